import pyarrow as pa
import pytest

from sae_core.features import Example
from sae_core.features.reader import Sample
from sae_core.labels.scoring.items import Item, as_item, marks, negatives, positives


def example(document: int, level: int) -> Example:
    return Example(7, level, "level", float(level), document, 0, 1, ["a", " b", " c"], [0.0, float(level), 0.2 * level])


EXAMPLES = [example(document, level) for document, level in enumerate([5, 5, 5, 4, 4, 3, 2, 1, 1, 1])]


def sample() -> Sample:
    """Twelve windows of four tokens; 7 fires in window 0 and 1, its neighbor 8 in 1 to 3, its neighbor 9 in 4."""
    windows = pa.table({"window": range(12), "document": range(100, 112), "tokens": [list("wxyz")] * 12})
    rows = [
        (7, 0, 0, 1.0),
        (7, 1, 2, 1.0),
        (8, 1, 0, 4.0),
        (8, 2, 1, 4.0),
        (8, 2, 3, 1.0),
        (8, 3, 2, 4.0),
        (9, 4, 0, 1.0),
    ]
    names = ("feature", "window", "place", "value")
    return Sample(windows, pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))))


def draw(chosen: list[Example], seen: frozenset[int] = frozenset()) -> list[Item]:
    return negatives(sample(), 7, [8, 9], chosen, set(seen), lambda examples: range(11, -1, -1), seed=0)


def test_positives_come_from_documents_that_were_not_shown_and_over_all_levels():
    chosen = positives(EXAMPLES, seen={0, 3}, count=5, seed=0)
    assert {e.document for e in chosen}.isdisjoint({0, 3})
    assert [e.level for e in chosen] == [5, 4, 3, 2, 1]
    assert [e.level for e in positives(EXAMPLES, {0, 3}, 99, 0)] == [5, 4, 3, 2, 1, 5, 1, 1]
    assert positives(EXAMPLES, set(range(10)), 5, 0) == []


def test_a_second_example_of_a_shown_document_is_not_used():
    assert positives([example(1, 5), example(1, 4), example(2, 3)], seen={1}, count=9, seed=0) == [example(2, 3)]


def test_negatives_are_of_three_strata_and_the_feature_fires_in_none():
    found = draw(EXAMPLES[:6])
    assert [item.stratum for item in found] == ["neighbor"] * 2 + ["nearest"] * 2 + ["random"] * 2
    assert not any(item.fires for item in found)
    assert found[0].marked in ([False, True, False, False], [False, False, True, False])  # windows 2 and 3 of 8
    assert found[1].marked == [True, False, False, False]  # each neighbor gives one before any gives a second
    assert [sum(item.marked) for item in found[2:]] == [1] * 4  # as many as in the examples, whose 0.2 is no mark


def test_a_silent_text_turns_on_a_marked_token_where_a_firing_one_has_its_peak():
    found = draw(EXAMPLES[:6])
    assert all(item.marked[item.place] for item in found)
    assert [item.place for item in found[2:]] == [1] * 4


def test_negatives_take_no_document_that_the_writer_saw():
    assert draw(EXAMPLES[:6], frozenset(range(102, 112))) == []
    assert len(draw(EXAMPLES, frozenset({102, 103}))) == 8  # what is left of twelve without the two it fires in


def test_the_draw_repeats():
    assert draw(EXAMPLES[:6]) == draw(EXAMPLES[:6])


@pytest.mark.parametrize(
    ("acts", "marked"),
    [
        ([0.0, 3.0, 10.0], [False, True, True]),
        ([0.0, 2.9, 10.0], [False, False, True]),
        ([0.0, 0.0], [False] * 2),
        ([], []),
    ],
)
def test_tokens_are_marked_from_three_tenths_of_the_strongest_on(acts, marked):
    assert marks(acts) == marked


def test_an_example_fires_at_its_level():
    assert as_item(EXAMPLES[3]).level == 4
    assert as_item(EXAMPLES[3]).fires
