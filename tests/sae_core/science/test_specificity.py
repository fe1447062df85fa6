"""Names of the sweep's features, written and rated by a scripted endpoint."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_core.science.claims import _rated_claim
from sae_core.science.specificity import Rated, rated
from sae_core.study import LabelSettings, ModelSettings
from tests.sae_core.labels.conftest import GOOD, Endpoint, Handler


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("MIND_ATLAS_CACHE", str(tmp_path / "cache"))
    found = Endpoint()
    thread = threading.Thread(target=found.server.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.server.shutdown()
    thread.join()
    found.server.server_close()


def says(handler: Handler, body: dict[str, Any]) -> None:
    """A label for whoever asks for one; each text rated 3 under it, 1 under any other name."""
    asked = body["messages"][-1]["content"]
    if "Rate how specific" not in body["messages"][0]["content"]:
        handler.answer(json.dumps(GOOD | {"label": f"planets {len(asked)}"}))
        return
    n = asked.count("\n") - 2
    handler.answer(json.dumps({"ratings": [3 if '"planets' in asked.splitlines()[-1] else 1] * n}))


def test_features_of_the_sweep_are_named_and_their_names_rated_by_level(
    endpoint: Endpoint, swept: tuple[Path, dict], text: Path, site: Path, tiny_model: Path, tmp_path: Path
):
    endpoint.behavior = says
    asked, model = LabelSettings(model="m", base_url=endpoint.url), ModelSettings(source=str(tiny_model))
    found = rated(asked, 3, model, text, site, swept[0] / "w64", tmp_path)
    assert found.judge == "m"
    assert found.levels.shape == (3, 5)
    assert set(found.levels[~np.isnan(found.levels)].tolist()) == {3.0}


@pytest.mark.parametrize(("levels", "verdict"), [
    (np.tile([0.5, 1, 2, 3.0], (20, 1)), "holds"),
    (np.tile([2.0, 1, 2, 2.0], (20, 1)), "does not"),
    (np.full((4, 4), np.nan), "cannot tell at this size"),
    (np.zeros((0, 5)), "cannot tell at this size"),
])  # fmt: skip
def test_the_claim_holds_when_the_top_is_rated_above_the_bottom(levels: np.ndarray, verdict: str):
    assert _rated_claim(Rated("m", levels, np.zeros(len(levels)))).verdict == verdict
