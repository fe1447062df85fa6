"""The map's pages and data, against the Parquet files they are made from."""

import html
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from sae_core.artifacts import ArtifactStore
from sae_core.atlas import Atlas
from sae_core.neighbor_index import NeighborError, NeighborIndex
from sae_core.serve import create_app
from sae_core.serve.map_data import CHUNK, MapData, z_order
from sae_core.serve.neighborhood import HEIGHT, WIDTH, neighborhood

MARKUP = "<script>alert(1)</script>"


def table(atlas: Atlas, stage: str, file: str) -> pa.Table:
    return pq.read_table(atlas.store.get(stage, atlas.dictionary).folder / file)


@pytest.fixture(scope="module")
def summary(client: TestClient, atlas: Atlas) -> dict[str, Any]:
    return client.get(f"/map/{atlas.dictionary}/map.json").json()


@pytest.fixture(scope="module")
def points(client: TestClient, atlas: Atlas, summary: dict[str, Any]) -> dict[str, np.ndarray]:
    """The binary table, read as its documentation says: 4 bytes a value, a column after the other."""
    answer = client.get(f"/map/{atlas.dictionary}/points-{summary['version']}.bin")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert "immutable" in answer.headers["cache-control"]
    n, raw = summary["n"], answer.content
    assert len(raw) == 4 * n * len(summary["columns"])
    kinds = {"feature": "<i4", "cluster": "<i4"}
    return {name: np.frombuffer(raw, kinds.get(name, "<f4"), n, 4 * n * i) for i, name in enumerate(summary["columns"])}


def test_the_binary_table_holds_what_the_parquet_files_hold(atlas: Atlas, points: dict[str, np.ndarray]) -> None:
    order = np.argsort(points["feature"])
    place = table(atlas, "feature_map", "map.parquet")
    assert points["feature"][order].tolist() == place["feature"].to_pylist()
    for name in ("x", "y", "cluster"):
        np.testing.assert_array_equal(points[name][order], place[name].to_numpy())
    density = table(atlas, "features", "features.parquet")["density"].to_numpy()
    np.testing.assert_array_equal(points["density"][order], density.astype(np.float32))
    assert np.isnan(points["score"]).all()  # the tiny study's labels have none


def test_names_in_chunks_are_those_of_the_tables_rows(
    client: TestClient, atlas: Atlas, summary: dict[str, Any], points: dict[str, np.ndarray]
) -> None:
    home = f"/map/{atlas.dictionary}/names-{summary['version']}"
    names = client.get(f"{home}/0.json").json()
    assert len(names) == min(CHUNK, summary["n"])
    assert names == [atlas.name(int(feature)) for feature in points["feature"][:CHUNK]]
    assert any(names)
    assert client.get(f"{home}/1.json").status_code == 404
    assert client.get(f"{home}/-1.json").status_code == 404


def test_an_address_of_an_older_atlas_is_not_answered_with_the_new_one(client: TestClient, atlas: Atlas) -> None:
    assert client.get(f"/map/{atlas.dictionary}/points-0123456789abcdef.bin").status_code == 404
    assert client.get(f"/map/{atlas.dictionary}/names-0123456789abcdef/0.json").status_code == 404


def test_clusters_are_the_maps_with_their_middles(atlas: Atlas, summary: dict[str, Any]) -> None:
    place = table(atlas, "feature_map", "map.parquet")
    cluster = place["cluster"].to_numpy()
    sizes = {i: int((cluster == i).sum()) for i in set(cluster.tolist()) - {-1}}
    assert {c["id"]: c["size"] for c in summary["clusters"]} == sizes
    assert [c["size"] for c in summary["clusters"]] == sorted(sizes.values(), reverse=True)
    for c in summary["clusters"]:
        assert c["x"] == pytest.approx(float(np.median(place["x"].to_numpy()[cluster == c["id"]])))
        assert c["name"]


def test_the_page_lists_clusters_for_readers_without_a_script(client: TestClient, atlas: Atlas) -> None:
    page = client.get("/map").text
    data = MapData(atlas.store, atlas.dictionary)
    for cluster in data.clusters:
        assert html.escape(cluster.name, quote=True).replace("&quot;", "&#34;").replace("&#x27;", "&#39;") in page
        assert all(f'href="/f/{atlas.dictionary}/{feature}"' in page for feature in cluster.features)


def test_the_map_asks_for_no_inline_script_and_nothing_from_elsewhere(client: TestClient) -> None:
    answer = client.get("/map")
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son[a-z]+=|https?://", answer.text)


@pytest.fixture
def hostile(tiny_atlas: Path, atlas: Atlas, tmp_path: Path) -> TestClient:
    """The same atlas with markup in every label and every token."""
    shutil.copytree(tiny_atlas, tmp_path / "atlas")
    store = ArtifactStore(tmp_path / "atlas")
    labels = store.get("labels", atlas.dictionary).folder / "labels.parquet"
    rows = pq.read_table(labels)
    marked = pa.array([MARKUP] * rows.num_rows)
    pq.write_table(rows.set_column(rows.column_names.index("label"), "label", marked), labels)
    features = store.get("features", atlas.dictionary).folder / "features.parquet"
    rows = pq.read_table(features)
    tokens = pa.array([[f"{MARKUP}{i}" for i, _ in enumerate(row)] for row in rows["top_tokens"].to_pylist()])
    pq.write_table(rows.set_column(rows.column_names.index("top_tokens"), "top_tokens", tokens), features)
    return TestClient(create_app(store), base_url="http://127.0.0.1")


def test_markup_in_labels_and_cluster_names_is_shown_not_run(hostile: TestClient, atlas: Atlas) -> None:
    for path in ("/map", f"/near/{atlas.dictionary}/0"):
        page = hostile.get(path).text
        assert MARKUP not in page
        assert "&lt;script&gt;alert(1)" in page


def test_a_map_that_is_not_made_is_said_to_be_missing(tiny_atlas: Path, atlas: Atlas, tmp_path: Path) -> None:
    shutil.copytree(tiny_atlas, tmp_path / "atlas", ignore=shutil.ignore_patterns("feature_map", "neighbors"))
    client = TestClient(create_app(ArtifactStore(tmp_path / "atlas")), base_url="http://127.0.0.1")
    for path in ("/map", f"/near/{atlas.dictionary}/0"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert "not made yet" in answer.text


def test_a_map_without_labels_still_has_its_places(tiny_atlas: Path, atlas: Atlas, tmp_path: Path) -> None:
    shutil.copytree(tiny_atlas, tmp_path / "atlas", ignore=shutil.ignore_patterns("labels"))
    data = MapData(ArtifactStore(tmp_path / "atlas"), atlas.dictionary)
    assert data.names(0) == [""] * len(data)
    assert not data.has_score


def test_places_that_are_no_numbers_are_left_out(tiny_atlas: Path, atlas: Atlas, tmp_path: Path) -> None:
    shutil.copytree(tiny_atlas, tmp_path / "atlas", ignore=shutil.ignore_patterns("search"))
    store = ArtifactStore(tmp_path / "atlas")
    path = store.get("feature_map", atlas.dictionary).folder / "map.parquet"
    rows = pq.read_table(path)
    x = rows["x"].to_numpy().copy()
    x[[3, 5]] = [np.nan, np.inf]
    pq.write_table(rows.set_column(1, "x", pa.array(x)), path)
    data = MapData(store, atlas.dictionary)
    assert sorted({*range(len(x))} - {*data.columns["feature"].tolist()}) == [3, 5]


def test_what_was_gathered_once_is_read_from_then_on_and_nothing_is_written_where_nothing_can_be(
    tiny_atlas: Path, atlas: Atlas, tmp_path: Path
) -> None:
    shutil.copytree(tiny_atlas, tmp_path / "atlas", ignore=shutil.ignore_patterns("search"))
    store, home = ArtifactStore(tmp_path / "atlas"), tmp_path / "atlas" / "search" / atlas.dictionary
    home.parent.write_text("a file, so that no folder can be made here")
    first = MapData(store, atlas.dictionary)
    home.parent.unlink()
    home.mkdir(parents=True)
    (home / "map-0-of-before.safetensors").touch()
    MapData(store, atlas.dictionary)
    (kept,) = home.iterdir()
    store.get("feature_map", atlas.dictionary).folder.joinpath("map.parquet").unlink()
    again = MapData(store, atlas.dictionary)
    assert first.version in kept.name
    assert again.to_bytes() == first.to_bytes()
    assert again.summary() == first.summary()
    assert again.clusters == first.clusters


def test_the_z_order_keeps_neighbors_together() -> None:
    axis = np.linspace(0, 1, 4, dtype=np.float32)
    x, y = (grid.ravel() for grid in np.meshgrid(axis, axis))
    found = np.argsort(z_order(x, y))
    quarter = (x[found] > 0.5).astype(int) + 2 * (y[found] > 0.5)
    assert quarter.tolist() == sorted(quarter.tolist())  # one quarter after the other
    assert z_order(x[:1], y[:1]).tolist() == [0]
    assert z_order(x[:0], y[:0]).tolist() == []


# ---- the neighborhood of a feature


@pytest.fixture(scope="module")
def index(atlas: Atlas) -> NeighborIndex:
    return NeighborIndex(atlas.store.get("neighbors", atlas.dictionary).folder)


def test_the_index_finds_what_the_decoder_rows_say(atlas: Atlas, index: NeighborIndex) -> None:
    W_dec = atlas.load_dictionary().W_dec.float()
    cosines = (W_dec @ W_dec.T / (W_dec.norm(dim=1)[:, None] * W_dec.norm(dim=1))).numpy()
    found, neighbors = index.near(7, 5)
    others = np.delete(np.arange(len(W_dec)), 7)
    expected = others[np.argsort(-cosines[7][others])][:5]
    assert neighbors.tolist() == expected.tolist()
    np.testing.assert_allclose(found, cosines[7][expected], atol=1e-5)
    assert len(index.near(0, 10_000)[1]) == len(index) - 1
    for wrong in (-1, len(index)):
        with pytest.raises(NeighborError, match=f"there is no feature {wrong}"):
            index.near(wrong, 3)


def test_a_nearer_feature_lies_nearer_to_the_center(index: NeighborIndex) -> None:
    picture = neighborhood(index, 7, lambda feature: f"name {feature}", 20)
    assert len(picture.points) == 20
    away = [np.hypot((p.x / WIDTH - 0.5) / 0.72, p.y / HEIGHT - 0.5) for p in picture.points]
    assert away == sorted(away)
    assert [p.cosine for p in picture.points] == sorted((p.cosine for p in picture.points), reverse=True)
    assert all(0 <= p.x <= WIDTH and 0 <= p.y <= HEIGHT for p in picture.points)
    assert len({(p.x, p.y) for p in picture.points}) == 20
    assert sum(bool(p.label) for p in picture.points) > 10


def test_the_neighborhood_page_links_each_neighbor(client: TestClient, atlas: Atlas, index: NeighborIndex) -> None:
    page = client.get(f"/near/{atlas.dictionary}/7").text
    for feature in index.near(7, 40)[1].tolist():
        assert f'href="/near/{atlas.dictionary}/{feature}"' in page
        assert f'href="/f/{atlas.dictionary}/{feature}"' in page
    assert f'href="/near/{atlas.dictionary}/7"' in client.get(f"/f/{atlas.dictionary}/7").text


@pytest.mark.parametrize("feature", ["64", "-1", "x", "99999999999999999999"])
def test_the_neighborhood_of_no_feature_is_a_page_that_helps(client: TestClient, atlas: Atlas, feature: str) -> None:
    answer = client.get(f"/near/{atlas.dictionary}/{feature}")
    assert answer.status_code == 404
    assert "overview" in answer.text
