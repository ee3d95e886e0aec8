"""Downloads of files that inputs refer to by URL, bounded in size and time."""

import contextlib
import functools
import math
import reprlib
import socket
import threading
import urllib.request
from collections.abc import Collection
from http.client import HTTPException
from typing import Any

REMOTE = ("http://", "https://", "data:")
WAIT_SECONDS = 30  # for a connection, and for the next bytes
DOWNLOAD_SECONDS = 300  # for the whole download
DOWNLOAD_BYTES = 256 * 2**20
CHUNK = 2**20


class _OnlyHosts(urllib.request.BaseHandler):
    """Refuses requests to hosts that are not on a list, redirects included."""

    def __init__(self, hosts: Collection[str]) -> None:
        self.hosts = {host.lower() for host in hosts}

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        if request.host.lower() not in self.hosts:
            raise ValueError(f"{request.host} is not one of the allowed hosts")
        return request

    https_request = ftp_request = http_request


class _Deadline(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Ends all connections of a download after some seconds, in whatever state they are.

    The timeout of a socket bounds each read alone, so a host that sends a byte now and then never meets it.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.passed = threading.Event()
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._end)
        self._timer.daemon = True

    def do_open(self, http_class: Any, req: urllib.request.Request, **options: Any) -> Any:
        return super().do_open(functools.partial(self._connection, http_class), req, **options)

    def _connection(self, http_class: Any, *arguments: Any, **options: Any) -> Any:
        connection = http_class(*arguments, **options)
        connection._create_connection = self._connect  # http.client has no public way
        return connection

    def _connect(self, *arguments: Any) -> socket.socket:
        connection = socket.create_connection(*arguments)
        self._sockets.append(connection.dup())  # TLS takes the other one over
        if self.passed.is_set():
            self._end()
        return connection

    def _end(self) -> None:
        self.passed.set()
        for each in list(self._sockets):
            with contextlib.suppress(OSError):  # it has ended
                each.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "_Deadline":
        if self._timer.interval < threading.TIMEOUT_MAX:
            self._timer.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._timer.cancel()
        for each in self._sockets:
            each.close()


def download(
    address: str,
    *,
    hosts: Collection[str] | None = None,
    most_bytes: int = DOWNLOAD_BYTES,
    most_seconds: float = DOWNLOAD_SECONDS,
) -> bytes:
    """Download a file.

    Args:
        address (`str`): `http://…`, `https://…` or `data:…`.
        hosts (`Collection[str]`, *optional*): The only hosts that are asked, as `name` or `name:port` like in the
            address. Redirects to others are refused. Default: any host.
        most_bytes (`int`): Largest size of the file.
        most_seconds (`float`): Longest time of the download, from the connection to the last byte.

    Returns:
        `bytes`: The content of the file.

    Raises:
        ValueError: The address cannot be reached, leads to another host, the file is too large, or it takes too long.
    """
    in_memory = address.startswith("data:")
    limit = math.inf if in_memory else most_bytes
    content = bytearray()
    with _Deadline(math.inf if in_memory else most_seconds) as deadline:
        opener = urllib.request.build_opener(deadline, *([] if hosts is None else [_OnlyHosts(hosts)]))
        try:
            with opener.open(address, timeout=min(WAIT_SECONDS, most_seconds)) as response:
                while chunk := response.read1(CHUNK):
                    content += chunk
                    if len(content) > limit:
                        raise ValueError(f"it holds more than {limit} bytes")
                if deadline.passed.is_set():  # what looks like the end of the file may be that of the connection
                    raise ValueError("it is not complete")
                if getattr(response, "length", None):
                    raise ValueError(f"the connection ended {response.length} bytes too early")
        except (OSError, ValueError, HTTPException) as error:
            reason = f"it takes longer than {most_seconds:g} seconds" if deadline.passed.is_set() else error
            raise ValueError(
                f"{reprlib.repr(address)} cannot be downloaded ({reason}). Check the address, or download the file "
                "yourself and give its path"
            ) from error
    return bytes(content)
