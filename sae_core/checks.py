"""What a stage's numbers must be: each check once, for Dagster's pages and for the command line.

The bounds are the study's `[checks]`; the numbers are the stage's summary.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from sae_core.studies import Order
from sae_core.study import CheckSettings


class Bounds(NamedTuple):
    """The range a number must lie in, ends included."""

    low: float = -math.inf
    high: float = math.inf


class Check(NamedTuple):
    """One number of a summary, and the range that it must lie in."""

    name: str
    description: str
    number: Callable[[dict[str, Any]], float]
    bounds: Callable[[CheckSettings, Order], Bounds]
    warns: bool = False
    """True when failing is worth a warning but no error."""


class Verdict(NamedTuple):
    """A check's outcome."""

    check: Check
    value: float
    bounds: Bounds

    @property
    def passed(self) -> bool:
        """False for NaN, too."""
        return self.bounds.low <= self.value <= self.bounds.high

    @property
    def text(self) -> str:
        """The number and its range, in words."""
        limits = (f"at least {self.bounds.low:.4g}", f"at most {self.bounds.high:.4g}")
        wanted = " and ".join(t for t, b in zip(limits, self.bounds, strict=True) if math.isfinite(b))
        return f"{self.check.name} is {self.value:.4g}; wanted {wanted or 'any number'}"


def _number(key: str) -> Callable[[dict[str, Any]], float]:
    return lambda summary: float(summary[key])


def _l0(wanted: CheckSettings, order: Order) -> Bounds:
    """Of what has no k, L0 is an outcome: any is right."""
    if (k := order.trained.k) is None:
        return Bounds()
    return Bounds(k * (1 - wanted.l0_tolerance), k * (1 + wanted.l0_tolerance))


def _share_finite(summary: dict[str, Any]) -> float:
    numbers = [value for value in summary.values() if isinstance(value, float)]
    return sum(map(math.isfinite, numbers)) / max(len(numbers), 1)


CHECKS: dict[str, list[Check]] = {
    "corpus": [
        Check(
            "enough_text", "The sources filled the token budget (share of it).",
            lambda s: s["tokens"] / (s["tokens"] + s["short_by"]), lambda wanted, order: Bounds(low=0.9), warns=True,
        ),
    ],
    "activations": [
        Check(
            "few_sinks", "Attention sinks, which are left out, are a small share of the tokens.",
            _number("sink_share"), lambda wanted, order: Bounds(high=0.1), warns=True,
        ),
    ],
    "dictionary": [
        Check("finite", "Every number of the evaluation is finite (share).", _share_finite, lambda w, o: Bounds(low=1)),
        Check(
            "fvu", "Fraction of variance unexplained on held-out tokens.",
            _number("fvu"), lambda wanted, order: Bounds(high=wanted.fvu_max),
        ),
        Check("l0", "Features active on a held-out token, against k.", _number("l0"), _l0),
        Check(
            "dead", "Share of features that never fire on the corpus.",
            _number("dead"), lambda wanted, order: Bounds(high=wanted.dead_max),
        ),
        Check(
            "ce_recovered", "Cross-entropy that the spliced dictionary keeps, against mean ablation.",
            _number("ce_recovered"), lambda wanted, order: Bounds(low=wanted.ce_recovered_min),
        ),
        Check(
            "expansion", "Features for each dimension: fewer than one cannot span the activations.",
            _number("expansion"), lambda wanted, order: Bounds(low=1), warns=True,
        ),
    ],
    "features": [
        Check(
            "alive", "Share of features without a single firing.",
            _number("dead"), lambda wanted, order: Bounds(high=wanted.dead_max),
        ),
    ],
    "scaling": [
        Check(
            "power_law", "Share of the variance of the runs' log losses that the joint law explains.",
            _number("joint_r2"), lambda wanted, order: Bounds(low=0.95), warns=True,
        ),
    ],
    "science": [
        Check(
            "told", "Share of the claims on which the sweep says something, one way or the other.",
            lambda s: 1 - s["cannot_tell"] / s["claims"], lambda wanted, order: Bounds(low=0.5), warns=True,
        ),
    ],
    "neighbors": [
        Check(
            "recall", "Recall@10 of the index against exact search.",
            _number("recall_at_10"), lambda wanted, order: Bounds(low=wanted.recall_min),
        ),
    ],
    "feature_map": [
        Check("placed", "Share of features with a place on the map.", _number("placed"), lambda w, o: Bounds(low=1)),
    ],
    "steering": [
        Check(
            "scored", "Features whose output score is no number.",
            _number("n_not_finite"), lambda wanted, order: Bounds(high=0),
        ),
    ],
    "steering_report": [
        Check(
            "controls", "Concept rate of random directions, over that of the model as it is (plus one in a thousand).",
            lambda s: s.get("rate_random_direction", 0) / (s.get("rate_base", 0) + 1e-3),
            lambda wanted, order: Bounds(high=5), warns=True,
        ),
        Check(
            "graded", "Share of the texts that a language model was to grade whose answers could not be used.",
            lambda s: s.get("failed", 0) / max(s.get("judged", 0), 1),
            lambda wanted, order: Bounds(high=wanted.label_failures_max), warns=True,
        ),
    ],
    "labels": [
        Check(
            "labeled", "Share of the features asked for that got a written label.",
            _number("labeled"),
            lambda wanted, order: Bounds(low=wanted.labeled_min if order.study.labels.features else 0),
        ),
        Check(
            "scored", "Share of the written labels that were scored on text that their writer did not see.",
            _number("scored"), lambda wanted, order: Bounds(low=wanted.scored_min if order.study.labels.scorers else 0),
            warns=True,
        ),
        Check(
            "beats_control", "Share of the scored labels that do better than another feature's in their place.",
            _number("beats_control"), lambda wanted, order: Bounds(low=wanted.beats_control_min), warns=True,
        ),
        Check(
            "failed", "Share of the features asked about whose answers could not be used.",
            _number("failed"), lambda wanted, order: Bounds(high=wanted.label_failures_max), warns=True,
        ),
        Check(
            "spent", "Share of the budget that is spent, in dollars or requests; 0 without a budget.",
            _number("spent"), lambda wanted, order: Bounds(high=1),
        ),
    ],
    "atlas": [
        Check(
            "kept", "Share of the served features that the new dictionary still has; 1 for a first one.",
            _number("kept_share"), lambda wanted, order: Bounds(low=order.study.retraining.kept_min),
        ),
    ],
    "safety": [
        Check(
            "kept", "Concepts that the audit before found and this one does not.",
            _number("n_lost"), lambda wanted, order: Bounds(high=0),
        ),
        Check(
            "calibrated", "Largest factor by which a monitor's rate of false alarms, on enough texts, is off.",
            _number("calibration_off"), lambda wanted, order: Bounds(high=1.5), warns=True,
        ),
    ],
    "behaviors": [
        Check(
            "measured", "Effects on behaviors that are no number.",
            _number("n_not_finite"), lambda wanted, order: Bounds(high=0),
        ),
    ],
    "circuit": [
        Check(
            "adds_up", "How far features and errors together are from the model as it is, as a share of what it says.",
            _number("adds_up"), lambda wanted, order: Bounds(high=0.01),
        ),
        Check(
            "beats_random", "Faithfulness of the circuit, less that of as many random features with the same errors.",
            lambda s: float(s["faithfulness"] - s["random"]), lambda wanted, order: Bounds(low=0), warns=True,
        ),
    ],
    "multilingual": [
        Check(
            "beyond_chance", "Similarity of true pairs of texts, less that of shuffled ones.",
            _number("similarity_gain"), lambda wanted, order: Bounds(low=0), warns=True,
        ),
    ],
}  # fmt: skip


def verdicts(stage: str, summary: dict[str, Any], order: Order) -> list[Verdict]:
    """The outcome of every check of a stage."""
    wanted = order.study.checks
    return [Verdict(check, check.number(summary), check.bounds(wanted, order)) for check in CHECKS[stage]]
