"""The command line in processes of its own, as a person uses it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MIND_ATLAS = Path(sys.executable).with_name("mind-atlas")


def run(*arguments: str, home: Path, cwd: Path | None = None, check: bool = False) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MIND_ATLAS_HOME": str(home), "DAGSTER_HOME": str(home / "dagster")}
    (home / "dagster").mkdir(parents=True, exist_ok=True)
    command = [str(MIND_ATLAS), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300, check=False)
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def home(tiny_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the tiny study, given by its path, was run from some other folder."""
    home = tmp_path_factory.mktemp("home")
    done = run("run", str(tiny_study), home=home, cwd=home, check=True)
    assert "What to do next" in done.stdout
    assert done.stderr.count(": made (never made)") == 7
    return home


def test_a_second_run_does_no_work_and_says_so(home: Path):
    before = {p: p.stat().st_mtime_ns for p in home.rglob("manifest.json")}
    done = run("run", "tiny", home=home, check=True)
    assert done.stderr.count(": cached") == 7
    assert {p: p.stat().st_mtime_ns for p in home.rglob("manifest.json")} == before


def test_a_study_given_by_path_is_known_by_name_afterwards(home: Path, tiny_study: Path):
    assert (home / "studies" / "tiny.toml").resolve() == tiny_study.resolve()
    rows = json.loads(run("status", "tiny", "--json", home=home, check=True).stdout)
    assert [row["state"] for row in rows] == ["made"] * 7


def test_status_says_what_is_stale_and_why(home: Path, tiny_study: Path):
    old = tiny_study.read_text("utf-8")
    try:
        tiny_study.write_text(old.replace("k = 4", "k = 4\nlr = 0.01"), "utf-8")
        rows = json.loads(run("status", "tiny", "--json", home=home, check=True).stdout)
    finally:
        tiny_study.write_text(old, "utf-8")
    why = {row["stage"]: row["why"] for row in rows if row["state"] == "stale"}
    assert why["dictionary"] == "lr: made with null, now 0.01"
    assert why.keys() == {"dictionary", "features", "neighbors", "feature_map", "labels"}


def test_features_are_found_shown_and_explained(home: Path):
    hits = json.loads(run("features", "the", "--json", home=home, check=True).stdout)
    assert hits
    number = str(hits[0]["feature"])
    card = json.loads(run("feature", number, "--json", home=home, check=True).stdout)
    assert card["row"]["feature"] == int(number)
    assert len(card["neighbors"]) == 10
    assert f"feature {number}" in run("feature", number, home=home, check=True).stdout
    tokens = json.loads(run("explain", "the old bridge", "--json", home=home, check=True).stdout)
    assert "".join(token["token"] for token in tokens).replace(" ", "").endswith("bridge")
    assert any(token["features"] for token in tokens)


def test_steering_changes_the_answer_and_the_same_seed_repeats_it(home: Path):
    hits = json.loads(run("features", "the", "--json", home=home, check=True).stdout)
    command = ("steer", "--feature", f"{hits[0]['feature']}=10", "--max-tokens", "8", "--json", "Hello")
    answers = json.loads(run(*command, home=home, check=True).stdout)
    assert answers["default"] != answers["steered"]
    assert json.loads(run(*command, home=home, check=True).stdout) == answers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "nowhere"), "no study 'nowhere': known are"),
        (("run", "nowhere.toml"), "no study file"),
        (("feature", "99999"), "no feature 99999"),
        (("feature", "1", "--dictionary", "x"), "no finished dictionary x"),
        (("steer", "--feature", "1=ten", "Hi"), "write NUMBER=STRENGTH"),
        (("steer", "--feature", "99999=1", "Hi"), "99999"),
        (("features", " "), "no word to search for"),
    ],
)
def test_bad_input_is_one_line_and_a_status(home: Path, arguments: tuple[str, ...], message: str):
    done = run(*arguments, home=home)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_without_an_atlas_one_is_told_how_to_make_it(tmp_path: Path):
    done = run("features", "bridge", home=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("mind-atlas: no atlas is made yet: `mind-atlas run` makes one")


def test_help_lists_the_commands():
    done = subprocess.run([str(MIND_ATLAS), "--help"], capture_output=True, text=True, check=True)
    for command in ("run", "status", "features", "feature", "explain", "steer", "ui"):
        assert f"  {command} " in done.stdout
