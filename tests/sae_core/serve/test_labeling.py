"""Labels of chosen features, asked for in the browser: who may, what is refused, and what is told of it."""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from sae_core.artifacts import ArtifactStore
from sae_core.atlas import Atlas
from sae_core.serve import create_app
from sae_core.studies import Studies, study_folders

GOOD = """
import sys, time
print("not a line of progress")
for n in (1, 2): print('{"done": %d, "total": 2, "unit": "labels"}' % n, flush=True)
while not __import__("os").path.exists(sys.argv[1]): time.sleep(0.01)
"""
BAD = "import sys; sys.exit('Traceback and all\\nmind-atlas: no label writer: <b>set labels.base_url</b>')"


@pytest.fixture
def started(tiny_atlas: Path) -> Callable[..., TestClient]:
    """Makes clients of servers that start a program in place of `mind-atlas label`."""

    def start(*program: str) -> TestClient:
        app = create_app(
            ArtifactStore(tiny_atlas), studies=Studies.load(*study_folders()),
            label=lambda dictionary, features: [sys.executable, "-c", *program],
        )  # fmt: skip
        return TestClient(app, base_url="http://127.0.0.1")

    return start


@pytest.fixture(scope="module")
def alive(atlas: Atlas) -> list[int]:
    return [i for i, dead in enumerate(atlas.features.table()["is_dead"].to_pylist()) if not dead]


def key(client: TestClient) -> str:
    found = re.search('name="key" value="([^"]+)"', client.get("/label?feature=0").text)
    assert found
    return found[1]


def wait(client: TestClient, until: Callable[[dict], bool]) -> dict:
    deadline = time.monotonic() + 60
    while not until(told := client.get("/api/label").json()):
        assert time.monotonic() < deadline, told
        time.sleep(0.02)
    return told


def test_features_are_labeled_by_a_process_and_the_page_tells_how_far_it_is(started, alive, tmp_path):
    client, end = started(GOOD, str(tmp_path / "end")), tmp_path / "end"
    assert client.get("/api/label").json()["features"] == []
    answer = client.post("/label", data={"key": key(client), "feature": alive[:2]}, follow_redirects=False)
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/label?dictionary=")
    told = wait(client, lambda told: told["done"] == 2)
    assert (told["features"], told["running"], told["total"], told["unit"]) == (alive[:2], True, 2, "labels")
    page = client.get(answer.headers["location"]).text
    assert "2 of 2 labels" in page
    assert 'hx-trigger="every 1s"' in page
    assert "<button>Write" not in page
    assert "Others are being labeled" in client.get(f"/label?feature={alive[5]}").text
    again = client.post("/label", data={"key": key_of(client), "feature": alive[0]})
    assert (again.status_code, "are being labeled" in again.text) == (409, True)
    end.touch()
    assert wait(client, lambda told: not told["running"])["error"] == ""
    page = client.get(answer.headers["location"]).text
    assert "Done: 2 asked about" in page
    assert "every 1s" not in page


def key_of(client: TestClient) -> str:
    """The key, while the page shows no form."""
    return client.app.state.labeling.key  # type: ignore[attr-defined]


def test_why_it_failed_is_told_in_one_line_as_text(started, alive):
    client = started(BAD)
    client.post("/label", data={"key": key(client), "feature": alive[0]})
    told = wait(client, lambda told: not told["running"])
    assert told["error"] == "no label writer: <b>set labels.base_url</b>"
    page = client.get("/label").text
    assert "No label was written: no label writer: &lt;b&gt;set" in page
    assert "Traceback" not in page


def test_a_program_that_is_not_there_or_says_nothing_is_told_too(tiny_atlas, started, alive):
    app = create_app(ArtifactStore(tiny_atlas), label=lambda dictionary, features: ["/no/such/program"])
    client = TestClient(app, base_url="http://127.0.0.1")
    client.post("/label", data={"key": key(client), "feature": alive[0]})
    assert "cannot be started" in wait(client, lambda told: not told["running"])["error"]
    client = started("raise SystemExit(3)")
    client.post("/label", data={"key": key(client), "feature": alive[0]})
    assert wait(client, lambda told: not told["running"])["error"] == "it ended without a word"


def test_what_another_site_sends_starts_nothing(started, alive):
    client, cross = started(BAD), {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    for data, headers in (
        ({"feature": alive[0]}, {}),
        ({"feature": alive[0], "key": "guessed"}, {}),
        ({"feature": alive[0], "key": key(client)}, cross),
    ):
        assert client.post("/label", data=data, headers=headers).status_code == 403
    assert client.get(f"/label?feature={alive[0]}&key={key(client)}").status_code == 200  # a link only shows
    assert client.get("/api/label").json()["features"] == []


@pytest.mark.parametrize(
    ("features", "status", "why"),
    [([], 400, "choose 1 to 50"), (["x", "9" * 5000], 400, "choose 1 to 50"), (range(60), 400, "choose 1 to 50"),
     ([999], 404, "no feature 999")],
)  # fmt: skip
def test_features_that_cannot_be_labeled_are_refused(started, features, status, why):
    client = started(BAD)
    answer = client.post("/label", data={"key": key(client), "feature": [str(feature) for feature in features]})
    assert answer.status_code == status
    assert why in answer.text
    assert client.get("/api/label").json()["features"] == []


def test_the_buttons_lead_there_and_are_not_shown_where_nothing_can_be_written(started, client, atlas, alive):
    page = f"/f/{atlas.dictionary}/{alive[0]}"
    able = started(BAD)
    assert f"feature={alive[0]}" in re.findall('href="(/label[^"]*)"', able.get(page).text)[0]
    (link,) = re.findall('href="(/label[^"]*)"', able.get("/search").text)
    assert link.count("feature=") == sum(feature < 30 for feature in alive)  # of those on the page
    for address in (page, "/search"):
        assert '"/label' not in client.get(address).text
    assert client.get("/label?feature=1").status_code == 404
    assert client.post("/label", data={"feature": alive[0], "key": key_of(client)}).status_code in (403, 404)


def test_an_address_with_a_secret_is_not_shown(tiny_atlas, alive):
    studies = Studies.load(*study_folders())
    slug = Atlas.open(ArtifactStore(tiny_atlas)).dictionary
    order = studies.dictionaries[slug]
    labels = order.study.labels.model_copy(update={"base_url": "http://me:hunter2@host.example/v1", "max_dollars": 2.5})
    studies.dictionaries[slug] = order._replace(study=order.study.model_copy(update={"labels": labels}))
    app = create_app(ArtifactStore(tiny_atlas), studies=studies, label=lambda dictionary, features: ["true"])
    page = TestClient(app, base_url="http://127.0.0.1").get(f"/label?feature={alive[0]}").text
    assert "at host.example for at most $2.5" in page
    assert "hunter2" not in page
