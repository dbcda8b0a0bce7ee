"""Load the kernels with Hugging Face's `kernels`, alone and through transformers, and compare with eager attention.

    python check_kernels.py LAYOUT

LAYOUT is what `effllm_kernels.hub.write_layout` wrote. Runs in an environment of its own, without effllm; prints one
line of JSON: largest differences, float32, and versions.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

LAYOUT, NAME = Path(sys.argv[1]).resolve(), "effllm/attention"
os.environ |= {"LOCAL_KERNELS": f"{NAME}={LAYOUT}", "HF_HUB_OFFLINE": "1"}

import torch  # noqa: E402 (the environment is read when they are imported)
import transformers  # noqa: E402

from kernels import get_kernel, get_local_kernel  # noqa: E402


def alone(module: Any) -> float:
    """Return the largest difference of the loaded functions from PyTorch's attention, forward and backward."""
    torch.manual_seed(0)
    found = []
    inputs = torch.randn(3, 2, 9, 4, 16)
    for call in (torch.nn.functional.scaled_dot_product_attention, module.flash_attn_func):
        q, k, v = inputs.clone().requires_grad_().unbind()
        if call is module.flash_attn_func:
            out = call(q, k, v)
        else:
            out = call(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        found.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


def in_a_model() -> float:
    """Return the largest difference of a small BERT's outputs on real tokens, padded right and left."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    eager = transformers.BertModel._from_config(config, attn_implementation="eager").eval()
    folder = LAYOUT.parent / "model"
    eager.save_pretrained(folder)
    ours = transformers.BertModel.from_pretrained(folder, attn_implementation=NAME).eval()
    ids = torch.randint(0, 50, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, 7:], mask[1, :5] = 0, 0
    with torch.inference_mode():
        a, b = (model(ids, attention_mask=mask).last_hidden_state for model in (eager, ours))
    return float((a - b)[mask == 1].abs().max())


def main() -> None:
    """Print what was found."""
    module = get_local_kernel(LAYOUT)
    said: dict[str, Any] = {"names": sorted(module.__all__), "get_local_kernel": alone(module)}
    said["get_kernel"] = alone(get_kernel(NAME, version=1))
    try:
        said["attn_implementation"] = in_a_model()
    except (ImportError, ValueError) as error:
        said["attn_implementation_error"] = str(error)
    packages = ("torch", "transformers", "kernels")
    said["versions"] = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
