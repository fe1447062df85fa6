"""A label written from the browser: by `mind-atlas label` in a process of its own, which asks a real HTTP server."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from pipelines.labeling import command
from sae_core.artifacts import PROJECT, ArtifactStore, file_sha256
from sae_core.labels import Labels
from sae_core.serve import create_app
from sae_core.studies import Studies


def answer(request: Request) -> Response:
    """A label of its own for every prompt, after a while; the key must have come along."""
    if request.headers["Authorization"] != "Bearer sk-browser":
        return Response(json.dumps({"error": {"message": "no"}}), 401, content_type="application/json")
    time.sleep(0.5)
    digest = hashlib.sha256(json.dumps(request.get_json()["messages"]).encode()).hexdigest()
    label = {"label": f"<i>thing</i> {digest[:8]}", "description": "A thing.", "kind": "input", "confidence": 0.5}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": json.dumps(label)}}
    body = {"id": digest, "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return Response(json.dumps(body), content_type="application/json")


@pytest.fixture(scope="module")
def home(tiny_atlas: Path, tiny_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The tiny atlas, one of whose features an endpoint has labeled, behind a server that may label more."""
    folder = tmp_path_factory.mktemp("labeling") / "home"
    shutil.copytree(tiny_atlas, folder)
    (folder / "studies").mkdir(exist_ok=True)
    (folder / "dagster").mkdir()
    shutil.copy(PROJECT / "dagster.yaml", folder / "dagster")
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()} | {
        "MIND_ATLAS_HOME": str(folder), "MIND_ATLAS_CACHE": str(folder / "cache"), "OPENAI_API_KEY": "sk-browser",
        "DAGSTER_HOME": str(folder / "dagster"),
    }  # fmt: skip
    with HTTPServer() as endpoint:
        endpoint.expect_request("/v1/chat/completions").respond_with_handler(answer)
        written = tiny_study.parent.parent / "by-endpoint" / "tiny.toml"  # its paths are seen from its folder
        written.parent.mkdir(exist_ok=True)
        labels = f'features = 1\nscorers = []\nbase_url = "{endpoint.url_for("/v1")}"\nmodel = "m"'
        written.write_text(tiny_study.read_text("utf-8").replace("features = 0", labels), "utf-8")
        (folder / "studies" / "tiny.toml").symlink_to(written)
        made = [sys.executable, "-m", "pipelines.cli", "run", "tiny", "--json"]
        done = subprocess.run(made, env=environment, cwd=PROJECT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        own = ("MIND_ATLAS", "DAGSTER", "OPENAI")
        variables = [f"{name}={value}" for name, value in environment.items() if name.startswith(own)]
        proxies = [f"--unset={name}" for name in os.environ if "proxy" in name.lower()]
        app = create_app(
            ArtifactStore(folder), studies=Studies.load(folder / "studies"),
            label=lambda dictionary, features: ["env", *proxies, *variables, *command(dictionary, features)],
        )  # fmt: skip
        listener = socket.create_server(("127.0.0.1", 0))
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        yield SimpleNamespace(
            store=ArtifactStore(folder), url=f"http://127.0.0.1:{listener.getsockname()[1]}", endpoint=endpoint
        )
        running.should_exit = True
        thread.join(20)


def test_a_label_is_written_from_a_features_page_and_what_was_served_is_not_touched(
    home: SimpleNamespace, chromium: Browser
):
    (slug,) = home.store.slugs("labels")
    served = home.store.get("labels", slug).folder
    rows = Labels.open(served).rows()
    before = {path.name: file_sha256(path) for path in served.iterdir() if path.is_file()}
    feature = next(row.feature for row in rows if row.status == "lexical")
    context = chromium.new_context(base_url=home.url)
    page = context.new_page()
    page.goto(f"/f/{slug}/{feature}")
    page.get_by_role("link", name="Write a label").click()
    expect(page.locator("main")).to_contain_text(re.compile(r"By m at (localhost|127\.0\.0\.1)\."))
    assert Axe().run(page).violations_count == 0
    page.get_by_role("button", name="Write its label").click()
    expect(page.locator("progress")).to_be_visible()
    expect(page.get_by_role("status")).to_contain_text("Done: 1 asked about", timeout=300_000)
    expect(page.locator("#labeling .name")).to_contain_text("<i>thing</i> ")
    assert Axe().run(page).violations_count == 0
    page.locator("#labeling .near a").click()
    expect(page.locator("h1")).to_contain_text("<i>thing</i> ")
    expect(page.get_by_role("link", name="Write another label")).to_be_visible()
    context.close()
    now = Labels.open(home.store.get("labels", slug).folder).rows()
    assert [row.feature for row, old in zip(now, rows, strict=True) if row != old] == [feature]
    assert {path.name: file_sha256(path) for path in served.iterdir() if path.is_file()} == before
    assert len(home.endpoint.log) == 2
