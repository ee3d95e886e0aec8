"""Downloading a file that an input names by its address, within bounds of size and time."""

import math
import reprlib
import time
import urllib.request
from http.client import HTTPException

REMOTE = ("http://", "https://", "data:")
WAIT_SECONDS = 30  # for the next bytes
DOWNLOAD_SECONDS = 300  # for all of them
DOWNLOAD_BYTES = 256 * 2**20
CHUNK = 2**20


def download(address: str) -> bytes:
    """What an address holds.

    Args:
        address (`str`): `http://…`, `https://…` or `data:…`.

    Returns:
        `bytes`

    Raises:
        ValueError: It cannot be reached, holds more than `DOWNLOAD_BYTES`, or takes longer than `DOWNLOAD_SECONDS`.
    """
    # A data address is in memory already.
    limit = math.inf if address.startswith("data:") else DOWNLOAD_BYTES
    end = time.monotonic() + DOWNLOAD_SECONDS
    content = bytearray()
    try:
        with urllib.request.urlopen(address, timeout=WAIT_SECONDS) as response:
            while chunk := response.read1(CHUNK):
                content += chunk
                if len(content) > limit:
                    raise ValueError(f"it holds more than {limit // 2**20} MiB")
                if time.monotonic() > end:
                    raise ValueError(f"it takes longer than {DOWNLOAD_SECONDS} seconds")
            if getattr(response, "length", None):
                raise ValueError(f"the connection ended {response.length} bytes too early")
    except (OSError, ValueError, HTTPException) as error:
        raise ValueError(
            f"{reprlib.repr(address)} cannot be downloaded ({error}). Check the address, or download the file "
            "yourself and give its path"
        ) from error
    return bytes(content)
