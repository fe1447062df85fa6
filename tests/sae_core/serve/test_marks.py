"""A label that does not beat its control is marked wherever it is shown: on every page, and by every command."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from pipelines.cli import cli
from sae_core.artifacts import ArtifactStore
from sae_core.labels.reader import NO_BETTER, doubted
from sae_core.serve import create_app
from sae_core.serve.site import write_site
from sae_core.studies import Studies, study_folders

NAMED = re.compile(r"thing \d+ here")
MARKED = re.compile(rf"thing \d+ here\W*(doubtful|{NO_BETTER})")
PROSE = "The quick brown fox jumps over the old bridge"


@pytest.fixture(scope="module")
def root(reported_atlas: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reported atlas, every label of which does no better than its control."""
    root = tmp_path_factory.mktemp("doubtful") / "atlas"
    shutil.copytree(reported_atlas, root)
    (file,) = root.glob("labels/*/*/labels.parquet")
    table = pq.read_table(file)
    for name, values in (
        ("label", [f"thing {i} here" for i in range(table.num_rows)]), ("beats_control", [False] * table.num_rows),
    ):  # fmt: skip
        at = table.column_names.index(name)
        table = table.set_column(at, name, pa.array(values, table.schema.field(name).type))
    pq.write_table(table, file)
    return root


@pytest.fixture(scope="module")
def doubtful(root: Path) -> Iterator[TestClient]:
    app = create_app(ArtifactStore(root), studies=Studies.load(*study_folders()))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


def said(page: str) -> str:
    """What a page shows, without its heading, which is marked below it."""
    page = re.sub(r'<h1 class="label.*?</h1>', "", page)
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", page).replace("&#39;", "'"))


def all_marked(text: str) -> bool:
    return 0 < len(NAMED.findall(text)) == len(MARKED.findall(text))


@pytest.mark.parametrize(
    "address",
    ["/", "/search?q=thing", "/search", "/f/{}/5", "/f/{}/5/together", "/near/{}/5", "/map", "/steer", "/audit",
     "/multilingual", "/text?text=" + PROSE, "/text?feature=5&text=" + PROSE],
)  # fmt: skip
def test_every_page_marks_every_such_label(doubtful: TestClient, address: str):
    page = doubtful.get(address.format(doubtful.get("/api/dictionaries").json()[0]))
    assert page.status_code == 200
    assert all_marked(said(page.text))


def test_the_page_of_the_feature_itself_marks_its_name(doubtful: TestClient):
    page = doubtful.get(f"/f/{doubtful.get('/api/dictionaries').json()[0]}/5").text.replace("&#39;", "'")
    assert f'<span class="badge warn">{NO_BETTER}</span>' in page
    assert f"<title>5 thing 5 here ({NO_BETTER}) · Mind Atlas</title>" in page


def test_a_document_marks_the_label_of_its_example(doubtful: TestClient):
    slug = doubtful.get("/api/dictionaries").json()[0]
    (example, *_) = doubtful.get(f"/api/features/{slug}/5").json()["levels"][0]["examples"]
    address = f"/d/tiny/{example['document']}?dictionary={slug}&feature=5&at={example['position']}"
    assert all_marked(said(doubtful.get(address).text))


@pytest.mark.parametrize("by", ["activations", "difference"])
def test_a_contrast_marks_labels(doubtful: TestClient, by: str):
    sides = {"positive": "def f(a): return a\ndef g(b): return b", "negative": f"{PROSE}\nRain fell on the bridge"}
    page = doubtful.post("/contrast", data=sides | {"by": by})
    assert all_marked(said(page.text))


def test_names_on_the_map_are_marked(doubtful: TestClient):
    slug = doubtful.get("/api/dictionaries").json()[0]
    version = doubtful.get(f"/map/{slug}/map.json").json()["version"]
    assert all_marked("\n".join(doubtful.get(f"/map/{slug}/names-{version}/0.json").json()))


def test_the_api_tells_of_each_label_whether_it_beats_its_control(doubtful: TestClient):
    slug = doubtful.get("/api/dictionaries").json()[0]
    card = doubtful.get(f"/api/features/{slug}/5").json()
    fired = doubtful.post("/api/text", json={"text": PROSE}).json()
    listed = [
        *card["neighbors"], *doubtful.get(f"/api/features/{slug}/5/together").json(),
        *doubtful.get("/api/search").json()["hits"], doubtful.get(f"/api/steer/{slug}/5").json(),
        *(c for concept in doubtful.get("/api/audit").json()["concepts"] for c in concept["candidates"]),
        *(f for text in doubtful.get("/api/multilingual").json()["texts"] for f in text["features"]),
        *(f for token in fired for f in token["features"]),
    ]  # fmt: skip
    assert {row["beats_control"] for row in listed} == {False}
    assert all(NAMED.fullmatch(row["label"]) for row in listed)


def test_a_site_of_files_marks_labels_and_its_scripts_say_the_same_words(root: Path, tmp_path: Path):
    write_site(ArtifactStore(root), "", tmp_path / "site", limit=3)
    pages = [path.read_text("utf-8") for path in (tmp_path / "site" / "f").rglob("index.html")]
    assert len(pages) == 6
    assert all(len(NAMED.findall(said(page))) == len(MARKED.findall(said(page))) for page in pages)
    assert '"beats_control": false' in (tmp_path / "site" / "search.json").read_text("utf-8")
    assert f'NO_BETTER = "{NO_BETTER}"' in (tmp_path / "site" / "static" / "doubt.js").read_text("utf-8")


@pytest.mark.parametrize(
    "command",
    [
        ["features", "thing"], ["feature", "5"], ["explain", PROSE], ["contrast", "--prompt", PROSE],
        ["contrast", "--positive-text", "def f(a): return a", "--negative-text", PROSE],
        ["contrast", "--positive-text", "def f(a)", "--negative-text", PROSE, "--direction", "difference"],
        ["steer", "--feature", "5=1", "--max-tokens", "1", "Hello"],
    ],
    ids=lambda command: " ".join(command)[:40],
)  # fmt: skip
def test_every_command_marks_every_such_label(root: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]):
    monkeypatch.setenv("MIND_ATLAS_HOME", str(root))
    monkeypatch.setattr("pipelines.console.out.width", 400)
    done = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert all_marked(re.sub(r"\s+", " ", done.stdout))


def test_a_label_that_was_not_scored_or_is_better_stands_as_it_is():
    assert [doubted("x", beats) for beats in (True, None, False)] == ["x", "x", f"x ({NO_BETTER})"]
