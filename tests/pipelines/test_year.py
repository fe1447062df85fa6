"""A year of retraining a small real model's atlas: new articles every month, some removed, one bad corpus, one new
version of code, a crash in each stage; and a reader who looks on all the time."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

import assets.resources
from assets.partitions import STUDIES
from sae_core.artifacts import ATLAS, ArtifactStore
from sae_core.atlas import Atlas
from sae_core.corpus.documents import Skipped, read_documents
from sae_core.errors import MindAtlasError
from sae_core.generations import Generation, Snapshot, generations
from sae_core.labels.reader import ATTEMPTS, Labels
from sae_core.lineage import LINEAGE, kept_since
from sae_core.serve import create_app
from sae_core.stages import VERSIONS
from sae_core.study import Source
from sae_core.training import build_dictionary
from tests.pipelines.conftest import Workplace

STUDY = STUDIES.get("year")
SLUG = STUDY.spec(STUDY.dictionaries[0]).slug
STAGES = list(VERSIONS)
D_SAE = STUDY.dictionaries[0].d_sae
AT_FIRST, A_MONTH = 60, 6
CARRIED = ("dictionary", "labels")


@pytest.fixture
def articles() -> Iterator[str]:
    """Beginnings of encyclopedia articles, none twice."""
    return (d.text[:2000] for d in read_documents(Source(source="wiki-en"), 2000, Skipped()) if len(d.text) > 1000)


@pytest.fixture
def place(articles: Iterator[str], tmp_path: Path) -> Iterator[Workplace]:
    text = Path(os.environ["MIND_ATLAS_HOME"]) / "year"  # as the study names it
    text.mkdir()
    for i, article in enumerate(islice(articles, AT_FIRST)):
        (text / f"first-{i:02}.txt").write_text(article, "utf-8")
    with dg.DagsterInstance.ephemeral() as instance:
        yield Workplace(tmp_path / "store", text, instance, "year")


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


def part(store: ArtifactStore, generation: Generation, stage: str) -> Path:
    """Folder of a generation's artifact of the dictionary."""
    return store.root / stage / SLUG / generation.manifests[f"{stage}/{SLUG}"].folder


def labels_carried(before: dict[str, Path], now: dict[str, Path]) -> int:
    """How many labels of kept features went over as they were; none of the others may be gone.

    One that held and does so no longer by new examples is asked for again, which the record of attempts tells.
    """
    then, today = Labels.open(before["labels"]), Labels.open(now["labels"])
    attempts = [json.loads(line) for line in (now["labels"] / ATTEMPTS).read_text("utf-8").splitlines()]
    asked = {row["feature"] for row in attempts if "turn" in row}
    n = 0
    for new, old in kept_since(before["dictionary"], now["dictionary"]).items():
        was, label = then.label(old), today.label(new)
        if was.status == "written" and label.status != "dead":
            assert label.status == "written", (new, was, label)
            assert label.label == was.label or new in asked, (new, was, label)
            n += label.label == was.label
    return n


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


def retrained(folder: Path, previous: Path, corpus: Path, activations: Path, seed: int = 0) -> float:
    """A control: the share kept of a dictionary by one that is trained from the beginning."""
    folder.mkdir()
    settings = STUDY.dictionaries[0].model_copy(update={"seed": STUDY.dictionaries[0].seed + seed})
    build_dictionary(
        settings, STUDY.activations, STUDY.model, corpus, activations, folder, previous=previous, warm_start=False
    )
    return kept_share(lineage_of(folder))


@pytest.mark.year
@pytest.mark.timeout(3600)
def test_a_year_of_retraining(
    place: Workplace, articles: Iterator[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    if "year" not in request.config.option.markexpr:
        pytest.skip("a year of retraining takes minutes: run it with -m year")
    assert place.refresh()[ATLAS] == "missing"
    promoted, warm, lines, carried = 1, [], [], 0
    start = time.monotonic()
    with Reader(place.store) as reader:
        for month in range(1, 13):
            for i, article in enumerate(islice(articles, A_MONTH)):
                place.write(f"month-{month:02}-{i}.txt", article)
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
            carried += labels_carried(*({s: part(place.store, g, s) for s in CARRIED} for g in (before, now)))
            rows = lineage_of(place.store.get("dictionary", SLUG).folder)
            lines.append(rows)
            warm.append(kept_share(rows))
            print(f"month {month}: {time.monotonic() - start:.0f} s, {warm[-1]:.0%} kept, {carried} labels so far")
    assert set(place.refresh().values()) == {"made"}
    assert promoted == 13

    assert not reader.wrong
    assert carried > 0
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

    old, new = (part(place.store, generation, "dictionary") for generation in generations(place.store, SLUG)[-2:])
    made = [
        place.store.get(stage, slug).folder for stage, slug in (("corpus", "year"), ("activations", STUDY.site.slug))
    ]
    shares = {
        "warm_start": sum(warm) / len(warm),
        "no_warm_start": retrained(tmp_path / "cold", old, *made),
        "same_data_another_seed": retrained(tmp_path / "seed", new, *made, seed=1),
    }
    shares["warm_start_last"] = warm[-1]
    for name, share in shares.items():
        record_property(name, round(share, 3))
        print(f"kept, {name}: {share:.2f}")
    print(f"labels carried over as they were: {carried}")
    print(f"twelve months in {time.monotonic() - start:.0f} s, looked at {len(reader.numbers)} times")
    assert shares["warm_start_last"] >= shares["no_warm_start"]
    assert shares["warm_start"] >= shares["same_data_another_seed"]
