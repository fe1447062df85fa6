import pytest

from sae_core.artifacts import PROJECT
from sae_core.checks import verdicts
from sae_core.studies import Order, Studies


@pytest.mark.parametrize(("study", "value", "passed"), [("paper", 300, True), ("standard", 300, False)])
def test_l0_is_checked_against_k_where_there_is_one(study: str, value: float, passed: bool):
    wanted = Studies.load(PROJECT / "pipelines" / "studies").get(study)
    summary = {"l0": value, "fvu": 0.1, "dead": 0.0, "ce_recovered": 0.9, "expansion": 8.0}
    (l0,) = (v for v in verdicts("dictionary", summary, Order(wanted, wanted.dictionaries[0])) if v.check.name == "l0")
    assert l0.passed == passed
    assert ("any number" in l0.text) == passed


@pytest.mark.parametrize(("expansion", "passed"), [(0.5, False), (1.0, True)])
def test_fewer_features_than_dimensions_are_allowed_and_warned_of(expansion: float, passed: bool):
    wanted = Studies.load(PROJECT / "pipelines" / "studies").get("quickstart")
    summary = {"l0": 32, "fvu": 0.1, "dead": 0.0, "ce_recovered": 0.9, "expansion": expansion}
    *_, verdict = verdicts("dictionary", summary, Order(wanted, wanted.dictionaries[0]))
    assert (verdict.check.name, verdict.passed, verdict.check.warns) == ("expansion", passed, True)
