"""Hashes of inputs by content: equal inputs are no negatives of each other, and need to be encoded only once."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from btok_hf.input_kinds import is_cell
from btok_hf.media import as_array, as_rgb


def content_hash(value: Any) -> int:
    """A stable 63-bit hash of the content of an input: of its text, its pixels, or the bytes of its file.

    Copies of a file have the same hash whatever their names are. A decoded image has another hash than its file, and
    that of another one which shows the same.

    Args:
        value: A text, image, array, bytes, file path, file as `datasets` stores it, or a dict or list of these. A dict
            with a single text, image or video has the hash of that value. The order of keys does not matter.

    Returns:
        `int`: At least 0.
    """
    digest = hashlib.blake2b(digest_size=8)

    def add(part: Any, is_text: bool = False) -> None:
        if isinstance(part, dict) and is_cell(part):
            part = part["path"] if part["bytes"] is None else ("file", hashlib.blake2b(part["bytes"]).hexdigest())
        if isinstance(part, (str, Path)) and not is_text and os.path.isfile(part):
            state = os.stat(part)
            part = ("file", _file_digest(os.path.abspath(part), state.st_size, state.st_mtime_ns))
        elif isinstance(part, (Image.Image, np.ndarray, torch.Tensor)):
            part = _shown(part)
        if isinstance(part, dict) and len(part) == 1 and part.keys() <= {"text", "image", "video"}:
            add(next(iter(part.values())), is_text="text" in part)
        elif isinstance(part, dict):
            digest.update(f"{{{len(part)}".encode())
            for key in sorted(part):
                add(key, is_text=True)
                add(part[key], is_text=key not in ("image", "video"))
        elif isinstance(part, (list, tuple)):
            digest.update(f"[{len(part)}".encode())
            for item in part:
                add(item, is_text)
        else:
            part = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
            digest.update(f"{len(part)}:".encode() + part)

    add(value)
    return int.from_bytes(digest.digest(), "big") >> 1


def _shown(pixels: Any) -> Any:
    """What a picture or an array holds, apart from how it is stored."""
    try:
        if isinstance(pixels, Image.Image):
            pixels = as_rgb(pixels)  # its own bytes do not say which way up it is, or what its palette is
            return "image", pixels.size, pixels.tobytes()
        pixels = np.ascontiguousarray(as_array(pixels))
        return str(pixels.dtype), pixels.shape, pixels.tobytes()
    except ValueError:  # it cannot be embedded; where it is read, the error says which input it is
        return repr(pixels)


@lru_cache(maxsize=2**20)
def _file_digest(path: str, size: int, modified: int) -> str:
    """The hash of a file's bytes. Training asks in every epoch, so a file is read again only if it has changed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
