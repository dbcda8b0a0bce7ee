"""How close a masked-LM comes to the best possible loss, on a language whose masked posterior can be computed.

    python benchmarks/known_optimum.py [--steps 2500]

The language is a Markov chain over 128 words with four successors each. Forward–backward (Rabiner 1989, equations
19–27) gives the exact probability of every masked word, so the least reachable loss is known. A two-layer model is
trained by `effllm.pretrain`; its loss on held-out text, 15 % masked, is compared with the least one on the same masks.
A loss below it by more than three standard errors would mean that the masked words leak. Writes
`results/known_optimum.jsonl`. Says nothing about natural language.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from effllm import machine
from effllm.data.masking import Masking, mask_keys, mask_packed
from effllm.data.samples import Samples, pair_keys
from effllm.data.store import KIND, TOKENIZER, StoreWriter, TokenStore
from effllm.data.vocabulary import Vocabulary
from effllm.rows import Row, write_rows
from effllm.train.pretrain import pretrain
from effllm.train.settings import PretrainSettings
from effllm.variant import write_manifest

RESULTS = Path(__file__).parent / "results" / "known_optimum.jsonl"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS, SUCCESSORS, LENGTH = 128, (0.5, 0.25, 0.15, 0.1), 30
HELD_OUT = 2000


def language(seed: int = 0) -> np.ndarray:
    """Return the transition matrix, float64 (WORDS, WORDS), doubly stochastic, so that every word is equally common."""
    rng = np.random.default_rng(seed)
    matrix = np.zeros((WORDS, WORDS))
    for probability in SUCCESSORS:
        matrix[np.arange(WORDS), rng.permutation(WORDS)] += probability
    return matrix


def texts(matrix: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return int64 (count, LENGTH) sequences of the chain, each from a word drawn uniformly."""
    rng = np.random.default_rng(seed)
    cumulative = matrix.cumsum(axis=1)
    words = np.zeros((count, LENGTH), dtype=np.int64)
    words[:, 0] = rng.integers(0, WORDS, count)
    for place in range(1, LENGTH):
        words[:, place] = (rng.random((count, 1)) > cumulative[words[:, place - 1]]).sum(axis=1).clip(max=WORDS - 1)
    return words


def least_losses(matrix: np.ndarray, words: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """Return -log P(word | all words that are not masked) in nats at the masked places, in reading order.

    `words` int64 (n, LENGTH), `masked` bool (n, LENGTH).
    """
    seen = np.where(masked[..., None], 1.0, np.eye(WORDS)[words])
    forward, backward = np.empty(seen.shape), np.ones(seen.shape)
    forward[:, 0] = seen[:, 0] / WORDS
    for place in range(1, LENGTH):
        forward[:, place] = (forward[:, place - 1] @ matrix) * seen[:, place]
        forward[:, place] /= forward[:, place].sum(axis=1, keepdims=True)
    for place in range(LENGTH - 2, -1, -1):
        backward[:, place] = (backward[:, place + 1] * seen[:, place + 1]) @ matrix.T
        backward[:, place] /= backward[:, place].sum(axis=1, keepdims=True)
    posterior = forward * backward
    posterior /= posterior.sum(axis=2, keepdims=True)
    return -np.log(np.take_along_axis(posterior, words[..., None], axis=2)[..., 0][masked])


def write_corpus(folder: Path, splits: dict[str, np.ndarray]) -> None:
    """Write the language as a token store; word w has the id w + 5."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *(f"w{i}" for i in range(WORDS))))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder / TOKENIZER)
    for split, words in splits.items():
        with StoreWriter(folder, split, np.dtype(np.uint16)) as writer:
            for row in words:
                writer.append(row + len(SPECIAL), np.ones(LENGTH))
    store = {"dtype": "uint16", "vocabulary_size": len(vocabulary), "tokenizer": "words"}
    write_manifest(folder, {"kind": KIND, "task": "fill-mask", "store": store})


def compare(model: torch.nn.Module, folder: Path, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the model's loss and the least loss at each masked word of the held-out text, float64."""
    vocabulary = Vocabulary.read(folder / TOKENIZER)
    samples = Samples(TokenStore.open(folder, "dev"), vocabulary, LENGTH + 2)
    indices = np.arange(len(samples))
    packed = samples.packed(indices, pair_keys(0, 0, indices))
    masking = Masking("token", 0.15, mask_share=1.0, random_share=0.0)
    ids, positions, labels = mask_packed(
        packed.ids, packed.starts, packed.maskable, packed.lengths, vocabulary, masking, mask_keys(0, 0, indices)
    )
    masked = np.zeros(len(ids), dtype=bool)
    masked[positions] = True
    inner = (len(samples), LENGTH + 2)
    words = packed.ids.reshape(inner)[:, 1:-1] - len(SPECIAL)
    least = least_losses(matrix, words, masked.reshape(inner)[:, 1:-1])
    with torch.inference_mode():
        states = model(input_ids=torch.from_numpy(ids.reshape(inner))).logits.reshape(len(ids), -1)[positions]
        own = torch.nn.functional.cross_entropy(states, torch.from_numpy(labels), reduction="none")
    return own.double().numpy(), least


def main() -> None:
    """Train, compare and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500)
    steps = parser.parse_args().steps
    matrix = language()
    settings = PretrainSettings(
        model="modern-tiny",
        steps=steps,
        batch_size=64,
        max_length=LENGTH + 2,
        learning_rate=3e-3,
        mask_rate=0.25,
        mask_share=1.0,
        random_share=0.0,
        weight_decay=0.0,
        log_every=100,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder, run = Path(scratch) / "tokens", Path(scratch) / "run"
        folder.mkdir()
        write_corpus(folder, {"train": texts(matrix, 40_000, 1), "dev": texts(matrix, HELD_OUT, 2)})
        for record in pretrain(folder, run, settings):
            if record.step % 100 == 0:
                print(f"step {record.step}  loss {record.loss:.4f}", flush=True)
        trained = transformers.AutoModelForMaskedLM.from_pretrained(run / "last").eval()
        own, least = compare(trained, folder, matrix)
    gap = own - least
    error = float(gap.std(ddof=1) / np.sqrt(len(gap)))
    how = {"steps": steps, "mask rate": 0.15, "model": "modern-tiny, 2 layers of 128"}
    where = machine.describe()
    rows = [
        Row("masked loss", float(own.mean()), "nats", "effllm pretrain", len(own), how=how, machine=where),
        Row("masked loss", float(least.mean()), "nats", "least possible", len(own), how=how, machine=where),
        Row("masked loss", float(np.log(WORDS)), "nats", "word frequencies", len(own), how=how, machine=where),
        Row(
            *("gap to the least possible", float(gap.mean()), "nats", "effllm pretrain", len(own)),
            *(float(gap.mean() - 1.96 * error), float(gap.mean() + 1.96 * error), how, where),
        ),
    ]
    write_rows(RESULTS, rows)
    for row in rows:
        print(f"{row.metric:28} {row.system:18} {row.value:.4f}")
    if gap.mean() < -3 * error:
        raise SystemExit("the loss is below the least possible one: the masked words leak")


if __name__ == "__main__":
    main()
