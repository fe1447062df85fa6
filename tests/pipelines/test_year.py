"""A year of retraining: new text every month, some removed, one bad corpus, one new version of code, a crash in each
stage; and a reader who looks on all the time."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

import assets.resources
from assets.partitions import STUDIES
from sae_core.artifacts import ATLAS, ArtifactStore
from sae_core.atlas import Atlas
from sae_core.errors import MindAtlasError
from sae_core.generations import Snapshot, generations
from sae_core.lineage import LINEAGE
from sae_core.serve import create_app
from sae_core.stages import VERSIONS
from sae_core.training import build_dictionary

STUDY = STUDIES.get("tiny")
SLUG = STUDY.spec(STUDY.dictionaries[0]).slug
STAGES = list(VERSIONS)
D_SAE = 64
NEWS = (
    "The comet came back in month {0}, and everyone looked up.", "class Month{0}:\n    number = {0}",
    "Le mois {0} fut froid, et la neige couvrait le jardin.", "El mes {0} trajo lluvia al río de la ciudad.",
)  # fmt: skip


class Crash(MindAtlasError):
    """What a stage dies of in this test."""


class Reader:
    """Opens the atlas and a page of it, over and over, and writes down what was wrong."""

    def __init__(self, store: ArtifactStore) -> None:
        self.store, self.client = store, TestClient(create_app(store, SLUG), base_url="http://127.0.0.1")
        self.wrong: list[str] = []
        self.numbers: list[int] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _poll(self) -> None:
        n = 0
        while not self._done.wait(0.2):
            n += 1
            try:
                self._look(n % D_SAE)
            except Exception as error:  # noqa: BLE001 - whatever it is, the test says so
                self.wrong.append(f"{type(error).__name__}: {error}")

    def _look(self, feature: int) -> None:
        atlas = Atlas(self.store, SLUG)
        if not isinstance(atlas.store, Snapshot):
            self.wrong.append("no generation is served")
            return
        parts = atlas.store.generation.manifests
        mixed = [m.key for m in parts.values() for key, made in m.parents.items() if parts[key].fingerprint != made]
        card = atlas.feature(feature)
        page = self.client.get(f"/f/{SLUG}/{feature}", follow_redirects=True)
        if mixed or card.row.feature != feature or page.status_code != 200:
            self.wrong.append(f"{mixed} {card.row.feature} {page.status_code}")
        self.numbers.append(atlas.store.generation.number)


def crash_in(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a stage die once: in the middle of its work if it tells of any, else when all but the manifest is written."""
    reporter, commit = assets.resources._reporter, ArtifactStore._commit

    def fatal_reporter(context: Any, name: str) -> Callable[..., None]:
        report = reporter(context, name)

        def fatal(done: int, total: int, unit: str, **values: float) -> None:
            if name == stage and done:
                raise Crash(f"{stage} died in the middle")
            report(done, total, unit, **values)

        return fatal

    def fatal_commit(self: ArtifactStore, manifest: Any, folder: Path) -> Any:
        if manifest.stage == stage:
            raise Crash(f"{stage} died at the end")
        return commit(self, manifest, folder)

    monkeypatch.setattr(assets.resources, "_reporter", fatal_reporter)
    monkeypatch.setattr(ArtifactStore, "_commit", fatal_commit)


def kept_share(rows: list[dict[str, Any]]) -> float:
    """Share of the old features that the newest generation of a lineage has kept."""
    newest = max(row["generation"] for row in rows)
    return sum(row["fate"] == "kept" for row in rows if row["generation"] == newest) / D_SAE


def lineage_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / LINEAGE).to_pylist()


def trace(rows: list[dict[str, Any]], number: int, generation: int) -> int:
    """The generation in which a number got the feature that it has in the given one."""
    while generation > 1:
        (row,) = (
            r for r in rows
            if r["generation"] == generation and r["feature"] == number and r["fate"] != "merged"
        )  # fmt: skip
        if row["fate"] in {"born", "split"}:
            return generation
        assert row["previous"] == number
        generation -= 1
    return 1


def retrained(place: Any, folder: Path, previous: Path, corpus: Path, activations: Path, seed: int = 0) -> float:
    """A control: the share kept of a dictionary by one that is trained from the beginning."""
    folder.mkdir()
    settings = STUDY.dictionaries[0].model_copy(update={"seed": STUDY.dictionaries[0].seed + seed})
    build_dictionary(
        settings, STUDY.activations, STUDY.model, corpus, activations, folder, previous=previous, warm_start=False
    )
    return kept_share(lineage_of(folder))


@pytest.mark.year
def test_a_year_of_retraining(
    place: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    if "year" not in request.config.option.markexpr:
        pytest.skip("a year of retraining takes minutes: run it with -m year")
    assert place.refresh()[ATLAS] == "missing"
    promoted, warm, lines = 1, [], []
    start = time.monotonic()
    with Reader(place.store) as reader:
        for month in range(1, 13):
            for i, text in enumerate(NEWS):
                place.write(f"month-{month:02}-{i}.txt", f"Number {month}{i}. {text.format(month)}\n" * 3)
            if month % 3 == 0:
                for path in sorted(place.text.iterdir())[:3]:
                    path.unlink()
            if month <= len(STAGES):
                with monkeypatch.context() as patch, pytest.raises(Exception, match="died"):
                    crash_in(STAGES[month - 1], patch)
                    place.refresh()
            if month == 10:
                monkeypatch.setitem(VERSIONS, "features", VERSIONS["features"] + 1)
            if month == 11:
                good = place.spoil()
                with pytest.raises(Exception, match="is not promoted, what is served stays"):
                    place.refresh()
                assert place.refresh()[ATLAS] == "refused"
                for name, text in good.items():
                    place.write(name, text)
            before = generations(place.store, SLUG)[-1]
            assert place.refresh()[ATLAS] == "stale", month
            now = generations(place.store, SLUG)[-1]
            assert (now.number, now.follows) == (before.number + 1, before.number)
            assert len(generations(place.store, SLUG)) <= STUDY.retraining.generations + 1
            promoted += 1
            rows = lineage_of(place.store.get("dictionary", SLUG).folder)
            lines.append(rows)
            warm.append(kept_share(rows))
    assert set(place.refresh().values()) == {"made"}
    assert promoted == 13

    assert not reader.wrong
    assert reader.numbers == sorted(reader.numbers)
    assert len(set(reader.numbers)) > 6  # it looked on all the time

    final = lines[-1]
    assert all(final[: len(rows)] == rows for rows in lines)  # nothing that was told is untold
    for generation in range(2, 14):
        of = [row for row in final if row["generation"] == generation]
        there = [row["feature"] for row in of if row["fate"] in {"kept", "moved", "split", "born"}]
        left = [row["previous"] for row in of if row["fate"] in {"kept", "moved", "merged", "died"}]
        assert sorted(there) == sorted(left) == list(range(D_SAE))
        assert all(1 <= trace(final, number, generation) <= generation for number in range(D_SAE))

    last = generations(place.store, SLUG)[-1]
    old = (
        place.store.root
        / "dictionary"
        / SLUG
        / generations(place.store, SLUG)[-2].manifests[f"dictionary/{SLUG}"].folder
    )
    new = place.store.root / "dictionary" / SLUG / last.manifests[f"dictionary/{SLUG}"].folder
    made = [
        place.store.get(stage, slug).folder for stage, slug in (("corpus", "tiny"), ("activations", STUDY.site.slug))
    ]
    shares = {
        "warm_start": sum(warm) / len(warm),
        "no_warm_start": retrained(place, tmp_path / "cold", old, *made),
        "same_data_another_seed": retrained(place, tmp_path / "seed", new, *made, seed=1),
    }
    shares["warm_start_last"] = warm[-1]
    for name, share in shares.items():
        record_property(name, round(share, 3))
        print(f"kept, {name}: {share:.2f}")
    print(f"twelve months in {time.monotonic() - start:.0f} s, looked at {len(reader.numbers)} times")
    assert shares["warm_start_last"] >= shares["no_warm_start"]
    assert shares["warm_start"] >= shares["same_data_another_seed"]
