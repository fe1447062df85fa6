import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_core.settings import Settings, fingerprint

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


class Oven(Settings):
    degrees: int = 180
    fan: bool = False


class FanOven(Oven):
    pass


@given(st.dictionaries(st.text(), JSON))
def test_the_order_of_keys_does_not_change_a_fingerprint(table: dict):
    assert fingerprint(dict(reversed(table.items()))) == fingerprint(table)


@given(JSON, JSON)
def test_unequal_values_have_unequal_fingerprints(one, other):
    # 1 == 1.0 == True in Python, but they are three different settings.
    assert (fingerprint(one) == fingerprint(other)) == (repr(one) == repr(other) or _same(one, other))


def _same(one, other) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return repr(one) == repr(other)


def test_a_subclass_with_the_same_values_has_the_same_fingerprint():
    assert FanOven().fingerprint() == Oven().fingerprint()


def test_values_that_json_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="JSON"):
        fingerprint(math.nan)
    with pytest.raises(TypeError):
        fingerprint({1, 2})


def test_settings_are_frozen_and_refuse_unknown_keys():
    with pytest.raises(ValueError, match="frozen"):
        Oven().degrees = 200  # type: ignore[misc]
    with pytest.raises(ValueError, match="Extra inputs"):
        Oven(grill=True)  # type: ignore[call-arg]
