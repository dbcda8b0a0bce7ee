"""The Fisher information of a task's answers without labels: gradients of an objective drawn from the model itself.

The Fisher matrix is the mean of g gᵀ, where g is the gradient of the negative log-likelihood of an answer that is drawn
from the model's own distribution (Kunstner et al. 2019, "Limitations of the empirical Fisher approximation"), so it
needs texts and no labels. Classes are drawn from the softmax, labels of which a text can have several each from its
sigmoid. Numbers and embeddings are the means of Gaussians of unit variance, where g is the inner product of the output
with a standard normal vector.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from effllm.compression.calibrate import feeds
from effllm.progress import Track, silent
from effllm.runtime.tokenizer import Encoding
from effllm.tasks import Head, Task
from effllm.tasks.text_classification import gives_each_label
from effllm.train.distil import EMBEDDING, SPANS, has_or_has_not
from effllm.train.supervised import pool

STATES = "last_hidden_state"


def task_outputs(model: Any, task: Task, head: Head, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a model's outputs for the task by name; token states become unit vectors (n, H), named `embedding`."""
    output = model(**inputs)
    if task.outputs != (STATES,):
        return {name: output[name] for name in task.outputs}
    pooled = pool(output[STATES], inputs["attention_mask"] == 1, head.pooling)
    return {EMBEDDING: functional.normalize(pooled, dim=-1)}


def probe_loss(
    task: Task, head: Head, outputs: Mapping[str, torch.Tensor], mask: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Return the objective, a 0-D sum over examples or tokens, whose gradients' outer products make the Fisher matrix.

    `outputs` are the model's by name, or the `embedding`; `mask` bool (n, T) marks real tokens. With classes it is the
    negative log-likelihood in nats of a drawn answer: a label per text for text classification, or for each label
    whether a text has it; a label per real token for token classification and fill-mask; a first and a last token for
    question answering. With one number per text, with embeddings and with token states it is the inner product with a
    standard normal vector. What is drawn does not depend on padding; the generator is on the CPU.
    """
    total = mask.new_zeros((), dtype=torch.float32)
    for name in (EMBEDDING,) if EMBEDDING in outputs else task.outputs:
        values = outputs[name]
        rows = values[mask] if values.dim() == 3 else values
        if name in SPANS:
            rows = values.masked_fill(~mask, -torch.inf)
        if name in (EMBEDDING, STATES) or rows.shape[-1] == 1:
            total = total + (rows.float() * torch.randn(rows.shape, generator=generator).to(rows.device)).sum()
        else:
            rows = has_or_has_not(rows).flatten(0, 1) if gives_each_label(task, head) else rows
            total = total + functional.cross_entropy(rows.float(), _drawn(rows, generator), reduction="sum")
    return total


def _drawn(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw one class per row of logits (n, C), int64 (n,); one random number per row, whatever C."""
    reached = logits.detach().double().softmax(dim=-1).cumsum(dim=-1)
    share = torch.rand(len(logits), 1, generator=generator).to(logits.device, torch.float64)
    return torch.searchsorted(reached, share * reached[:, -1:], right=True)[:, 0]


def per_example_gradients(
    model: Any,
    task: Task,
    head: Head,
    encodings: Sequence[Encoding],
    parameters: Sequence[torch.Tensor],
    *,
    count: int,
    seed: int,
    track: Track = silent,
    what: str = "gradients",
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield `count` gradients of the probe, each of one text, with regard to `parameters`, in their shapes.

    The texts are gone through again, with other draws, where there are fewer of them. A parameter that the answer does
    not depend on has a gradient of zero. The model runs in eval mode and its `.grad` stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    texts = itertools.islice(itertools.chain.from_iterable(feeds(model, encodings) for _ in itertools.count()), count)
    for inputs in track(texts, what, count):
        with torch.enable_grad():
            outputs = task_outputs(model, task, head, inputs)
            loss = probe_loss(task, head, outputs, inputs["attention_mask"] == 1, generator)
            gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        yield tuple(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True))
