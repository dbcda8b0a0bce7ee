"""Which texts each method of a row calibrates on, what is said of them, and which the gate keeps for itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import LABELS, make_model
from jobs import TEXTS

from effllm.compression import parse_method
from effllm.compression.method import Calibrated
from effllm.compression.pipeline import compress
from effllm.compression.texts import Given, Texts, choose_texts
from effllm.data.split import digest, fingerprint
from effllm.errors import SettingError, Unsupported
from effllm.exporters.source import Source, load_source
from effllm.folder import open_folder
from effllm.tasks import Example, task_of

NUMBERED = [f"text number {i}" for i in range(600)]
LABELLED = [{"text": t, "label": LABELS["text-classification"][i % 3]} for i, t in enumerate(TEXTS[40:])]


@pytest.fixture(scope="module")
def source(classifier: Path) -> Source:
    folder = open_folder(classifier)
    return load_source(folder, task_of(folder))


def texts_of(source: Source, *specs: str, **given: Any) -> tuple[Texts, list[list[str]]]:
    """Return the texts of a row of methods, and what each method gets of them."""
    methods = [parse_method(spec) for spec in specs]
    texts = choose_texts(source, methods, Given(**given))
    return texts, [[str(e.text) for e in texts.drawn(method).examples] for method in methods]


def test_the_seed_of_each_method_chooses_its_texts(source: Source) -> None:
    given = {"calib": NUMBERED, "dev": LABELLED}
    _, (first, last) = texts_of(source, "wanda:seed=7", "int8:calibration=128", **given)
    assert first != last
    assert texts_of(source, "wanda:seed=7", **given)[1] == [first]
    assert texts_of(source, "wanda", "int8:seed=7,calibration=128", **given)[1] == [last, first]


def test_a_method_that_wants_few_gets_them_from_the_whole_file(source: Source) -> None:
    _, (few, many) = texts_of(source, "wanda:calibration=100", "int8:calibration=500", calib=NUMBERED, dev=LABELLED)
    assert (len(few), len(many)) == (100, 500)
    # Of 100 texts drawn from 600 evenly, 50 of the second half are expected; one in ten thousand draws has 33 or less.
    assert 33 < sum(int(text.split()[-1]) >= 300 for text in few) < 67


def test_the_gate_depends_on_no_seed_and_shares_no_text_with_any_method(source: Source) -> None:
    gates = set()
    for seed in (0, 1):
        texts, drawn = texts_of(source, f"wanda:seed={seed + 5}", f"int8:seed={seed}", calib=NUMBERED)
        gate = {fingerprint(e) for e in texts.gate.examples}
        assert len(gate) == 300
        assert not gate & {fingerprint(Example(text)) for texts in drawn for text in texts}
        assert [len(texts) for texts in drawn] == [128, 300]
        gates.add(digest(texts.gate.examples))
    assert len(gates) == 1


def test_where_nothing_calibrates_the_gate_has_every_text_and_no_note_says_otherwise(source: Source) -> None:
    for spec in ("magnitude", "layers"):
        texts, drawn = texts_of(source, spec, calib=TEXTS)
        assert drawn == [[]]
        assert len(texts.gate.examples) == len(TEXTS)
        assert texts.gate.data == "texts given by the caller"
        assert not [note for note in texts_of(source, spec)[0].notes if "calibrat" in note]
        assert texts_of(source, spec, calib=NUMBERED, dev=LABELLED)[1] == [[]]
        texts_of(source, spec, calib=TEXTS[40:], dev=LABELLED)
    for spec in ("wanda", "layers:by=cosine"):
        assert texts_of(source, spec)[0].notes[0].startswith("calibrated on english sentences")


def test_few_texts_are_counted_as_the_method_gets_them(source: Source) -> None:
    texts, _ = texts_of(source, "wanda:calibration=8", "int8", calib=NUMBERED, dev=LABELLED)
    assert texts.notes == ["only 8 calibration texts; 32 or more are better"]


def test_the_manifest_records_what_each_method_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sequence[Example]] = []
    read = Calibrated.encodings

    def noted(job: Calibrated) -> list[Any]:
        seen.append(job.calibration)
        return read(job)

    monkeypatch.setattr(Calibrated, "encodings", noted)
    methods = [parse_method(spec) for spec in ("lowrank", "magnitude:sparsity=0.2", "wanda:calibration=20,seed=3")]
    variant = compress(
        make_model(tmp_path / "model"), tmp_path / "out", method=methods, calib=TEXTS, max_drop=1.0, threads=1
    )
    entries = variant.manifest["calibration_of_steps"]
    assert [entry and entry["examples"] for entry in entries] == [40, None, 20]
    assert [entry["sha256"] for entry in entries if entry] == [digest(texts) for texts in seen]
    assert variant.manifest["calibration"] == entries[2]


def test_without_calibration_the_manifest_has_no_entry(tmp_path: Path) -> None:
    variant = compress(
        make_model(tmp_path / "model"), tmp_path / "out", method=parse_method("magnitude"), max_drop=1.0, threads=1
    )
    assert not [key for key in variant.manifest if key.startswith("calibration")]
    assert not [note for note in variant.manifest["notes"] if "calibrated" in note]


def test_columns_hold_for_records_too(source: Source) -> None:
    records = [{"sentence": r["text"], "y": r["label"]} for r in LABELLED]
    texts, _ = texts_of(source, "wanda", calib=NUMBERED, dev=records, columns={"text": "sentence", "label": "y"})
    expected, _ = texts_of(source, "wanda", calib=NUMBERED, dev=LABELLED)
    assert texts.gate.examples == expected.gate.examples
    with pytest.raises(SettingError, match="an example of dev has no column 'body'"):
        texts_of(source, "wanda", dev=records, columns={"text": "body"})


@pytest.mark.parametrize("name", ["distil", "qat"])
def test_steps_alone_train_and_neither_is_refused(source: Source, name: str, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    texts, _ = texts_of(source, f"{name}:epochs=0,steps=5", train=file)
    assert len(texts.train.examples) == len(TEXTS)
    with pytest.raises(SettingError, match=f"--method {name} trains; give --train"):
        texts_of(source, f"{name}:epochs=0,steps=5")
    with pytest.raises(SettingError, match=f"{name}: epochs or steps must be above 0"):
        parse_method(f"{name}:epochs=0")


def test_training_texts_calibrate_where_nothing_trains_on_them(source: Source, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for spec in ("wanda:sparsity=0.5,calibration=20", "ffn:keep=0.5,calibration=20"):
        texts, (drawn,) = texts_of(source, spec, train=file)
        assert texts.calibration.data == "train.jsonl"
        assert set(drawn) < set(TEXTS)
        assert not texts.train.examples
        assert not any("English" in note or "english" in note for note in texts.notes)


def test_labels_are_learned_only_of_tasks_that_have_a_loss(tmp_path: Path) -> None:
    model, train = make_model(tmp_path / "model", "bert", "fill-mask"), tmp_path / "train.txt"
    train.write_text("\n".join(TEXTS))
    method = parse_method("distil:label_weight=1")
    with pytest.raises(Unsupported, match=r"label_weight is for text-classification, .*, not for fill-mask"):
        compress(model, tmp_path / "out", method=method, train=train, threads=1)


def test_a_gate_of_a_few_texts_says_so(source: Source) -> None:
    few, _ = texts_of(source, "int8:calibration=20", calib=NUMBERED[:20])
    assert "the gate judges by 10 texts alone; 32 or more are better (--dev)" in few.notes
    many, _ = texts_of(source, "int8:calibration=20", calib=NUMBERED)
    assert not [note for note in many.notes if note.startswith("the gate judges by")]
