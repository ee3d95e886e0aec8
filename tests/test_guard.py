"""What the page refuses on its way in: addresses, and other sites in the browsers of its users."""

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient, WebSocketDenialResponse

from btok_hf.corpus.guard import POLICY, OwnOnly, own_hosts


@pytest.fixture(scope="module")
def client():
    routes = [Route("/{path:path}", lambda request: PlainTextResponse("served"), methods=["GET", "POST", "OPTIONS"])]
    return TestClient(Starlette(routes=routes, middleware=[Middleware(OwnOnly)]), base_url="http://192.168.1.5:7860")


@pytest.mark.parametrize(
    "headers",
    [
        {},  # no browser, or a link to the page
        {"origin": "http://192.168.1.5:7860"},
        {"origin": "https://search.example.org", "host": "search.example.org"},
        {"origin": "https://search.example.org", "x-forwarded-host": "search.example.org"},
        {"origin": "https://search.example.org", "sec-fetch-site": "same-origin"},
    ],
)
def test_the_page_itself_is_answered(client, headers):
    answer = client.post("/gradio_api/call/search", headers=headers)
    assert answer.text == "served" and answer.headers["content-security-policy"] == POLICY


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://evil.example", "sec-fetch-site": "cross-site"},
        {"origin": "http://192.168.1.5:8000", "sec-fetch-site": "same-site"},
        {"origin": "null"},
    ],
)
def test_other_sites_are_refused(client, headers):
    for method in ("POST", "GET", "OPTIONS"):
        answer = client.request(method, "/gradio_api/call/search", headers=headers)
        assert answer.status_code == 403 and "other sites" in answer.text
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "127.1", "127.0.0.2"])
def test_a_page_for_this_machine_has_no_other_names(host):
    """The owner of a site may point its name at 127.0.0.1. Then its scripts have the origin of the page."""
    routes = [Route("/", lambda request: PlainTextResponse("served"))]
    guarded = [Middleware(OwnOnly, hosts=own_hosts(host, "Search.example.org:8443"))]
    client = TestClient(Starlette(routes=routes, middleware=guarded))
    names = (
        "127.0.0.1:7860",
        "localhost",
        "LOCALHOST:80",
        "localhost.:80",
        "[::1]:7860",
        "search.example.org",
        "[::1]",
    )
    for name in (*names, host):
        assert client.get("/", headers={"host": name}).text == "served"
    for name in ("evil.example:7860", "evil.example", "127.0.0.1.evil.example"):
        answer = client.get("/", headers={"host": name, "x-forwarded-host": "localhost"})
        assert answer.status_code == 403 and answer.text.endswith(f"--public-host {name.split(':')[0]}")
    for name in ("", ":80", "::1", "a b", "localhost:80@evil.example", "localhost/evil"):
        answer = client.get("/", headers={"host": name})
        assert answer.status_code == 403 and answer.text.endswith("use its own address")


def test_a_page_for_others_has_any_name_unless_one_is_given():
    assert own_hosts("0.0.0.0") is own_hosts("192.168.1.5") is None
    assert {"search.example.org", "0.0.0.0"} <= own_hosts("0.0.0.0", "search.example.org")


@pytest.mark.parametrize("given", ["https://a.org", "a.org/", "a.org,b.org", "bücher.de", "fe80::1", ":8443", ""])
def test_a_public_host_is_a_host(given):
    with pytest.raises(ValueError, match=f"such as search.example.org .*got {given!r}"):
        own_hosts("127.0.0.1", given)


def test_addresses_are_refused(client):
    for path in ("file=https://example.org/a.png", "file/http://127.0.0.1:1", "proxy=https://x.hf.space/"):
        assert client.get(f"/gradio_api/{path}").status_code == 403
    assert client.get("/gradio_api/file=/tmp/a.png").text == "served"


def test_other_sites_open_no_websocket(client):
    headers = {"origin": "http://evil.example"}
    with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("/queue", headers=headers):
        pass
    assert refused.value.status_code == 403
