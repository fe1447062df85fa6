"""The graph of a circuit in a real browser: drawn, read, zoomed, pinned, grouped, shared; by keyboard; accessible."""

import re
from urllib.parse import parse_qs, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

ADDRESS = "/circuits/tiny-circuits.mini"


def opened(page: Page, query: str = "") -> None:
    page.goto(ADDRESS + query)
    expect(page.locator("#circuit[data-ready]")).to_be_visible()


def asked(page: Page) -> dict[str, list[str]]:
    return parse_qs(urlsplit(page.url).query)


def test_nodes_and_edges_of_the_table_are_drawn_with_their_signs(page: Page):
    page.goto("/circuits")
    page.get_by_role("link", name="tiny-circuits.mini").click()
    expect(page.locator("#circuit[data-ready]")).to_be_visible()
    effects = [row.replace("−", "-") for row in page.locator("#nodes tbody td:nth-child(3)").all_inner_texts()]
    expect(page.locator(".node")).to_have_count(len(effects))
    expect(page.locator(".node.against")).to_have_count(sum(effect.startswith("-") for effect in effects))
    weights = page.locator("#edges tbody td:nth-child(3)").all_inner_texts()
    expect(page.locator(".edge")).to_have_count(len(weights))
    expect(page.locator(".edge.against")).to_have_count(sum(weight.startswith("-") for weight in weights))


def test_a_node_is_pinned_by_keyboard_told_and_shared(page: Page):
    opened(page)
    node = page.locator(".node:has(circle)").first
    name = node.get_attribute("data-id")
    node.focus()
    page.keyboard.press("Enter")
    expect(page.locator(f".node[data-id='{name}']")).to_have_attribute("aria-pressed", "true")
    expect(page.locator(f".node[data-id='{name}']")).to_be_focused()
    expect(page.locator("#circuit-card h2")).to_contain_text("feature")
    assert asked(page)["pin"] == [name]
    link = page.get_by_role("link", name="Link to this").get_attribute("href") or ""
    opened(page, link)
    expect(page.locator(".node.pinned")).to_have_count(1)
    page.get_by_role("button", name="Unpin all").click()
    expect(page.locator(".node.pinned")).to_have_count(0)
    assert "pin" not in asked(page)


def test_pinned_nodes_become_one_and_open_again(page: Page):
    opened(page)
    before, edges = page.locator(".node").count(), page.locator(".edge").count()
    names = [page.locator(".node").nth(i).get_attribute("data-id") for i in (0, 1)]
    effect = sum(_effect(page, name) for name in names)
    for name in names:
        page.locator(f".node[data-id='{name}']").press("Enter")
    page.get_by_role("button", name="Group the pinned").click()
    expect(page.locator(".node")).to_have_count(before - 1)
    assert page.locator(".edge").count() <= edges
    group = page.locator(".node[data-id^='g_']")
    assert float(_signed(group.get_attribute("aria-label"))) == pytest.approx(effect, abs=0.002)
    assert len(asked(page)["group"][0].split(",")) == 2
    opened(page, "?" + urlsplit(page.url).query)
    page.locator(".node[data-id^='g_']").press("Enter")
    expect(page.locator(".node")).to_have_count(before)


def test_pinned_nodes_are_taken_out_of_the_model_and_a_link_shows_it_again(page: Page):
    opened(page)
    button = page.get_by_role("button", name="Ablate the pinned")
    expect(button).to_be_disabled()
    node = page.locator(".node:has(circle)").first
    name = node.get_attribute("data-id")
    node.focus()
    page.keyboard.press("Enter")
    button.press("Enter")
    expect(page.locator("#edit-status")).to_have_text("Done.", timeout=60_000)
    rows = page.locator("#edit-levels tbody tr").all_inner_texts()
    right, difference, loss = (row.split("\t") for row in rows)
    assert right[1] == "100 %"
    assert difference[1] != difference[2]
    assert re.fullmatch(r"\d+\.\d{4} \(\d+\.\d{4} to \d+\.\d{4}\)", loss[3])
    page.get_by_text("Prompt by prompt").click()
    wrong = page.locator("#edit-prompts tbody tr:has-text('wrong now')").count()
    prompts = page.locator("#edit-prompts tbody tr").count()
    assert right[2] == f"{round(100 * (1 - wrong / prompts))} %"
    assert asked(page)["ablate"] == [name]
    expect(page.locator("#edit-command")).to_contain_text("--ablate")
    link = page.get_by_role("link", name="Link to this").get_attribute("href") or ""
    opened(page, link)
    expect(page.locator("#edit-status")).to_have_text("Done.", timeout=60_000)
    assert page.locator("#edit-levels tbody tr").all_inner_texts() == rows
    page.get_by_role("button", name="Unpin all").click()
    expect(page.locator("#edit")).to_be_hidden()
    assert "ablate" not in asked(page)


def test_the_graph_zooms_by_button_and_key_and_shows_fewer_nodes(page: Page):
    opened(page)
    whole = _width(page)
    page.get_by_role("button", name="+", exact=True).click()
    assert _width(page) == pytest.approx(whole / 1.25, rel=0.01)
    page.locator(".node").first.press("+")
    assert _width(page) == pytest.approx(whole / 1.25**2, rel=0.01)
    page.locator(".node").first.press("0")
    assert _width(page) == pytest.approx(whole)
    page.locator("#circuit-nodes").fill("2")
    expect(page.locator(".node")).to_have_count(2)
    assert asked(page)["nodes"] == ["2"]


def test_a_spoiled_address_draws_what_is_left_of_it(page: Page):
    opened(page, "?nodes=xyz&pin=9_9,zzz&group=1_1")
    expect(page.locator(".node")).not_to_have_count(0)
    expect(page.locator(".node.pinned")).to_have_count(0)


def test_without_a_script_there_are_tables(chromium: Browser, server: str):
    context = chromium.new_context(base_url=server, java_script_enabled=False)
    page = context.new_page()
    page.goto(ADDRESS)
    expect(page.locator("#circuit")).to_be_hidden()
    expect(page.locator("#nodes tbody tr")).not_to_have_count(0)
    context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_is_accessible_and_fits_a_phone(chromium: Browser, server: str, theme: str):
    context = chromium.new_context(base_url=server, color_scheme=theme, viewport={"width": 390, "height": 844})
    page = context.new_page()
    opened(page)
    page.locator(".node").first.press("Enter")
    page.get_by_role("button", name="Ablate the pinned").click()
    expect(page.locator("#edit-status")).to_have_text("Done.", timeout=60_000)
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()


def _effect(page: Page, name: str | None) -> float:
    return float(_signed(page.locator(f".node[data-id='{name}']").get_attribute("aria-label")))


def _signed(label: str | None) -> str:
    return re.findall(r"effect ([+−]\d+\.\d+)", label or "")[0].replace("−", "-")


def _width(page: Page) -> float:
    return float((page.locator("#circuit-graph").get_attribute("viewBox") or "").split()[2])
