"""What the compiler makes of the attention kernels for Hopper: registers, spills, shared memory, matrix instructions.

    python benchmarks/kernel_code.py

Compiles every kernel for sm_90 with the ptxas inside the triton wheel, no GPU needed, and reads the machine code. Needs
triton. Writes `results/kernel_code.jsonl`. It shows that the code compiles, fits and uses the matrix unit; it measures
no time.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from effllm_kernels import launch
from effllm_kernels.fused_attention import attention_terms
from effllm_kernels.record import Case
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from effllm.rows import Row, write_rows

RESULTS = Path(__file__).parent / "results" / "kernel_code.jsonl"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGET = GPUTarget("cuda", 90, 32)
HALF = torch.bfloat16
LONG = functools.partial(Case, batch=1, queries=1024, keys=1024, heads=2)
CASES = [
    (LONG("plain", width=64), HALF),
    (LONG("plain", width=128), HALF),
    (LONG("plain", width=256), HALF),
    (LONG("plain", width=80), HALF),
    (LONG("plain", width=64), torch.float32),
    (Case("short", batch=1, queries=128, keys=128, heads=2, width=64), HALF),
    (Case("shorter", batch=1, queries=32, keys=32, heads=2, width=64), HALF),
    (LONG("lengths", width=64, terms=("lengths",)), HALF),
    (LONG("window", width=64, terms=("window", "lengths")), HALF),
    (LONG("causal", width=128, terms=("causal",)), HALF),
    (LONG("bias", width=64, terms=("bias", "mask")), HALF),
    (LONG("dropout", width=64, terms=("dropout", "lengths")), HALF),
    (LONG("deberta", width=64, terms=("c2p", "p2c", "lengths")), HALF),
    (LONG("t5", width=64, terms=("relative_bias", "mask")), HALF),
    (LONG("softcap", width=64, terms=("softcap", "alibi", "heads")), HALF),
    (LONG("rotary", width=64, terms=("rotary",)), HALF),
    (LONG("rotary", width=128, terms=("rotary",)), HALF),
    (LONG("rotary window", width=64, terms=("rotary", "window", "lengths")), HALF),
    (LONG("interleaved", width=64, terms=("interleaved",)), HALF),
    (Case("rotary short", batch=1, queries=128, keys=128, heads=2, width=64, terms=("rotary",)), HALF),
    (LONG("everything", width=64, terms=(
        "lengths", "mask", "window", "bias", "alibi", "c2p", "p2c", "softcap", "dropout", "heads", "rotary")), HALF),
]  # fmt: skip


class NoDevice:
    """Stands for a Hopper GPU towards Triton's compiler; nothing can be launched on it."""

    def get_current_device(self) -> int:
        """Return the number of the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return a stream that is never used."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return TARGET


def calls(case: Case, dtype: torch.dtype) -> Iterator[launch.Call]:
    """Yield every launch of a case's forward and backward pass."""
    given = case.inputs(dtype)
    terms, (q, k, v) = attention_terms(**given), (given[name] for name in "qkv")
    lse = torch.empty(case.batch, case.heads, case.queries)
    out = torch.empty_like(q)
    yield launch.forward_call(q, k, v, out, lse, terms)
    yield from launch.backward_calls(out, None, q, k, v, out, lse, lse, terms, (q, k, v))
    yield from launch.term_calls(out, q, k, v, lse, lse, terms, terms.bias, terms.c2p, terms.p2c)


def inspect(call: launch.Call) -> dict[str, tuple[float, str]]:
    """Return what the machine code of a launch holds: metric -> (value, unit)."""
    compiled = call.kernel.warmup(*call.args, grid=(1,), **call.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", flag, cubin], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    words = {name: value for name, _, value in (word.partition(":") for word in usage.split()) if value}
    lines = code.splitlines()
    return {
        "registers": (float(words["REG"]), "per thread"),
        "stack": (float(words["STACK"]), "bytes per thread"),
        "spill instructions": (float(sum(" STL" in line or " LDL" in line for line in lines)), "instructions"),
        "shared memory": (float(compiled.metadata.shared), "bytes"),
        "HGMMA": (float(sum("HGMMA" in line for line in lines)), "instructions"),
        "HMMA": (float(sum(" HMMA" in line for line in lines)), "instructions"),
        "code": (float(len(re.findall(r"^ +/\*[0-9a-f]{4,}\*/ +\S", code, re.MULTILINE))), "instructions"),
    }


def main() -> None:
    """Compile, inspect, print, write."""
    driver.set_active(NoDevice())
    where = f"triton {importlib.metadata.version('triton')}, sm_90, compiled without a device"
    rows = []
    for case, dtype in CASES:
        for call in calls(case, dtype):
            system = f"{call.kernel.__name__} {case.name} d{case.width} {str(dtype).removeprefix('torch.')}"
            sizes = {name: value for name, value in call.options.items() if isinstance(value, int)}
            found = inspect(call)
            rows += [
                Row(metric, value, unit, system, how=sizes, machine=where) for metric, (value, unit) in found.items()
            ]
            print(
                f"{system:45}", "  ".join(f"{metric} {value:.0f}" for metric, (value, _) in found.items()), flush=True
            )
    write_rows(RESULTS, rows)


if __name__ == "__main__":
    main()
