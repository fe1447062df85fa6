"""`mind-atlas serve`: the web application on a socket, and who may reach it."""

import ipaddress
import os
import secrets
import socket
from collections.abc import Sequence

import uvicorn

from pipelines.console import err
from pipelines.labeling import command
from sae_core.artifacts import ArtifactStore, home
from sae_core.atlas import Atlas
from sae_core.errors import MindAtlasError
from sae_core.serve import create_app
from sae_core.serve.door import LOOPBACK
from sae_core.serve.openai_api import load_presets
from sae_core.steers import Steer, SteeringError, check_steers, parse_steers
from sae_core.studies import Studies, study_folders

_TOKEN = 16  # characters at least
_HEAD = 1_000_000  # bytes of a request's first line and headers: a long text is refused by us, with a reason


class ServeError(MindAtlasError):
    """A server that cannot be started as asked."""


def serve(dictionary: str, host: str, port: int, expose: bool, steered: Sequence[str] = ()) -> None:
    """Serve the atlas until the process is stopped.

    Raises:
        ServeError: the address is other machines' too and `expose` is not set, or it cannot be listened on; or the
            token is too short.
        SteeringError: a steered model is not written as one, or names a feature that cannot be steered.
        ArtifactError: nothing is made yet.
    """
    store = ArtifactStore(home())
    presets = _presets(steered, Atlas.open(store, dictionary))
    token = _token(host, expose)
    application = create_app(
        store, dictionary, Studies.load(*study_folders()),
        hosts=() if token else (*LOOPBACK, host), token=token, presets=presets,
        label=None if token else command,  # which may cost money: for who sits at this machine
    )  # fmt: skip
    listener = _listen(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"
    err.print(f"{address}{f'?token={token}' if token else ''}", markup=False)
    if token:
        err.print(
            "whoever reaches this address and has the token can read the atlas with the texts of its corpus, "
            "and run texts through the model; the connection is not encrypted", markup=False,
        )  # fmt: skip
    config = uvicorn.Config(application, log_level="warning", access_log=False, h11_max_incomplete_event_size=_HEAD)
    uvicorn.Server(config).run(sockets=[listener])


def _presets(steered: Sequence[str], atlas: Atlas) -> dict[str, tuple[Steer, ...]]:
    """The steered models of `steered.toml`, and those given as `name=1234:10,99:-2`."""
    presets = load_presets(home())
    for text in steered:
        name, equals, steers = text.partition("=")
        if not name.strip() or not equals:
            raise SteeringError(f"{text!r}: write NAME=FEATURE:STRENGTH, as in golden-gate=1234:10")
        presets[name.strip()] = parse_steers(steers)
    maxima = atlas.features.columns("max_act")["max_act"].to_numpy()
    for name, found in presets.items():
        try:
            check_steers(found, maxima)
        except SteeringError as error:
            raise SteeringError(f"the steered model {name}: {error}") from None
    return presets


def _token(host: str, expose: bool) -> str:
    """The token that requests need; none on an address that only this machine reaches."""
    if _is_loopback(host):
        return ""
    if not expose:
        raise ServeError(
            f"{host} lets other machines read the atlas and run texts through its model: "
            "add --expose if you want that, or leave --host out"
        )
    token = os.environ.get("MIND_ATLAS_TOKEN") or secrets.token_urlsafe(24)
    if len(token) < _TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ServeError(f"MIND_ATLAS_TOKEN must have {_TOKEN} ASCII characters or more, and no space")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        raise ServeError(f"cannot listen on {host}:{port}: {error.strerror or error}; try another --port") from None
    return listener
