"""`plan`: durations, refusals, and a study file that says what was proposed. `science`: a page made anew."""

import json
from pathlib import Path

import pytest
from click import BadParameter
from click.testing import CliRunner

from pipelines.commands.science import Duration, plan, science
from sae_core.study_files import load_study


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20m", 1200), ("1h30m", 5400), ("0.5h", 1800), ("1d", 86400)]
)
def test_a_duration_is_read_in_the_units_that_people_write(text: str, seconds: int):
    assert Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "2 hours", "-2h", "2h later"])
def test_what_is_no_duration_is_refused_with_how_to_write_one(text: str):
    with pytest.raises(BadParameter, match="write 90s, 20m, 2h, 1h30m or 1d"):
        Duration().convert(text, None, None)


@pytest.mark.parametrize(("options", "why"), [
    ([], "one of --budget 2h, --flops 1e15, --tokens 4000000"),
    (["--budget", "1h", "--tokens", "5"], "one of --budget 2h"),
    (["--budget", "1h", "--run"], "--run needs --into FILE.toml"),
    (["--budget", "1h", "--into", "x.txt"], "ends in .toml"),
])  # fmt: skip
def test_plan_says_what_is_missing_before_it_measures_anything(options: list[str], why: str):
    result = CliRunner().invoke(plan, ["tiny", *options])
    assert result.exit_code == 2
    assert why in result.output


def test_a_plan_for_a_model_that_was_never_read_is_written_as_a_study_that_loads(tiny_study: Path, tmp_path: Path):
    file = tmp_path / "larger.toml"
    options = ["tiny", "--tokens", "20000", "--into", str(file), "--device", "cpu", "--json"]
    result = CliRunner().invoke(plan, options, catch_exceptions=False)
    told = json.loads(result.stdout)
    before, after = load_study(tiny_study), load_study(file)
    assert "the law is that of layer 15 of SmolLM2-135M-Instruct" in told["note"]
    (dictionary,) = after.dictionaries
    assert (dictionary.d_sae, dictionary.tokens) == (told["proposal"]["d_sae"], told["proposal"]["tokens"])
    assert dictionary.lr == told["proposal"]["lr"]
    assert 19_000 < dictionary.tokens <= 20_000
    changed = {"name", "dictionaries"}
    assert after.model_dump(exclude=changed) == before.model_dump(exclude=changed)
    assert told["proposal"]["seconds"] > 0


def test_one_command_makes_the_sweep_and_the_table_through_the_assets_and_puts_both_into_a_page(
    tiny_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("assets.resources.home", lambda: tmp_path)
    page = tmp_path / "science.md"
    page.write_text(
        "# A\n<!-- scaling -->\nwhat was there\n<!-- /scaling -->\nB\n<!-- science -->\n<!-- /science -->\nC\n", "utf-8"
    )
    done = CliRunner().invoke(
        science, ["tiny-science", "--into", str(page), "--device", "cpu"], obj=False, catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    text = page.read_text("utf-8")
    assert "what was there" not in text
    assert (
        text.index("Joint law") < text.index("\nB\n") < text.index("| features are not neurons") < text.index("\nC\n")
    )
    assert page.with_name("scaling.png").stat().st_size > 1000
    (made,) = (tmp_path / "science").glob("*/*/science.json")
    claims = [row["claim"] for row in json.loads(made.read_text("utf-8"))["claims"]]
    assert all(f"| {claim} |" in text for claim in claims)
    assert len(set(claims)) == len(claims)
    for part in (
        "the loss at the best size", "two seeds of relu", "split into", "silent where another one absorbed it",
        "has a feature when it is frequent", "nor are they coordinates", "easier to name than neurons",
        "shuffled weights", "log-likelihood ratio of DNA",
    ):  # fmt: skip
        assert any(part in claim for claim in claims), part
    assert "\nneurons: " in text
    assert not list((tmp_path / "science").rglob("scratch"))
