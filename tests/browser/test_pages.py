"""The pages in a real browser: search, open, hover, keyboard, own text, back and forward; accessible in both themes."""

import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from sae_core.artifacts import ArtifactStore
from sae_core.atlas import Atlas

ADDRESSES = (
    "/", "/search?q=bridge", "{}/5", "{}/5/together", "/near{}/5", "/map", "/map?color=density&q=bridge", "/steer",
    "/text?text=The+old+bridge&feature=5", "/d/tiny/3", "/nowhere",
)  # fmt: skip


@pytest.fixture(scope="session")
def features(tiny_atlas) -> str:
    """Address of the features, without a number."""
    return f"/f/{Atlas.open(ArtifactStore(tiny_atlas)).dictionary}"


def test_words_are_searched_as_they_are_typed_and_a_hit_opens(page: Page):
    page.goto("/")
    page.keyboard.press("/")
    page.keyboard.type("bridge")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"/search\?q=bridge"))
    found = page.locator(".hit")
    expect(found.first).to_be_visible()
    before = found.all_inner_texts()
    page.get_by_role("searchbox").fill("python river")
    expect(page).to_have_url(re.compile("python"))
    expect(page.locator("#results")).to_contain_text("river")
    assert found.all_inner_texts() != before
    page.get_by_label("alive").check()
    expect(page).to_have_url(re.compile("alive=true"))
    name = found.first.locator(".name").inner_text()
    found.first.click()
    expect(page.locator("h1")).to_have_text(name)
    page.go_back()
    expect(page.get_by_role("searchbox")).to_have_value("python river")
    page.go_forward()
    expect(page.locator("h1")).to_have_text(name)


def test_keys_lead_from_feature_to_feature_and_a_token_tells_its_value(page: Page, features: str):
    page.goto(f"{features}/5")
    for key, number in (("j", 6), ("ArrowRight", 7), ("k", 6), ("ArrowLeft", 5)):
        page.keyboard.press(key)
        expect(page).to_have_url(re.compile(rf"/{number}$"))
    token = page.locator(".example .a").first
    token.hover()
    assert float((token.get_attribute("title") or "").split(",")[0]) > 0
    page.get_by_role("link", name="Look through its examples").click()
    expect(page.locator("aside #together")).to_be_visible()
    page.locator(".source").first.click()
    expect(page.locator("#at")).to_be_in_viewport()


def test_an_own_text_is_tested_in_place(page: Page, features: str):
    page.goto(f"{features}/5")
    page.get_by_label("Your own text").fill("The old bridge <b>&amp;\nmore")
    page.get_by_role("button", name="Test").click()
    expect(page.locator("#answer .example")).to_contain_text("&amp;⏎")
    expect(page.locator("#answer .example")).to_contain_text("<b>")
    expect(page).to_have_url(re.compile("/5$"))
    page.get_by_label("Your own text").press("j")  # a letter there, no key
    expect(page).to_have_url(re.compile("/5$"))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_page_is_accessible_and_fits_a_phone(chromium: Browser, server: str, features: str, theme: str):
    context = chromium.new_context(base_url=server, color_scheme=theme, viewport={"width": 390, "height": 844})
    page = context.new_page()
    for address in ADDRESSES:
        page.goto(address.format(features).replace("/near/f/", "/near/"))
        if address.startswith("/map"):
            page.wait_for_selector("#map[data-ready]")
            page.wait_for_selector("#map-list li" if "q=" in address else "#map-points")
        found = Axe().run(page)
        assert found.violations_count == 0, f"{address}: {found.generate_report()}"
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, address
    context.close()


def test_a_feature_page_can_be_read_without_javascript(chromium: Browser, server: str, features: str):
    context = chromium.new_context(base_url=server, java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{features}/5")
    expect(page.locator(".example").first).to_be_visible()
    page.get_by_role("link", name="6 →").click()
    expect(page).to_have_url(re.compile("/6$"))
    page.get_by_label("Your own text").fill("The old bridge")
    page.get_by_role("button", name="Test").click()
    expect(page.locator("#where")).to_contain_text("The old bridge")
    context.close()
