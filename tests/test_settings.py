"""Settings as text, JSON and help: one definition, checked on the way in."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effllm.errors import SettingError
from effllm.settings import build, describe, read_key, split_spec, to_json

QUICK = settings(deadline=None, max_examples=60)


@dataclass(frozen=True)
class Oven:
    heat: Literal["top", "bottom"] = field(default="top", metadata={"help": "where the heat comes from"})
    minutes: int = field(default=10, metadata={"help": "how long"})
    degrees: float = field(default=180.0, metadata={"help": "how hot"})
    fan: bool = field(default=False, metadata={"help": "whether air moves"})
    label: str = field(default="", metadata={"help": "a name"})


def refused(key: str, value: object) -> str:
    with pytest.raises(SettingError) as caught:
        build(Oven, {key: value}, "oven")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_spec_is_a_name_and_its_settings() -> None:
    assert split_spec("oven") == ("oven", {})
    assert split_spec("oven:") == ("oven", {})
    assert split_spec(" oven : minutes = 5 ,label=a=b,") == ("oven", {"minutes": "5", "label": "a=b"})


@pytest.mark.parametrize("spec", ["oven:minutes=1,minutes=2", "oven:minutes=1, minutes=1", "oven:minutes=1,minutes =2"])
def test_a_setting_given_twice_is_refused(spec: str) -> None:
    with pytest.raises(SettingError, match="'minutes' is given twice"):
        split_spec(spec)


def test_a_setting_without_a_value_is_refused() -> None:
    with pytest.raises(SettingError, match="expected key=value, got 'fan'"):
        split_spec("oven:minutes=1,fan")


def test_an_unknown_setting_suggests_the_nearest() -> None:
    message = refused("minuts", 5)
    assert message.startswith("unknown setting of oven 'minuts'; did you mean 'minutes'?")
    assert "degrees, fan, heat, label, minutes" in message


@pytest.mark.parametrize("value", ["x", "", "1.5", "nan", 1.5, float("inf"), float("nan"), True, None, [], {}])
def test_a_whole_number_is_not(value: object) -> None:
    assert refused("minutes", value) == f"oven: minutes must be a whole number, got {value!r}"


@pytest.mark.parametrize("value", ["x", "", "nan", "-inf", float("inf"), float("nan"), 10**400, True, None, [], {}])
def test_a_number_is_not(value: object) -> None:
    assert refused("degrees", value) == f"oven: degrees must be a number, got {value!r}"


@pytest.mark.parametrize("value", ["x", "", 2, None, []])
def test_a_truth_value_is_not(value: object) -> None:
    assert refused("fan", value) == f"oven: fan must be true or false, got {value!r}"


@pytest.mark.parametrize("value", ["side", "", None, 1, []])
def test_a_choice_is_not(value: object) -> None:
    assert refused("heat", value) == f"oven: heat must be one of top, bottom, got {value!r}"


@pytest.mark.parametrize("value", [None, True, 5, []])
def test_a_text_is_not(value: object) -> None:
    assert refused("label", value) == f"oven: label must be text, got {value!r}"


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("Yes", True), ("1", True), ("FALSE", False), ("no", False)]
)
def test_truth_values_have_several_spellings(text: str, value: bool) -> None:
    assert build(Oven, {"fan": text}, "oven").fan is value


def test_whole_floats_of_json_are_whole_numbers() -> None:
    minutes = build(Oven, {"minutes": 5.0}, "oven").minutes
    assert minutes == 5
    assert type(minutes) is int


ovens = st.builds(
    Oven,
    heat=st.sampled_from(["top", "bottom"]),
    minutes=st.integers(),
    degrees=st.floats(allow_nan=False, allow_infinity=False),
    fan=st.booleans(),
    label=st.text(),
)


@QUICK
@given(ovens)
def test_json_and_back_is_the_same(oven: Oven) -> None:
    assert build(Oven, json.loads(json.dumps(to_json(oven))), "oven") == oven
    assert list(to_json(oven)) == [f.name for f in dataclasses.fields(Oven)]


@QUICK
@given(ovens)
def test_the_text_form_and_back_is_the_same(oven: Oven) -> None:
    oven = dataclasses.replace(oven, label="plain")
    spec = "oven:" + ",".join(f"{key}={value}" for key, value in to_json(oven).items())
    name, values = split_spec(spec)
    assert name == "oven"
    assert build(Oven, values, name) == oven


def test_nothing_given_is_the_defaults() -> None:
    assert build(Oven, {}, "oven") == Oven()


def test_ranges_are_the_dataclass_own_business() -> None:
    @dataclass(frozen=True)
    class Positive:
        n: int = 1

        def __post_init__(self) -> None:
            if self.n < 1:
                raise SettingError("n must be positive")

    with pytest.raises(SettingError, match="n must be positive"):
        build(Positive, {"n": "0"}, "positive")


def test_describe_gives_key_type_default_and_help() -> None:
    assert describe(Oven) == [
        ("heat", "top|bottom", "top", "where the heat comes from"),
        ("minutes", "a whole number", "10", "how long"),
        ("degrees", "a number", "180.0", "how hot"),
        ("fan", "true|false", "False", "whether air moves"),
        ("label", "text", "", "a name"),
    ]


def test_a_field_of_another_type_is_a_bug() -> None:
    @dataclass(frozen=True)
    class Odd:
        n: tuple = ()

    with pytest.raises(TypeError, match="not supported"):
        build(Odd, {"n": "1"}, "odd")


def test_a_key_file_that_is_no_text_is_refused_without_a_byte_of_it(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"secret\xfe")
    with pytest.raises(SettingError) as refused:
        read_key("--key-file", str(file))
    assert str(refused.value) == f"--key-file {file} cannot be read: it is not UTF-8 text"
