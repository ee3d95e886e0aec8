"""Middleware of the page of `btok app`: it refuses requests of other sites, and sets a Content-Security-Policy."""

import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"


class OwnOnly:
    """Keeps a page to its own host: the server fetches no address that a client names, other sites cannot send
    requests through the browser of a user, and browsers load nothing from elsewhere.

    Args:
        app (`ASGIApp`): The page.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        refusal = reason(scope["path"], Headers(scope=scope)) if scope["type"] in ("http", "websocket") else None
        if refusal:
            await PlainTextResponse(refusal, 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send_with_policy)


def reason(path: str, headers: Headers) -> str | None:
    """Why a request is refused, or `None`.

    Args:
        path (`str`): Path of the request.
        headers (`Headers`): Its headers.
    """
    # Gradio would fetch the address and pass on its content.
    if re.search(r"/(file|proxy)[=/]+\w+:", path):
        return "addresses are not opened"
    # Browsers send the site of the script in Origin. With https and on localhost they also send Sec-Fetch-Site, which
    # is right behind proxies that change Host, too.
    origin, own = headers.get("origin"), (headers.get("host"), headers.get("x-forwarded-host"))
    if origin is None or headers.get("sec-fetch-site") == "same-origin" or origin.partition("://")[2] in own:
        return None
    return "other sites may not use this page; a proxy must pass the header Host on as it is"
