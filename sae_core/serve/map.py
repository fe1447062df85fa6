"""The map page, the neighborhood page, and what they load: a table of all points, clusters, names in chunks."""

from functools import lru_cache
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi import Path as InPath
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException

from sae_core.atlas import Atlas
from sae_core.neighbor_index import NeighborIndex
from sae_core.serve.map_data import CHUNK, MapData
from sae_core.serve.neighborhood import HEIGHT, WIDTH, neighborhood
from sae_core.serve.render import page
from sae_core.serve.shapes import MapSummary
from sae_core.serve.shelf import ChosenAtlas

router = APIRouter(tags=["map"])

Chunk = Annotated[int, InPath(ge=0, description=f"{CHUNK} rows of the table.")]

_FOREVER = "private, max-age=31536000, immutable"
_LISTED = 60  # clusters listed below the map


@lru_cache(4)
def map_of(atlas: Atlas) -> MapData:
    """The map of an open atlas. Raises ArtifactError when it is not made yet."""
    return MapData(atlas.store, atlas.dictionary)


def prepare(atlas: Atlas) -> None:
    """Have all ready that the first visitor of the map would else wait for."""
    map_of(atlas).summary()
    map_of(atlas).names(0)


@lru_cache(4)
def index_of(atlas: Atlas) -> NeighborIndex:
    """The neighbor index of an open atlas. Raises ArtifactError when it is not made yet."""
    return NeighborIndex(atlas.store.get("neighbors", atlas.dictionary).folder)


@router.get("/map", response_class=HTMLResponse, include_in_schema=False)
def map_page(request: Request, atlas: ChosenAtlas) -> Response:
    data = map_of(atlas)
    clusters = data.clusters[:_LISTED]
    return page(request, "map.html", dictionary=atlas.dictionary, data=data, clusters=clusters)


@router.get("/near/{dictionary}/{feature}", response_class=HTMLResponse, include_in_schema=False)
def near_page(request: Request, atlas: ChosenAtlas, feature: int) -> Response:
    atlas.features.feature(feature)  # refuses one that is not there
    picture = neighborhood(index_of(atlas), feature, atlas.name, beats=atlas.beats_control)
    return page(request, "near.html", dictionary=atlas.dictionary, feature=feature, name=atlas.shown(feature),
                picture=picture, width=WIDTH, height=HEIGHT)  # fmt: skip


@router.get("/map/{dictionary}/map.json")
def summary(atlas: ChosenAtlas) -> MapSummary:
    """How to read the table of points, and the clusters."""
    return map_of(atlas).summary()


_BINARY: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}


@router.get("/map/{dictionary}/points-{version}.bin", response_class=Response, responses=_BINARY)
def points(atlas: ChosenAtlas, version: str) -> Response:
    """The table of all points: the columns that `map.json` names, 4 bytes a value, little-endian, one after another."""
    table = _of_version(map_of(atlas), version).to_bytes()
    return Response(table, media_type="application/octet-stream", headers={"Cache-Control": _FOREVER})


@router.get("/map/{dictionary}/names-{version}/{chunk}.json")
def names(atlas: ChosenAtlas, version: str, chunk: Chunk, response: Response) -> list[str]:
    """Names of the features in a chunk of the table's rows."""
    data = _of_version(map_of(atlas), version)
    if chunk >= data.n_chunks:
        raise HTTPException(404, f"there is no chunk {chunk}: there are {data.n_chunks}")
    response.headers["Cache-Control"] = _FOREVER
    return data.names(chunk)


def _of_version(data: MapData, version: str) -> MapData:
    if version != data.version:
        raise HTTPException(404, "the atlas was made again: reload the map")
    return data
