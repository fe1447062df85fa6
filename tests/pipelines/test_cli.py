"""The command line in processes of its own, as a person uses it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import pytest
from pytest_httpserver import HTTPServer

from sae_core.artifacts import PROJECT
from sae_core.stages import VERSIONS

NOTHING_MORE: Mapping[str, str] = MappingProxyType({})
MIND_ATLAS = Path(sys.executable).with_name("mind-atlas")


def surroundings(home: Path) -> dict[str, str]:
    """Environment of a command: a home of its own, and Dagster set up as the project sets it up."""
    (home / "dagster").mkdir(parents=True, exist_ok=True)
    shutil.copy(PROJECT / "dagster.yaml", home / "dagster")
    return os.environ | {"MIND_ATLAS_HOME": str(home), "DAGSTER_HOME": str(home / "dagster")}


def run(
    *arguments: str, home: Path, cwd: Path | None = None, check: bool = False, more: Mapping[str, str] = NOTHING_MORE
) -> subprocess.CompletedProcess[str]:
    environment = surroundings(home) | dict(more)
    cwd = cwd or home  # where .dagster goes
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
    assert done.stderr.count(": made (never made)") == 9
    return home


def test_a_second_run_does_no_work_and_says_so(home: Path):
    before = {p: p.stat().st_mtime_ns for p in home.rglob("manifest.json")}
    done = run("run", "tiny", home=home, check=True)
    assert done.stderr.count(": cached") == 9
    assert {p: p.stat().st_mtime_ns for p in home.rglob("manifest.json")} == before


def test_a_study_given_by_path_is_known_by_name_afterwards(home: Path, tiny_study: Path):
    assert (home / "studies" / "tiny.toml").resolve() == tiny_study.resolve()
    rows = json.loads(run("status", "tiny", "--json", home=home, check=True).stdout)
    states = ["made"] * len(VERSIONS)
    assert [row["state"] for row in rows] == states


def test_status_says_what_is_stale_and_why(home: Path, tiny_study: Path):
    old = tiny_study.read_text("utf-8")
    try:
        tiny_study.write_text(old.replace("k = 4", "k = 4\nlr = 0.01"), "utf-8")
        rows = json.loads(run("status", "tiny", "--json", home=home, check=True).stdout)
    finally:
        tiny_study.write_text(old, "utf-8")
    why = {row["stage"]: row["why"] for row in rows if row["state"] == "stale"}
    assert why["dictionary"] == "lr: made with null, now 0.01"
    assert why.keys() == {"dictionary", "features", "neighbors", "feature_map", "steering", "labels", "atlas"}


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
    assert "activation" in run("explain", "the old bridge", home=home, check=True).stdout


def test_why_tells_features_of_two_prompts_and_what_their_ablation_does(home: Path):
    command = ("why", "The old bridge", "--target", " the", "--against", " river bank", "--compare", "The lazy dog")
    told = json.loads(run(*command, "--limit", "3", "--json", home=home, check=True).stdout)
    assert [cause["ablation"] is not None for cause in told["why"]["causes"]] == [True] * 3
    assert told["compared"]["target"]["token"] == told["why"]["target"]["token"]
    assert len(told["features"]) == 3
    shown = run(*command, home=home, check=True).stdout
    assert "tokens: the first" in shown  # of " river bank"
    assert shown.count("attribution") == 2
    assert "features of both prompts" in shown


def test_steering_changes_the_answer_and_the_same_seed_repeats_it(home: Path):
    hits = json.loads(run("features", "the", "--json", home=home, check=True).stdout)
    command = ("steer", "--feature", f"{hits[0]['feature']}=10", "--max-tokens", "90", "--json", "Hello :smile: " * 20)
    answers = json.loads(run(*command, home=home, check=True).stdout)
    assert answers["default"] != answers["steered"]
    assert answers["prompt"] == "Hello :smile: " * 20  # neither folded nor drawn
    assert json.loads(run(*command, home=home, check=True).stdout) == answers
    found = run("steer", "--feature", str(hits[0]["feature"]), "--max-tokens", "5", "Hello", home=home, check=True)
    assert f"feature {hits[0]['feature']}: texts were " in found.stderr


def test_chosen_features_are_labeled_after_a_look_at_the_cost(
    home: Path, tiny_study: Path, tmp_path: Path, httpserver: HTTPServer
):
    message = {"role": "assistant", "content": '{"label": "a thing"}'}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    httpserver.expect_request("/v1/chat/completions").respond_with_json(body)
    own = tmp_path / "own"
    shutil.copytree(home, own, symlinks=True)
    study = tiny_study.parent.parent / "asked" / "tiny.toml"  # beside, as its paths are seen from its folder
    study.parent.mkdir()
    labels = f'base_url = "{httpserver.url_for("/v1")}"\nmodel = "m"\nfeatures = 2\nscorers = ["embedding"]'
    study.write_text(tiny_study.read_text("utf-8").replace("features = 0", labels), "utf-8")
    (own / "studies" / "tiny.toml").unlink()
    (own / "studies" / "tiny.toml").symlink_to(study)
    environment = {"NO_PROXY": "127.0.0.1", "MIND_ATLAS_CACHE": str(tmp_path / "cache")}
    command = partial(run, home=own, check=True, more=environment)
    estimate = json.loads(command("label", "--dry-run", "--json").stdout)
    assert (estimate["requests"], estimate["dollars"]) == (2, None)
    assert len(httpserver.log) == 0
    command("run", "tiny")
    hits = json.loads(command("features", "the", "--limit", "20", "--json").stdout)
    number = next(hit["feature"] for hit in hits if hit["label"] != "a thing")
    assert "a thing" in command("label", "--feature", str(number)).stdout
    assert len(httpserver.log) == 3
    assert command("run", "tiny").stderr.count(": cached") == len(VERSIONS)
    assert json.loads(command("feature", str(number), "--json").stdout)["name"] == "a thing"
    study.write_text(study.read_text("utf-8").replace('model = "m"', 'model = "other"'), "utf-8")
    command("run", "tiny")
    found = json.loads(command("labels", "--json").stdout)
    assert [(one["model"], one["written"]) for one in found["labelers"]] == [("other", 2), ("m", 3)]
    assert all(label["scores"] for label in found["labels"])
    beside = command("labels", "--against", found["labelers"][1]["name"]).stdout
    assert "2 features have both labels, 2 of them the same one" in beside


def test_a_dictionary_is_exported_and_made_again_from_the_export(home: Path, tiny_study: Path, tmp_path: Path):
    done = run("export", "--format", "saelens", "--json", str(tmp_path / "sae"), home=home, check=True)
    name = json.loads(done.stdout)["dictionary"]
    assert {path.name for path in (tmp_path / "sae").iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    imports = tiny_study.parent.parent / "imports" / "imports.toml"
    imports.parent.mkdir()
    shutil.copytree(tmp_path / "sae", imports.parent / "sae")
    text = tiny_study.read_text("utf-8")
    imports.write_text(text.replace("[dictionary]", '[dictionary]\nsource = "./sae"\nvariant = "again"'), "utf-8")
    (found,) = json.loads(run("run", str(imports), "--json", home=tmp_path, check=True).stdout)["dictionaries"]
    assert found["name"] == name.replace(".tiny.", ".imports.") + ".again"
    assert found["dictionary"]["fvu"] < 1


def test_dictionaries_are_listed_and_pictured(home: Path, tmp_path: Path):
    picture = tmp_path / "frontier.png"
    points = json.loads(run("dictionaries", "--plot", str(picture), "--json", home=home, check=True).stdout)
    assert [point["d_sae"] for point in points] == [64]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert points[0]["name"] in run("dictionaries", home=home, check=True).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "--format", "sparsify", "out"), "fire above thresholds"),
        (("export", "--format", "keras", "out"), "'keras' is not one of 'saelens'"),
        (("run", "nowhere"), "no study 'nowhere': known are"),
        (("run", "nowhere.toml"), "no study file"),
        (("feature", "99999"), "no feature 99999"),
        (("feature", "1", "--dictionary", "x"), "no finished dictionary x"),
        (("steer", "--feature", "1=ten", "Hi"), "write NUMBER=STRENGTH"),
        (("steer", "--feature", "99999=1", "Hi"), "99999"),
        (("features", " "), "no word to search for"),
        (("why", ""), "holds no token"),
        (("why", "The", "--target", " the", "--against", " the"), "both begin with the token"),
        (("label",), "say which: --feature N"),
        (("label", "--dry-run", "--feature", "99999"), "no feature 99999"),
    ],
)
def test_bad_input_is_one_line_and_a_status(home: Path, arguments: tuple[str, ...], message: str):
    done = run(*arguments, home=home)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("k = 4", "kay = 4", "dictionary.kay: unknown key; known here:"),
        ("layer = 2", "layer = 9", "activations.layer = 9: the model has layers 0 to 3: give one of these"),
        ("../models/tiny-llama", "../models/nowhere", "nowhere"),
        ('"../text"', '"../empty"', "empty"),
        ('"../text"', '"wiki-enn"', "wiki-en"),
        ("features = 0", 'features = 1\nmodel = "qwen2.5"', "labels.model: 'qwen2.5' is no name in the catalog"),
        ("features = 0", 'features = 1\nbase_url = "http://127.0.0.1:9/v1"\nask_each = 3', "labels.ask_each"),
        (
            'features = 0\nembedder = "../models/tiny-embedder"',
            'features = 1\nbase_url = "http://127.0.0.1:9/v1"\nembedder = "../models/nowhere"',
            "labels.embedder: there is no file or folder",
        ),
        ("held_out = 0.2", "held_out = 0", "corpus.held_out = 0: Input should be greater than 0"),
    ],
)
def test_a_bad_study_is_refused_in_one_line(tiny_study: Path, tmp_path: Path, old: str, new: str, message: str):
    (tiny_study.parent.parent / "empty").mkdir(exist_ok=True)
    text = tiny_study.read_text("utf-8")
    assert old in text
    bad = tiny_study.parent.parent / "bad" / "bad.toml"
    bad.parent.mkdir(exist_ok=True)
    bad.write_text(text.replace(old, new), "utf-8")
    done = run("run", str(bad), home=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*/*/manifest.json"))
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_study_that_clashes_with_another_is_not_taken_in(home: Path, tmp_path: Path):
    twin = tmp_path / "quickstart.toml"
    shutil.copy(PROJECT / "pipelines" / "studies" / "quickstart.toml", twin)
    assert "another study is called quickstart" in run("status", str(twin), home=home).stderr
    assert not (home / "studies" / "quickstart.toml").exists()
    run("status", "tiny", home=home, check=True)  # the others still work


def test_ctrl_c_stops_in_one_line_and_the_next_run_goes_on(tiny_study: Path, tmp_path: Path):
    environment = surroundings(tmp_path)
    command = [str(MIND_ATLAS), "run", str(tiny_study)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    while not list(tmp_path.glob("activations/*/*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("mind-atlas: stopped; what is finished stays")
    assert "Traceback" not in errors
    done = run("run", str(tiny_study), home=tmp_path, check=True)
    assert "corpus       tiny: cached" in done.stderr


def test_a_damaged_file_is_found_named_removed_and_made_again(home: Path, tmp_path: Path):
    copy = shutil.copytree(home, tmp_path / "home", symlinks=True)
    (shard,) = copy.glob("activations/*/*/train-00000.safetensors")
    calm = shard.read_bytes()
    shard.write_bytes(calm[:-7] + bytes([calm[-7] ^ 4]) + calm[-6:])
    found = run("verify", "--study", "tiny", "--repair", "--json", home=copy)
    assert found.returncode == 1
    damaged = {v["artifact"].partition("/")[0]: v["damage"] for v in json.loads(found.stdout) if v["damage"]}
    assert damaged == {"activations": {shard.name: f"{shard.name} has other content than was written"}}
    assert "1 damaged files: removed" in found.stderr
    assert run("run", "tiny", "--workers", "1", home=copy, check=True).stderr.count(": cached") == len(VERSIONS) - 1
    assert shard.read_bytes() == calm
    assert "as they were made" in run("verify", home=copy, check=True).stdout


def test_a_relative_home_means_one_folder(tiny_study: Path, tmp_path: Path):
    environment = os.environ | {"MIND_ATLAS_HOME": "here"}
    command = [str(MIND_ATLAS), "status", str(tiny_study), "--json"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert {row["state"] for row in json.loads(done.stdout)} == {"missing"}
    assert (tmp_path / "here" / "studies" / "tiny.toml").is_symlink()


def test_without_an_atlas_one_is_told_how_to_make_it(tmp_path: Path):
    done = run("features", "bridge", home=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("mind-atlas: no atlas is made yet: `mind-atlas run` makes one")


def test_help_lists_the_commands():
    done = subprocess.run([str(MIND_ATLAS), "--help"], capture_output=True, text=True, check=True)
    for command in (
        "run",
        "status",
        "dictionaries",
        "features",
        "feature",
        "labels",
        "explain",
        "steer",
        "export",
        "verify",
        "ui",
    ):
        assert f"  {command} " in done.stdout


def test_contrast_finds_features_for_two_sets_and_says_when_they_are_too_few(home: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("".join(f"def add{i}(a, b):\n" for i in range(6)), "utf-8")
    (tmp_path / "b.jsonl").write_text("".join(f'{{"text": "Rain fell {i} times."}}\n' for i in range(6)), "utf-8")
    sets = ["--positive", str(tmp_path / "a.txt"), "--negative", str(tmp_path / "b.jsonl")]
    found = json.loads(run("contrast", *sets, "--positive-text", "def add1(a, b):", "--json", home=home).stdout)
    assert found["prompts"] == {"find_positive": 3, "find_negative": 3, "test_positive": 3, "test_negative": 3}
    assert found["duplicates"] == 1
    assert found["claim"].startswith("no claim")
    done = run("contrast", "--positive", str(tmp_path / "a.txt"), home=home)
    assert done.returncode == 1
    assert "no negative prompts" in done.stderr


def test_an_audit_calibrates_monitors_that_watch_a_stream(home: Path, tmp_path: Path):
    done = run("audit", "tiny", "--only", "citation_surnames", home=home, check=True)
    assert "citation_surnames" in done.stdout
    (tmp_path / "in.jsonl").write_text('{"text": "As was shown (Novak & Rossi, 1998)."}\nplain text\n', "utf-8")
    watch = ["monitor", str(tmp_path / "in.jsonl"), "--false-positive-rate"]
    alerts = [json.loads(line) for line in run(*watch, "0.9", home=home, check=True).stdout.splitlines()]
    assert all(alert["concept"] == "citation_surnames" and alert["value"] >= alert["threshold"] for alert in alerts)
    done = run(*watch, "0.001", home=home)
    assert done.returncode == 1
    assert "40 calibration texts cannot hold a false-positive rate of 0.001" in done.stderr
