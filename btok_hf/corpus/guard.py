"""Middleware of the page of `btok app`: it refuses requests of other sites, and sets a Content-Security-Policy."""

import re
import socket
from collections.abc import Collection
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOST = re.compile(r"[a-z\d_.-]+")  # a name or an IPv4 address
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"


class OwnOnly:
    """Keeps a page to its own host: the server fetches no address that a client names, other sites cannot send
    requests through the browser of a user, and browsers load nothing from elsewhere.

    Args:
        app (`ASGIApp`): The page.
        hosts (`Collection[str]`, *optional*): Names and addresses in `Host` that are answered (default: all).
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None = None) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        asked = scope["type"] in ("http", "websocket")
        refusal = reason(scope["path"], Headers(scope=scope), self.hosts) if asked else None
        if refusal:
            await PlainTextResponse(refusal, 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send_with_policy)


def own_hosts(host: str, public: str | None = None) -> set[str] | None:
    """What `Host` may be for a page that listens on `host`, or `None` if it may be anything.

    The owner of a site can point its name at an address of this machine, so that browsers take the page for a part of
    that site (DNS rebinding). Then the name in `Host` is that of the site. A page that other machines reach may be
    called by names that are not known here, so it needs `public` for this.

    Args:
        host (`str`): Name or address that the page listens on.
        public (`str`, *optional*): The host that browsers ask for, e.g. that of a proxy.

    Raises:
        ValueError: `public` is no host.
    """
    if public is not None and not HOST.fullmatch(_name(public)):
        raise ValueError(
            "--public-host is the host of the address that browsers ask for, such as search.example.org (names with "
            f"other letters as xn--…), got {public!r}. Leave out https:// and what follows the host."
        )
    try:
        addresses = {ip_address(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:  # nothing can listen there
        addresses = set()
    loopback = all(address.is_loopback for address in addresses)
    names = ["localhost", "127.0.0.1", "[::1]", host, *([public] if public else [])]
    return set(map(_name, names)) if loopback or public else None


def reason(path: str, headers: Headers, hosts: Collection[str] | None = None) -> str | None:
    """Why a request is refused, or `None`.

    Args:
        path (`str`): Path of the request.
        headers (`Headers`): Its headers.
        hosts (`Collection[str]`, *optional*): As in `OwnOnly`.
    """
    name = _name(headers.get("host", ""))
    if hosts is not None and name not in hosts:
        advice = f", or start it with --public-host {name}" if HOST.fullmatch(name) else ""
        return f"this page is not called {name!r}: use its own address{advice}"
    # Gradio would fetch the address and pass on its content.
    if re.search(r"/(file|proxy)[=/]+\w+:", path):
        return "addresses are not opened"
    # Browsers send the site of the script in Origin. With https and on localhost they also send Sec-Fetch-Site, which
    # is right behind proxies that change Host, too.
    origin, own = headers.get("origin"), (headers.get("host"), headers.get("x-forwarded-host"))
    if origin is None or headers.get("sec-fetch-site") == "same-origin" or origin.partition("://")[2] in own:
        return None
    return "other sites may not use this page; a proxy must pass the header Host on as it is"


def _name(host: str) -> str:
    """`Host` without its port and the dot that may end a name."""
    return re.sub(r":\d*$", "", host).lower().removesuffix(".")
