"""Downloading a file that an input names by its address, within bounds of size and time."""

import math
import reprlib
import time
import urllib.request
from collections.abc import Collection
from http.client import HTTPException

REMOTE = ("http://", "https://", "data:")
WAIT_SECONDS = 30  # for the next bytes
DOWNLOAD_SECONDS = 300  # for all of them
DOWNLOAD_BYTES = 256 * 2**20
CHUNK = 2**20


class _OnlyHosts(urllib.request.BaseHandler):
    """Refuses requests to other hosts, also those that an answer redirects to."""

    def __init__(self, hosts: Collection[str]) -> None:
        self.hosts = {host.lower() for host in hosts}

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        if request.host.lower() not in self.hosts:
            raise ValueError(f"{request.host} is not one of the allowed hosts")
        return request

    https_request = ftp_request = http_request


def download(
    address: str,
    *,
    hosts: Collection[str] | None = None,
    most_bytes: int = DOWNLOAD_BYTES,
    most_seconds: float = DOWNLOAD_SECONDS,
) -> bytes:
    """What an address holds.

    Args:
        address (`str`): `http://…`, `https://…` or `data:…`.
        hosts (`Collection[str]`, *optional*): The only hosts that it may lead to, `name` or `name:port` as in the
            address. Default: any.
        most_bytes (`int`): Most bytes of what is downloaded.
        most_seconds (`float`): Most seconds of the download.

    Returns:
        `bytes`

    Raises:
        ValueError: It cannot be reached, leads to another host, holds too many bytes, or takes too long.
    """
    # A data address is in memory already.
    limit = math.inf if address.startswith("data:") else most_bytes
    end = time.monotonic() + most_seconds
    content = bytearray()
    opener = urllib.request.build_opener(*([] if hosts is None else [_OnlyHosts(hosts)]))
    try:
        with opener.open(address, timeout=min(WAIT_SECONDS, most_seconds)) as response:
            while chunk := response.read1(CHUNK):
                content += chunk
                if len(content) > limit:
                    raise ValueError(f"it holds more than {limit} bytes")
                if time.monotonic() > end:
                    raise ValueError(f"it takes longer than {most_seconds:g} seconds")
            if getattr(response, "length", None):
                raise ValueError(f"the connection ended {response.length} bytes too early")
    except (OSError, ValueError, HTTPException) as error:
        raise ValueError(
            f"{reprlib.repr(address)} cannot be downloaded ({error}). Check the address, or download the file "
            "yourself and give its path"
        ) from error
    return bytes(content)
