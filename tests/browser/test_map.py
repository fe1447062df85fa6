"""The map in a real browser, served and as files: drawn, hovered, clicked, lassoed, and kept in the address."""

import http.server
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sae_core.artifacts import ArtifactStore
from sae_core.atlas import Atlas
from sae_core.serve.site import write_site


@pytest.fixture(scope="module")
def atlas(tiny_atlas: Path) -> Atlas:
    return Atlas.open(ArtifactStore(tiny_atlas))


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def files(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the same pages as files, in a sub-folder of a plain host."""
    host = tmp_path_factory.mktemp("host")
    write_site(atlas.store, atlas.dictionary, host / "atlas")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(host))) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/atlas"
        server.shutdown()


@pytest.fixture(params=["server", "files"])
def shell(request: pytest.FixtureRequest) -> str:
    """Both ways in which the pages reach a reader."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[[str], Any]]:
    """Opens an address; at the end, no page may have warned or complained on the console."""
    context, told = chromium.new_context(viewport={"width": 1100, "height": 800}), []

    def opened(address: str) -> Any:
        page = context.new_page()
        page.on("console", lambda message: told.append((message.type, message.text)))
        page.on("pageerror", lambda error: told.append(("error", str(error))))
        page.goto(address)
        if "/map" in address:
            page.wait_for_selector("#map[data-ready]")
        return page

    yield opened
    context.close()
    heavy = [text for kind, text in told if kind in ("error", "warning") and "GPU stall" not in text]
    assert heavy == []  # a stall is the software renderer's own remark


def a_word(atlas: Atlas, feature: int) -> str:
    """A token of letters that the feature promotes or fires on."""
    row = atlas.features.feature(feature)
    return next(token.strip() for token in [*row.promoted, *row.top_tokens] if token.strip().isalpha())


def painted(page: Any) -> int:
    """Pixels of the canvas that are not empty."""
    return page.evaluate("""() => {
        const canvas = document.getElementById("map-points"), copy = document.createElement("canvas");
        Object.assign(copy, { width: canvas.width, height: canvas.height });
        const context = copy.getContext("2d");
        context.drawImage(canvas, 0, 0);
        return context.getImageData(0, 0, copy.width, copy.height).data.filter((v, i) => i % 4 === 3 && v > 0).length;
    }""")


def test_points_are_drawn_and_clusters_named(open_page: Callable[[str], Any], shell: str, atlas: Atlas) -> None:
    page = open_page(f"{shell}/map/")
    page.wait_for_selector("#map-labels span", state="attached")
    assert painted(page) > 64 * 4
    assert page.locator("#map-note").is_hidden()


def is_page_of(atlas: Atlas, feature: int) -> re.Pattern[str]:
    """Addresses of a feature's page, in both shells."""
    return re.compile(rf"/f/{re.escape(atlas.dictionary)}/{feature}/?$")


def test_a_point_says_its_name_and_a_click_opens_its_page(
    open_page: Callable[[str], Any], shell: str, atlas: Atlas
) -> None:
    page = open_page(f"{shell}/map/?f=7")  # which brings it to the middle
    box = page.locator("#map-stage").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#map-card strong")
    name, facts, *_ = page.locator("#map-card").inner_text().split("\n")
    assert name == " ".join(atlas.name(7).split())
    assert facts.startswith("feature 7 ")
    page.mouse.down()
    page.mouse.up()
    page.wait_for_url(is_page_of(atlas, 7))
    page.go_back()
    page.wait_for_selector("#map[data-ready]")
    assert "f=7" in page.url


def test_a_lasso_lists_what_it_holds_with_links(open_page: Callable[[str], Any], shell: str, atlas: Atlas) -> None:
    page = open_page(f"{shell}/map/")
    box = page.locator("#map-stage").bounding_box()
    page.click("#map-lasso")
    corners = [(0.01, 0.01), (0.99, 0.01), (0.99, 0.99), (0.01, 0.99), (0.01, 0.02)]
    places = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in corners]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=3)
    page.mouse.up()
    page.wait_for_selector("#map-list h2")
    assert page.locator("#map-list h2").inner_text() == "64 inside"
    links = page.locator("#map-list li a")
    assert links.count() == 64
    assert {int(link.get_attribute("href").rstrip("/").split("/")[-1]) for link in links.all()} == {*range(64)}
    page.keyboard.press("Escape")
    assert page.locator("#map-list").is_hidden()


def test_a_search_lists_and_colors_its_hits_and_stays_in_the_address(
    open_page: Callable[[str], Any], shell: str, atlas: Atlas
) -> None:
    word = a_word(atlas, 5)
    page = open_page(f"{shell}/map/")
    page.fill("#map-query", word)
    page.wait_for_selector("#map-list li")
    page.wait_for_url("**q=*")
    again = open_page(page.url)
    again.wait_for_selector("#map-list li")
    assert again.input_value("#map-query") == word
    assert again.locator("#map-list li").count() == page.locator("#map-list li").count() > 0


def test_the_view_moves_by_wheel_and_keys_and_stays_in_the_address(open_page: Callable[[str], Any], shell: str) -> None:
    page = open_page(f"{shell}/map/")
    assert "z=" not in page.url
    page.locator("#map-stage").hover(position={"x": 300, "y": 300})
    page.mouse.wheel(0, -600)
    page.wait_for_url("**z=*")
    page.focus("#map-stage")
    before = page.url
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("before => location.href !== before", arg=before)
    page.select_option("#map-color", "density")
    page.wait_for_url("**color=density*")
    again = open_page(page.url)
    assert again.input_value("#map-color") == "density"
    assert again.locator("#map-legend").is_visible()
    assert again.url == page.url
    again.focus("#map-stage")
    again.keyboard.press("0")
    again.wait_for_function("() => !location.search.includes('z=')")


def test_a_feature_in_the_address_is_marked_and_named(
    open_page: Callable[[str], Any], shell: str, atlas: Atlas
) -> None:
    page = open_page(f"{shell}/map/?f=7")
    page.wait_for_selector("#map-labels .selected", state="attached")
    assert page.locator("#map-overlay circle").count() == 1
    page.focus("#map-stage")
    page.keyboard.press("Enter")
    page.wait_for_url(is_page_of(atlas, 7))


@pytest.mark.parametrize("state", ["?x=NaN&y=1e999&z=-1", "?f=-1", "?f=1e99&color=<script>", "?z=0&x=1&y=1"])
def test_a_spoiled_address_opens_the_whole_map(open_page: Callable[[str], Any], server: str, state: str) -> None:
    page = open_page(f"{server}/map{state}")
    assert painted(page) > 64 * 4
    assert page.input_value("#map-color") == "cluster"


def test_the_search_page_of_files_finds_features(open_page: Callable[[str], Any], files: str, atlas: Atlas) -> None:
    page = open_page(f"{files}/search/")
    page.fill("input[name=q]", a_word(atlas, 9))
    page.wait_for_selector("#results li")
    link = page.locator("#results li a").first
    feature = int(link.get_attribute("href").rstrip("/").split("/")[-1])
    link.click()
    page.wait_for_url(is_page_of(atlas, feature))
    assert str(feature) in page.inner_text(".crumb")
