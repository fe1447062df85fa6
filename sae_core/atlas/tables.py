"""The files of finished stages as tables of DuckDB: of one dictionary to read, or of all in a file for a person."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from filelock import FileLock

from sae_core.artifacts import ArtifactStore, write_atomically
from sae_core.generations import served
from sae_core.names import DictionarySpec

FILES = {
    "features": ("features", "features.parquet"),
    "examples": ("features", "examples.parquet"),
    "windows": ("features", "windows.parquet"),
    "labels": ("labels", "labels.parquet"),
    "neighbors": ("neighbors", "neighbors.parquet"),
    "map": ("feature_map", "map.parquet"),
    "steering": ("steering", "scores.parquet"),
    "training": ("dictionary", "metrics.parquet"),
    "lineage": ("dictionary", "lineage.parquet"),
    "audit": ("safety", "audit.parquet"),
    "documents": ("corpus", "documents.parquet"),
}
"""Stage and file of each table; an artifact's slug is the column `dictionary`, for `documents` the column `corpus`."""


class Tables:
    """The tables of one dictionary. Safe to use from several threads."""

    def __init__(self, store: ArtifactStore, dictionary: str) -> None:
        self._database = duckdb.connect(config={"autoinstall_known_extensions": "false"})
        self._names = set(_create_views(self._database, store, [dictionary]))

    def __contains__(self, table: str) -> bool:
        """Whether the table's stage is made."""
        return table in self._names

    def columns(self, table: str) -> set[str]:
        """Names of a table's columns; none when its stage is not made yet."""
        return {row[0] for row in self.query(f"DESCRIBE {table}")} if table in self else set()

    def query(self, sql: str, parameters: list[Any] | None = None) -> list[tuple[Any, ...]]:
        """The rows that an SQL query finds."""
        return self._database.cursor().execute(sql, parameters or []).fetchall()

    def arrow(self, sql: str) -> pa.RecordBatch:
        """The same in columns."""
        table = self._database.cursor().sql(sql).to_arrow_table().combine_chunks()
        return pa.record_batch([c.combine_chunks() for c in table.columns], names=table.column_names)


def write_views(store: ArtifactStore) -> Path:
    """Write `<root>/atlas.duckdb`: a view over each table of all finished artifacts, for anyone who writes SQL.

    `SELECT feature, label FROM labels WHERE dictionary = '...'`; `dictionaries` lists what there is. The file holds
    no data, only the paths of what is finished now: write it again when something new is.
    """
    target = store.root / "atlas.duckdb"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(store.root / ".views.lock"), write_atomically(target) as path:
        path.unlink(missing_ok=True)  # left by a killed run
        with duckdb.connect(str(path)) as database:
            _create_views(database, store, store.slugs("dictionary"))
            database.execute(
                "CREATE TABLE dictionaries(dictionary VARCHAR, model VARCHAR, hook VARCHAR, layer INTEGER, "
                "corpus VARCHAR, architecture VARCHAR, d_sae INTEGER, k INTEGER, l1_coefficient DOUBLE)"
            )
            for slug in store.slugs("dictionary"):
                spec = DictionarySpec.parse(slug)
                row = [slug, *spec.site, spec.architecture, spec.d_sae, spec.k, spec.l1_coefficient]
                database.execute("INSERT INTO dictionaries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    return target


def _create_views(database: duckdb.DuckDBPyConnection, store: ArtifactStore, slugs: Iterable[str]) -> list[str]:
    """Create a view for each table that some finished artifact of the given dictionaries has; returns their names."""
    specs = [DictionarySpec.parse(slug) for slug in slugs]
    made = []
    for table, (stage, file) in FILES.items():
        column = "corpus" if stage == "corpus" else "dictionary"
        names = sorted({spec.site.corpus if stage == "corpus" else spec.slug for spec in specs})
        seen = {name: store if stage == "corpus" else served(store, name) for name in names}
        folders = {name: of.get(stage, name).folder for name, of in seen.items() if of.manifest(stage, name)}
        selects = [
            f"SELECT {_quoted(name)} AS {column}, * FROM read_parquet({_quoted(str(folder / file))})"
            for name, folder in folders.items()
            if (folder / file).is_file()
        ]
        if selects:
            database.execute(f"CREATE VIEW {table} AS {' UNION ALL BY NAME '.join(selects)}")
            made.append(table)
    if "labels" in made and "scores" in {row[0] for row in database.execute("DESCRIBE labels").fetchall()}:
        database.execute(
            "CREATE VIEW scores AS SELECT dictionary, feature, label, beats_control, shuffled_from, "
            "unnest(scores, max_depth := 2) FROM labels"
        )
        made.append("scores")
    return made


def _quoted(text: str) -> str:
    """`text` as a string of SQL, for views, which take no parameters."""
    return "'" + text.replace("'", "''") + "'"
