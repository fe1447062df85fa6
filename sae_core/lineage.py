"""Which features of a new dictionary are those of an old one, and what became of the others.

Two features are alike by the cosine of their decoder rows (they do the same) together with the correlation of their
activations on common tokens (they fire alike). A one-to-one matching makes the sum of the likenesses as large as can
be; what it leaves over was split off, merged, born, or has died.

A kept feature keeps its number: `follow` puts the new dictionary's features in the places of the old ones they are
matched with. A number whose feature has gone names another one from then on; `lineage.parquet` says from when.
"""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Float64, Int64
from scipy.sparse import csc_array, csr_array, hstack
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from sae_core.artifacts import write_atomically
from sae_core.dictionary import Dictionary
from sae_core.dictionary.sparse import SparseActs
from sae_core.dictionary.transcoder import sides
from sae_core.errors import MindAtlasError

Fate = Literal["kept", "moved", "split", "merged", "born", "died"]

KEPT = 0.7
"""Likeness from which a feature counts as the same one: a match of less is `moved`."""
ALIKE = 0.4
"""Likeness below which two features have nothing to do with each other."""
CANDIDATES = 8
"""Old features that each new one is compared with: those of the nearest decoder rows."""
LINEAGE = "lineage.parquet"
COMMON_BATCHES = 16
"""Batches of activations on which the two are compared."""
SCHEMA = pa.schema(
    [
        ("generation", pa.int32()), ("feature", pa.int32()), ("previous", pa.int32()), ("fate", pa.string()),
        ("cosine", pa.float32()), ("correlation", pa.float32()),
    ]
)  # fmt: skip
_BLOCK = 4096  # rows of a product of decoders at a time


class LineageError(MindAtlasError):
    """Two dictionaries that cannot be compared."""


class Kin(NamedTuple):
    """One line of the lineage: a new feature and the old one it comes from, or an old one without successor."""

    new: int | None
    """None when the old feature died, or went up into another."""
    old: int | None
    """None when the new feature was born."""
    fate: Fate
    """`kept` or `moved`: matched. `split`: a second one like an old feature that goes on in another. `merged`: an old
    one most like a new feature that goes on from another (then `new` is that one). `born`, `died`: like none."""
    cosine: float
    """Of the decoder rows; 0 without a partner."""
    correlation: float
    """Of the activations on the common tokens (Pearson); 0 without a partner."""

    @property
    def likeness(self) -> float:
        """The mean of both."""
        return (self.cosine + self.correlation) / 2


class Alike(NamedTuple):
    """Pairs of a new and an old feature that may be the same."""

    new: Int64[np.ndarray, " pairs"]
    old: Int64[np.ndarray, " pairs"]
    cosine: Float64[np.ndarray, " pairs"]
    correlation: Float64[np.ndarray, " pairs"]

    @property
    def likeness(self) -> Float64[np.ndarray, " pairs"]:
        return (self.cosine + self.correlation) / 2


def lineage(old: Dictionary, new: Dictionary, activations: Iterable[Float[Tensor, "_ *site d_model"]]) -> list[Kin]:
    """What became of every feature: a line for each new one, in order, then one for each old one that is not matched.

    Args:
        old, new: dictionaries of the same site; their sizes may differ.
        activations: raw activations of the site, or pairs, in batches: the common tokens.

    Raises:
        LineageError: the dictionaries read activations of different widths.
    """
    if old.d_model != new.d_model:
        raise LineageError(
            f"the dictionaries read activations of width {old.d_model} and {new.d_model}: they are of different sites"
        )
    alike = _alike(old, new, activations)
    matched = _match(alike, old.d_sae, new.d_sae)
    return [*_of_new(alike, matched, new.d_sae), *_of_old(alike, matched, old.d_sae)]


def follow(
    old: Dictionary,
    new: Dictionary,
    activations: Iterable[Float[Tensor, "_ *site d_model"]],
    previous: Path,
    folder: Path,
) -> Dictionary:
    """The new dictionary with its features in the places of the old ones they are matched with.

    Writes `lineage.parquet`, a line for each feature and each generation since the first: that of `previous`, the old
    dictionary's folder, and what became of its features now. `previous` and `feature` are numbers in the generation
    before and in this one; a line without `feature` tells of one that has gone.
    """
    lines = lineage(old, new, islice(activations, COMMON_BATCHES))
    places = _places(lines, old.d_sae, new.d_sae)
    before = pq.read_table(previous / LINEAGE) if (previous / LINEAGE).exists() else SCHEMA.empty_table()
    number = _generation(previous) + 1
    rows = [
        {
            "generation": number, "feature": None if line.new is None else places[line.new], "previous": line.old,
            "fate": line.fate, "cosine": line.cosine, "correlation": line.correlation,
        }
        for line in lines
    ]  # fmt: skip
    with write_atomically(folder / LINEAGE) as path:
        pq.write_table(pa.concat_tables([before, pa.Table.from_pylist(rows, SCHEMA)]), path)
    return new.reordered(torch.tensor(np.argsort(places), device=new.device))


def kept_since(previous: Path, folder: Path) -> dict[int, int]:
    """The features of a dictionary that are the same as in the one it followed: number now, number then.

    There are none when the dictionary in `folder` did not come right after the one in `previous`.
    """
    if not (folder / LINEAGE).exists():
        return {}
    lines = pq.read_table(folder / LINEAGE).to_pylist()
    newest = max(line["generation"] for line in lines)
    if newest != _generation(previous) + 1:
        return {}
    kept = (line for line in lines if line["generation"] == newest and line["fate"] == "kept")
    return {line["feature"]: line["previous"] for line in kept}


def _generation(folder: Path) -> int:
    """The generation of a dictionary: 1, unless it followed another."""
    path = folder / LINEAGE
    return max(pq.read_table(path)["generation"].to_pylist(), default=1) if path.exists() else 1


def _places(lines: list[Kin], n_old: int, n_new: int) -> list[int]:
    """The place of each new feature: that of the old one it is matched with, else the next free one."""
    matched = {line.new: line.old for line in lines if line.fate in {"kept", "moved"} and line.old is not None}
    fits = {new: old for new, old in matched.items() if old < n_new}
    free = iter(sorted(set(range(n_new)) - set(fits.values())))
    return [fits[i] if i in fits else next(free) for i in range(n_new)]


def _alike(old: Dictionary, new: Dictionary, activations: Iterable[Float[Tensor, "_ *site d_model"]]) -> Alike:
    """The pairs worth comparing: each feature with the nearest ones of the other dictionary."""
    pairs = np.unique(np.concatenate([_nearest(new, old), _nearest(old, new)[:, ::-1]]), axis=0)
    cosine = (new.W_dec[pairs[:, 0]] * old.W_dec[pairs[:, 1]]).sum(1).double().cpu().numpy()
    return Alike(pairs[:, 0], pairs[:, 1], cosine, _correlation(old, new, pairs, activations))


def _nearest(of: Dictionary, among: Dictionary) -> Int64[np.ndarray, "pairs 2"]:
    """Each feature with the `CANDIDATES` features of the other dictionary whose decoder rows are nearest."""
    count = min(CANDIDATES, among.d_sae)
    found = torch.cat([(rows @ among.W_dec.T).topk(count, dim=1).indices for rows in of.W_dec.split(_BLOCK)])
    return np.stack([np.repeat(np.arange(of.d_sae), count), found.flatten().cpu().numpy()], axis=1)


def _correlation(
    old: Dictionary, new: Dictionary, pairs: Int64[np.ndarray, "pairs 2"], activations: Iterable[Tensor]
) -> Float64[np.ndarray, " pairs"]:
    """Pearson's correlation of the activations of each pair; 0 where one of them never fires."""
    n, products = 0, np.zeros(len(pairs))
    sums, squares = ([np.zeros(d.d_sae) for d in (new, old)] for _ in range(2))
    for x in activations:
        n += len(x)
        acts = [_columns(d.encode_sparse(sides(x)[0]), d.d_sae) for d in (new, old)]
        for side, a in enumerate(acts):
            sums[side] += a.sum(axis=0)
            squares[side] += a.multiply(a).sum(axis=0)
        together = (acts[0].T @ acts[1]).tocsr()  # few features fire together at all: this stays sparse
        products += np.asarray(together[pairs[:, 0], pairs[:, 1]]).ravel()
    means = [total / max(n, 1) for total in sums]
    variances = [square / max(n, 1) - mean**2 for square, mean in zip(squares, means, strict=True)]
    covariance = products / max(n, 1) - means[0][pairs[:, 0]] * means[1][pairs[:, 1]]
    scale = np.sqrt(np.maximum(variances[0][pairs[:, 0]] * variances[1][pairs[:, 1]], 0))
    return np.divide(covariance, scale, out=np.zeros(len(pairs)), where=scale > 0).clip(-1, 1)


def _columns(acts: SparseActs, d_sae: int) -> csc_array:
    values = acts.value.double().cpu().numpy()
    return csr_array((values, (acts.row.cpu().numpy(), acts.feature.cpu().numpy())), (acts.n_rows, d_sae)).tocsc()


def _match(alike: Alike, n_old: int, n_new: int) -> dict[int, int]:
    """New features and the old ones they are matched with, so that the sum of likenesses is largest.

    Each new feature may also stay alone, which counts as `ALIKE`: so no pair is matched that is less alike.
    """
    worth = alike.likeness > ALIKE
    paired = csr_array((2 - alike.likeness[worth], (alike.new[worth], alike.old[worth])), (n_new, n_old))
    alone = csr_array((np.full(n_new, 2 - ALIKE), (np.arange(n_new), np.arange(n_new))), (n_new, n_new))
    rows, columns = min_weight_full_bipartite_matching(hstack([paired, alone], format="csr"))
    return {int(i): int(j) for i, j in zip(rows, columns, strict=True) if j < n_old}


def _of_new(alike: Alike, matched: dict[int, int], n_new: int) -> list[Kin]:
    """The lines of the new features."""
    found = {(int(i), int(j)): n for n, (i, j) in enumerate(zip(alike.new, alike.old, strict=True))}
    nearest, lines = _most_alike(alike, alike.new), []
    for i in range(n_new):
        if i in matched:
            line = _kin(alike, found[i, matched[i]], "kept")
            lines.append(line if line.likeness >= KEPT else line._replace(fate="moved"))
        elif i in nearest:
            lines.append(_kin(alike, nearest[i], "split"))
        else:
            lines.append(Kin(i, None, "born", 0.0, 0.0))
    return lines


def _of_old(alike: Alike, matched: dict[int, int], n_old: int) -> list[Kin]:
    """The lines of the old features that no new one is matched with."""
    gone, nearest = sorted(set(range(n_old)) - set(matched.values())), _most_alike(alike, alike.old)
    return [_kin(alike, nearest[j], "merged") if j in nearest else Kin(None, j, "died", 0.0, 0.0) for j in gone]


def _most_alike(alike: Alike, key: Int64[np.ndarray, " pairs"]) -> dict[int, int]:
    """The pair of each feature that is most alike, where one is alike at all."""
    order = np.argsort(alike.likeness, kind="stable")
    return {int(key[n]): int(n) for n in order[alike.likeness[order] > ALIKE]}


def _kin(alike: Alike, pair: int, fate: Fate) -> Kin:
    return Kin(
        int(alike.new[pair]), int(alike.old[pair]), fate, float(alike.cosine[pair]), float(alike.correlation[pair])
    )
