"""The pages and the JSON API on a real (tiny) atlas, read as a browser without JavaScript reads them."""

import html
import json
import re
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from sae_core.artifacts import ArtifactStore
from sae_core.atlas import Atlas
from sae_core.labels.reader import Score
from sae_core.language_model import LanguageModel
from sae_core.serve import create_app
from sae_core.study import ModelSettings

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'"


class Reader(HTMLParser):
    """Elements and text of a page; hidden text for screen readers is kept apart."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if self._hidden or dict(attrs).get("class") == "sr":
            self._hidden += 1

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= self._hidden > 0

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    return reader


def path(atlas: Atlas, feature: int) -> str:
    return f"/f/{atlas.dictionary}/{feature}"


@pytest.fixture(scope="session")
def alive(atlas: Atlas) -> int:
    """A feature that fires often."""
    return int(pc.index(atlas.features.table()["n_fired"], pc.max(atlas.features.table()["n_fired"])).as_py())


def copy(root: Path, to: Path, *leave_out: str) -> ArtifactStore:
    shutil.copytree(root, to, ignore=shutil.ignore_patterns(*leave_out), dirs_exist_ok=True)
    return ArtifactStore(to)


def rewrite(file: Path, **columns: object) -> None:
    """Replace columns of a table, at once as the store does; a plain value stands in each row."""
    table = pq.read_table(file)
    for name, value in columns.items():
        values = value if isinstance(value, list) else [value] * table.num_rows
        field = pa.array(values, table.schema.field(name).type) if name in table.column_names else pa.array(values)
        table = table.drop([name] if name in table.column_names else []).append_column(name, field)
    pq.write_table(table, new := file.with_suffix(".new"))
    new.replace(file)


def score(value: float) -> Score:
    return Score("detection", value, 0.1, 0.9, 0.51, 0.5, 0.0, value, value, value, [value], 0.0, 12, 12)


def open_client(store: ArtifactStore) -> TestClient:
    return TestClient(create_app(store), base_url="http://127.0.0.1", raise_server_exceptions=True)


def test_a_feature_page_shows_every_example_with_its_exact_values(client: TestClient, atlas: Atlas, alive: int):
    page = client.get(path(atlas, alive))
    assert page.status_code == 200
    read_ = read(page.text)
    card = atlas.feature(alive)
    assert card.examples
    for example in card.examples:
        text = "".join(example.tokens).strip()
        if "\\x" not in text:
            assert text.replace("\n", "⏎") in read_.text
    titles = {attrs["title"] for tag, attrs in read_.elements if tag == "span" and "a a" in (attrs.get("class") or "")}
    assert f"{max(card.examples[0].acts):.3g}"[:3] in {title[:3] for title in titles if title}
    assert card.name in read_.text
    assert f"{card.row.n_fired:,}" in read_.text
    for neighbor in card.neighbors:
        assert path(atlas, neighbor.feature) in page.text


def test_examples_go_from_the_strongest_level_down_and_shares_sum_to_one(client: TestClient, atlas: Atlas, alive: int):
    told = client.get(f"/api/features/{atlas.dictionary}/{alive}").json()
    assert [level["high"] for level in told["levels"]] == sorted((x["high"] for x in told["levels"]), reverse=True)
    for level in told["levels"]:
        for example in level["examples"]:
            assert level["low"] < example["act"] / told["row"]["max_act"] <= level["high"] + 1e-6
    if len(told["levels"]) == 5:
        assert sum(level["share"] for level in told["levels"]) == pytest.approx(1)


def test_the_shade_of_a_token_is_its_share_of_the_maximum(client: TestClient, atlas: Atlas, alive: int):
    page = read(client.get(path(atlas, alive)).text)
    shades = {attrs["class"] for tag, attrs in page.elements if tag == "span" and "a a" in (attrs.get("class") or "")}
    assert "a a10" in shades
    assert not any("style" in attrs for _, attrs in page.elements)


def test_features_are_linked_to_the_ones_before_and_after(client: TestClient, atlas: Atlas):
    last = atlas.features.table().num_rows - 1
    rels = {n: {a.get("rel"): a.get("href") for t, a in read(client.get(path(atlas, n)).text).elements if t == "a"}
            for n in (0, 1, last)}  # fmt: skip
    assert (rels[1]["prev"], rels[1]["next"]) == (path(atlas, 0), path(atlas, 2))
    assert "prev" not in rels[0]
    assert "next" not in rels[last]


@pytest.mark.parametrize(
    "address",
    ["/f/{}/99999", "/f/{}/-1", "/f/{}/abc", "/f/nowhere/1", "/f/..%2F..%2Fetc/1", "/d/tiny/99999", "/d/..%2Fx/0",
     "/d/tiny/x", "/nowhere", "/static/../app.py", "/static/%2e%2e/app.py", "/f/{}/" + "9" * 400],
)  # fmt: skip
def test_what_is_not_there_is_a_page_that_helps(client: TestClient, atlas: Atlas, address: str):
    page = client.get(address.format(atlas.dictionary))
    assert page.status_code == 404
    assert "/search" in page.text


def test_an_unknown_feature_of_the_api_says_which_there_are(client: TestClient, atlas: Atlas):
    answer = client.get(f"/api/features/{atlas.dictionary}/99999")
    assert (answer.status_code, answer.json()) == (
        404, {"detail": "there is no feature 99999: this dictionary has features 0 to 63"},
    )  # fmt: skip


def test_search_finds_what_the_atlas_finds(client: TestClient, atlas: Atlas):
    hits = atlas.search("bridge", 30)
    assert hits
    told = client.get("/api/search", params={"q": "bridge"}).json()
    assert [hit["feature"] for hit in told["hits"]] == [hit.feature for hit in hits]
    page = client.get("/search", params={"q": "bridge"}).text
    assert all(path(atlas, hit.feature) in page for hit in hits)


def test_filters_and_orders_agree_with_the_table(client: TestClient, atlas: Atlas):
    table = atlas.features.table().to_pylist()
    asked = {"min_density": "1", "max_density": "20", "alive": "true", "sort": "density", "limit": "200"}
    found = [hit["feature"] for hit in client.get("/api/search", params=asked).json()["hits"]]
    rows = [row for row in table if 0.01 <= row["density"] <= 0.2 and row["n_fired"]]
    assert rows
    assert found == [row["feature"] for row in sorted(rows, key=lambda row: (-row["density"], row["feature"]))]
    everything = {hit["feature"] for hit in client.get("/api/search?limit=200").json()["hits"]}
    assert everything == set(range(64))
    clusters = pq.read_table(atlas.store.get("feature_map", atlas.dictionary).folder / "map.parquet")["cluster"]
    of_none = [hit["feature"] for hit in client.get("/api/search?cluster=-1&limit=200").json()["hits"]]
    assert of_none == [i for i, cluster in enumerate(clusters.to_pylist()) if cluster == -1]


def test_pages_of_a_search_follow_one_another(client: TestClient):
    first = client.get("/search?limit=40").text
    more = html.unescape(re.findall(r'class="more" href="([^"]+)"', first)[0])
    second = client.get(more).text
    features = [re.findall(r'class="hit" href="[^"]+/(\d+)"', page) for page in (first, second)]
    assert [int(n) for page in features for n in page] == list(range(64))
    assert 'class="more"' not in second


@pytest.mark.parametrize(
    "asked", ["min_density=x", "max_density=nan", "sort=DROP TABLE", "cluster=1e99", "q=" + "a" * 501]
)
def test_a_search_that_makes_no_sense_is_refused_with_the_reason(client: TestClient, asked: str):
    answer = client.get(f"/api/search?{asked}")
    assert answer.status_code == 400
    assert answer.json()["detail"]
    assert client.get(f"/search?{asked}").status_code == 400


@pytest.mark.parametrize("query", ["%", "'; DROP TABLE texts; --", "[(", "a\0b", "\\", "日本"])
def test_odd_queries_are_plain_text(client: TestClient, query: str):
    assert client.get("/search", params={"q": query}).status_code == 200


def test_bytes_that_are_no_text_are_no_failure(client: TestClient):
    assert client.get("/search?q=%ED%A0%80%FF").status_code == 200
    assert client.get("/text?text=%ED%A0%80%FF").status_code == 200


def test_a_text_is_read_as_the_command_line_reads_it(client: TestClient, atlas: Atlas, tiny_model: Path):
    lm = LanguageModel.load(ModelSettings(source=str(tiny_model)), precision="float32")
    text = "The old bridge.\nمرحبا 日本"
    expected = list(atlas.explain_lazily(lm, text, 3, feature=5))
    told = client.post("/api/text", json={"text": text, "per_token": 3, "feature": 5}).json()
    assert [token["token"] for token in told] == [token.token for token in expected]
    assert [token["value"] for token in told] == pytest.approx([token.value for token in expected])
    assert [[f["feature"] for f in token["features"]] for token in told] == [
        [f.feature for f in token.features] for token in expected
    ]
    page = read(client.get("/text", params={"text": text, "feature": 5}).text)
    assert "The old bridge.⏎" in page.text
    assert "日本" in page.text  # its bytes are tokens of their own


def test_texts_that_cannot_be_read_are_refused_with_the_reason(client: TestClient):
    assert client.get("/text", params={"text": "a" * 20_000}).status_code == 413
    assert client.post("/api/text", json={"text": "a" * 100_000}).status_code == 422
    assert client.post("/api/text", content=b'{"text": "\\ud800"}').status_code == 422
    assert client.post("/api/text", json={"text": "a", "feature": 99999}).status_code == 404
    assert client.get("/text?text=a&feature=x").status_code == 404
    assert client.post("/api/text", json={"text": "a\0b"}).status_code == 200
    assert client.get("/text?text=%20").status_code == 200


def test_a_text_without_a_study_says_what_is_missing(tiny_atlas: Path):
    with open_client(ArtifactStore(tiny_atlas)) as client:
        assert "add its study file" in client.post("/api/text", json={"text": "a"}).json()["detail"]


def test_a_document_shows_its_whole_text_with_the_example_marked(client: TestClient, atlas: Atlas, alive: int):
    example = atlas.feature(alive).examples[0]
    address = f"/d/tiny/{example.document}?dictionary={atlas.dictionary}&feature={alive}&at={example.position}"
    assert html.escape(address) + "#at" in client.get(path(atlas, alive)).text
    page = read(client.get(address).text)
    text = client.get(f"/api/documents/tiny/{example.document}").json()["text"]
    assert text.strip()
    assert text.replace("\n", "⏎\n") in page.text
    assert ("span", {"id": "at", "class": "mark"}) in page.elements


def test_features_that_fire_together_share_tokens(client: TestClient, atlas: Atlas, alive: int):
    fires = {
        (x.document, x.position - x.peak + i)
        for x in atlas.feature(alive).examples
        for i, act in enumerate(x.acts)
        if act
    }
    peaks = {
        other: sum((x.document, x.position) in fires for x in atlas.features.examples(other))
        for other in range(64) if other != alive
    }  # fmt: skip
    best = sorted(((n, -i) for i, n in peaks.items() if n), reverse=True)[:10]
    told = client.get(f"/api/features/{atlas.dictionary}/{alive}/together").json()
    assert [(x["tokens"], -x["feature"]) for x in told] == best
    assert best


def test_the_overview_tells_health_and_what_is_made(client: TestClient, atlas: Atlas):
    told = client.get("/api/overview").json()
    summary = atlas.store.get("dictionary", atlas.dictionary).manifest.summary
    assert told["health"]["fvu"] == summary["fvu"]
    assert told["study"] == "tiny"
    missing = {stage["cure"]: stage["on_request"] for stage in told["stages"] if not stage["made"]}
    assert all(missing.values())
    assert "mind-atlas audit" in missing
    page = read(client.get("/").text).text
    assert f"{summary['fvu']:.3f}" in page
    assert "not yet:" not in page


@pytest.mark.parametrize("made", ["", "labels", "neighbors", "feature_map", "corpus dictionary activations"])
def test_an_atlas_that_is_half_made_has_all_pages_and_says_what_is_missing(
    tiny_atlas: Path, atlas: Atlas, alive: int, tmp_path: Path, made: str
):
    stages = {"corpus", "activations", "dictionary", "labels", "neighbors", "feature_map"} - set(made.split())
    with open_client(copy(tiny_atlas, tmp_path, *stages)) as client:
        overview = client.get("/")
        assert overview.status_code == 200
        for stage in stages:
            assert f"mind-atlas run STUDY --until {stage}" in overview.text
        page = client.get(path(atlas, alive)).text
        assert ("Labels are not made yet" in page) == ("labels" in stages)
        assert ("--until neighbors" in page) == ("neighbors" in stages)
        for address in ("/search", "/search?q=bridge", "/search?kind=input&sort=score", "/text", "/api/overview"):
            assert client.get(address).status_code == 200, address


def test_an_empty_store_says_how_to_make_an_atlas(tmp_path: Path):
    with open_client(ArtifactStore(tmp_path)) as client:
        page = client.get("/")
        assert page.status_code == 404
        assert "mind-atlas run" in page.text


def test_markup_in_corpus_label_and_query_is_text_everywhere(
    tiny_atlas: Path, atlas: Atlas, alive: int, tmp_path: Path
):
    store = copy(tiny_atlas, tmp_path)
    labels = store.get("labels", atlas.dictionary).folder / "labels.parquet"
    features = store.get("features", atlas.dictionary).folder
    rewrite(labels, label=MARKUP, description=MARKUP, lexical=MARKUP, kind=MARKUP, model=MARKUP, status="written")
    examples = pq.read_table(features / "examples.parquet")
    rewrite(features / "examples.parquet", tokens=[[MARKUP] * len(t) for t in examples["tokens"].to_pylist()])
    rewrite(features / "features.parquet", promoted=[[MARKUP]] * 64, top_tokens=[[MARKUP]] * 64,
            top_token_shares=[[1.0]] * 64, promoted_logits=[[1.0]] * 64)  # fmt: skip
    corpus = store.get("corpus", "tiny").folder / "documents.parquet"
    rewrite(corpus, text=MARKUP * 3, title=MARKUP, source=MARKUP, license=MARKUP, language=MARKUP)
    example = atlas.feature(alive).examples[0]
    with open_client(store) as client:
        for address in (
            "/", path(atlas, alive), f"{path(atlas, alive)}/together", f"/d/tiny/{example.document}",
            f"/d/tiny/{example.document}?feature={alive}&at={example.position}", f"/search?q={MARKUP}",
            "/search?q=script",
            f"/search?kind={MARKUP}&min_density={MARKUP}", f"/text?feature={MARKUP}", f"/f/{MARKUP}/1", f"/{MARKUP}",
            f"/?dictionary={MARKUP}", f"/text?text={MARKUP}",
        ):  # fmt: skip
            page = read(client.get(address).text)
            for tag, attrs in page.elements:
                assert tag != "img"
                assert tag != "script" or (attrs["src"] or "").startswith("/static/")
                assert not any(name.startswith("on") for name in attrs)
        assert MARKUP in read(client.get(path(atlas, alive)).text).text


def test_scores_are_shown_when_labels_have_them(tiny_atlas: Path, atlas: Atlas, tmp_path: Path):
    store = copy(tiny_atlas, tmp_path)
    labels = store.get("labels", atlas.dictionary).folder / "labels.parquet"
    scores = [[asdict(score(i / 100)) | {"shuffled": 0.51}] for i in range(64)]
    rewrite(labels, scores=scores, beats_control=False)
    with open_client(store) as client:
        told = client.get(f"/api/features/{atlas.dictionary}/40").json()
        assert told["label"]["scores"] == [
            {
                "name": "detection",
                "value": 0.4,
                "low": 0.1,
                "high": 0.9,
                "control": 0.51,
                "lexical": 0.5,
                "random": 0.4,
                "nearest": 0.4,
                "neighbor": 0.4,
                "failed": 0.0,
                "n_firing": 12,
                "n_silent": 12,
            }
        ]
        assert "0.510" in client.get(path(atlas, 40)).text
        assert "no better than another's label" in client.get(path(atlas, 40)).text.replace("&#39;", "'")
        best = client.get("/api/search?min_score=0.6&sort=score").json()["hits"]
        assert [hit["feature"] for hit in best] == [63, 62, 61, 60]


def test_the_overview_tells_scores_of_labels_beside_those_of_others(tiny_atlas: Path, atlas: Atlas, tmp_path: Path):
    store = copy(tiny_atlas, tmp_path)
    file = store.root / "labels" / atlas.dictionary / "manifest.json"
    told = json.loads(file.read_text("utf-8"))
    told["summary"]["scores"] = {"detection": {"score": [0.9, 0.7, None], "shuffled": [0.5, 0.5, None], "lexical": []}}
    file.write_text(json.dumps(told), "utf-8")
    with open_client(store) as client:
        quality = client.get("/api/overview").json()["quality"]
        mean = {"name": "detection", "labels": 2, "value": pytest.approx(0.8), "control": 0.5, "lexical": None}
        assert quality == [mean]
        assert "0.500 for another feature's label" in read(client.get("/").text).text


def test_a_search_says_whether_meaning_was_searched_and_why_a_hit_was_found(
    client: TestClient, tiny_atlas: Path, atlas: Atlas, tmp_path: Path
):
    found = client.get("/api/search?q=bridge").json()
    assert found["by_meaning"]
    near = [hit for hit in found["hits"] if hit["meaning"] is not None]
    assert near
    assert all(hit["why"] for hit in found["hits"])
    page = read(client.get("/search?q=bridge").text).text
    assert "by words and by meaning" in page
    assert "meaning: " in page
    with open_client(copy(tiny_atlas, tmp_path, "meaning.faiss")) as plain:
        found = plain.get("/api/search?q=bridge").json()
        assert not found["by_meaning"]
        assert all(hit["meaning"] is None for hit in found["hits"])
        assert "Found by words" in read(plain.get("/search?q=bridge").text).text


def test_a_stage_made_anew_is_shown_without_a_restart(tiny_atlas: Path, atlas: Atlas, tmp_path: Path):
    store = copy(tiny_atlas, tmp_path)
    with open_client(store) as client:
        assert "a new name" not in client.get(path(atlas, 3)).text
        manifest = store.get("labels", atlas.dictionary)
        rewrite(manifest.folder / "labels.parquet", label="a new name", status="written")
        file = manifest.folder.parent / "manifest.json"
        file.write_text(file.read_text("utf-8"), "utf-8")
        assert "a new name" in client.get(path(atlas, 3)).text


def test_a_damaged_table_is_answered_with_the_cure(tiny_atlas: Path, atlas: Atlas, tmp_path: Path):
    store = copy(tiny_atlas, tmp_path)
    file = store.get("labels", atlas.dictionary).folder / "labels.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with open_client(store) as client:  # which reads it on its own account, too
        answer = client.get("/api/search", params={"q": "bridge"})
        assert answer.status_code == 500
        assert "mind-atlas verify" in answer.text


def test_every_answer_of_the_api_has_a_documented_shape(client: TestClient):
    told = client.get("/api/openapi.json").json()
    assert len(told["paths"]) >= 7
    for address, methods in told["paths"].items():
        for method in methods.values():
            kind = "application/octet-stream" if address.endswith(".bin") else "application/json"
            schema = method["responses"]["200"]["content"][kind]["schema"]
            assert schema, address
            assert method["description"]
    for name in ("FeatureView", "Hit", "FeatureRow", "ExplainedToken", "SearchView"):
        shape = told["components"]["schemas"][name]
        assert shape["description"]
        assert any("description" in field for field in shape["properties"].values()), name
