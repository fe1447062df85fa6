"""The site of files: whole, closed in itself, and inside its folder."""

import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from sae_core.artifacts import ArtifactError
from sae_core.atlas import Atlas
from sae_core.serve import site
from sae_core.serve.site import SiteError, write_site

LIMIT = 6


class Addresses(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(tag, name, value) for name, value in attrs if value and name in ("href", "src", "action")]


@pytest.fixture(scope="module")
def folder(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("host") / "some" / "sub path"
    told = write_site(atlas.store, atlas.dictionary, folder, LIMIT)
    assert told["features"] == LIMIT
    assert told["files"] == sum(path.is_file() for path in folder.rglob("*"))
    return folder


def test_every_link_of_every_page_leads_to_a_file_of_the_site(folder: Path) -> None:
    pages = [path for path in folder.rglob("*.html") if path.name != "404.html"]
    assert len(pages) > 3 * LIMIT
    for page in pages:
        addresses = Addresses()
        addresses.feed(page.read_text("utf-8"))
        links = [value for _, _, value in addresses.found if not value.startswith("#")]
        assert any("style.css" in value for value in links)
        for value in links:
            parts = urlsplit(value)
            assert not parts.scheme
            assert not parts.netloc
            assert not value.startswith("/")  # the site may lie in a sub-folder of its host
            target = (page.parent / parts.path).resolve()
            assert folder.resolve() in (target, *target.parents)
            assert (target / "index.html" if parts.path.endswith("/") else target).is_file(), (page, value)


def test_what_needs_a_server_is_left_out(folder: Path, atlas: Atlas) -> None:
    page = (folder / "f" / atlas.dictionary / "0" / "index.html").read_text("utf-8")
    assert "<textarea" not in page
    assert "hx-get" not in page
    assert "/text" not in page
    assert "<textarea" not in (folder / "search" / "index.html").read_text("utf-8")


def test_every_page_carries_the_policy_that_the_server_would_send(folder: Path) -> None:
    for page in folder.rglob("*.html"):
        assert "Content-Security-Policy" in page.read_text("utf-8")


def test_the_index_of_the_search_holds_the_features_with_pages(folder: Path, atlas: Atlas) -> None:
    rows = json.loads((folder / "search.json").read_text("utf-8"))
    assert [row["feature"] for row in rows] == list(range(LIMIT))
    assert [row["label"] for row in rows] == [atlas.name(feature) for feature in range(LIMIT)]
    assert all(atlas.features.feature(row["feature"]).promoted[0].strip() in row["tokens"] for row in rows)


def test_the_map_finds_its_data_as_files(folder: Path, atlas: Atlas) -> None:
    home = folder / "map" / atlas.dictionary
    summary = json.loads((home / "map.json").read_text("utf-8"))
    assert (home / f"points-{summary['version']}.bin").stat().st_size == 4 * summary["n"] * len(summary["columns"])
    assert (home / f"names-{summary['version']}" / "0.json").is_file()


def test_a_folder_that_holds_something_is_refused_and_left_as_it_is(atlas: Atlas, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds mine\.txt already"):
        write_site(atlas.store, atlas.dictionary, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("address", ["/../out", "/%2e%2e/out", "/a/..%2fout", "/a/%00", "/a/.", "/a%5c..%5cout"])
def test_no_address_leads_out_of_the_folder(address: str, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    with pytest.raises(SiteError, match="is no address of a file"):
        site._write(tmp_path / "site", address, b"")
    assert [path.name for path in tmp_path.rglob("*")] == ["site"]
