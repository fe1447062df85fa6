import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


def test_every_linked_file_and_every_named_place_is_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    tree = re.findall(r"^  (\S+)   ", README.partition("## Where things are")[2], re.M)
    places = [*links, *(f"sae_core/{name}" for name in tree)]
    assert not [place for place in places if not (ROOT / place).exists()]
