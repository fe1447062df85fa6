"""The safety audit, the contrast and the multilingual report in a real browser, accessible in both themes."""

import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

ADDRESSES = ("/audit", "/multilingual", "/contrast")


def test_the_audit_is_in_the_navigation_and_leads_to_features(page: Page):
    page.goto("/")
    page.get_by_role("link", name="Audit", exact=True).click()
    expect(page.locator("h1")).to_have_text("Safety audit")
    expect(page.locator(".caveats")).to_contain_text("a feature that is silent proves nothing")
    page.get_by_role("link", name="power seeking").click()
    article = page.locator("#c-power_seeking")
    expect(article).to_be_in_viewport()
    expect(article).to_contain_text("on unseen prompts")
    expect(article).to_contain_text("As a monitor:")
    link = article.locator("ol a").first
    number = link.locator(".n").inner_text()
    link.click()
    expect(page).to_have_url(re.compile(rf"/f/.*/{number}$"))


def test_two_sets_of_prompts_are_compared_by_keyboard_alone(page: Page):
    page.goto("/")
    page.get_by_role("link", name="Contrast").press("Enter")
    page.get_by_label("Positives").focus()
    page.keyboard.insert_text("\n".join(f"def f{i}(a, b): return {i}" for i in range(12)))
    page.keyboard.press("Tab")
    page.keyboard.insert_text("\n".join(f"The bridge crosses river {i}." for i in range(12)))
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#told tbody tr").first).to_be_visible(timeout=60_000)
    expect(page.get_by_role("status")).to_contain_text("a claim needs 40 a side")
    expect(page.locator("#told")).to_contain_text("6 find, positive; 6 find, negative; 6 test, positive")
    expect(page.get_by_label("Negatives")).to_have_value(re.compile("^The bridge crosses river 0"))
    page.get_by_label("Rank by").select_option("difference")
    page.get_by_role("button", name="Compare").press("Enter")
    expect(page.locator("#told ol.near li")).to_have_count(10)
    expect(page.get_by_role("status")).to_contain_text("An angle is no test")


def test_what_is_wrong_with_the_prompts_is_said_and_they_stay(chromium: Browser, server: str):
    context = chromium.new_context(base_url=server, java_script_enabled=False)  # the console notes the status
    page = context.new_page()
    page.goto("/contrast")
    page.get_by_label("Positives").fill("the same")
    page.get_by_label("Negatives").fill("the same")
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("alert")).to_contain_text("no positive prompts (all 1 are on both sides)")
    expect(page.get_by_label("Positives")).to_have_value("the same")
    context.close()


def test_a_feature_is_shown_in_all_its_languages(page: Page):
    page.goto("/")
    page.get_by_role("link", name="Languages").click()
    item = page.locator(".languages").first
    expect(item.locator("li .facts")).to_have_text(["en", "fr", "ru"])
    expect(item.locator(".example").nth(2)).to_contain_text("Мост")
    expect(page.locator(".languages .a").first).to_be_visible()
    page.get_by_role("link", name=re.compile("in all languages")).last.click()
    expect(page).to_have_url(re.compile("text=sentences&feature="))
    expect(page.locator(".languages").first).to_be_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_reports_are_accessible_and_fit_a_phone(chromium: Browser, server: str, theme: str):
    context = chromium.new_context(base_url=server, color_scheme=theme, viewport={"width": 390, "height": 844})
    page = context.new_page()
    for address in ADDRESSES:
        page.goto(address)
        if address == "/contrast":
            page.get_by_label("Positives").fill("def f(a):\ndef g(b):\ndef h(c):\ndef i(d):")
            page.get_by_label("Negatives").fill("One river.\nTwo rivers.\nThree rivers.\nFour rivers.")
            page.get_by_role("button", name="Compare").click()
            expect(page.locator("#told")).to_be_visible(timeout=60_000)
        found = Axe().run(page)
        assert found.violations_count == 0, f"{address}: {found.generate_report()}"
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, address
    context.close()
