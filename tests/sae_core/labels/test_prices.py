import pytest

from sae_core.labels.budget import Budget
from sae_core.labels.prices import FREE, Prices, Usage, find_prices
from sae_core.labels.reader import LabelError
from sae_core.study import LabelSettings


def test_a_local_model_costs_nothing():
    assert find_prices(LabelSettings()) == FREE


def test_a_public_model_has_the_price_its_provider_asks():
    prices = find_prices(LabelSettings(base_url="https://api.openai.com/v1", model="gpt-4o-mini"))
    assert prices == pytest.approx((0.15e-6, 0.60e-6, 0.075e-6))  # as published in July 2024, and since


def test_the_same_model_elsewhere_has_the_price_asked_there():
    there = find_prices(LabelSettings(base_url="https://openrouter.ai/api/v1", model="openai/gpt-4o-mini"))
    assert there is not None
    assert find_prices(LabelSettings(base_url="http://127.0.0.1:8000/v1", model="openai/gpt-4o-mini")) is None


def test_the_study_s_own_prices_come_first():
    own = LabelSettings(
        base_url="https://api.openai.com/v1", model="gpt-4o-mini", prompt_price=1.0, completion_price=3.0
    )
    assert find_prices(own) == pytest.approx((1e-6, 3e-6, 1e-6))


def test_a_prefix_that_was_read_before_is_charged_at_its_own_price():
    assert Prices(4.0, 10.0, 1.0).dollars(Usage(100, 5, 60)) == 40 * 4.0 + 60 * 1.0 + 50.0
    assert Prices(4.0, 10.0, 1.0).dollars(Usage(10, 0, 60)) == 10.0  # a server that miscounts


def test_a_limit_in_dollars_without_a_price_is_refused():
    settings = LabelSettings(base_url="http://127.0.0.1:8000/v1", model="mine", max_dollars=5)
    with pytest.raises(LabelError, match=r"labels.prompt_price.*labels.max_requests") as failure:
        Budget(settings, find_prices(settings))
    assert "\n" not in str(failure.value)


def test_one_price_alone_is_refused():
    with pytest.raises(ValueError, match="give both"):
        LabelSettings(prompt_price=1.0)


@pytest.mark.parametrize(("spent", "limits", "share"), [
    ((2.0, 9), {}, 0.0), ((2.0, 9), {"max_dollars": 4}, 0.5), ((2.0, 9), {"max_dollars": 4, "max_requests": 10}, 0.9),
    ((0.0, 0), {"max_dollars": 0}, 0.0), ((0.0, 3), {"max_requests": 0}, 1.0),
])  # fmt: skip
def test_the_share_of_the_budget_is_the_nearer_limit_s(spent, limits, share):
    budget = Budget(LabelSettings(**limits), FREE)
    budget.dollars, budget.requests = spent
    assert budget.share == share
