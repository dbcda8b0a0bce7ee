"""How long the pieces take: tokenising, one batch in float32 and int8, choosing a grid.

    pytest benchmarks/test_speed.py                        with pytest-benchmark's table
    pytest benchmarks/test_speed.py --benchmark-disable    run them once, time nothing

They assert no time. The model is the packaged all-MiniLM-L6-v2; nothing here says how other models do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import effllm
from effllm.compression.grids import choose_grid
from effllm.data.english import english_sentences
from effllm.data.packaged import minilm
from effllm.folder import open_folder
from effllm.runtime.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The packaged model, exported and compressed."""
    root = tmp_path_factory.mktemp("speed")
    effllm.export(minilm(), root / "fp32")
    effllm.compress(minilm(), root / "int8", method=effllm.Int8(activations="static", calibration=64))
    return {"fp32": root / "fp32", "int8": root / "int8"}


def test_tokenise(benchmark) -> None:
    tokenizer = TextTokenizer.open(open_folder(minilm()))
    texts = english_sentences()[:100]
    assert len(benchmark(lambda: [tokenizer.encode(text) for text in texts])) == 100


@pytest.mark.parametrize("form", ["fp32", "int8"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 16), (16, 64)])
def test_run(benchmark, folders: dict[str, Path], form: str, batch: int, tokens: int) -> None:
    engine = effllm.open(folders[form], threads=1).engine
    ids = np.random.default_rng(0).integers(1000, 20000, (batch, tokens))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    output = benchmark(engine.run, feeds)
    assert output["last_hidden_state"].shape == (batch, tokens, 384)


def test_choose_grid(benchmark) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 384)).astype(np.float32)
    w = rng.normal(size=(384, 384)).astype(np.float32)
    low, high = x.min(axis=0), x.max(axis=0)
    assert benchmark(choose_grid, x, low, high, [w], (0.5,), (0.9,)).error < 1e-3
