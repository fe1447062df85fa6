"""Who may come in, how much they may send, and the headers of every answer."""

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from sae_core.artifacts import ArtifactStore
from sae_core.serve import create_app
from sae_core.serve.door import COOKIE, MAX_BODY

TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def guarded(tiny_atlas: Path) -> TestClient:
    """Open to any host name, with a token."""
    return TestClient(create_app(ArtifactStore(tiny_atlas), hosts=(), token=TOKEN), base_url="http://atlas.example")


def test_every_answer_forbids_inline_script_and_style(client: TestClient):
    for address in ("/", "/nowhere", "/static/style.css", "/api/overview"):
        policy = client.get(address).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "[::2]:7860"])
def test_a_host_of_another_name_is_refused(client: TestClient, host: str):
    assert client.get("/", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost", "localhost:7860", "127.0.0.1:1", "[::1]:7860", "[::1]"])
def test_loopback_is_let_in_by_all_its_names(client: TestClient, host: str):
    assert client.get("/text", headers={"host": host}).status_code == 200


def test_other_sites_may_link_here_and_not_read_or_send(client: TestClient):
    cross = {"sec-fetch-site": "cross-site"}
    assert client.get("/text", headers=cross | {"sec-fetch-mode": "navigate"}).status_code == 200
    assert client.post("/contrast", headers=cross | {"sec-fetch-mode": "navigate"}).status_code == 403
    assert client.get("/api/overview", headers=cross | {"sec-fetch-mode": "cors"}).status_code == 403
    assert client.get("/text?text=a", headers=cross | {"sec-fetch-mode": "no-cors"}).status_code == 403
    assert client.get("/text", headers={"sec-fetch-site": "same-origin"}).status_code == 200


def test_without_the_token_nothing_is_told(guarded: TestClient):
    for address in ("/", "/static/style.css", "/api/overview", "/nowhere", "/?token=wrong", "/?token=%FF"):
        answer = guarded.get(address)
        assert answer.status_code == 401, address
        assert "smollm" not in answer.text
    for wrong in (TOKEN[:-1], TOKEN + "x", "", "ä"):
        assert guarded.get("/text", headers={"authorization": f"Bearer {wrong}".encode()}).status_code == 401
        assert guarded.get("/text", headers={"cookie": f"{COOKIE}={wrong}".encode()}).status_code == 401


def test_the_token_opens_as_a_header_and_becomes_a_cookie_from_an_address(guarded: TestClient):
    assert guarded.get("/text", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    answer = guarded.get(f"//evil.example/text?token={TOKEN}&feature=3", follow_redirects=False)
    assert answer.status_code == 303
    assert answer.headers["location"].startswith(("/evil.example", "/text"))  # of this host
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert TOKEN not in answer.headers["location"]
    assert guarded.get(f"/text?token={TOKEN}").status_code == 200  # followed, with the cookie
    guarded.cookies.clear()


def test_more_than_a_text_needs_may_not_be_sent(client: TestClient):
    assert client.post("/api/text", content=b"a" * (MAX_BODY + 1)).status_code == 413
    assert client.post("/api/text", content=b"a", headers={"content-length": "-1"}).status_code == 413

    def chunks():
        for _ in range(20):
            yield b"a" * 100_000

    assert client.post("/api/text", content=chunks()).status_code == 400  # of a length that was not told
