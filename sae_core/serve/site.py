"""The atlas as files for any web host: the app's own pages, asked for one after another, with relative links.

What needs a server is left out: own texts on the live model, the JSON API, filters of the search. The search runs in
the browser, over one JSON file. The files work under any address and in any sub-folder of a host.
"""

import json
import posixpath
import re
from collections.abc import Iterator
from functools import partial
from html import escape, unescape
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pyarrow.compute as pc
import pyarrow.parquet as pq
from fastapi import FastAPI
from starlette.testclient import TestClient

from sae_core.artifacts import ArtifactStore, new_folder
from sae_core.atlas import Atlas
from sae_core.errors import MindAtlasError
from sae_core.progress import Report, silent
from sae_core.serve.app import create_app
from sae_core.serve.door import POLICY
from sae_core.serve.map import map_of
from sae_core.serve.render import feature_path
from sae_core.serve.shelf import Shelf
from sae_core.serve.views import names
from sae_core.stages import report_of

INDEX = "search.json"
_WITH_STATE = ("/map", "/search")  # pages whose script reads what follows the question mark
_STATIC = Path(__file__).parent / "static"
_ADDRESS = re.compile(r' (href|src|action|data-[a-z]+)="(/[^"]*)"')
_LIVE = re.compile(r' hx-[a-z-]+="[^"]*"')


class SiteError(MindAtlasError):
    """A site that cannot be written."""


def write_site(
    store: ArtifactStore, dictionary: str, folder: Path, limit: int | None = None, report: Report = silent
) -> dict[str, int]:
    """Write the pages of a dictionary into a new or empty folder.

    Args:
        store: where the artifacts are.
        dictionary: whose pages; empty for the newest.
        folder: made when it is not there; all files lie inside it.
        limit: features with pages, those with a written label first; None for all.
        report: progress, in pages.

    Returns:
        Numbers of features and of files.

    Raises:
        ArtifactError: the folder holds something or cannot be written to; or there is no such dictionary.
        SiteError: a page cannot be made.
    """
    new_folder(folder)
    app = create_app(store, dictionary)
    app.state.static = True
    shelf: Shelf = app.state.shelf
    atlas = shelf.atlas()
    features = _chosen(atlas, limit)
    pages = [*_pages(atlas, features)]
    files = [*_data(atlas)]
    known = {*pages, *files, f"/{INDEX}", *(f"/static/{path.relative_to(_STATIC)}" for path in _static_files())}
    for path in _static_files():
        _write(folder, f"/static/{path.relative_to(_STATIC).as_posix()}", path.read_bytes())
    _write(folder, f"/{INDEX}", json.dumps(_index(atlas, features), ensure_ascii=False).encode("utf-8", "replace"))
    _write(folder, "/.nojekyll", b"")  # GitHub Pages takes the files as they are
    ask = partial(_ask, _client(app))
    for done, address in enumerate([*files, *pages]):
        body = ask(address)
        if address in pages:
            body = _relative(body.decode(), address, known).encode()
        _write(folder, address + "/index.html" if address in pages else address, body)
        report(done + 1, len(files) + len(pages), "pages")
    _write(folder, "/404.html", _relative(ask("/404", 404).decode(), "/404.html", set()).encode())
    return {"features": len(features), "files": sum(path.is_file() for path in folder.rglob("*"))}


def _client(app: FastAPI) -> TestClient:
    return TestClient(app, base_url="http://localhost")


def _ask(client: TestClient, address: str, status: int = 200) -> bytes:
    answer = client.get(address)
    if answer.status_code != status:
        raise SiteError(f"the page {address} cannot be made ({answer.status_code}): {_told(answer.text)}")
    return answer.content


def _told(page: str) -> str:
    found = re.search(r'<p class="lead">(.*?)</p>', page, re.DOTALL)
    return unescape(found[1]) if found else "the server says nothing more"


def _chosen(atlas: Atlas, limit: int | None) -> list[int]:
    """Features with pages, in order; with a limit, those with a written label before the others."""
    every = range(len(atlas.features))
    if limit is None:
        return [*every]
    labels = atlas.store.manifest("labels", atlas.dictionary) and atlas.store.get("labels", atlas.dictionary)
    rows = pq.read_table(labels.folder / "labels.parquet", columns=["feature", "label"]) if labels else None
    written = set(rows.filter(pc.field("label") != "")["feature"].to_pylist()) if rows else set()
    return sorted(sorted(every, key=lambda feature: (feature not in written, feature))[:limit])


def _pages(atlas: Atlas, features: list[int]) -> Iterator[str]:
    """Addresses of all pages."""
    yield from ("/", "/search")
    if atlas.store.manifest("feature_map", atlas.dictionary):
        yield "/map"
    reports = {"safety": "/audit", "multilingual": "/multilingual"}
    yield from (path for stage, path in reports.items() if report_of(atlas.store, stage, atlas.dictionary))
    has_near = atlas.store.manifest("neighbors", atlas.dictionary) is not None
    for feature in features:
        path = feature_path(atlas.dictionary, feature)
        yield from (path, f"{path}/together")
        if has_near:
            yield f"/near{path.removeprefix('/f')}"
    corpus = atlas.site.corpus
    if atlas.store.manifest("corpus", corpus):
        shown = pc.field("feature").isin(features)
        rows = pq.read_table(atlas.features.examples_path, columns=["document"], filters=shown)
        documents = sorted(set(rows["document"].to_pylist()))
        yield from (f"/d/{quote(corpus, safe='')}/{document}" for document in documents)


def _data(atlas: Atlas) -> Iterator[str]:
    """Addresses of what the map page loads."""
    if atlas.store.manifest("feature_map", atlas.dictionary):
        data, home = map_of(atlas), f"/map/{quote(atlas.dictionary, safe='')}"
        yield from (f"{home}/map.json", f"{home}/points-{data.version}.bin")
        yield from (f"{home}/names-{data.version}/{chunk}.json" for chunk in range(data.n_chunks))


def _index(atlas: Atlas, features: list[int]) -> list[dict[str, Any]]:
    """What the search in the browser looks through."""
    rows = atlas.features.columns("density", "top_tokens", "promoted").take(features).to_pylist()
    return [
        {**names(atlas, feature), "density": row["density"],
         "tokens": " ".join(map(str.strip, [*row["top_tokens"], *row["promoted"]]))}
        for feature, row in zip(features, rows, strict=True)
    ]  # fmt: skip


def _static_files() -> list[Path]:
    return sorted(path for path in _STATIC.rglob("*") if path.is_file())


def _relative(page: str, here: str, known: set[str]) -> str:
    """The page with addresses as seen from it; a link to what is not written loses its address.

    Templates hold the only markup, and quotes in shown text are escaped, so that an address in the pattern is real.
    """

    def address(found: re.Match[str]) -> str:
        name, value = found[1], urlsplit(unescape(found[2]))
        path = f"/{INDEX}" if value.path == "/api/search" else value.path
        is_stem = name.startswith("data-") and path.endswith("/")
        if path not in known and not is_stem:
            return ""
        to = posixpath.relpath(path, here if PurePosixPath(here).suffix == ".html" else here + "/")
        to += "/" if is_stem or not _is_file(path) else ""
        state = f"?{value.query}" if value.query and path in _WITH_STATE else ""
        return f' {name}="{escape(to + state)}"'

    page = _ADDRESS.sub(address, _LIVE.sub("", page))
    policy = f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY.partition("; frame-ancestors")[0])}">'
    return page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n  {policy}', 1)


def _is_file(address: str) -> bool:
    return address.startswith(("/static/", "/map/")) or address == f"/{INDEX}"


def _write(folder: Path, address: str, content: bytes) -> None:
    """Write a file at its address. Raises SiteError when the address leads out of the folder."""
    parts = [unquote(part) for part in address.split("/") if part]
    if any(part in ("", ".", "..") or "/" in part or "\\" in part or "\0" in part for part in parts):
        raise SiteError(f"{address!r} is no address of a file")
    path = folder.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
