"""Transformers models give the same with our attention as with eager attention, forward and backward."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from effllm_kernels import hf, operators

SHAPE = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2}
LOCAL = SHAPE | {"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 6}
DISTIL = {"vocab_size": 40, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 40, "max_position_embeddings": 64}
T5 = {
    "vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 40, "num_layers": 2, "num_heads": 2,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0,
}  # fmt: skip
MODELS = {
    "bert": (transformers.BertModel, transformers.BertConfig, SHAPE),
    "roberta": (transformers.RobertaModel, transformers.RobertaConfig, SHAPE),
    "xlm-roberta": (transformers.XLMRobertaModel, transformers.XLMRobertaConfig, SHAPE),
    "distilbert": (transformers.DistilBertModel, transformers.DistilBertConfig, DISTIL),
    "electra": (transformers.ElectraModel, transformers.ElectraConfig, SHAPE | {"embedding_size": 16}),
    "modernbert": (transformers.ModernBertModel, transformers.ModernBertConfig, LOCAL),
    "eurobert": (transformers.EuroBertModel, transformers.EuroBertConfig, GROUPED),
    "t5-encoder": (transformers.T5EncoderModel, transformers.T5Config, T5),
    "t5": (transformers.T5Model, transformers.T5Config, T5),
    "llama": (transformers.LlamaModel, transformers.LlamaConfig, GROUPED),
    "qwen2": (transformers.Qwen2Model, transformers.Qwen2Config, GROUPED),
    "mistral": (transformers.MistralModel, transformers.MistralConfig, GROUPED | {"sliding_window": 4}),
    "gemma2": (
        transformers.Gemma2Model,
        transformers.Gemma2Config,
        GROUPED | {"head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    ),
}
LENGTH = 14
PADDINGS = {
    "none": None,
    "right": [[1] * 14, [1] * 9 + [0] * 5, [1] * 3 + [0] * 11],
    "left": [[1] * 14, [0] * 5 + [1] * 9, [0] * 11 + [1] * 3],
    "an empty row": [[1] * 14, [0] * 14, [1] * 6 + [0] * 8],
}
# Both work in float32: each is a few roundings of every layer's sums away from the exact value.
NEAR = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=2e-5)


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    hf.register()
    monkeypatch.setattr(operators, "runs_kernels", lambda x: x.is_cuda)


def build(name: str, implementation: str, device: str, **changes) -> torch.nn.Module:
    model, config, settings = MODELS[name]
    torch.manual_seed(0)
    built = model._from_config(config(**(settings | changes)), attn_implementation=implementation)
    for parameter in built.parameters():  # transformers' 0.02 would make attention uniform and differences invisible
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15 if name.startswith("t5") else 0.3)  # T5 scales no product
    return built.to(device).eval()


def tokens(device: str, rows: int = 3, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(1)).to(device)


def run(model: torch.nn.Module, weight: torch.Tensor, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the outputs of the tokens that count, and the gradients of a sum that only these enter."""
    if model.config.model_type == "t5" and isinstance(model, transformers.T5Model):
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
        weight = torch.ones_like(weight)
    out = model(**inputs).last_hidden_state * weight[..., None]
    steps = torch.linspace(-1, 1, out.shape[-1], device=out.device)
    (out * steps).sum().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compare(name: str, device: str, mask: torch.Tensor | None, **inputs) -> None:
    ids = tokens(device)
    weight = torch.ones_like(ids) if mask is None else mask
    expected, gradients = run(build(name, "eager", device), weight, input_ids=ids, attention_mask=mask, **inputs)
    got, own = run(build(name, "effllm", device), weight, input_ids=ids, attention_mask=mask, **inputs)
    NEAR(got, expected)
    assert own.keys() == gradients.keys()
    for key, gradient in gradients.items():
        size = gradient.abs().max().item()
        NEAR(own[key], gradient, atol=2e-5 * max(1.0, size), msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_eager(name: str, padding: str, device: str) -> None:
    if name == "t5" and padding == "an empty row":
        pytest.skip("eager averages over what a decoder cannot see, we give zero")
    rows = PADDINGS[padding]
    compare(name, device, None if rows is None else torch.tensor(rows, device=device))


@pytest.mark.skipif(operators.launch is None, reason="needs triton")
def test_equals_eager_in_the_kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "runs_kernels", lambda x: True)
    compare("modernbert", device, torch.tensor(PADDINGS["right"], device=device))


def test_padded_rows_and_what_they_hold_change_nothing(device: str) -> None:
    model, ids = build("bert", "effllm", device), tokens(device)
    mask = torch.tensor(PADDINGS["right"], device=device)
    first = model(input_ids=ids, attention_mask=mask).last_hidden_state
    second = model(input_ids=torch.where(mask == 1, ids, 7), attention_mask=mask).last_hidden_state
    assert torch.equal(first[mask == 1], second[mask == 1])


def test_a_cross_attention_mask_does_not_blank_the_decoder(device: str) -> None:
    mask = torch.tensor(PADDINGS["left"], device=device)
    inputs = {"input_ids": tokens(device), "attention_mask": mask, "decoder_input_ids": tokens(device).flip(1)}
    NEAR(*(build("t5", kind, device)(**inputs).last_hidden_state for kind in ("effllm", "eager")))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_takes_a_mask_made_by_hand(dtype: torch.dtype, device: str) -> None:
    allowed = torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool, device=device).tril(2)
    mask = allowed if dtype == torch.bool else torch.where(allowed, 0.0, torch.finfo(dtype).min)
    eager = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    ids = tokens(device)
    got = build("bert", "effllm", device)(input_ids=ids, attention_mask=mask).last_hidden_state
    NEAR(got, build("bert", "eager", device)(input_ids=ids, attention_mask=eager).last_hidden_state)


@pytest.mark.parametrize("least", [torch.finfo(torch.float32).min, -1e9])
def test_a_row_that_a_mask_made_by_hand_hides_whole_is_zeros_or_the_mean(least: float, device: str) -> None:
    q, k, v = (torch.randn(1, 2, LENGTH, 16, device=device, requires_grad=True) for _ in range(3))
    allowed = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=device).tril()
    allowed[..., 3, :] = False
    mask = torch.where(allowed, 0.0, least)
    got = hf._attention(torch.nn.Module(), q, k, v, mask)[0]
    eager = ((q @ k.mT / 4 + mask).softmax(-1) @ v).transpose(1, 2)
    if least < -1e30:  # beyond what a float can be added to, it says that the key is not there
        eager = torch.cat([eager[:, :3], torch.zeros_like(eager[:, :1]), eager[:, 4:]], dim=1)
    NEAR(got, eager)
    weights = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), (q, k, v), retain_graph=True) for out in (got, eager))
    for mine, other in zip(ours, theirs, strict=True):
        NEAR(mine, other)


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "mistral"])
def test_packed_sequences_equal_themselves_alone(name: str, device: str) -> None:
    model, lengths = build(name, "effllm", device), [5, 1, 8]
    ids = tokens(device, 1)
    starts = torch.tensor([0, 5, 6, 14], dtype=torch.int32, device=device)
    places = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
    packed = model(
        input_ids=ids, position_ids=places, cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=8, max_length_k=8
    ).last_hidden_state
    alone = [model(input_ids=part).last_hidden_state for part in ids.split(lengths, dim=1)]
    NEAR(packed, torch.cat(alone, dim=1))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_decoders_find_packed_sequences_by_their_positions(name: str, device: str) -> None:
    places = torch.cat([torch.arange(n, device=device) for n in (5, 1, 8)]).expand(3, -1)
    compare(name, device, None, position_ids=places)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_decodes_with_a_cache(name: str, device: str) -> None:
    model, ids = build(name, "effllm", device), tokens(device)
    mask = torch.tensor(PADDINGS["left"], device=device)
    whole = model(input_ids=ids, attention_mask=mask).last_hidden_state
    cache = transformers.DynamicCache(config=model.config)
    parts = [
        model(
            input_ids=ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, use_cache=True
        ).last_hidden_state
        for a, b in ((0, 8), (8, 12), (12, 13), (13, 14))
    ]
    NEAR(torch.cat(parts, dim=1)[mask == 1], whole[mask == 1])


def test_decodes_with_a_static_cache(device: str) -> None:
    ids, found = tokens(device), []
    for kind in ("effllm", "eager"):
        model = build("llama", kind, device)
        cache = transformers.StaticCache(config=model.config, max_cache_len=20)
        with torch.no_grad():
            found += [model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state]
    NEAR(*found)


@pytest.mark.parametrize(("name", "half"), [("modernbert", 3), ("mistral", 3)])
def test_the_window_ends_where_transformers_says(name: str, half: int, device: str) -> None:
    local = {"layer_types": ["sliding_attention"]} if name == "modernbert" else {}
    model = build(name, "effllm", device, num_hidden_layers=1, **local)
    ids = tokens(device, 1)
    base = model(input_ids=ids).last_hidden_state[0]
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1 - 3) % 37 + 3
    moved = (model(input_ids=changed).last_hidden_state[0] != base).any(-1).nonzero()[:, 0].tolist()
    assert moved == list(range(6 if name == "mistral" else 6 - half, 6 + half + 1))


def test_training_with_dropout_repeats_and_drops(device: str) -> None:
    mask = torch.tensor(PADDINGS["right"], device=device)
    model = build("bert", "effllm", device, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.0).train()
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        model.zero_grad()
        found.append(run(model, mask, input_ids=tokens(device), attention_mask=mask))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
    assert not torch.equal(found[0][0], found[2][0])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # renamed after transformers 5.17
def test_checkpointed_gradients_are_the_same(device: str) -> None:
    mask, found = torch.tensor(PADDINGS["right"], device=device), []
    for checkpointing in (False, True):
        model = build("bert", "effllm", device, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        found.append(run(model, mask, input_ids=tokens(device), attention_mask=mask)[1])
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name])


def test_masks_stay_two_dimensional(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.masks, "sdpa_mask", lambda *_, **__: pytest.fail("a mask of S × S was made"))
    mask = torch.tensor(PADDINGS["right"], device=device)
    for name in MODELS:
        extra = {"decoder_input_ids": tokens(device)} if name == "t5" else {}
        build(name, "effllm", device)(input_ids=tokens(device), attention_mask=mask, **extra)


@pytest.mark.slow
def test_compiled_as_one_graph(device: str) -> None:
    """Without a code generator: what a C++ compiler takes for its code is not ours."""
    torch._dynamo.reset()
    model, ids = build("llama", "effllm", device, num_hidden_layers=1), tokens(device)
    mask = torch.tensor(PADDINGS["right"], device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, want = (run(input_ids=ids, attention_mask=mask).last_hidden_state for run in (compiled, model))
    NEAR(got[mask == 1], want[mask == 1])


def test_says_what_it_does_not_cover(device: str) -> None:
    model, ids = build("bert", "effllm", device), tokens(device, 1)
    starts = torch.tensor([0, 14], dtype=torch.int32, device=device)
    places = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 14, "max_length_k": 14}
    with pytest.raises(ValueError, match="attention weights"):
        model(input_ids=ids, output_attentions=True)
    with pytest.raises(ValueError, match="go together"):
        model(input_ids=ids, cu_seq_lens_q=starts)
    with pytest.raises(ValueError, match="take no attention_mask and no position bias"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **places)
    with pytest.raises(ValueError, match="position bias"):
        build("t5-encoder", "effllm", device)(input_ids=ids, **places)
