"""What a list of outcomes says: rates, percentiles, and what is left out."""

from __future__ import annotations

import io

import numpy as np
import pytest

from effllm.data.lengths import texts_of_lengths
from effllm.measure.serving_load import TIMED_OUT, LoadRun, Sent, poisson_arrivals
from effllm.report import terminal_table
from effllm.rows import Row


def values(rows: list[Row]) -> dict[str, float]:
    return {row.metric + str(row.how.get("outcome", "")): row.value for row in rows}


def test_arrivals_are_a_poisson_process() -> None:
    times = poisson_arrivals(200.0, 100.0, seed=1)
    gaps = np.diff(times, prepend=0.0)
    assert times.max() < 100
    assert len(times) == pytest.approx(20000, abs=5 * 20000**0.5)
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.04)
    assert gaps.std() == pytest.approx(1 / 200, rel=0.04)  # an exponential's spread is its mean
    assert (poisson_arrivals(200.0, 100.0, seed=1) == times).all()
    assert (poisson_arrivals(200.0, 100.0, seed=2)[:5] != times[:5]).all()


def test_rates_and_percentiles_of_known_delays() -> None:
    delays = np.arange(1, 1001) / 1000  # 1 ms … 1 s
    sent = [
        Sent(i / 100, i / 100, i / 100 + d, 2, "200")
        for i, d in enumerate(np.random.default_rng(0).permutation(delays))
    ]
    found = values(LoadRun(sent, 10.0).rows("s", {"clients": 1}, within_ms=500.0))
    assert found["request p50"] == pytest.approx(500.5)
    assert found["request p90"] == pytest.approx(900.1)
    assert found["request p99"] == pytest.approx(990.01)
    in_time = [s for s in sent if s.done_s < 10]
    assert found["throughput served"] == pytest.approx(2 * len(in_time) / 10)
    assert found["goodput"] == pytest.approx(2 * sum(s.done_s - s.due_s <= 0.5 for s in in_time) / 10)
    assert found["requests200"] == 1000
    assert found[f"requests{TIMED_OUT}"] == 0


def test_latency_counts_from_when_a_request_was_due() -> None:
    sent = [Sent(due_s=1.0, sent_s=1.4, done_s=1.5, texts=1, outcome="200")]
    found = values(LoadRun(sent, 2.0).rows("s", {}, 1e3))
    assert found["request p50"] == pytest.approx(500)
    assert found["send delay p99"] == pytest.approx(400)


def test_warm_up_and_failures_do_not_count_as_answers() -> None:
    sent = [
        Sent(-0.5, -0.5, -0.4, 1, "200"),  # warm-up
        Sent(-0.5, -0.5, 0.5, 1, "200"),  # due in the warm-up, done after it: throughput, no latency
        Sent(0.5, 0.5, 0.6, 1, "200"),
        Sent(0.6, 0.6, 5.6, 1, TIMED_OUT),
        Sent(0.7, 0.7, 0.71, 1, "429"),
        Sent(0.9, 0.9, 1.3, 1, "200"),  # done after the end: latency, no throughput
        Sent(1.2, 1.2, 1.3, 1, "503"),  # due after the end
    ]
    rows = LoadRun(sent, 1.0).rows("s", {}, 1e3)
    found = values(rows)
    assert found["throughput served"] == pytest.approx(2.0)
    assert found["request p50"] == pytest.approx(400), "of 100, 400 and the 5,000 after which it was given up"
    assert (found["requests200"], found["requests429"], found[f"requests{TIMED_OUT}"]) == (2, 1, 1)
    assert "requests503" not in found
    assert all(row.how["role"] == "serving" and row.machine for row in rows)


def test_nothing_answered_has_rates_but_no_latencies() -> None:
    found = values(LoadRun([Sent(0.1, 0.1, 0.2, 1, "500")], 1.0).rows("s", {}, 1e3))
    assert found["throughput served"] == 0
    assert not any(name.startswith("request p") for name in found)
    assert values(LoadRun([], 1.0).rows("s", {}, 1e3))["requests200"] == 0


def test_intervals_widen_when_a_part_of_the_time_was_slow() -> None:
    """A stall hits neighbours together: resampled one by one, 1,000 requests would seem to know p90 well."""
    steady = [Sent(i / 100, i / 100, i / 100 + 0.01 * (1 + i % 10), 1, "200") for i in range(1000)]
    stalled = [s._replace(done_s=s.done_s + (0.5 if 400 <= i < 510 else 0.0)) for i, s in enumerate(steady)]

    def width(sent: list[Sent]) -> float:
        row = next(r for r in LoadRun(sent, 10.0).rows("s", {}, 1e3) if r.metric == "request p90")
        assert row.low <= row.value <= row.high
        return row.high - row.low

    assert width(steady) < 15
    assert width(stalled) > 400


def test_a_load_is_one_line_of_a_table() -> None:
    from rich.console import Console

    rows = []
    for clients in (1, 8):
        sent = [
            Sent(i / 50, i / 50, i / 50 + 0.01, 1, "429" if i % 5 == 0 and clients == 8 else "200") for i in range(100)
        ]
        rows += LoadRun(sent, 2.0).rows("ours", {"api": "tei", "clients": clients}, 1e3)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(rows))
    text = console.export_text()
    assert "1 client " in text
    assert "8 clients" in text
    assert "429: 20" in text
    assert "OTHER MEASUREMENTS" not in text


def test_words_are_one_token_each(minilm) -> None:
    from effllm.folder import open_folder
    from effllm.runtime.tokenizer import TextTokenizer

    tokenizer = TextTokenizer.open(open_folder(minilm, weights=False))
    lengths = [len(tokenizer.encode(text)) for text in texts_of_lengths(8, 128, 200)]
    assert min(lengths) < 16
    assert max(lengths) > 120
    assert all(8 <= length <= 128 for length in lengths)
    assert len(tokenizer.encode(texts_of_lengths(64, 64, 1)[0])) == 64
