"""The stages' checks as Dagster shows them."""

import math

import dagster as dg

from sae_core.checks import CHECKS, Verdict


def specs(stage: str) -> list[dg.AssetCheckSpec]:
    """What Dagster is told beforehand of the checks of a stage."""
    return [dg.AssetCheckSpec(check.name, asset=stage, description=check.description) for check in CHECKS[stage]]


def result(verdict: Verdict) -> dg.AssetCheckResult:
    """A verdict as Dagster records it."""
    return dg.AssetCheckResult(
        check_name=verdict.check.name,
        passed=verdict.passed,
        severity=dg.AssetCheckSeverity.WARN if verdict.check.warns else dg.AssetCheckSeverity.ERROR,
        description=verdict.text,
        metadata={"value": verdict.value} if math.isfinite(verdict.value) else {},
    )
