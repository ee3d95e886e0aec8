"""What kind of input a value is: a text, an image, a video, a frame, a chat message. Nothing is decoded here."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image

from btok_hf.download import REMOTE
from btok_hf.media import FRAMES, IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_still

# What `encode` accepts: a text, a file path, an image, frames, an input dict, one chat message or a list of them.
Input = str | Path | Image.Image | np.ndarray | torch.Tensor | Mapping[str, Any] | Sequence[Mapping[str, Any]]

# Keys of an input dict.
INPUT_KEYS = ("image", "video", "text")
Array = FRAMES[1:]


def as_list(value: Any) -> list[Any]:
    """The value itself if it is a list, otherwise a list of the one value."""
    return value if isinstance(value, list) else [value]


def is_cell(value: Mapping[str, Any]) -> bool:
    """Whether this is an image or video as `datasets` stores it."""
    return set(value) == {"bytes", "path"}


def is_frame(value: Any) -> bool:
    """Whether a part of a list under `video` is a frame, and not a video: an image, or the file of a still one."""
    if isinstance(value, Mapping) and is_cell(value):
        if value["bytes"] is not None:
            return is_still(value["bytes"])
        value = str(value["path"])
    if isinstance(value, (str, Path)):
        suffix = suffix_of(str(value))
        return str(value).startswith("data:image/") or (suffix in IMAGE_SUFFIXES and suffix != ".gif")
    return isinstance(value, Image.Image) or (isinstance(value, Array) and value.ndim < 4)


def suffix_of(text: str) -> str:
    """The suffix of a path or address in lower case, without its query."""
    try:
        return Path(urlsplit(text).path if text.startswith(REMOTE) else text).suffix.lower()
    except ValueError:  # a text that begins like an address and is none
        return ""


def is_messages(value: Any) -> bool:
    """Whether an input is a chat message (a dict with a role) or a list of chat messages."""
    return is_message(value[0] if isinstance(value, (list, tuple)) and value else value)


def is_message(value: Any) -> bool:
    """Whether this is a chat message: a dict with a role."""
    return isinstance(value, Mapping) and "role" in value


def text_of(value: Any, is_text: bool = False) -> str | None:
    """The text of an input: a string itself, or the text in an input dict or in chat messages. `None` without text.

    `is_text`: strings are texts, even if they look like names of files.
    """
    if isinstance(value, str):
        return None if not is_text and names_media(value) else value.strip() or None
    if isinstance(value, dict):
        return text_of(value.get("content", value.get("text")), is_text=True)
    if isinstance(value, (list, tuple)):
        texts = [
            text_of(part, is_text)
            for part in value
            if not isinstance(part, dict) or part.get("type", "text") == "text"
        ]
        return " ".join(text for text in texts if text) or None
    return None


def names_media(text: str) -> bool:
    """Whether a string that stands alone is read as a file: one that exists, or looks like an image or video."""
    if text.startswith("data:"):
        return text.startswith(("data:image/", "data:video/"))
    return is_media_path(text) or (not text.startswith(REMOTE) and os.path.isfile(text))


def is_media_path(text: str) -> bool:
    """Whether a text looks like an image or video file: one word, and a known suffix.

    White space around it, as a line of a file has, makes it no text: it is refused where it is read.
    """
    word = text.strip()
    return not any(map(str.isspace, word)) and suffix_of(word) in IMAGE_SUFFIXES + VIDEO_SUFFIXES
