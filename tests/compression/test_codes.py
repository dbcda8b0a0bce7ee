"""int4-torch, nf4, llm-int8: folders that transformers loads with another library, heads untouched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import WORDS, make_model
from safetensors.torch import load_file

from effllm.compression import parse_method
from effllm.compression.codes import inner_linears, outer_linears
from effllm.compression.fp8 import round_to_e4m3
from effllm.compression.int4_torch import pack_int32
from effllm.compression.nf4 import fits
from effllm.compression.pipeline import compress
from effllm.errors import MissingExtra, SettingError, Unsupported

TEXTS = [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(4 + i % 17)) for i in range(60)]
CODES = {
    "int4-torch:group_size=32,calibration=20": ("compressed_tensors", torch.int32),
    "nf4": ("bitsandbytes", torch.uint8),
    "llm-int8": ("bitsandbytes", torch.int8),
}


def squeeze(folder: Path, architecture: str, task: str, *specs: str):
    model = make_model(folder / "model", architecture, task)
    methods = [parse_method(spec) for spec in specs]
    return model, compress(model, folder / "out", method=methods, calib=TEXTS, max_drop=1.0, threads=1)


@pytest.mark.parametrize("spec", CODES)
@pytest.mark.parametrize(
    ("architecture", "task"),
    [("bert", "text-classification"), ("modernbert", "fill-mask"), ("electra", "question-answering")],
)
def test_layers_are_coded_and_nothing_else(tmp_path: Path, spec: str, architecture: str, task: str) -> None:
    package, dtype = CODES[spec]
    pytest.importorskip(package)
    if architecture == "modernbert" and package == "compressed_tensors":
        with pytest.raises(Unsupported, match="transformers cannot load a modernbert model"):
            squeeze(tmp_path, architecture, task, spec)
        return
    model, variant = squeeze(tmp_path, architecture, task, spec)
    auto_class = getattr(
        transformers,
        {
            "text-classification": "AutoModelForSequenceClassification",
            "fill-mask": "AutoModelForMaskedLM",
            "question-answering": "AutoModelForQuestionAnswering",
        }[task],
    )
    dense = auto_class.from_pretrained(model)
    stored, before = load_file(variant.path / "model.safetensors"), load_file(model / "model.safetensors")
    inner = inner_linears(dense)
    coded = {name for name, linear in inner.items() if spec != "nf4" or fits(linear)}
    assert coded
    for name in coded:
        assert stored.get(f"{name}.weight_packed", stored.get(f"{name}.weight")).dtype == dtype
    for name, tensor in before.items():
        if name.removesuffix(".weight") not in coded:
            assert torch.equal(stored[name], tensor), f"{name} should have stayed as it was"
    loaded, info = auto_class.from_pretrained(variant.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    config = json.loads((variant.path / "config.json").read_text())["quantization_config"]
    assert (config.get("ignore") or config.get("llm_int8_skip_modules") or []) == [
        *outer_linears(dense),
        *(name for name in inner if name not in coded),
    ]
    assert loaded is not None


def test_eight_codes_lie_in_a_word_the_first_lowest() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15], [0] * 8], dtype=torch.uint8)
    assert [w & 0xFFFFFFFF for w in pack_int32(codes).flatten().tolist()] == [0xF7654321, 0]


def test_packed_words_are_those_of_the_library() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(0, 16, (5, 64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack_int32(codes), pack_to_int32((codes - 8).to(torch.int8), 4))


@pytest.mark.parametrize("spec", CODES)
def test_pruned_models_are_sent_to_onnx(tmp_path: Path, spec: str) -> None:
    pytest.importorskip(CODES[spec][0])
    with pytest.raises(Unsupported, match=r"int4 or int8 \(ONNX\)"):
        squeeze(tmp_path, "bert", "text-classification", "magnitude", spec)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spec", CODES)
def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, spec: str, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    extra = "int4" if "int4" in spec else "bitsandbytes"
    with pytest.raises(MissingExtra, match=rf"effllm\[{extra}\]"):
        squeeze(tmp_path, "bert", "text-classification", spec)


def test_a_model_whose_layers_fit_no_block_is_refused_before_work(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("effllm.compression.nf4.COLUMNS", 48)
    with pytest.raises(Unsupported, match="inputs divide by 48, outputs by 32; there is none"):
        squeeze(tmp_path, "bert", "text-classification", "nf4")
    assert not (tmp_path / "out").exists()


def test_groups_that_do_not_divide_are_refused_before_work(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(SettingError, match=r"group_size=128 does not divide the 32 inputs of encoder.layer.0"):
        squeeze(tmp_path, "bert", "text-classification", "int4-torch")


def test_outliers_are_multiplied_in_float() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    dense = torch.nn.Linear(64, 32)
    x = torch.randn(4, 64)
    x[:, 7] = 100.0
    errors = {}
    for threshold in (0.0, 6.0):
        layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=threshold)
        layer.load_state_dict(dense.state_dict())
        with torch.no_grad():  # in training mode inputs are never rounded on a CPU
            errors[threshold] = float((layer.to("cpu").eval()(x) - dense(x)).abs().mean())
    # Rounding the other 63 inputs to steps of 100 / 127 moves a product by 0.11 on average; the weights alone by 0.027.
    assert errors[6.0] < errors[0.0] / 3


def test_e4m3_has_a_scale_per_row_and_four_significant_bits() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-3], [1], [50], [1], [1], [0]]
    )
    values, scales = round_to_e4m3(weight)
    assert values.dtype == torch.float8_e4m3fn
    assert scales.shape == (6, 1)
    largest = values.float().abs().amax(dim=1)
    assert largest.tolist() == [448.0] * 5 + [0.0]
    # Three stored bits: half a step is 2**-4 of a normal number; below 2**-6 steps are 2**-9.
    bound = torch.maximum(weight.abs() * 2**-4, scales * 2**-10)
    assert ((values.float() * scales - weight).abs() <= bound * (1 + 1e-6)).all()


def test_fp8_names_the_hardware_that_it_needs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("effllm.compression.fp8.has_fp8", lambda: False)
    with pytest.raises(Unsupported, match=r"compute capability 8\.9"):
        squeeze(tmp_path, "bert", "text-classification", "fp8")


def test_fp8_folders_are_loaded_as_they_were_judged(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("compressed_tensors")
    monkeypatch.setattr("effllm.compression.fp8.has_fp8", lambda: True)
    _, variant = squeeze(tmp_path, "bert", "text-classification", "fp8")
    stored = load_file(variant.path / "model.safetensors")
    assert stored["bert.encoder.layer.0.output.dense.weight"].dtype == torch.float8_e4m3fn
    assert stored["classifier.weight"].dtype == torch.float32


def test_negative_thresholds_are_refused() -> None:
    with pytest.raises(SettingError, match="threshold must be at least 0"):
        parse_method("llm-int8:threshold=-1")
