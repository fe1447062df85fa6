from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy import sparse
from sklearn.metrics import roc_auc_score
from torch import Tensor

from sae_core.atlas import Atlas
from sae_core.prompt_reader import Pooled, PromptError, PromptReader
from sae_core.prompt_search import best_features, by_prompt, contrast, direction, nearest, read_prompts, split_prompts

D_SAE, PLANTED, EXCLUSIVE = 50, 17, 31


def pooled(texts: list[str]) -> Pooled:
    """Made-up features: one that mostly fires on what begins with `yes`, one that always and only does; noise."""
    rng = np.random.default_rng(sum(map(len, texts)))
    values = rng.random((len(texts), D_SAE)) * (rng.random((len(texts), D_SAE)) < 0.3)
    is_yes = np.array([text.startswith("yes") for text in texts])
    values[:, PLANTED] = rng.normal(1, 0.5, len(texts)).clip(0) + is_yes
    values[:, EXCLUSIVE] = 0.1 * is_yes * (rng.random(len(texts)) + 0.5)
    raw = rng.normal(size=(len(texts), 8)) + 3 * is_yes[:, None] * np.eye(8)[2]
    matrix = sparse.csr_array(values.astype(np.float32))
    return Pooled(matrix, (matrix / 3).tocsr(), raw.astype(np.float32), np.full(len(texts), 5), 1)


class Reader(PromptReader):
    """Reads without a model."""

    def __init__(self, pool: Any = pooled, W_dec: Tensor | None = None) -> None:
        self._pool = pool
        self.dictionary: Any = SimpleNamespace(d_sae=D_SAE, W_dec=W_dec)

    def pool(self, texts: Any, report: Any = None) -> Pooled:
        return self._pool(texts)


class Labels(Atlas):
    """An atlas of which the labels are known, and some numbers."""

    def __init__(self, **columns: list[float]) -> None:
        self.features: Any = SimpleNamespace(table=lambda: pa.table(columns))

    def name(self, feature: int) -> str:
        return f"label {feature}"

    def beats_control(self, feature: int) -> bool | None:
        return feature % 2 == 0


READER, ATLAS = Reader(), Labels()


def sides(n: int) -> tuple[list[str], list[str]]:
    return [f"yes {i}" for i in range(n)], [f"no {i}" for i in range(n)]


def test_a_planted_feature_is_found_and_holds_on_unseen_prompts() -> None:
    found = contrast(ATLAS, READER, split_prompts(*sides(100)), limit=3)
    assert {f.feature for f in found.features[:2]} == {PLANTED, EXCLUSIVE}
    best = found.features[0]
    assert (best.feature, best.label) == (EXCLUSIVE, "label 31")
    assert best.p < 1e-6
    assert best.low == best.auc == 1
    assert found.exclusive == [EXCLUSIVE]
    assert found.tried == 2 * D_SAE
    assert "tells unseen prompts of these two kinds apart" in found.claim
    assert found.windowed == 1


def test_the_auc_of_a_found_feature_is_scikit_learns() -> None:
    sets = split_prompts(*sides(60))
    parts = [pooled(texts) for texts in (*sets.find, *sets.test)]
    row = next(f for f in best_features(*parts, limit=5) if f.feature == PLANTED)
    values = [getattr(part, row.pool)[:, [PLANTED]].toarray()[:, 0] for part in parts]
    y = np.repeat([1, 0], [30, 30])
    assert row.find_auc == pytest.approx(roc_auc_score(y, np.concatenate(values[:2])))
    assert row.auc == pytest.approx(roc_auc_score(y, np.concatenate(values[2:])))


def test_with_few_prompts_nothing_is_claimed() -> None:
    found = contrast(ATLAS, READER, split_prompts(*sides(20)))
    assert found.features
    assert found.claim.startswith("no claim: 10 prompts on the smallest side; a claim needs 40")


def test_two_sets_of_the_same_kind_give_no_claim_of_a_find() -> None:
    rng = np.random.default_rng(3)

    def noise(texts: list[str]) -> Pooled:
        most, mean = (sparse.csr_array(rng.random((len(texts), D_SAE))) for _ in range(2))
        return pooled(texts)._replace(max=most, mean=mean)

    assert contrast(ATLAS, Reader(noise), split_prompts(*sides(100))).claim.startswith("nothing was found")


def test_duplicates_and_what_is_on_both_sides_are_taken_out_and_counted() -> None:
    sets = split_prompts(["a", "b", "b ", "c", "d", "e"], ["c", "x", "y", "z", "x", "w"])
    assert sets.duplicates == 4
    texts = [text for split in (sets.find, sets.test) for side in split for text in side]
    assert sorted(texts) == ["a", "b", "d", "e", "w", "x", "y", "z"]
    assert [len(side) for side in (*sets.find, *sets.test)] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("positive", "negative", "why"),
    [
        (["a"], [], "no negative"),
        ([], ["a"], "no positive"),
        ([" "], ["a"], "no positive"),
        (["a"], ["a"], "both sides"),
    ],
)
def test_one_sided_and_empty_sets_are_refused(positive: list[str], negative: list[str], why: str) -> None:
    with pytest.raises(PromptError, match=why):
        split_prompts(positive, negative)


def test_prompts_are_read_from_lines_and_from_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\n\n  two\r\n", "utf-8")
    assert read_prompts(tmp_path / "a.txt") == ["one", "  two"]
    (tmp_path / "b.jsonl").write_text('{"text": "on\\ne"}\n"two"\n', "utf-8")
    assert read_prompts(tmp_path / "b.jsonl") == ["on\ne", "two"]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.txt", "caf\xe9".encode("latin-1"), "not UTF-8 .byte 0xe9 at 3."), ("a.txt", b"\n \n", "holds no prompt"),
        ("a.jsonl", b"{oops", "line 1 is not JSON"), ("a.jsonl", b'{"txt": 1}', "line 1 holds no text"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=f"{name}.*{why}"):
        read_prompts(tmp_path / name)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"gone\.txt"):
        read_prompts(tmp_path / "gone.txt")


@pytest.mark.parametrize("kind", ["difference", "probe"])
def test_the_direction_between_two_sets_leads_to_the_feature_that_points_along_it(kind: Any) -> None:
    raw = [pooled(side).raw for side in sides(80)]
    rows = torch.nn.functional.normalize(torch.randn(D_SAE, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    rows[5] = torch.eye(8)[2]
    reader = Reader(W_dec=rows)
    near = nearest(ATLAS, reader, direction(*raw, kind), limit=3)
    assert near[0].feature == 5
    assert near[0].cosine > 0.9
    with pytest.raises(PromptError, match="no length"):
        nearest(ATLAS, reader, np.zeros(8))


def test_on_one_prompt_a_rare_feature_near_its_maximum_comes_first() -> None:
    row = sparse.csr_array(np.array([[5.0, 2.0, 0.0, 1.0]], np.float32))
    reader = Reader(lambda texts: pooled(texts)._replace(max=row))
    atlas = Labels(max_act=[10.0, 2.0, 1.0, 1.0], density=[0.5, 0.001, 0.1, 0.4])
    found = by_prompt(atlas, reader, "some text")
    assert [f.feature for f in found] == [1, 3, 0]
    assert found[0].of_max == 1
