"""Units that are sliced away leave what masking them leaves, in every architecture, from memory, disk and ONNX."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, make_model
from jobs import TASK_OF, TEXTS, make_job

from effllm.compression import parse_method
from effllm.compression.calibrate import feeds
from effllm.compression.importance import masking
from effllm.compression.pipeline import compress, export
from effllm.compression.slicing import Block, blocks, keep_units
from effllm.errors import Unsupported
from effllm.hf import LowRankLinear

HEADS = ([0, 2], [3])
NEURONS = ([*range(0, 64, 2)], [*range(5), *range(20, 41), 63])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {a: make_model(root / a, a, TASK_OF[a]) for a in ARCHITECTURES}


def chosen_units(model) -> dict[Block, torch.Tensor]:
    """Different heads and neurons in each layer, and different numbers of them."""
    found = [*zip(blocks(model, "heads"), HEADS, strict=True), *zip(blocks(model, "neurons"), NEURONS, strict=True)]
    return {block: torch.tensor(units) for block, units in found}


def answers(job) -> list[torch.Tensor]:
    with torch.no_grad():
        outputs = [job.model(**feed) for feed in feeds(job.model, job.encodings()[:6])]
    return [output[name] for output in outputs for name in job.source.task.outputs]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sliced_output_is_masked_output(folders, tmp_path: Path, architecture: str) -> None:
    job = make_job(folders[architecture], tmp_path)
    kept = chosen_units(job.model)
    dense = answers(job)
    masks = {block: torch.zeros(block.count).index_fill(0, units, 1.0) for block, units in kept.items()}
    with masking(job.model, masks):
        masked = answers(job)
    keep_units(job.model, kept)
    sliced = answers(job)
    for a, b, c in zip(masked, sliced, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert (b - c).abs().max() > 1e-2, "masking changed nothing, so that the comparison shows nothing"
    assert [b.count for b in blocks(job.model, "heads")] == [2, 1]
    assert [b.count for b in blocks(job.model, "neurons")] == [32, 27]


def test_a_block_that_keeps_everything_is_not_touched(folders, tmp_path: Path) -> None:
    model = make_job(folders["modernbert"], tmp_path).model
    before = dict(model.base_model.named_modules())
    keep_units(model, {b: torch.arange(b.count) for b in blocks(model, "heads")})
    assert all(before[name] is module for name, module in model.base_model.named_modules())


def test_weights_of_a_unit_are_what_goes_with_it(folders, tmp_path: Path) -> None:
    for architecture in ("bert", "modernbert"):
        model = make_job(folders[architecture], tmp_path).model
        (first, _), (ffn, _) = blocks(model, "heads"), blocks(model, "neurons")
        before = model.num_parameters()
        biases = (3 * 8, 1) if architecture == "bert" else (0, 0)
        keep_units(model, {first: torch.tensor([0, 1, 2])})
        assert before - model.num_parameters() == first.weights + biases[0] == 4 * 8 * 32 + biases[0]
        before = model.num_parameters()
        keep_units(model, {ffn: torch.arange(1, 64)})
        assert before - model.num_parameters() == ffn.weights + biases[1]


def test_sparse_and_factored_layers_are_refused(folders, tmp_path: Path) -> None:
    model = make_job(folders["bert"], tmp_path).model
    model.base_model.encoder.layer[1].output.dense = LowRankLinear(64, 32, 4, bias=True)
    with pytest.raises(Unsupported, match=r"encoder\.layer\.1\.output\.dense is sparse or factored already"):
        blocks(model, "neurons")
    assert len(blocks(model, "heads")) == 2


RELOAD = """
import json, sys, warnings
import numpy, torch, transformers
transformers.utils.logging.disable_progress_bar()
if "plain" not in sys.argv[1:]:
    import effllm.hf
for folder in json.loads(sys.stdin.read()):
    config = json.load(open(folder + "/config.json"))
    cls = getattr(transformers, config["architectures"][0])
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    torch.manual_seed(0)
    ids = torch.randint(5, 60, (2, 9))
    with torch.no_grad():
        output = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    numpy.save(folder + "/again.npy", output[0].numpy())
"""


def answer_of(folder: Path) -> np.ndarray:
    config = json.loads((folder / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
    torch.manual_seed(0)
    ids = torch.randint(5, 60, (2, 9))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids))[0].numpy()


def reload_in_a_fresh_process(folders: list[Path], *flags: str) -> None:
    code = [sys.executable, "-c", RELOAD, *flags]
    subprocess.run(code, input=json.dumps([str(f) for f in folders]), text=True, check=True, capture_output=True)
    for folder in folders:
        # The processes need not have as many threads, and sums of float32 are split by them.
        np.testing.assert_allclose(np.load(folder / "again.npy"), answer_of(folder), rtol=1e-5, atol=1e-6)


def test_pruned_folders_reload_and_export(folders, tmp_path: Path) -> None:
    written = []
    for architecture in ("electra", "modernbert"):
        methods = [parse_method("heads:keep=0.5"), parse_method("ffn:keep=0.4,uniform=false")]
        out = tmp_path / architecture
        compress(folders[architecture], out, method=methods, calib=TEXTS[:30], max_drop=1.0, threads=1)
        config = json.loads((out / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "effllm"
        written.append(out)
    reload_in_a_fresh_process(written)
    for out in written:
        export(out, tmp_path / "onnx" / out.name)  # compares the graph with the pruned model on six shapes


def test_equal_sizes_are_a_plain_config(folders, tmp_path: Path) -> None:
    written = []
    for architecture in ("distilbert", "modernbert"):
        methods = [parse_method("layers:drop=1"), parse_method("ffn:keep=0.5")]
        out = tmp_path / architecture
        compress(folders[architecture], out, method=methods, calib=TEXTS[:30], max_drop=1.0, threads=1)
        config = json.loads((out / "config.json").read_text())
        assert "quantization_config" not in config
        names = (
            ("hidden_dim", "n_layers") if architecture == "distilbert" else ("intermediate_size", "num_hidden_layers")
        )
        assert [config[name] for name in names] == [32, 1]
        written.append(out)
    reload_in_a_fresh_process(written, "plain")
