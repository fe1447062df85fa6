"""Debian's chromium, driven by Playwright, on a server that runs in this process."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from sae_core.artifacts import ArtifactStore
from sae_core.serve import create_app
from sae_core.studies import Studies, study_folders

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
ARGUMENTS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
"""The map is drawn by WebGL, in software where there is no graphics card."""


@pytest.fixture(scope="session")
def server(reported_atlas: Path) -> Iterator[str]:
    """Address of the tiny atlas in the browser."""
    app = create_app(ArtifactStore(reported_atlas), studies=Studies.load(*study_folders()))
    listener = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    running.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def chromium(server: str) -> Iterator[Browser]:
    """For one file of tests: while it runs, Playwright's event loop is the thread's, and nobody else can run one.

    The atlas, which Dagster makes on a loop of its own, is therefore made before.
    """
    if not CHROMIUM.exists():
        pytest.skip(f"no chromium at {CHROMIUM}: install it, or set CHROMIUM")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)


def opened(chromium: Browser, server: str, **options: object) -> tuple[BrowserContext, Page, list[str]]:
    """A page in a window of its own, and what its console complains of."""
    context = chromium.new_context(base_url=server, **options)  # type: ignore[arg-type]
    page = context.new_page()
    page.set_default_timeout(20_000)
    complaints: list[str] = []
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    return context, page, complaints


@pytest.fixture
def page(chromium: Browser, server: str) -> Iterator[Page]:
    """A page that must leave nothing on the console."""
    context, page, complaints = opened(chromium, server)
    yield page
    context.close()
    assert complaints == []
