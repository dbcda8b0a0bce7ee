"""Which layers stay, by each criterion, and that what is left is those layers."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_config, make_model, make_tokenizer
from jobs import make_job

from effllm.compression.calibrate import feeds
from effllm.compression.layer_drop import Layers, evenly_spaced, hidden_changes, keep_layers, mask_information
from effllm.compression.layers import layer_list
from effllm.errors import SettingError


def deep_job(tmp_path: Path, architecture: str):
    """A job on a model of five layers, of which the fourth hardly does anything."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(architecture)
    config = make_config(architecture, len(tokenizer), ["a", "b"])
    config.num_hidden_layers = 5
    if architecture == "modernbert":
        config.layer_types = [f"{kind}_attention" for kind in ("full", "sliding", "sliding", "full", "sliding")]
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            idle = any(part == "3" for part in name.split(".")) and "norm" not in name.lower()
            if parameter.dim() == 2:
                parameter.normal_(0, 1e-4 if idle else 0.15)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return make_job(tmp_path / "model", tmp_path)


def test_even_spacing_is_that_of_distilbert() -> None:
    assert evenly_spaced(12, 6) == [0, 2, 4, 7, 9, 11]
    assert evenly_spaced(5, 5) == [0, 1, 2, 3, 4]
    assert evenly_spaced(6, 1) == [0]


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
@pytest.mark.parametrize("by", ["cosine", "fisher"])
def test_the_idle_layer_goes_first(tmp_path: Path, architecture: str, by: str) -> None:
    job = deep_job(tmp_path, architecture)
    modules = layer_list(job.model)[1]
    changed = Layers(drop=1, by=by).apply(job)
    assert changed.details["kept"] == [0, 1, 2, 4]
    assert list(layer_list(job.model)[1]) == [modules[i] for i in (0, 1, 2, 4)]
    assert job.model.config.num_hidden_layers == 4


def test_scores_are_what_they_say(tmp_path: Path) -> None:
    job = deep_job(tmp_path, "bert")
    modules = layer_list(job.model)[1]
    seen = []
    for feed in feeds(job.model, job.encodings()):
        with torch.no_grad():
            states = job.model(**feed, output_hidden_states=True).hidden_states
        cosines = [torch.cosine_similarity(a, b, dim=-1)[0] for a, b in itertools.pairwise(states)]
        seen.append(torch.stack(cosines))
    expected = 1 - torch.cat(seen, dim=1).double().mean(dim=1)
    torch.testing.assert_close(hidden_changes(job, modules), expected, rtol=1e-5, atol=1e-6)
    information = mask_information(job, modules, seed=0)
    assert torch.equal(information, mask_information(job, modules, seed=0))
    assert information[3] < 1e-3 * information.max()


def test_modernbert_keeps_its_attention_kinds_and_its_first_layer(tmp_path: Path) -> None:
    job = deep_job(tmp_path, "modernbert")
    keep_layers(job.model, [0, 2, 3])
    assert job.model.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    assert [m.layer_idx for m in layer_list(job.model)[1]] == [0, 1, 2]
    job.model.save_pretrained(tmp_path / "small")
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "small", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(5, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, job.model(input_ids=ids).logits)


@pytest.mark.parametrize("settings", [{"keep": 1, "drop": 1}, {"keep": -1}, {"drop": 1, "calibration": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(SettingError, match="layers: "):
        Layers(**settings)


@pytest.mark.parametrize("settings", [{"keep": 3}, {"drop": 2}])
def test_a_model_with_too_few_layers_is_refused(tmp_path: Path, settings: dict[str, int]) -> None:
    job = make_job(make_model(tmp_path / "model"), tmp_path)
    with pytest.raises(SettingError, match="of 2 layers at least 1 must stay"):
        Layers(**settings).check(job.source)


def test_keeping_all_layers_changes_nothing(tmp_path: Path) -> None:
    job = make_job(make_model(tmp_path / "model"), tmp_path)
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    Layers(keep=2, by="fisher").apply(job)
    assert all(torch.equal(before[name], value) for name, value in job.model.state_dict().items())
