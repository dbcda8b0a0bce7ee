"""How fast the attention kernels are beside what PyTorch and transformers offer, on one GPU.

    python benchmarks/attention_kernels.py            every row
    python benchmarks/attention_kernels.py --only dense short      these parts; rows of the others stay
    python benchmarks/attention_kernels.py --quick    few sizes and repeats, no rows written
    python benchmarks/attention_kernels.py --cpu      the code paths at tiny sizes on the CPU, no rows written; with
                                                      TRITON_INTERPRET=1 the kernels too, in Triton's interpreter

Measures the machine first (copy, bfloat16 product), then: forward and forward + backward over S, padded batches at 50 %
fill, a window of ±64, rotary embedding in the kernel, short sequences under CUDA graphs, host time a call, and whole
BERT-base and ModernBERT-base forwards on lengths drawn as texts have them. Baselines: named SDPA backends, compiled
FlexAttention (it takes long to compile: at two dense lengths), a compiled rotation before SDPA, transformers' padded
path. Each time is a median over rotated inputs, together larger than the cache; a baseline that refuses a case has no
row. Random weights and inputs: it measures time only. Writes `results/kernels.jsonl`.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from effllm_kernels import attention, hf
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from effllm.measure.statistics import median_interval
from effllm.rows import Row, read_rows, write_rows

RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"
BACKENDS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
OURS, FLEX, PADDED = "effllm", "FlexAttention compiled", "transformers padded flash"
TOKENS, WINDOW = 16384, 64
FLEX_LENGTHS = (512, 8192)
CACHE_BYTES = 256 << 20
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Scale:
    """How much is measured, and where."""

    device: str
    lengths: tuple[int, ...]
    long: int
    short: tuple[int, ...]
    tokens: int
    repeats: int
    writes: bool

    @property
    def gpu(self) -> bool:
        """Whether it is a measurement and not only an exercise."""
        return self.device == "cuda"


FULL = Scale("cuda", (128, 256, 512, 1024, 2048, 4096, 8192), 8192, (32, 64, 128, 256), TOKENS, 25, True)
QUICK = Scale("cuda", (128, 2048), 2048, (64,), TOKENS, 7, False)
CPU = Scale("cpu", (32,), 160, (16,), 64, 2, False)


def timed(calls: list[Callable[[], Any]], scale: Scale) -> list[float]:
    """Return microseconds of each repeat; the calls, equal but for their inputs, take turns."""
    turns = itertools.cycle(calls)
    for _ in range(2 * len(calls)):
        next(turns)()
    found = []
    for _ in range(scale.repeats):
        if not scale.gpu:
            start = time.perf_counter()
            next(turns)()
            found.append((time.perf_counter() - start) * 1e6)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000 * len(calls))  # half a ms a call: the host runs ahead, its time is not measured
        begin.record()
        for _ in range(len(calls)):
            next(turns)()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return found


def row(
    metric: str, unit: str, system: str, values: list[float], how: dict[str, Any], rate: float | None = None
) -> Row:
    """Return a median as a row: of times in µs, or with `rate` of rate / time."""
    numbers = values if rate is None else [rate / value for value in values]
    median, low, high = median_interval(numbers)
    found = Row(metric, median, unit, system, len(values), low, high, how | versions(), where())
    print(f"{metric:34} {system:28} {median:10.4g} {unit:9} {how}", flush=True)
    return found


def versions() -> dict[str, str]:
    """Return the versions that decide a time."""
    found = {"torch": torch.__version__, "transformers": transformers.__version__}
    if torch.cuda.is_available():
        found |= {"triton": importlib.metadata.version("triton"), "cuda": str(torch.version.cuda)}
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def where() -> str:
    """Return the device's name."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def rooflines(scale: Scale) -> Iterator[Row]:
    """Yield what the machine reaches: bytes copied, and a bfloat16 product."""
    size, side = (1 << 30, 8192) if scale.gpu else (1 << 16, 64)
    source, target = (torch.empty(size, dtype=torch.uint8, device=scale.device) for _ in range(2))
    values = timed([lambda: target.copy_(source)], scale)
    yield row("copy", "GB/s", "machine", values, {"bytes": size}, 2 * size / 1e3)  # read and written
    a, b = (torch.randn(side, side, device=scale.device, dtype=torch.bfloat16) for _ in range(2))
    yield row("bf16 product", "TFLOP/s", "machine", timed([lambda: a @ b], scale), {"side": side}, 2 * side**3 / 1e6)


def inputs(scale: Scale, batch: int, length: int, heads: int, width: int) -> list[list[Tensor]]:
    """Return enough (B, S, H, D) triples to miss the cache."""
    size = 3 * batch * length * heads * width * 2
    count = max(2, min(128, CACHE_BYTES // size + 1)) if scale.gpu else 2
    dtype = torch.bfloat16 if scale.gpu else torch.float32
    shape = (3, batch, length, heads, width)
    made = [torch.randn(shape, device=scale.device, dtype=dtype) for _ in range(count)]
    return [list(one.unbind()) for one in made]


def heads_first(call: Callable[..., Tensor], **settings: Any) -> Call:
    """Return a call on (B, S, H, D) of a function on (B, H, S, D)."""
    return lambda q, k, v: call(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **settings).transpose(1, 2)


def named(backend: SDPBackend) -> Callable[..., Tensor]:
    """Return SDPA that runs on this backend or fails."""

    def call(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(q, k, v, **settings)

    return call


def sdpa(scale: Scale, **settings: Any) -> dict[str, Call]:
    """Return a call for each backend; the CPU has one of its own."""
    backends = BACKENDS if scale.gpu else {"SDPA math": SDPBackend.MATH}
    return {name: heads_first(named(backend), **settings) for name, backend in backends.items()}


def flex(scale: Scale, rule: Callable[..., Tensor] | None, batch: int | None, length: int) -> dict[str, Call]:
    """Return FlexAttention with its block mask made beforehand, compiled on a GPU for this shape and no other."""
    torch._dynamo.reset()  # past its limit of recompilations dynamo would refuse
    mask = None if rule is None else create_block_mask(rule, batch, None, length, length, device=scale.device)
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return {FLEX: heads_first(compiled if scale.gpu else flex_attention, block_mask=mask)}


def compare(
    scale: Scale, metric: str, calls: dict[str, Call], sets: list[list[Tensor]], how: dict[str, Any], flops: float,
    *, backward: bool = False,
) -> Iterator[Row]:  # fmt: skip
    """Yield each call's rate, forward or forward and backward."""
    gradient = torch.randn_like(sets[0][0])
    sets = [[x.detach().requires_grad_(backward) for x in one] for one in sets]

    def once(call: Call, tensors: list[Tensor]) -> None:
        if backward:
            torch.autograd.grad(call(*tensors), tensors, gradient)
        else:
            with torch.inference_mode():
                call(*tensors)

    for name, call in calls.items():
        try:
            once(call, sets[0])
        except (RuntimeError, NotImplementedError, ValueError) as error:
            print(f"{metric:34} {name:28} refuses {how}: {str(error).splitlines()[0][:80]}")
            continue
        turns = [lambda call=call, tensors=tensors: once(call, tensors) for tensors in sets]
        yield row(metric, "TFLOP/s", name, timed(turns, scale), how, flops / 1e6)


def dense(scale: Scale) -> Iterator[Row]:
    """Yield forward, and forward + backward, of full attention over S at a constant number of tokens."""
    for width, length in itertools.product((64, 128), scale.lengths):
        batch, heads = max(1, scale.tokens // length), 2048 // width if scale.gpu else 2
        sets = inputs(scale, batch, length, heads, width)
        calls = {OURS: attention, **sdpa(scale)}
        if length in FLEX_LENGTHS or not scale.gpu:
            calls |= flex(scale, None, None, length)
        how = {"batch": batch, "length": length, "heads": heads, "width": width}
        flops = 4.0 * batch * heads * length**2 * width
        yield from compare(scale, "attention forward", calls, sets, how, flops)
        if not scale.gpu:  # FlexAttention has no backward pass on the CPU
            calls.pop(FLEX)
        yield from compare(scale, "attention forward + backward", calls, sets, how, 3.5 * flops, backward=True)


def padded(scale: Scale) -> Iterator[Row]:
    """Yield a padded batch at 50 % fill; the rate counts the real products only, so it compares times."""
    for length in (512, 2048) if scale.gpu else (32,):
        batch, heads, width = max(2, scale.tokens // length), 12 if scale.gpu else 2, 64
        lengths = torch.linspace(1, length - 1, batch, device=scale.device).round().to(torch.int32)
        real = torch.arange(length, device=scale.device) < lengths[:, None]
        sets = inputs(scale, batch, length, heads, width)
        calls: dict[str, Call] = {
            OURS: lambda q, k, v, n=lengths: attention(q, k, v, key_lengths=n, query_lengths=n),
            **sdpa(scale, attn_mask=real[:, None, None, :].expand(batch, 1, length, length)),
            **flex(scale, lambda b, h, i, j, n=lengths: (i < n[b]) & (j < n[b]), batch, length),
        }
        if scale.gpu:
            calls[PADDED] = transformers_padded(real)
        how = {"batch": batch, "length": length, "heads": heads, "width": width, "fill": 0.5}
        flops = 4.0 * heads * width * float(lengths.double().square().sum())
        yield from compare(scale, "padded forward", calls, sets, how, flops)
        if not scale.gpu:
            calls.pop(FLEX)
        yield from compare(scale, "padded forward + backward", calls, sets, how, 3.5 * flops, backward=True)


def transformers_padded(real: Tensor) -> Call:
    """Return what transformers does with flash attention and padding: gather, packed attention, scatter.

    The packed attention is PyTorch's own FlashAttention; the package flash_attn has to be compiled.
    """
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 (needs a GPU)
    from transformers.modeling_flash_attention_utils import (  # noqa: PLC0415
        _pad_input,
        _unpad_input,
        _upad_input,
    )

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys, values, places, starts, longest = _upad_input(q, k, v, real, q.shape[1], _unpad_input)
        out = varlen_attn(rows, keys, values, *starts, *longest)
        return _pad_input(out, places, *q.shape[:2])

    return call


def window(scale: Scale) -> Iterator[Row]:
    """Yield a window of ±64 at full length, and full attention beside it, as time."""
    length, heads, width = scale.long, 12 if scale.gpu else 1, 64
    sets = inputs(scale, 1, length, heads, width)
    near = flex(scale, lambda b, h, i, j: (i - j).abs() <= WINDOW, None, length)[FLEX]
    calls: dict[str, Call] = {
        "effllm full": attention,
        "effllm window": lambda q, k, v: attention(q, k, v, window=WINDOW),
        f"{FLEX} window": near,
    }
    how = {"batch": 1, "length": length, "heads": heads, "width": width, "window": WINDOW}
    for name, call in calls.items():
        with torch.inference_mode():
            turns = [lambda call=call, one=one: call(*one) for one in sets]
            yield row("window ±64 forward", "µs", name, timed(turns, scale), how)


def rotary(scale: Scale) -> Iterator[Row]:
    """Yield attention whose q and k come unrotated, full and in a window, rotated by the kernel or beforehand."""
    turn = torch.compile(turned, fullgraph=True, dynamic=False) if scale.gpu else turned
    for length in (128, 512, 2048, 8192) if scale.gpu else (32,):
        torch._dynamo.reset()
        batch, heads, width = max(1, scale.tokens // length), 12 if scale.gpu else 2, 64
        sets = inputs(scale, batch, length, heads, width)
        phase = torch.arange(length)[:, None] * 10_000.0 ** -(torch.arange(width // 2) / (width // 2))
        cos, sin = (table.to(sets[0][0]) for table in (phase.cos(), phase.sin()))

        def before(call: Call, cos: Tensor = cos, sin: Tensor = sin) -> Call:
            return lambda q, k, v: call(turn(q, cos, sin), turn(k, cos, sin), v)

        fused = functools.partial(attention, rotary_cos=cos, rotary_sin=sin)
        calls = {OURS: fused, f"rotation + {OURS}": before(attention)}
        calls |= {f"rotation + {name}": before(call) for name, call in sdpa(scale).items()}
        local: dict[str, Call] = {
            OURS: functools.partial(fused, window=WINDOW),
            f"rotation + {OURS}": before(functools.partial(attention, window=WINDOW)),
        }
        how = {"batch": batch, "length": length, "heads": heads, "width": width}
        flops = 4.0 * batch * heads * length**2 * width
        yield from compare(scale, "rotary forward", calls, sets, how, flops)
        yield from compare(scale, "rotary forward + backward", calls, sets, how, 3.5 * flops, backward=True)
        yield from compare(scale, "rotary window ±64 forward", local, sets, how | {"window": WINDOW}, flops)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return (B, S, H, D) rotated, the pairs being the columns (c, c + D / 2)."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def short(scale: Scale) -> Iterator[Row]:
    """Yield short sequences' times without the host's: replayed CUDA graphs; and the host's time a call."""
    for batch, length in itertools.product((8, 32) if scale.gpu else (2,), scale.short):
        sets = inputs(scale, batch, length, 12 if scale.gpu else 2, 64)
        how = {"batch": batch, "length": length, "heads": sets[0][0].shape[2], "width": 64}
        for name, call in {OURS: attention, **sdpa(scale)}.items():
            turns = [graphed(call, one, scale) for one in sets]
            yield row("short forward under graphs", "µs", name, timed(turns, scale), how)
    sets = inputs(scale, 1, 16, 2, 64)
    with torch.inference_mode():
        for name, call in {OURS: attention, **sdpa(scale)}.items():
            yield row("host time a call", "µs", name, host_times(call, sets[0], scale), {"batch": 1, "length": 16})


def graphed(call: Call, tensors: list[Tensor], scale: Scale) -> Callable[[], Any]:
    """Return the replay of a captured call, the call itself on the CPU."""
    if not scale.gpu:
        return lambda: call(*tensors)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(*tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(*tensors)
    return graph.replay


def host_times(call: Call, tensors: list[Tensor], scale: Scale) -> list[float]:
    """Return microseconds until a call returns, each the mean of 100 while the device is far from behind."""
    found = []
    for _ in range(scale.repeats):
        if scale.gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            call(*tensors)
        found.append((time.perf_counter() - start) * 1e4)
    return found


def models(scale: Scale) -> Iterator[Row]:
    """Yield real tokens per second of whole encoders, random weights, on lengths drawn from a log-normal mix."""
    hf.register()
    batch, longest = (64, 512) if scale.gpu else (3, 24)
    draws = torch.randn(batch, generator=torch.Generator().manual_seed(0))
    lengths = (draws * 0.8 + 4.8).exp().round().clamp(8, longest).to(torch.int64)
    width = int(lengths.max())
    mask = (torch.arange(width) < lengths[:, None]).long().to(scale.device)
    ids = torch.randint(5, 30000 if scale.gpu else 50, (batch, width), device=scale.device)
    small = {} if scale.gpu else {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 50}
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    configs = {"BERT-base": transformers.BertConfig(**small)}
    configs["ModernBERT-base"] = transformers.ModernBertConfig(**small | ({} if scale.gpu else ends))
    how = {"batch": batch, "width": width, "tokens": int(lengths.sum()), "lengths": "log-normal 4.8 ± 0.8"}
    for name, config in configs.items():
        for system in ("effllm", "sdpa", "sdpa compiled", "effllm compiled"):
            kind, _, compiled = system.partition(" ")
            model = transformers.AutoModel.from_config(config, attn_implementation=kind, dtype=torch.bfloat16)
            model = model.to(scale.device).eval()
            run = torch.compile(model) if compiled and scale.gpu else model
            with torch.inference_mode():
                values = timed([lambda run=run: run(input_ids=ids, attention_mask=mask)], scale)
            yield row(f"{name} forward", "tokens/s", system, values, how, float(lengths.sum()) * 1e6)


PARTS: dict[str, Callable[[Scale], Iterator[Row]]] = {
    part.__name__: part for part in (rooflines, dense, padded, window, rotary, short, models)
}


def main() -> None:
    """Measure, print, and write the rows of a full run."""
    parser = argparse.ArgumentParser(description="Time the attention kernels on a GPU.")
    parser.add_argument("--quick", action="store_true", help="few sizes and repeats, no rows written")
    parser.add_argument("--cpu", action="store_true", help="exercise the code at tiny sizes, no rows written")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=[*PARTS], help="the parts to measure")
    options = parser.parse_args()
    scale = CPU if options.cpu else QUICK if options.quick else FULL
    if scale.gpu and not torch.cuda.is_available():
        parser.error("no GPU: use --cpu to exercise the code")
    torch.manual_seed(0)
    before = read_rows(RESULTS) if RESULTS.exists() else []
    found: list[Row] = []
    for name in options.only:
        found += PARTS[name](scale)
        if scale.writes:
            measured = {row.metric for row in found}
            write_rows(RESULTS, [*(row for row in before if row.metric not in measured), *found])


if __name__ == "__main__":
    main()
