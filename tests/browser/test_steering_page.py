"""The steering page in a real browser: three answers, stop, and a link that restores everything."""

import re
from urllib.parse import parse_qs, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from sae_core.artifacts import ArtifactStore
from sae_core.atlas import Atlas


@pytest.fixture(scope="session")
def atlas(tiny_atlas) -> Atlas:
    return Atlas.open(ArtifactStore(tiny_atlas))


@pytest.fixture(scope="session")
def alive(atlas: Atlas) -> int:
    """A feature that fires."""
    return next(row["feature"] for row in atlas.features.table().to_pylist() if not row["is_dead"])


def written(page: Page, status: str = "Done.") -> None:
    """The first answer waits for the model to be loaded."""
    expect(page.locator("#status")).to_have_text(status, timeout=60_000)


def answers(page: Page) -> list[str]:
    return [element.text_content() or "" for element in page.locator(".stream").all()]


def test_a_strength_is_found_for_a_feature_that_has_none(page: Page, atlas: Atlas):
    rows = atlas.features.table().to_pylist()
    feature = next(r["feature"] for r in rows if not r["is_dead"] and atlas.suggested_strength(r["feature"]) is None)
    page.goto(f"/steer?feature={feature}")
    search = page.get_by_role("button", name=f"Find a strength for feature {feature}")
    search.click()
    written_at = re.compile("^Texts were (fluent up to|not fluent at any)")
    expect(page.locator("#status")).to_have_text(written_at, timeout=60_000)
    expect(search).to_be_hidden()


def test_three_answers_are_written_and_a_link_restores_everything(page: Page, atlas: Atlas, alive: int):
    page.goto(f"/steer?feature={alive}")
    row = page.locator("#features li")
    expect(row).to_have_count(1)
    page.get_by_label(f"Exact strength of feature {alive}").fill("8")
    page.get_by_label("Prompt", exact=True).fill("The river\n  said")
    page.get_by_role("spinbutton", name="Tokens").fill("12")
    page.get_by_label("Temperature").fill("1.5")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Where").select_option("generated")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    written(page)
    said = answers(page)
    assert said[0] != said[1]
    assert all(said)
    token = page.locator("[data-column=steered] [data-logprob]").first
    assert float(token.get_attribute("data-logprob") or "nan") <= 0
    assert f"feature {alive}: " in (token.get_attribute("title") or "")
    link = page.get_by_role("link", name="Link to this").get_attribute("href") or ""
    page.goto(f"/steer{link}")
    written(page)
    assert answers(page) == said
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("The river\n  said")
    expect(page.get_by_label("Where")).to_have_value("generated")
    expect(page.get_by_label(f"Strength of feature {alive}, in maxima")).to_have_value("8")
    assert parse_qs(urlsplit(page.url).query)["f"] == [f"{alive}:8:clamp"]


def test_white_space_of_the_answer_is_whole(page: Page, alive: int):
    body = "".join(
        f'data: {{"column": "default", "text": "{text}", "logprob": -1, "finish": "", "before": []}}\n\n'
        for text in ("a", "  b", "\\n\\n", "\\tc", " <b>&amp;")
    )
    page.route("**/api/steer", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    page.goto("/steer")
    page.get_by_role("button", name="Answer").click()
    written(page)
    assert answers(page)[0] == "a  b\n\n\tc <b>&amp;"
    assert page.locator("[data-column=default] .stream").evaluate("p => getComputedStyle(p).whiteSpace") == "pre-wrap"


def test_the_answer_stops_when_asked(page: Page, alive: int):
    page.goto(f"/steer?f={alive}:1")
    page.get_by_role("spinbutton", name="Tokens").fill("512")
    page.get_by_role("button", name="Answer").click()
    expect(page.locator("[data-column=steered] [data-logprob]").first).to_be_visible(timeout=60_000)
    page.get_by_role("button", name="Stop").click()
    written(page, "Stopped.")
    before = answers(page)
    page.wait_for_timeout(300)
    assert answers(page) == before
    expect(page.get_by_role("button", name="Answer")).to_be_enabled()
    page.get_by_role("spinbutton", name="Tokens").fill("3")  # the model is free again
    page.get_by_role("button", name="Answer").click()
    written(page)


def test_features_are_found_changed_and_removed_by_keyboard(page: Page, alive: int):
    page.goto("/steer")
    page.get_by_label("Add a feature").fill(str(alive))
    page.keyboard.press("Enter")
    expect(page.locator("#features li")).to_have_count(1)
    page.get_by_label("Add a feature").fill("bridge")
    expect(page.locator("#found button").first).to_be_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#features li")).to_have_count(2)
    slider = page.get_by_role("slider").first
    slider.focus()
    before = float(slider.input_value())
    page.keyboard.press("ArrowRight")
    exact = page.get_by_label(f"Exact strength of feature {alive}")
    expect(exact).to_have_value(re.compile(rf"{before + 0.25:g}"))
    page.get_by_label(f"Method of feature {alive}").select_option("scale")
    expect(page.locator(".formula").first).to_contain_text("s \u2212 1")
    exact.fill("500")
    expect(page.locator(".caution").first).to_contain_text("degenerate")
    page.get_by_role("button", name=f"Remove feature {alive}").press("Enter")
    expect(page.locator("#features li")).to_have_count(1)


def test_a_feature_that_cannot_be_steered_says_so(page: Page):
    page.route(
        "**/api/steer/*/9",
        lambda route: route.fulfill(
            json={
                "feature": 9,
                "label": "",
                "is_dead": True,
                "max_act": 0,
                "strength": 2,
                "suggested_strength": None,
                "output_score": None,
                "role": "",
            }
        ),
    )
    page.goto("/steer?feature=9")
    expect(page.locator(".caution")).to_contain_text("Dead")


def test_the_page_of_a_feature_leads_to_it(page: Page, atlas: Atlas, alive: int):
    page.goto(f"/f/{atlas.dictionary}/{alive}")
    page.get_by_role("link", name="Steer with it").click()
    expect(page.locator("#features li .n")).to_have_text(str(alive))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_is_accessible_and_fits_a_phone(chromium: Browser, server: str, theme: str, alive: int):
    context = chromium.new_context(base_url=server, color_scheme=theme, viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.goto(f"/steer?f={alive}:30&max_tokens=8&run=1")
    written(page)
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()
