"""The web application on the tiny study's atlas."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from sae_core.artifacts import ArtifactStore
from sae_core.atlas import Atlas
from sae_core.serve import create_app
from sae_core.studies import Studies, study_folders


@pytest.fixture(scope="session")
def atlas(tiny_atlas: Path) -> Atlas:
    return Atlas.open(ArtifactStore(tiny_atlas))


@pytest.fixture(scope="session")
def client(tiny_atlas: Path) -> Iterator[TestClient]:
    app = create_app(ArtifactStore(tiny_atlas), studies=Studies.load(*study_folders()))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client
