"""Decoders: the methods of the weights on causal models, what they are calibrated on, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from decoders import LENGTH, TEXTS, make_decoder
from jobs import make_job
from safetensors.torch import load_file

import effllm
import effllm.hf
from effllm.compression import METHODS, method_class, parse_method, pipeline
from effllm.compression.calibrate import observe
from effllm.compression.layers import linears
from effllm.compression.layerwise import layer_by_layer
from effllm.errors import GateFailed, Unsupported
from effllm.exporters.source import DECODERS
from effllm.runtime.predictor import Predictor
from effllm.tasks import Example

DEV = [{"text": text} for text in TEXTS[:6]]
LEARNT = TEXTS[20:40]
"""Texts that the trained decoder has seen."""
KINDS = {
    "llama": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama, no groups": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}
SPECS = {
    "magnitude:sparsity=0.5": "",
    "wanda": "",
    "ria:pattern=2:4": "",
    "sparsegpt": "",
    "int4-torch:group_size=32": "compressed_tensors",
    "int4-torch:algorithm=rtn,group_size=64": "compressed_tensors",
    "nf4": "bitsandbytes",
    "llm-int8": "bitsandbytes",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("decoders")
    return {name: make_decoder(root / name, kind, **settings) for name, (kind, settings) in KINDS.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("decoders") / "trained", trained=True)


def test_every_known_decoder_is_tried() -> None:
    assert {kind.lower() for kind, _ in KINDS.values()} == DECODERS


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        *(("llama", spec) for spec in SPECS),
        *((kind, spec) for kind in list(KINDS)[1:] for spec in ("sparsegpt", "int4-torch:group_size=32")),
    ],
)
def test_the_folder_loads_in_transformers_and_answers_as_measured(
    tmp_path: Path, models: dict[str, Path], kind: str, spec: str
) -> None:
    if SPECS[spec]:
        pytest.importorskip(SPECS[spec])
    variant = effllm.compress(
        models[kind], tmp_path / "out", method=parse_method(spec), calib=TEXTS, dev=DEV, max_drop=10.0, threads=1
    )
    assert variant.task == "text-generation"
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(variant.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    before, after = load_file(models[kind] / "model.safetensors"), load_file(variant.path / "model.safetensors")
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert ("lm_head.weight" in before) == ("lm_head.weight" in after)
    if not SPECS[spec]:
        zeros = [float((linear.weight == 0).float().mean()) for linear in linears(loaded).values()]
        assert len(zeros) == 14
        assert zeros == pytest.approx([0.5] * 14, abs=0.01)
    total = count = 0.0
    tokenizer = transformers.AutoTokenizer.from_pretrained(variant.path)
    for record in DEV:
        ids = torch.tensor([tokenizer(record["text"])["input_ids"]])
        assert ids.shape[1] <= LENGTH
        with torch.no_grad():
            total += float(loaded.eval()(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    name = spec.partition(":")[0]
    (row,) = [row for row in variant.rows if row.metric == "perplexity" and row.system == name]
    assert row.value == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)


def grams_token_by_token(model, encodings) -> dict[str, torch.Tensor]:
    """Return the sums of x xᵀ that enter each linear layer run token by token: none can see the next."""
    grams: dict[str, torch.Tensor] = {}
    handles = []
    for name, linear in linears(model).items():

        def add(_: object, args: tuple[torch.Tensor], name: str = name) -> None:
            x = args[0].flatten(0, -2)
            grams[name] = grams.get(name, 0) + x.T @ x

        handles.append(linear.register_forward_pre_hook(add))
    for encoding in encodings:
        cache = transformers.DynamicCache(config=model.config)
        for token in encoding.ids:
            with torch.no_grad():
                model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    for handle in handles:
        handle.remove()
    return grams


def test_layers_see_their_texts_alone_and_no_token_after(tmp_path: Path, models: dict[str, Path]) -> None:
    job = make_job(models["llama"], tmp_path / "work", [*TEXTS[:9], " ".join(TEXTS[30:33])])
    encodings, model = job.encodings(), job.model
    assert len(encodings) > 10
    assert max(map(len, encodings)) == LENGTH
    expected = grams_token_by_token(model, encodings)
    at_once = observe(model, list(linears(model)), encodings)
    seen = {}
    for index, moments in enumerate(layer_by_layer(model, encodings)):
        seen |= moments
        if not index:  # the second layer is to see what the first has become, its keys and values too
            for linear in linears(model).values():
                linear.weight.data.mul_(torch.arange(linear.in_features) % 2)
    with torch.no_grad():
        changed = grams_token_by_token(model, encodings)
    assert set(seen) == set(at_once) == set(expected)
    for name, gram in expected.items():
        wanted = changed[name] if name in moments else gram
        for got, reference in ((seen[name], wanted), (at_once[name], gram)):
            assert got.tokens == sum(map(len, encodings))
            scale = float(reference.diagonal().max())
            torch.testing.assert_close(got.gram, reference, rtol=0, atol=1e-5 * scale)


def test_the_gate_is_on_perplexity_with_dev_texts_and_on_agreement_without(tmp_path: Path, trained: Path) -> None:
    dev = tmp_path / "dev.txt"
    dev.write_text("\n".join(LEARNT) + "\n")
    hard = parse_method("magnitude:sparsity=0.9")
    with pytest.raises(GateFailed, match=r"magnitude: perplexity rise .* more than the allowed"):
        effllm.compress(trained, tmp_path / "out", method=hard, calib=TEXTS[40:], dev=dev, threads=1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(GateFailed, match="magnitude: disagreement with dense"):
        effllm.compress(trained, tmp_path / "out", method=hard, calib=TEXTS[40:], threads=1)
    mild = parse_method("wanda:sparsity=0.05")
    variant = effllm.compress(trained, tmp_path / "out", method=mild, calib=TEXTS[40:], dev=dev, threads=1)
    assert "perplexity" in (variant.path / "README.md").read_text()
    assert "LlamaForCausalLM.from_pretrained" in (variant.path / "README.md").read_text()


REFUSED = [name for name in METHODS if not getattr(method_class(name), "decoders", False)]


@pytest.mark.parametrize("spec", [*REFUSED, "magnitude:epochs=1"])
def test_other_methods_are_refused_before_any_work(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    monkeypatch.setattr(pipeline, "load_source", None)
    methods = [parse_method(spec)]
    methods += [parse_method("int8")] if spec == "qat" else []
    with pytest.raises(Unsupported, match=f"--method {spec.partition(':')[0]} .*encoders") as caught:
        effllm.compress(models["llama"], tmp_path / "out", method=methods)
    assert "\n" not in str(caught.value)


def test_what_needs_a_graph_or_a_mask_is_refused(tmp_path: Path, models: dict[str, Path], tokens: Path) -> None:
    from effllm.errors import EffllmError
    from effllm.train.finetune import finetune
    from effllm.train.pretrain import pretrain
    from effllm.train.settings import FinetuneSettings, PretrainSettings

    model, out, texts = models["llama"], tmp_path / "out", tmp_path / "train.txt"
    texts.write_text("a text\n")
    refused = {
        "is a decoder; decoders are compressed": lambda: effllm.export(model, out),
        "is a decoder": lambda: effllm.bench([model]),
        "is a 'llama' model; effllm handles bert": lambda: effllm.export(model, out, task="feature-extraction"),
        "text-generation is not fine-tuned": lambda: list(
            finetune(model, out, task="text-generation", train=texts, settings=FinetuneSettings(steps=1))
        ),
        "is not a masked-LM": lambda: list(
            pretrain(tokens, out, PretrainSettings(model=str(model), steps=1, batch_size=4, max_length=32))
        ),
    }
    for message, call in refused.items():
        with pytest.raises(EffllmError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not out.exists()


def test_a_causal_model_that_was_not_tried_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_decoder(tmp_path / "other", "Olmo")
    with pytest.raises(Unsupported, match=r"is a 'olmo' model; effllm handles llama, .* for text-generation"):
        effllm.compress(folder, tmp_path / "out", method=parse_method("wanda"))


def test_a_compressed_decoder_is_evaluated_and_predicts(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from effllm.cli import main

    calib = tmp_path / "calib.txt"
    calib.write_text("\n".join(TEXTS[40:]) + "\n")
    out = str(tmp_path / "out")
    flags = ["--calib", str(calib), "--dev", str(calib), "--dev-limit", "20", "--max-drop", "1", "--threads", "1"]
    assert main(["compress", str(trained), "--method", "sparsegpt:sparsity=0.2", "--out", out, *flags]) == 0
    assert main(["eval", out, "--data", str(calib)]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["predict", out, TEXTS[3]]) == 0
    answer = next(Predictor.open(out, threads=1).answers([Example(TEXTS[3])])).value
    assert f"perplexity {answer['perplexity']:.2f} over {answer['tokens']} tokens" in capsys.readouterr().out
    assert main(["compress", str(trained), "--method", "int8", "--out", str(tmp_path / "no")]) == 2
    assert "--method int8 is for encoders" in capsys.readouterr().err
    assert main(["serve", out]) == 2
