"""The quality gate: whether a compressed model is still right."""

from __future__ import annotations

from dataclasses import dataclass

from effllm.measure.quality import Comparison


@dataclass(frozen=True)
class Verdict:
    """Whether a comparison stays within the allowed drop, and the sentence that says so."""

    passed: bool
    drop: float
    reason: str


def judge(comparison: Comparison, max_drop: float) -> Verdict:
    """Judge a comparison.

    With reference answers, the drop is the share of the dense metric that is lost, or that an error rises by. Without,
    and where the dense model scores 0 or less, it is one minus the agreement with the dense model: answers for
    classifiers, taggers and readers, likeliest next tokens for decoders, mean cosine for embeddings.
    """
    drop = comparison.drop
    if comparison.can_fall:
        what = f"{comparison.metric} {'rise' if comparison.task.lower_is_better else 'drop'} {_percent(drop)} of dense"
    else:
        why = "no labelled data was given"
        if comparison.labelled:
            why = f"the dense model's {comparison.metric} is {comparison.task.score(comparison.dense):.3g}"
        what = f"disagreement with dense {_percent(drop)} ({why})"
    passed = drop <= max_drop
    return Verdict(passed, drop, f"{what}, {'within' if passed else 'more than'} {allowance(max_drop)}")


def allowance(max_drop: float) -> str:
    """Return the words with which a verdict ends."""
    return f"the allowed {_percent(max_drop)}"


def _percent(share: float) -> str:
    """Return a share in percent with at least one significant digit."""
    return f"{share:.2%}" if abs(share) >= 5e-5 or share == 0 else f"{share * 100:.1g}%"
