import pytest

from sae_core.artifacts import PROJECT
from sae_core.checks import verdicts
from sae_core.studies import Order, Studies


@pytest.mark.parametrize(("study", "value", "passed"), [("paper", 300, True), ("standard", 300, False)])
def test_l0_is_checked_against_k_where_there_is_one(study: str, value: float, passed: bool):
    wanted = Studies.load(PROJECT / "pipelines" / "studies").get(study)
    summary = {"l0": value, "fvu": 0.1, "dead": 0.0, "ce_recovered": 0.9}
    (l0,) = (v for v in verdicts("dictionary", summary, Order(wanted, wanted.dictionaries[0])) if v.check.name == "l0")
    assert l0.passed == passed
    assert ("any number" in l0.text) == passed
