"""Whether the methods of the weights stand in the order of their papers on a decoder too.

    python benchmarks/decoder.py DATA --work DIR [--seconds N] [--only NAME,…]

DATA is a folder with `train.txt.xz`, `dev.txt.xz` and `test.txt.xz`, documents between empty lines (English Wikipedia
here). A Llama-like decoder of 5 million parameters (4 layers of 256, grouped queries, 8,192 byte-level BPE tokens, tied
embeddings) is trained on the documents of `train` for N seconds, on the threads that torch is given, then compressed by
each recipe with the beginnings of 128 documents of `train`, 1,000 characters each, to calibrate on. Perplexity is that
of the task text-generation, in windows of 256 tokens, on 100 documents of `test`, which decided nothing; the change of
the mean loss has a paired interval over documents. Folders are kept in DIR, and those that are there already are not
made again. Rows go to `results/decoder.jsonl`.

One model, one seed, one corpus, one processor; what saw a few million tokens is far from the models of the papers,
whose weights are used to the full. No speed is measured. GPTQ makes up for what quantised layers before it moved,
which its paper does not; both algorithms choose each group's scale by its error, so that `rtn` is better here than
plain rounding.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from effllm import machine
from effllm.compression import parse_method
from effllm.compression.pipeline import compress
from effllm.data.documents import open_source
from effllm.data.prepare import prepare
from effllm.data.settings import PrepareSettings
from effllm.data.store import TokenStore
from effllm.data.vocabulary import Vocabulary
from effllm.folder import tokenizer_files
from effllm.measure.quality import quality_rows
from effllm.measure.statistics import interval_of_difference
from effllm.rows import Row, read_rows, write_rows
from effllm.runtime.predictor import Predictor
from effllm.tasks import TASKS, Example
from effllm.train.optimizers import build_optimizer
from effllm.train.schedules import learning_rate_factor

RESULTS = Path(__file__).parent / "results" / "decoder.jsonl"
TASK = TASKS["text-generation"]
LENGTH, BATCH = 256, 8
PEAK, WARMUP, CLIP = 3e-3, 0.05, 1.0
DENSE = "dense"
CALIBRATION, CHARACTERS, TESTED = 1000, 1000, 100
"""Documents to choose calibration texts from, what is taken of each, and documents that perplexity is measured on."""
RECIPES = {
    **{f"{name} 50 %": f"{name}:sparsity=0.5" for name in ("magnitude", "wanda", "sparsegpt")},
    "int4 gptq": "int4-torch:group_size=128,calibration=128",
    "int4 rtn": "int4-torch:algorithm=rtn,group_size=128,calibration=128",
    "nf4": "nf4",
    **{f"{name} 2:4": f"{name}:pattern=2:4" for name in ("magnitude", "wanda", "sparsegpt")},
    "ria 50 %": "ria:sparsity=0.5",
    "ria 2:4": "ria:pattern=2:4",
}


def documents(file: Path) -> Iterator[str]:
    """Yield the documents of a text file in order."""
    return itertools.chain.from_iterable(open_source(file).batches())


def sequences(store: TokenStore, first: int, last: int) -> np.ndarray:
    """Return the split as int64 (sequences, 256): its documents in a row, each between tokens `first` and `last`."""
    ends = np.diff(store.offsets)
    places = store.offsets[:-1] + 2 * np.arange(len(ends))
    stream = np.empty(len(store) + 2 * len(ends), dtype=np.int64)
    inside = np.ones(len(stream), dtype=bool)
    for token, marks in ((first, places), (last, places + ends + 1)):
        stream[marks], inside[marks] = token, False
    stream[inside] = store.tokens
    return stream[: len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH)


def new_model(vocabulary: Vocabulary) -> Any:
    """Return the decoder with weights drawn by seed 0."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=vocabulary.cls_id,
        eos_token_id=vocabulary.sep_id,
        pad_token_id=vocabulary.pad_id,
    )
    return transformers.LlamaForCausalLM(config)


def train(model: Any, rows: np.ndarray, seconds: float) -> tuple[int, float]:
    """Train in place until the seconds are over; return the steps and the mean loss of the last twentieth, in nats.

    A step takes 8 sequences in an order drawn by seed 0; products are in bfloat16, Muon moves the matrices of the
    layers and AdamW the rest, and the learning rate rises over a twentieth of the time and then falls linearly to
    zero. A token can see the documents before its own in its sequence.
    """
    optimizer = build_optimizer("muon", model, PEAK, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    order = np.random.default_rng(0).permutation(len(rows))
    losses: list[tuple[float, float]] = []
    began = time.monotonic()
    for step in range(len(order) // BATCH):
        progress = (time.monotonic() - began) / seconds
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = PEAK * learning_rate_factor("linear", progress, WARMUP, 0.0)
        ids = torch.from_numpy(rows[order[step * BATCH : (step + 1) * BATCH]])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((progress, float(loss.detach())))
        if step % 100 == 0:
            print(f"step {step}, {progress:.0%} of the time: loss {losses[-1][1]:.3f}", flush=True)
    return len(losses), float(np.mean([loss for progress, loss in losses if progress >= 0.95]))


def make_dense(data: Path, work: Path, seconds: float) -> list[Row]:
    """Make the trained decoder in `work` and return what its training took, as rows."""
    tokens = work / "tokens"
    if not tokens.exists():
        settings = PrepareSettings(tokenizer="bpe", vocab_size=8192, max_length=LENGTH, near_duplicates=1.0)
        prepare([data / "train.txt.xz"], tokens, settings)
    store = TokenStore.open(tokens)
    vocabulary = Vocabulary.read(store.tokenizer)
    model = new_model(vocabulary)
    began = time.process_time()
    steps, loss = train(model, sequences(store, vocabulary.cls_id, vocabulary.sep_id), seconds)
    staging = work / ".dense"
    spent = time.process_time() - began
    model.eval().save_pretrained(staging)
    for name, file in tokenizer_files(store.tokenizer).items():
        shutil.copyfile(file, staging / name)
    staging.rename(work / DENSE)
    return [
        Row("parameters", float(sum(p.numel() for p in model.parameters())), "count", DENSE),
        Row("training tokens", float(steps * BATCH * LENGTH), "count", DENSE, steps),
        Row("training processor time", spent, "s", DENSE, how={"seconds": seconds}),
        Row("training loss", loss, "nats", DENSE),
    ]


def make(name: str, data: Path, work: Path) -> Path:
    """Return the folder of a recipe, made if it is not there."""
    out = work / name.replace(" ", "-").replace(":", "-")
    if not out.exists():
        calibration = [text[:CHARACTERS] for text in itertools.islice(documents(data / "train.txt.xz"), CALIBRATION)]
        dev = [{"text": text} for text in itertools.islice(documents(data / "dev.txt.xz"), 16)]
        compress(
            work / DENSE, out, method=parse_method(RECIPES[name]), calib=calibration, dev=dev, max_drop=1e3, threads=1
        )
    return out


def statistics_of(folder: Path, examples: list[Example]) -> np.ndarray:
    """Return each document's negative log-likelihood and predicted tokens, (documents, 2)."""
    answers = Predictor.open(folder, threads=1).answers(examples, chunk=8)
    return np.array([TASK.statistics(e, answer.value) for e, answer in zip(examples, answers, strict=True)])


def rows_of(name: str, folder: Path, statistics: np.ndarray, dense: np.ndarray) -> list[Row]:
    """Return perplexity, loss, the paired change of the loss and the size of a folder."""

    def loss(chosen: np.ndarray) -> float:
        return TASK.metrics(chosen)["loss"]

    rows = quality_rows(TASK, statistics, name, "test")
    if name != DENSE:
        low, high = interval_of_difference(loss, statistics, dense)
        how = {"role": "change", "data": "test", "over": DENSE, "method": RECIPES[name]}
        change = loss(statistics) - loss(dense)
        rows.append(Row("loss change", change, "nats", name, len(dense), low, high, how, machine.describe()))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return [*rows, Row("model size", float(size), "bytes", name)]


def main() -> None:
    """Train what is missing, compress, measure, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=700.0, metavar="N", help="how long to train")
    parser.add_argument("--only", default=",".join(RECIPES), metavar="NAME,…")
    arguments = parser.parse_args()
    data, work = arguments.data, arguments.work
    work.mkdir(parents=True, exist_ok=True)
    rows = list(read_rows(RESULTS)) if RESULTS.is_file() else []
    if not (work / DENSE).exists():
        rows = make_dense(data, work, arguments.seconds)  # rows of another model's variants would not compare
    tested = itertools.islice(documents(data / "test.txt.xz"), TESTED)
    examples = [Example(text, gold=True) for text in tested]
    dense = statistics_of(work / DENSE, examples)
    measured = {DENSE: (work / DENSE, dense)}
    for name in [None, *arguments.only.split(",")]:
        if name is not None:
            folder = make(name, data, work)
            measured[name] = folder, statistics_of(folder, examples)
        system = name or DENSE
        new = rows_of(system, *measured[system], dense)
        kept = {row.metric for row in new}
        rows = [row for row in rows if not (row.system == system and row.metric in kept)] + new
        write_rows(RESULTS, rows)
        print(f"{system:16} {' '.join(f'{row.metric} {row.value:.4f}' for row in new)}", flush=True)


if __name__ == "__main__":
    main()
