"""The examples run."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from conftest import make_model

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


def test_quickstart_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import quickstart

    model = make_model(tmp_path / "model", "bert", "feature-extraction")
    quickstart.main(model, tmp_path / "small")
    assert "similarity, dense and int8:" in capsys.readouterr().out


def test_the_kernels_example_prints_what_it_promises(capsys: pytest.CaptureFixture[str]) -> None:
    import kernels_in_your_model

    kernels_in_your_model.main()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    for line in printed:
        assert f"    {line}\n" in kernels_in_your_model.__doc__


@pytest.mark.slow
def test_the_english_language_model_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    import language_model

    monkeypatch.setattr(sys, "argv", ["language_model", "--minutes", "0.3", "--out", str(tmp_path / "out")])
    language_model.main()
    assert "This is the [MASK] of the class." in capsys.readouterr().out


@pytest.mark.slow
def test_the_chinese_language_model_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    import language_model

    characters = "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后"
    texts = [
        "，".join(characters[(7 * i + 3 * k) % 40 : (7 * i + 3 * k) % 40 + 9] for k in range(12)) for i in range(400)
    ]
    file = tmp_path / "zh.txt"
    file.write_text("\n\n".join(f"{text}。{i}" for i, text in enumerate(texts)), encoding="utf-8")
    settings, sentences = language_model.LANGUAGES["zh"]
    small = dataclasses.replace(settings, vocab_size=320)
    monkeypatch.setitem(language_model.LANGUAGES, "zh", (small, sentences))
    arguments = [str(file), "--language", "zh", "--minutes", "0.2", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["language_model", *arguments])
    language_model.main()
    assert sentences[0] in capsys.readouterr().out


@pytest.mark.slow
def test_the_fine_tuned_classifier_learns_the_toy_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    import finetune

    monkeypatch.setattr(sys, "argv", ["finetune", "--out", str(tmp_path / "out")])
    finetune.main()
    assert "'please dim the lamp': light" in capsys.readouterr().out
