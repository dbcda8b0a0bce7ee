"""Perplexity: that of transformers' loss, and that of each token predicted by itself."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from decoders import LENGTH, TEXTS, make_decoder

from effllm.compression.gate import judge
from effllm.measure.quality import compare, evaluate
from effllm.runtime.predictor import Predictor
from effllm.runtime.tokenizer import TextTokenizer
from effllm.tasks import TASKS, Example

TASK = TASKS["text-generation"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("decoders") / "llama")


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Predictor:
    return Predictor.open(folder, threads=1)


@pytest.fixture(scope="module")
def model(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def token_ids(folder: Path, text: str) -> list[int]:
    return transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def test_the_perplexity_of_a_text_is_that_of_transformers_loss(folder: Path, predictor: Predictor, model) -> None:
    for text in TEXTS[:5]:
        ids = torch.tensor([token_ids(folder, text)])
        assert 1 < ids.shape[1] <= LENGTH
        with torch.no_grad():
            loss = float(model(input_ids=ids, labels=ids).loss)
        answer = predictor.predict(text)
        assert answer["tokens"] == ids.shape[1] - 1
        assert math.log(answer["perplexity"]) == pytest.approx(loss, abs=1e-5)


def test_each_token_is_predicted_once_after_those_before_it_in_its_window(
    folder: Path, predictor: Predictor, model
) -> None:
    texts = [TEXTS[2], TEXTS[37], " ".join(TEXTS[30:33]), "a"]
    total, count = 0.0, 0
    for text in texts:
        ids = token_ids(folder, text)
        for place in range(1, len(ids)):
            start = (place - 1) // (LENGTH - 1) * (LENGTH - 1)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids[start:place]])).logits[0, -1].double()
            total -= float(logits.log_softmax(0)[ids[place]])
            count += 1
    assert count > 3 * LENGTH
    rows, truncated = evaluate(predictor, [Example(text, gold=True) for text in texts], "texts")
    assert truncated == 0
    found = {row.metric: row.value for row in rows}
    assert found["loss"] == pytest.approx(total / count, abs=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-6)


def test_company_and_padding_change_no_likelihood(predictor: Predictor) -> None:
    examples = [Example(text) for text in TEXTS[:60]]
    alone = predictor.answers(examples, chunk=1, batch_size=1)
    for one, other in zip(alone, predictor.answers(examples), strict=True):
        assert one.value["log_likelihood"] == pytest.approx(other.value["log_likelihood"], rel=1e-6)


def test_outputs_of_the_size_of_the_vocabulary_are_not_kept(predictor: Predictor) -> None:
    for answer in predictor.answers([Example(TEXTS[38])]):
        assert {array.ndim for outputs in answer.outputs for array in outputs.values()} == {1}


@pytest.mark.parametrize("length", [2, 3, 7, 32])
def test_windows_share_one_token_and_hold_all(predictor: Predictor, length: int) -> None:
    for text in ["", "a", *TEXTS[:8], TEXTS[39]]:
        whole = [token for token, *_ in predictor.tokenizer.pieces(text)]
        windows = predictor.tokenizer.encode_all(text, length)
        joined = [*windows[0].ids[:1], *(token for window in windows for token in window.ids[1:])]
        assert joined == whole
        assert all(1 < len(window) <= length for window in windows)
        assert all(len(window) == length for window in windows[:-1])
        assert all(a.ids[-1] == b.ids[0] for a, b in itertools.pairwise(windows))
        assert all(len(w.offsets) == len(w.special) == len(w.type_ids) == len(w) for w in windows)


def test_texts_without_a_predicted_token_count_for_nothing(folder: Path, predictor: Predictor) -> None:
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.ByteLevel()
    bare = TextTokenizer(backend, LENGTH, None, 1)
    assert bare.encode_all("", LENGTH) == []
    assert [len(window) for window in bare.encode_all("a", LENGTH)] == [1]
    other = Predictor("bare", predictor.folder, TASK, bare, predictor.engine)
    answers = [answer.value for answer in other.answers([Example(""), Example("a")])]
    assert [(a["tokens"], a["perplexity"]) for a in answers] == [(0, 1.0), (0, 1.0)]
    examples = [Example(text, gold=True) for text in ("", "a", TEXTS[0])]
    both = compare(other, other, examples, "texts")
    assert both.dense[:2].tolist() == [[0, 0], [0, 0]]
    assert both.drop == 0


def test_a_hopeless_model_has_a_perplexity_that_is_a_number() -> None:
    assert math.isfinite(TASK.score(np.array([[1e6, 2.0]])))


def test_more_perplexity_is_a_loss_of_quality(tmp_path: Path, predictor: Predictor) -> None:
    better = Predictor.open(make_decoder(tmp_path / "trained", trained=True), threads=1, name="better")
    examples = [Example(text, gold=True) for text in TEXTS[:20]]
    worse = compare(better, predictor, examples, "texts")
    low, high = TASK.score(worse.dense), TASK.score(worse.other)
    assert low < high
    assert worse.drop == pytest.approx(high / low - 1)
    verdict = judge(worse, 0.01)
    assert not verdict.passed
    assert "perplexity rise" in verdict.reason
    assert judge(compare(predictor, better, examples, "texts"), 0.0).passed
