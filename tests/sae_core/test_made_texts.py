import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_core.made_texts import GENERATORS


@given(st.sampled_from(sorted(GENERATORS)), st.integers(0, 2**32))
def test_generators_repeat_with_their_seed(name: str, seed: int) -> None:
    one, two = (GENERATORS[name](np.random.default_rng(seed)) for _ in range(2))
    assert [next(one) for _ in range(5)] == [next(two) for _ in range(5)]


@pytest.mark.parametrize(("name", "wanted"), [("working_code", True), ("buggy_code", False)])
def test_working_code_runs_and_buggy_code_does_not(name: str, wanted: bool) -> None:
    stream = GENERATORS[name](np.random.default_rng(0))
    assert {runs(next(stream)[1]) for _ in range(40)} == {wanted}


def runs(code: str) -> bool:
    names: dict = {}
    try:
        exec(code, names)
        for function in [f for n, f in names.items() if n.startswith("get_")]:
            arguments = [3] * function.__code__.co_argcount if "for x in" not in code else [[1]]
            function(*arguments)
    except (NameError, SyntaxError, TypeError, IndexError, ZeroDivisionError):
        return False
    return True
