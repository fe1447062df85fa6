"""The page that says why, in a real browser: ask, compare, ablate, share; by keyboard; accessible."""

import re
from urllib.parse import parse_qs, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect


def done(page: Page, status: str | re.Pattern[str] = "Done.") -> None:
    """The first answer waits for the model to be loaded."""
    expect(page.locator("#status")).to_have_text(status, timeout=60_000)


def ask(page: Page, prompt: str = "The old bridge", compare: str = "") -> None:
    page.goto("/why")
    page.get_by_label("Prompt what").fill(prompt)
    page.get_by_role("textbox", name="Second prompt").fill(compare)
    page.get_by_label("Prompt what").press("Control+Enter")
    done(page)


def test_two_prompts_are_compared_a_feature_is_ablated_and_a_link_shares_it(page: Page):
    ask(page, "The old bridge", "The lazy dog")
    expect(page.locator("#answers section")).to_have_count(2)
    expect(page.locator("[data-answer='1'] .lead")).to_contain_text("against")
    expect(page.locator("#shared tbody tr")).not_to_have_count(0)
    ablate = page.get_by_role("button", name=re.compile("^Ablate feature")).first
    number = re.findall(r"\d+", ablate.get_attribute("aria-label") or "")[0]
    ablation = page.locator("[data-answer='0'] tbody tr").first.locator("td").nth(5).inner_text()
    ablate.press("Enter")
    expect(page.locator("#effect")).to_contain_text("goes from")
    said = page.locator("#effect").inner_text().replace("−", "-")
    before, after = map(float, re.findall(r"[+-]\d+\.\d+", said))
    assert before - after == pytest.approx(float(ablation.replace("−", "-")), abs=0.002)
    rows = page.locator("#what-if tbody tr").all_inner_texts()
    assert len(rows) >= 10
    link = page.get_by_role("link", name="Link to this").get_attribute("href") or ""
    assert parse_qs(link.removeprefix("?"))["h"][0].startswith(f"{number}:0:")
    page.goto(f"/why{link}")
    done(page)
    expect(page.get_by_role("textbox", name="Second prompt")).to_have_value("The lazy dog")
    expect(page.locator("#held .n")).to_have_text(number)
    assert page.locator("#what-if tbody tr").all_inner_texts() == rows


def test_a_clamped_feature_is_turned_up_and_taken_out_again_by_keyboard(page: Page):
    ask(page)
    page.get_by_role("button", name=re.compile("^Clamp feature")).first.press("Enter")
    expect(page.locator("#effect")).to_contain_text("goes from")
    said = page.locator("#effect").inner_text()
    strength = page.get_by_role("spinbutton", name=re.compile("Strength of feature"))
    expect(strength).to_have_value("1")
    strength.fill("8")
    strength.press("Tab")
    expect(page.locator("#effect")).not_to_have_text(said)
    expect(page.locator("#effect")).to_contain_text("goes from")
    assert parse_qs(urlsplit(page.url).query)["h"][0].split(":")[1] == "8"
    page.get_by_role("button", name=re.compile("Remove feature")).press("Enter")
    expect(page.locator("#what-if")).to_be_hidden()
    assert "h" not in parse_qs(urlsplit(page.url).query)


def test_a_token_of_the_prompt_shows_its_features_alone(page: Page):
    ask(page)
    rows = page.locator("[data-answer='0'] tbody tr")
    at = rows.first.locator("td").first.inner_text()
    token = page.locator(f".heat button[data-at='{at}']")
    assert "features" in (token.get_attribute("title") or "")
    token.press("Enter")
    expect(token).to_have_attribute("aria-pressed", "true")
    shown = [row for row in rows.all() if row.is_visible()]
    assert shown
    assert {row.locator("td").first.inner_text() for row in shown} == {at}
    token.press("Enter")
    assert all(row.is_visible() for row in rows.all())


def test_markup_in_tokens_and_labels_is_text_and_a_doubtful_label_is_marked(page: Page):
    token = {"token": " <b>\n", "is_sink": False, "features": -0.5, "error": 0.1}
    side = {"token": " <i>x</i>", "logit": 1, "probability": 0.5}
    cause = {
        "position": 0, "token": " <b>\n", "feature": 3, "label": "<img src=x onerror=alert(1)>",
        "beats_control": False, "act": 2, "share": None, "attribution": -0.5, "ablation": -0.4,
    }  # fmt: skip
    why = {
        "prompt": "x", "tokens": [token], "target": side, "against": side, "difference": 1, "base": 0,
        "of_features": -0.5, "of_error": 0.1, "rest": 1.4, "steps": 0, "n_active": 1, "causes": [cause],
        "notes": ["<u>note</u>"],
    }  # fmt: skip
    answer = {"why": why, "compared": None, "features": []}
    page.route("**/api/why", lambda route: route.fulfill(json=answer))
    ask(page)
    expect(page.locator("[data-answer='0'] tbody .name")).to_have_text("<img src=x onerror=alert(1)>")
    expect(page.locator("[data-answer='0'] .badge")).to_have_text("doubtful")
    expect(page.locator(".lead")).to_contain_text("␣<i>x</i>")
    expect(page.locator("#notes li")).to_have_text("<u>note</u>")
    expect(page.locator(".heat button")).to_have_class("a a10 against")
    expect(page.locator(".heat button")).to_contain_text("<b>⏎")
    expect(page.locator("#shared")).to_be_hidden()


def test_what_is_wrong_with_a_question_is_said(chromium: Browser, server: str):
    context = chromium.new_context(base_url=server)  # the console tells of the 400
    page = context.new_page()
    page.goto("/why?prompt=The+old&target=the&against=the&run=1")
    done(page, re.compile("both begin with the token"))
    expect(page.locator("#answers section")).to_have_count(0)
    context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_is_accessible_and_fits_a_phone(chromium: Browser, server: str, theme: str):
    context = chromium.new_context(base_url=server, color_scheme=theme, viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.goto("/why?prompt=The+old+bridge&compare=The+lazy+dog&h=1:2:&run=1")
    done(page)
    expect(page.locator("#effect")).to_contain_text("goes from")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()
