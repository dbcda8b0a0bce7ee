"""The attention kernels in a plain PyTorch module and in a transformers model, before and after.

    python examples/kernels_in_your_model.py

Takes a few seconds on a CPU, where the kernels' plain torch reference runs; on an NVIDIA GPU the same lines run the
Triton kernels. Expected output, up to the last digits:

    module: largest difference 0.0000, no mask of 16 × 16 made
    ModernBERT's two kinds of layer: largest difference 0.0000, no rotated q and k made
    BertModel: largest difference on real tokens 0.0000
    packed: largest difference 0.0000, 19 tokens instead of 32
"""

from __future__ import annotations

import torch
import transformers
from effllm_kernels import attention, attention_qkvpacked, hf
from torch import Tensor, nn
from torch.nn import functional

LENGTHS = (16, 3)


class SelfAttention(nn.Module):
    """Multi-head self-attention over padded sequences, as one would write it in PyTorch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return (B, S, width); key padding is a (B, 1, 1, S) mask."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        return self.out(out.transpose(1, 2).flatten(2))


class FusedSelfAttention(SelfAttention):
    """The same with the kernel: no transposes, no mask, and padding costs nothing."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return (B, S, width)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.out(attention(q, k, v, key_lengths=lengths, query_lengths=lengths).flatten(2))


class RotarySelfAttention(nn.Module):
    """A layer of ModernBERT: rotary position embedding, and a window where the layer is local."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, theta: float, window: int | None) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        pairs = width // heads // 2
        phase = torch.arange(16)[:, None] * theta ** -(torch.arange(pairs) / pairs)
        self.register_buffer("cos", phase.cos())
        self.register_buffer("sin", phase.sin())

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return (B, S, width)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        position = torch.arange(x.shape[1], device=x.device)
        mask = (position < lengths[:, None])[:, None, None]
        if self.window is not None:
            near = (position[:, None] - position).abs() <= self.window
            mask = mask & near | torch.eye(x.shape[1], device=x.device).bool()  # no row without a key
        out = functional.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(2))

    def rotated(self, x: Tensor) -> Tensor:
        """Return (B, H, S, D) with the pairs (c, c + D / 2) turned by their positions' angles."""
        a, b = x.chunk(2, -1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], -1)


class FusedRotarySelfAttention(RotarySelfAttention):
    """The same with the kernel, which reads the projection as it is and turns q and k while it loads them."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return (B, S, width)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        out = attention_qkvpacked(
            qkv, lengths=lengths, window=self.window, rotary_cos=self.cos, rotary_sin=self.sin
        )  # fmt: skip
        return self.out(out.flatten(2))


def apart(before: nn.Module, after: nn.Module, device: str) -> float:
    """Return the largest difference of two modules' outputs and gradients, with the same weights."""
    before, after = before.to(device), after.to(device)
    after.load_state_dict(before.state_dict())
    x, lengths = torch.randn(2, 16, 64, device=device), torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    real = (torch.arange(16, device=device) < lengths[:, None])[..., None]
    found = []
    for module in (before, after):
        out = module(x, lengths) * real
        out.square().sum().backward()
        found.append((out.detach(), *(parameter.grad for parameter in module.parameters())))
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


def in_a_module(device: str) -> None:
    """Compare modules before and after, forward and gradients."""
    torch.manual_seed(0)
    found = apart(SelfAttention(64, 4), FusedSelfAttention(64, 4), device)
    print(f"module: largest difference {found:.4f}, no mask of 16 × 16 made")
    found = 0.0
    for theta, window in ((160_000.0, None), (10_000.0, 3)):  # ModernBERT's own local layers see ±64
        settings = (64, 4, theta, window)
        found = max(found, apart(RotarySelfAttention(*settings), FusedRotarySelfAttention(*settings), device))
    print(f"ModernBERT's two kinds of layer: largest difference {found:.4f}, no rotated q and k made")


def in_transformers(device: str) -> None:
    """Compare a model with `attn_implementation="effllm"` with the same one as it comes, padded and packed."""
    hf.register()
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    before = transformers.AutoModel.from_config(config, attn_implementation="eager").to(device).eval()
    after = transformers.AutoModel.from_config(config, attn_implementation="effllm").to(device).eval()
    after.load_state_dict(before.state_dict())
    ids = torch.randint(5, 100, (2, 16), device=device)
    mask = (torch.arange(16, device=device) < torch.tensor(LENGTHS, device=device)[:, None]).long()
    with torch.inference_mode():
        expected, got = (model(ids, attention_mask=mask).last_hidden_state for model in (before, after))
        starts = torch.tensor([0, 16, 19], dtype=torch.int32, device=device)
        packed = after(
            ids[mask == 1][None],
            position_ids=torch.cat([torch.arange(n, device=device) for n in LENGTHS])[None],
            cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=16, max_length_k=16,
        ).last_hidden_state[0]  # fmt: skip
    worst = float((expected - got)[mask == 1].abs().max())
    print(f"{type(after).__name__}: largest difference on real tokens {worst:.4f}")
    worst = float((expected[mask == 1] - packed).abs().max())
    print(f"packed: largest difference {worst:.4f}, {packed.shape[0]} tokens instead of {ids.numel()}")


def main() -> None:
    """Run both on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    in_a_module(device)
    in_transformers(device)


if __name__ == "__main__":
    main()
