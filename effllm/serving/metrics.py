"""What a server counts, for Prometheus: its own registry, no default collectors."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from effllm.serving.served import Answers, Models

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Metrics:
    """Counters and histograms. Labels are names of models and templates of paths, never what a client wrote."""

    def __init__(self, models: Models) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        self._requests = self._counter("requests", "Requests by path and status.", ("path", "status"))
        self._gone = self._counter("client_gone", "Requests whose client closed before the answer.", ("path",))
        self._total = self._histogram("request_seconds", "From the head of a request to its answer.", "path")
        self._queue = self._histogram("queue_seconds", "The time that a request waited for its model.", "model")
        self._tokenise = self._histogram("tokenise_seconds", "The time that tokenising took.", "model")
        self._infer = self._histogram("infer_seconds", "The time that the model ran.", "model")
        self._inputs = self._counter("inputs", "Inputs answered.", ("model",))
        self._tokens = self._counter("tokens", "Tokens run, without padding.", ("model",))
        self._truncated = self._counter("truncated_tokens", "Tokens cut off because they did not fit.", ("model",))
        self._registry.register(_Gauges(models))
        # Looking labels up takes longer than counting; there are few of them.
        self._of_model = functools.cache(
            lambda model: (
                self._queue.labels(model),
                self._tokenise.labels(model),
                self._infer.labels(model),
                self._inputs.labels(model),
                self._tokens.labels(model),
                self._truncated.labels(model),
            )
        )
        self._of_path = functools.cache(
            lambda path, status: (self._requests.labels(path, status), self._total.labels(path))
        )

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"effllm_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, label: str) -> Histogram:
        return Histogram(f"effllm_{name}", text, (label,), registry=self._registry, buckets=SECONDS)

    def answered(self, model: str, answers: Answers) -> None:
        """Count a request that a model answered."""
        queue, tokenise, infer, inputs, tokens, truncated = self._of_model(model)
        queue.observe(answers.queue_s)
        tokenise.observe(answers.tokenise_s)
        infer.observe(answers.infer_s)
        inputs.inc(len(answers.results))
        tokens.inc(answers.tokens)
        truncated.inc(sum(result.truncated_tokens for result in answers.results))

    def done(self, path: str, status: int, seconds: float) -> None:
        """Count a request that got an answer."""
        requests, total = self._of_path(path, status)
        requests.inc()
        total.observe(seconds)

    def gone(self, path: str) -> None:
        """Count a request whose client closed."""
        self._gone.labels(path).inc()

    def text(self) -> bytes:
        """Return all of it in the Prometheus text format."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    """What is read from the models when it is asked for."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """Yield the queue, the readiness and, where the models count them, the restarts of every model."""
        queued = GaugeMetricFamily("effllm_queue_size", "Inputs that wait.", labels=("model",))
        ready = GaugeMetricFamily("effllm_ready", "1 where the model answers.", labels=("model",))
        restarts = CounterMetricFamily("effllm_worker_restarts", "Workers started again.", labels=("model",))
        for name, model in self._models.models.items():
            queued.add_metric((name,), model.queued)
            ready.add_metric((name,), float(model.ready))
            restarts.add_metric((name,), getattr(model, "restarts", 0))
        yield from (queued, ready, restarts)
