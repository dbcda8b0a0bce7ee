"""Write the README's tables and plots from the committed rows. `--check` fails when one is not what the rows say.

python benchmarks/readme.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import compression_report

from effllm.report import text
from effllm.rows import Row, read_rows

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
SPARSITY = RESULTS / "sparsity.svg"
MASKED = "head on masked positions"


def find(rows: list[Row], metric: str, system: str, **how: object) -> Row | None:
    """Return the newest row of a metric and system whose `how` holds the given entries."""
    matching = [
        row
        for row in rows
        if row.metric == metric and row.system == system and all(row.how.get(k) == v for k, v in how.items())
    ]
    return max(matching, key=lambda row: row.at, default=None)


def stsb_table() -> str:
    """Return quality, speed and size of all-MiniLM-L6-v2's forms."""
    rows = read_rows(RESULTS / "stsb_int8.jsonl")
    systems = list(dict.fromkeys(row.system for row in rows if row.metric == "model size"))
    lines = [
        "| | Spearman, STS-B test | change [95 %] | cosine to dense | 1 × 128, ms | speed-up "
        "| 16 × 64, texts/s | speed-up | model file |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for system in systems:
        dagger = " †" if find(rows, "batch dependent", system) else ""
        lines.append(f"| {system}{dagger} | " + " | ".join(_cells(rows, system)) + " |")
    first = rows[0]
    lines += [
        "",
        f"{first.machine}; one thread, one interleaved run, medians of 15 rounds; speed-up over ONNX Runtime fp32 "
        f"exported by effllm. {first.at[:10]}. † answers can depend on the other texts in the batch.",
        "",
        _cost_sentence(rows),
        "",
        _over_bf16_sentence(rows),
        "",
        _other_machine_sentence(read_rows(RESULTS / "stsb_int8_avx2.jsonl")),
    ]
    return "\n".join(lines)


def _over_bf16_sentence(rows: list[Row]) -> str:
    """Return what int8 gains over the dense form that is faster at these loads."""
    gains = [
        find(rows, "speed-up", "int8", **load).value / find(rows, "speed-up", "torch bf16", **load).value
        for load in ({"batch": 1, "tokens": 128}, {"batch": 16, "tokens": 64})
    ]
    return (
        "This processor has bfloat16 products; over torch bf16, the faster dense form at these loads, int8 is "
        f"{text.ratio(gains[0])[0]} and {text.ratio(gains[1])[0]} as fast. OpenVINO was not measured."
    )


def _other_machine_sentence(rows: list[Row]) -> str:
    """Return what int8 gained where there is no 8-bit dot product."""
    short, long = (
        find(rows, "speed-up", "int8", batch=batch, tokens=tokens).value for batch, tokens in ((1, 128), (16, 64))
    )
    return (
        f"Without 8-bit dot products int8 gains less ({rows[0].machine}): "
        f"{text.ratio(short)[0]} at 1 × 128 and {text.ratio(long)[0]} at 16 × 64."
    )


def _cells(rows: list[Row], system: str) -> list[str]:
    short, long = {"batch": 1, "tokens": 128}, {"batch": 16, "tokens": 64}

    def cell(metric: str, form: Callable[[Row], str], **how: object) -> str:
        row = find(rows, metric, system, **how)
        return form(row) if row else "–"

    def interval(row: Row) -> str:
        value, bounds = text.change(row.value, row.low, row.high)
        return f"{value} {bounds}"

    return [
        cell("spearman", lambda r: f"{r.value:.4f}"),
        cell("spearman change", interval),
        cell("cosine mean", lambda r: text.share(r.value)[0]),
        cell("latency p50", lambda r: f"{r.value:.1f}", **short),
        cell("speed-up", lambda r: text.ratio(r.value)[0], **short),
        cell("throughput", lambda r: f"{r.value:.0f}", **long),
        cell("speed-up", lambda r: text.ratio(r.value)[0], **long),
        cell("model size", lambda r: text.size(r.value)),
    ]


def _cost_sentence(rows: list[Row]) -> str:
    seconds, peak = find(rows, "compress time", "int8"), find(rows, "compress peak memory", "int8")
    if seconds is None or peak is None:
        return ""
    return (
        f"Making it (`effllm compress --method int8`, 500 calibration texts, gate on 1,500 pairs) took "
        f"{seconds.value:.0f} s and {text.size(peak.value)} of memory."
    )


def graph_form_table() -> str:
    """Return how fast each form of the exported float32 graph runs."""
    rows = read_rows(RESULTS / "graph_form.jsonl")
    systems = list(dict.fromkeys(row.system for row in rows))
    loads = [(1, 16), (1, 128), (16, 64)]
    lines = ["| exported graph | " + " | ".join(f"{b} × {t}" for b, t in loads) + " |", "|---|" + "---|" * len(loads)]
    for system in systems:
        cells = []
        for batch, tokens in loads:
            row = find(rows, "speed-up", system, batch=batch, tokens=tokens)
            cells.append(text.ratio(row.value)[0] if row else "–")
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{rows[0].machine}."])


def interop_table() -> str:
    """Return which tools loaded the folders, and how far their numbers are from effllm's."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in read_rows(RESULTS / "interop.jsonl"):
        groups.setdefault((row.system, str(row.how.get("loaded", row.metric))), []).append(row)
    lines = ["| tool | loaded | folders | largest difference |", "|---|---|---|---|"]
    for (system, loaded), rows in groups.items():
        worst = max(rows, key=lambda row: row.value)
        folders = ", ".join(str(row.how["folder"]) for row in rows)
        unit = "" if worst.unit == "absolute" else f" {worst.unit}"
        lines.append(f"| {system} | {loaded} | {folders} | {worst.value:.1e}{unit} |")
    return "\n".join(lines)


def exactness_table() -> str:
    """Return the factors by which loss and gradient norm are off when a batch is split."""
    rows = read_rows(RESULTS / "trainer_exactness.jsonl")
    splits = list(dict.fromkeys((row.how["processes"], row.how["accumulation"]) for row in rows))
    names = [f"{p} process{'es' if p > 1 else ''} × {a}" for p, a in splits]
    lines = ["| model | | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(splits)]
    for model in dict.fromkeys(row.how["model"] for row in rows):
        for system in dict.fromkeys(row.system for row in rows):
            cells = []
            for processes, accumulation in splits:
                how = {"model": model, "processes": processes, "accumulation": accumulation}
                loss, norm = (find(rows, f"{metric} factor", system, **how) for metric in ("loss", "gradient norm"))
                cells.append(f"{loss.value:.3f} / {norm.value:.3f}" if loss and norm else "–")
            lines.append(f"| {model} | {system} | " + " | ".join(cells) + " |")
    return "\n".join(
        [*lines, "", "Loss / gradient norm over those of the undivided batch; processes × accumulation steps."]
    )


def training_table() -> str:
    """Return what was measured on training, one line each, from the files that are there."""
    lines = ["| what | measured |", "|---|---|"]
    for name, sentences in TRAINING.items():
        file = RESULTS / f"{name}.jsonl"
        if not file.is_file():
            continue
        rows = read_rows(file)
        for what, metric, system, form, how in sentences:
            row = find(rows, metric, system, **how)
            if row:
                bounds = "" if row.low is None or row.high is None else f" [{form(row.low)}, {form(row.high)}]"
                lines.append(f"| {what} | {form(row.value)}{bounds} |")
    return "\n".join([*lines, *_finetuned_lines(), "", BRACKETS])


BRACKETS = (
    "Brackets: of accuracies the lowest and the highest seed; of gains 95 % over the seeds of fine-tuning, all from "
    "one pre-training; of the gap two standard errors; else 95 % of the median over the steps of one run."
)


def _finetuned_lines() -> list[str]:
    file = RESULTS / "finetuning.jsonl"
    if not file.is_file():
        return []
    rows = read_rows(file)
    lines = []
    for system in dict.fromkeys(row.system for row in rows):
        own = [row for row in rows if row.system == system]
        metric = own[0].metric
        found = [find(own, metric, system, split=split) for split in ("dev", "test")]
        parts = [f"{row.how['split']} {row.value:.4f}" for row in found if row]
        first = own[0]
        seeds = f"median of {first.n} seeds" if first.n > 1 else "one seed"
        what = f"all-MiniLM-L6-v2 fine-tuned on {system}, {first.how['examples']:,} examples, {seeds}: {metric}"
        lines.append(f"| {what} | {', '.join(parts)} |")
    return lines


def compression_table() -> str:
    """Return what each recipe costs a classifier, and the plot of quality against zeros."""
    picture = SPARSITY.relative_to(ROOT).as_posix()
    return compression_report.tables(
        read_rows(RESULTS / "compression.jsonl"), "accuracy", "SST-2 dev accuracy", picture
    )


def embedding_table() -> str:
    """Return what 8 and 4 bits cost embeddings."""
    rows = read_rows(RESULTS / "compression_stsb-en.jsonl")
    return compression_report.tables(rows, "spearman", "STS-B dev Spearman")


def chinese_table() -> str:
    """Return what each recipe costs a Chinese model of sentence similarity."""
    rows = read_rows(RESULTS / "compression_stsb-zh.jsonl")
    return compression_report.tables(rows, "spearman", "Chinese STS-B dev Spearman")


def sparsity_plot() -> str:
    """Return the plot of a classifier's quality against zeros."""
    rows = read_rows(RESULTS / "compression.jsonl")
    return compression_report.sparsity_plot(compression_report.recipes(rows, "accuracy"), "SST-2 dev accuracy")


def decoder_table() -> str:
    """Return one line per recipe on a small decoder: perplexity, change of the loss over the dense one's, size."""
    rows = read_rows(RESULTS / "decoder.jsonl")
    lines = ["| | perplexity | loss above dense, nats [95 %] | file |", "|---|---|---|---|"]
    for system in dict.fromkeys(row.system for row in rows if row.metric == "perplexity"):
        perplexity, size = (find(rows, metric, system) for metric in ("perplexity", "model size"))
        change = find(rows, "loss change", system)
        value, bounds = text.change(change.value, change.low, change.high) if change else ("–", "")
        loss = f"{value} {bounds}".rstrip()
        lines.append(f"| {system} | {perplexity.value:.2f} | {loss} | {text.size(size.value)} |")
    dense, tokens, parameters, seconds = (
        find(rows, metric, "dense")
        for metric in ("perplexity", "training tokens", "parameters", "training processor time")
    )
    made = (
        f"{parameters.value / 1e6:.1f} million parameters, trained for {seconds.value / 60:.0f} minutes of one core on "
        f"{tokens.value / 1e6:.1f} million tokens of English Wikipedia; {dense.n} other documents in windows of 256"
    )
    return "\n".join([*lines, "", f"{dense.machine}; {made}; one seed."])


OURS = "effllm serve"


def serving_table() -> str:
    """Return texts per second and waiting times of the servers and of the loop without one, and what broke."""
    rows = read_rows(RESULTS / "serving.jsonl")
    loads = ((32, "16–64"), (32, "8–128"), (1, "16–64"))
    lines = [
        "| | " + " | ".join(f"{c} client{'s' * (c > 1)}, {t} tokens" for c, t in loads) + " |",
        "|---|" + "---|" * len(loads),
    ]
    systems = [row.system for row in rows if row.how.get("part") == "peers" and row.metric == "throughput served"]
    for system in dict.fromkeys(systems):
        cells = []
        for clients, tokens in loads:
            how = {"part": "peers", "clients": clients, "tokens": tokens}
            rate, p50, p99 = (
                find(rows, metric, system, **how) for metric in ("throughput served", "request p50", "request p99")
            )
            times = f", p50 {p50.value:.0f} ms" if p50 else ""
            times += f", p99 {p99.value:.0f} ms" if p99 else ""
            cells.append(f"{rate.value:.0f} texts/s{times}" if rate else "–")
        lines.append(f"| {system} | {' | '.join(cells)} |")
    first = find(rows, "throughput served", OURS, part="peers", clients=32, tokens="8–128")
    goodput = find(rows, "goodput, share of peak", OURS)
    errors = find(rows, "server errors", OURS, part="overload")
    killed, lost = (find(rows, metric, OURS) for metric in ("workers killed", "requests without a clear end"))
    ends = (
        f"Under four times its load for a minute (cores: {goodput.how['cores']}) "
        f"it answered {goodput.value:.0%} of its peak [{goodput.low:.0%}, {goodput.high:.0%}], with {errors.value:.0f} "
        f"server errors; with {killed.value:.0f} workers killed under load {lost.value:.0f} requests were lost."
    )
    over = {"shapes": "10,000 requests of random shapes", "soak": "half an hour at 80 % load"}
    for part, what in over.items():
        growth = find(rows, "memory growth", OURS, part=part)
        if growth:
            ends += f" Over {what} its memory grew by {growth.value:.1%}."
    fifths = [find(rows, "request p99 of a fifth", OURS, part="soak", fifth=fifth) for fifth in ("first", "last")]
    if all(fifths):
        first_p99, last_p99 = (fifth.value for fifth in fifths)
        ends += f" In the first fifth of that half hour p99 was {first_p99:.0f} ms, in the last {last_p99:.0f} ms."
    typical = [find(rows, "request p99 of ten seconds", OURS, part="soak", fifth=fifth) for fifth in ("first", "last")]
    if all(typical):
        ends += " Of ten seconds it was {:.0f} and {:.0f} ms (medians).".format(*(one.value for one in typical))
    peaks = [row.value for row in rows if row.metric == "peak" and row.how.get("part") == "soak"]
    if peaks:
        ends += f" Meanwhile its peak, measured {len(peaks)} times, was {min(peaks):.0f} to {max(peaks):.0f} texts/s."
    how = (
        f"all-MiniLM-L6-v2 in int8, medians of {first.n} interleaved rounds of {first.how['seconds']:g} s, client and "
        "server on the same cores; infinity, and LitServe by default, run one batch on all cores, effllm one on each"
    )
    return "\n".join([*lines, "", f"{first.machine}; {how}. {ends}"])


KERNEL_SYSTEMS = (
    "effllm",
    "SDPA flash",
    "SDPA memory-efficient",
    "FlexAttention compiled",
)
KERNEL_CASES: tuple[tuple[str, str, dict[str, object]], ...] = (
    ("forward, 128 tokens, width 64", "attention forward", {"length": 128, "width": 64}),
    ("forward, 256 tokens, width 64", "attention forward", {"length": 256, "width": 64}),
    ("forward, 512 tokens, width 64", "attention forward", {"length": 512, "width": 64}),
    ("forward, 2,048 tokens, width 64", "attention forward", {"length": 2048, "width": 64}),
    ("forward and backward, 128 tokens, width 64", "attention forward + backward", {"length": 128, "width": 64}),
    ("forward and backward, 256 tokens, width 64", "attention forward + backward", {"length": 256, "width": 64}),
    ("forward and backward, 512 tokens, width 64", "attention forward + backward", {"length": 512, "width": 64}),
    ("forward and backward, 2,048 tokens, width 64", "attention forward + backward", {"length": 2048, "width": 64}),
    ("forward, 2,048 tokens, width 128", "attention forward", {"length": 2048, "width": 128}),
    ("forward, half padding, 512 tokens", "padded forward", {"length": 512}),
    ("forward, half padding, 2,048 tokens", "padded forward", {"length": 2048}),
    ("forward and backward, half padding, 512 tokens", "padded forward + backward", {"length": 512}),
    ("forward and backward, half padding, 2,048 tokens", "padded forward + backward", {"length": 2048}),
    ("forward in a CUDA graph, 8 × 32 tokens", "short forward under graphs", {"batch": 8, "length": 32}),
    ("forward in a CUDA graph, 32 × 128 tokens", "short forward under graphs", {"batch": 32, "length": 128}),
)


def kernels_table() -> str:
    """Return the speed of each attention over that of PyTorch's default on this GPU, SDPA's cuDNN."""
    rows = read_rows(RESULTS / "kernels.jsonl")
    lines = ["| | " + " | ".join(KERNEL_SYSTEMS) + " |", "|---|" + "---|" * len(KERNEL_SYSTEMS)]
    for what, metric, how in KERNEL_CASES:
        default = find(rows, metric, "SDPA cuDNN", **how)
        cells = []
        for system in KERNEL_SYSTEMS:
            row = find(rows, metric, system, **how)
            if row is None or default is None:
                cells.append("–")
                continue
            cells.append(f"{default.value / row.value if row.unit == 'µs' else row.value / default.value:.2f}×")
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    first = rows[0]
    ours_us, theirs_us = (find(rows, "host time a call", system).value for system in ("effllm", "SDPA cuDNN"))
    window_us, flex_us = (
        find(rows, "window ±64 forward", system).value for system in ("effllm window", "FlexAttention compiled window")
    )
    return "\n".join(
        [
            *lines,
            "",
            f"One {first.machine}, PyTorch {first.how['torch']}, Triton {first.how['triton']}, bfloat16, medians of "
            f"{first.n} rounds, {first.at[:10]}. 1.00× is SDPA's cuDNN, PyTorch's default there; – is a case that was "
            f"not measured or is refused. Of an eager call {ours_us:.0f} µs are the host's time (SDPA's: "
            f"{theirs_us:.0f}, with the choice of its backend), which the short cases outside of graphs contain. "
            "Padding and graphs were measured before the last changes of the kernels' tiles, graphs with inputs that "
            f"fit into the GPU's cache. A window of ±64 at 8,192 tokens took {window_us:.0f} µs as called, in compiled "
            f"FlexAttention {flex_us:.0f}.",
        ]
    )


def _number(value: float) -> str:
    return f"{value:.3f}"


def _points(value: float) -> str:
    return f"{100 * value:.1f} points"


def _times(value: float) -> str:
    return text.ratio(value)[0]


def _percent(value: float) -> str:
    return f"{value:.1%}"


BERT_BASE = "12 layers of 768 at 512 tokens, bfloat16"
BASE: dict[str, object] = {"what": "BERT 12 x 768, 512 tokens"}
MODERN_BASE: dict[str, object] = {"what": "ModernBERT 12 x 768, 512 tokens"}
MEDIUM: dict[str, object] = {"what": "ModernBERT 6 x 512, 128 tokens"}
EVERYTHING = "that model on all 67,349 examples, one epoch, one seed"
ON_CORE: dict[str, object] = {"pre-training seconds": 1200.0}
ON_GPU: dict[str, object] = {"pre-training seconds": 52.0}
LARGER_ON_GPU: dict[str, object] = {"pre-training seconds": 554.0}
TRAINING: dict[str, list[tuple[str, str, str, Callable[[float], str], dict[str, object]]]] = {
    "masked_head": [
        ("a step with the head on masked positions, over one with it on all", "speed-up", MASKED, _times, {}),
        ("share of a step that goes into making its batch", "data share of a step", MASKED, _percent, {}),
    ],
    "known_optimum": [
        (
            "masked loss above the least possible one, in a language where that is known, nats",
            "gap to the least possible",
            "effllm pretrain",
            _number,
            {},
        ),
    ],
    "gpu_training": [
        (
            f"model FLOP utilisation of pre-training on an H100, {BERT_BASE}, compiled",
            "MFU",
            "compiled",
            _percent,
            BASE,
        ),
        ("the same without --compile, half the batch, by an earlier version", "MFU", "as written", _percent, BASE),
        ("ModernBERT of that size, compiled", "MFU", "compiled", _percent, MODERN_BASE),
        ("6 layers of 512 at 128 tokens (ModernBERT), compiled", "MFU", "compiled", _percent, MEDIUM),
        ("share of such a step that is spent in waiting for data", "data wait", "compiled", _percent, MEDIUM),
        ("the same of ModernBERT, 12 layers of 768", "data wait", "compiled", _percent, MODERN_BASE),
    ],
    "transfer": [
        (
            "SST-2 dev accuracy from 2,000 examples, random weights, median of 5 seeds",
            "accuracy",
            "random weights",
            _percent,
            ON_CORE,
        ),
        ("the same after 20 minutes of pre-training on one core", "accuracy", "pre-trained", _percent, ON_CORE),
        ("gain, mean of the 5 paired differences", "gain", "pre-trained", _points, ON_CORE),
        (EVERYTHING, "accuracy", "pre-trained, all examples", _percent, ON_CORE),
        ("gain after 52 seconds of pre-training on an H100", "gain", "pre-trained", _points, ON_GPU),
        ("masked loss on dev after them, nats", "masked loss", "pre-trained", _number, ON_GPU),
        (EVERYTHING, "accuracy", "pre-trained, all examples", _percent, ON_GPU),
        (
            "gain of 6 layers of 512 after 9 minutes of pre-training there",
            "gain",
            "pre-trained",
            _points,
            LARGER_ON_GPU,
        ),
        ("masked loss on dev after them, nats", "masked loss", "pre-trained", _number, LARGER_ON_GPU),
    ],
}
"""File of rows -> (what it says, metric, system, how it is written, entries of the row's `how`)."""
TABLES = {
    "stsb_int8": stsb_table,
    "graph_form": graph_form_table,
    "trainer_exactness": exactness_table,
    "training": training_table,
    "interop": interop_table,
    "compression": compression_table,
    "compression_stsb-en": embedding_table,
    "compression_stsb-zh": chinese_table,
    "decoder": decoder_table,
    "kernels": kernels_table,
    "serving": serving_table,
}
PLOTS = {SPARSITY: sparsity_plot}


def rendered(readme: str) -> str:
    """Return the README's text with each table between its markers written anew."""
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- rows: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        readme = pattern.sub(lambda m, table=table: f"{m.group(1)}{table()}\n{m.group(2)}", readme)
    return readme


def main() -> int:
    """Write the README and the plots, or check them."""
    readme = ROOT / "README.md"
    files = {readme: rendered(readme.read_text(encoding="utf-8"))} | {file: plot() for file, plot in PLOTS.items()}
    changed = [file for file, new in files.items() if not file.is_file() or file.read_text(encoding="utf-8") != new]
    if "--check" in sys.argv:
        return int(bool(changed))
    for file in changed:
        file.write_text(files[file], encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
