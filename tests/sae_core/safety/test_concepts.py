from pathlib import Path

import pytest

from sae_core.catalog import find_text
from sae_core.catalog_entries import TEXTS
from sae_core.safety.concepts import SHIPPED, Concept, ConceptError, Rule, Sizes, load_concept, load_concepts
from sae_core.safety.drawing import SPLITS, draw
from sae_core.study import Source

OWN = """
name = "owls"
kind = "calibration"
description = "Owls."
about = "owl"
[[positive]]
source = "./owls.jsonl"
[[negative]]
generator = "digits"
"""


def write(folder: Path, text: str = OWN, name: str = "owls.toml") -> Path:
    (folder / name).write_text(text, "utf-8")
    return folder / name


def texts(folder: Path, n: int) -> None:
    lines = "\n".join(f'{{"text": "The owl number {i} hoots in a tree, or in a barn, all night."}}' for i in range(n))
    (folder / "owls.jsonl").write_text(lines, "utf-8")


def test_every_shipped_concept_names_known_texts_says_its_license_and_matches_its_own_pattern() -> None:
    concepts = load_concepts()
    assert {c.kind for c in concepts} == {"safety", "calibration"}
    assert len(concepts) >= 20
    for concept in concepts:
        assert concept.license, concept.name
        assert concept.source, concept.name
        for rule in [*concept.positive, *concept.negative]:
            assert not rule.source or rule.source in TEXTS
            assert not rule.templates or rule.license == "Apache-2.0"
        for source in concept.about_sources:
            assert find_text(Source(source=source)) == source


def test_every_written_concept_has_enough_prompts_and_shares_no_sentence_between_find_and_test() -> None:
    written = [c for c in load_concepts() if not any(r.source for r in [*c.positive, *c.negative])]
    assert len(written) >= 9
    for concept in written:
        drawn = draw(concept)
        assert not drawn.why_no_claim, concept.name
        if all(r.templates for r in [*concept.positive, *concept.negative]):
            groups = [{t.group for t in side[split]} for side in (drawn.positive, drawn.negative) for split in SPLITS]
            assert not groups[0] & groups[2]
            assert not groups[3] & groups[5]
        found = [t.text for side in (drawn.positive, drawn.negative) for split in SPLITS for t in side[split]]
        assert len(found) == len(set(found)), concept.name


def test_a_file_of_ones_own_is_read_drawn_and_takes_the_place_of_a_shipped_one(tmp_path: Path) -> None:
    texts(tmp_path, 200)
    path = write(tmp_path)
    write(tmp_path, OWN.replace('"owls"', '"dna"', 1), "dna.toml")
    concept = load_concept(path)
    drawn = draw(concept)
    assert drawn.least == 40
    assert {len(side[s]) for side in (drawn.positive, drawn.negative) for s in SPLITS} == {40}
    shipped = load_concepts()
    both = load_concepts(SHIPPED, tmp_path)
    assert len(both) == len(shipped) + 1
    assert next(c for c in both if c.name == "dna").description == "Owls."


def test_no_text_is_in_two_splits_and_drawing_again_gives_the_same(tmp_path: Path) -> None:
    texts(tmp_path, 90)
    concept = load_concept(write(tmp_path))
    drawn = draw(concept)
    found = [t for side in (drawn.positive, drawn.negative) for split in SPLITS for t in side[split]]
    assert len({t.text for t in found}) == len(found)
    assert draw(concept) == drawn


def test_too_few_prompts_are_drawn_and_nothing_is_to_be_claimed_of_them(tmp_path: Path) -> None:
    texts(tmp_path, 30)
    assert draw(load_concept(write(tmp_path))).why_no_claim == "10 prompts on the smallest side, 40 are needed"


def test_duplicates_between_find_and_test_and_between_the_sides_are_left_out_and_counted() -> None:
    rule = {"prompts": {"find": ["a b", "c d"], "test": ["A b", "e f"]}}
    sides = {"positive": [Rule(**rule)], "negative": [Rule(prompts={"find": ["c d", "g"], "test": ["h"]})]}
    drawn = draw(Concept(name="x", kind="safety", description="", about="x", sizes=Sizes(), **sides))
    assert drawn.duplicates == 2
    assert [t.text for t in drawn.positive["test"]] == ["e f"]
    assert [t.text for t in drawn.negative["find"]] == ["g"]


def test_a_piece_is_taken_around_the_match_and_lacks_what_it_must_not_have(tmp_path: Path) -> None:
    lines = [f'{{"text": "{"before " * 60}owl {i} {"after " * 60}{"mouse" if i % 2 else ""}"}}' for i in range(20)]
    (tmp_path / "owls.jsonl").write_text("\n".join(lines), "utf-8")
    rule = f'source = "{tmp_path}/owls.jsonl"\nhaving = "owl"\nwithout = "mouse|owl 4"\nupper = true'
    drawn = draw(load_concept(write(tmp_path, OWN.replace('source = "./owls.jsonl"', rule))))
    found = [t.text for split in SPLITS for t in drawn.positive[split]]
    assert 15 <= len(found) < 20
    assert all("OWL" in text and len(text) <= 120 for text in found)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('about = "owl"', 'abuot = "owl"', "unknown key|about: Field required"),
        ("generator", "generatr", "negative.0.generatr: unknown key: take it out"),
        ('about = "owl"', 'about = "(owl"', "no regular expression"),
        ('kind = "calibration"', 'kind = "other"', "kind: Input should be"),
        ('generator = "digits"', 'generator = "digit"', "generator: Input should be"),
        ('generator = "digits"', 'generator = "digits"\nsource = "wiki-en"', "exactly one of source"),
        ('generator = "digits"', "upper = true", "exactly one of source"),
        ('generator = "digits"', 'templates.find = ["a {b}"]', "fillers.b is missing"),
        ("[[negative]]", "[[negative]", "not a TOML file"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_its_name_and_the_key(tmp_path: Path, old: str, new: str, why: str) -> None:
    with pytest.raises(ConceptError, match=rf"owls\.toml.*({why})"):
        load_concept(write(tmp_path, OWN.replace(old, new)))


def test_a_file_that_is_no_utf8_a_folder_without_concepts_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConceptError, match="holds no concept"):
        load_concepts(tmp_path)
    (tmp_path / "a.toml").write_bytes(b"name = '\xe9'")
    with pytest.raises(ConceptError, match=r"a\.toml is not UTF-8"):
        load_concepts(tmp_path)
    with pytest.raises(ConceptError, match="no concept 'owl': known are arabic"):
        load_concepts(names=["owl"])


def test_a_changed_file_and_a_changed_text_change_the_identity(tmp_path: Path) -> None:
    texts(tmp_path, 9)
    before = load_concept(write(tmp_path)).identity
    texts(tmp_path, 10)
    other = load_concept(write(tmp_path)).identity
    changed = load_concept(write(tmp_path, OWN.replace("Owls.", "Owls!"))).identity
    assert before["texts"] != other["texts"]
    assert other["sha256"] != changed["sha256"]
