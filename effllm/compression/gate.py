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
    it is one minus the agreement with the dense model: answers for classifiers, taggers and readers, likeliest next
    tokens for decoders, mean cosine for embeddings.
    """
    drop = comparison.drop
    if comparison.labelled:
        what = f"{comparison.metric} {'rise' if comparison.task.lower_is_better else 'drop'} {_percent(drop)} of dense"
    else:
        what = f"disagreement with dense {_percent(drop)} (no labelled data was given)"
    passed = drop <= max_drop
    return Verdict(passed, drop, f"{what}, {'within' if passed else 'more than'} the allowed {_percent(max_drop)}")


def _percent(share: float) -> str:
    """Return a share in percent with at least one significant digit."""
    return f"{share:.2%}" if abs(share) >= 5e-5 or share == 0 else f"{share * 100:.1g}%"
