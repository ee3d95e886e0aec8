"""Inputs to embed: texts, images, videos, dicts of them, and chat messages. Here they are read, checked and hashed.

`encode`, training, evaluation and model cards use these functions, so that a value means the same everywhere. Reading
files is in `btok_hf/media.py`.
"""

import hashlib
import math
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers import ProcessorMixin

from btok_hf.media import IMAGE_SUFFIXES, VIDEO_FRAMES, VIDEO_SUFFIXES, read_image, read_video

# What `encode` accepts: a text, a file path, an image, frames, an input dict, one chat message or a list of them.
Input = str | Path | Image.Image | np.ndarray | torch.Tensor | Mapping[str, Any] | Sequence[Mapping[str, Any]]

# Keys of an input dict, in the order of the row.
INPUT_KEYS = ("image", "video", "text")
REMOTE = ("http://", "https://", "data:")


class ImageLimits(NamedTuple):
    """Image settings of a model's processor.

    Args:
        max_pixels (`int`): Larger images are reduced to this many pixels.
        patch_size (`int`): Side of a patch in pixels. Images with a smaller side are refused.
    """

    max_pixels: int
    patch_size: int


def check_input(item: Input, limits: ImageLimits) -> Any:
    """Read the files of an input and check its parts.

    Args:
        item (`Input`): An input of `encode`. Chat messages and arrays of frames are returned unchanged.
        limits (`ImageLimits`): Limits of the model's processor.

    Returns:
        The input for the processor, with images and videos instead of their paths.

    Raises:
        FileNotFoundError: A file of the input does not exist.
        ValueError: The input cannot be embedded correctly. The message shows the input instead of its index, because
            `encode` sorts its inputs.
    """
    try:
        if isinstance(item, (str, Path)):
            return _read_path(str(item), limits)
        if isinstance(item, dict) and "role" not in item and "array" not in item:
            unknown = set(item) - set(INPUT_KEYS)
            if unknown or not item:
                raise ValueError(f"unknown keys {sorted(unknown)}; use the keys {sorted(INPUT_KEYS)}")
            return {key: _check_part(key, item[key], limits) for key in INPUT_KEYS if key in item}
        if isinstance(item, Image.Image):
            return _check_image(item, limits)
        return item
    except (ValueError, FileNotFoundError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"Input {reprlib.repr(item)}: {error}") from error


def _read_path(text: str, limits: ImageLimits) -> Any:
    """Read the media file that a string names; other texts are returned. A missing media file is an error."""
    is_file = is_media_path(text) or (is_media_path(text.replace(" ", "")) and os.path.isfile(text))
    if text.startswith(REMOTE) or not is_file:
        return text
    if Path(text).suffix.lower() in IMAGE_SUFFIXES:
        return _check_image(read_image(text, limits.max_pixels), limits)
    return {"video": read_video(text)}


def _check_part(key: str, value: Any, limits: ImageLimits) -> Any:
    """Read and check the value of one key of an input dict."""
    if key == "text":
        if not (isinstance(value, str) or (isinstance(value, (list, tuple)) and all(map(_is_text, value)))):
            raise ValueError(f"'text' must be a string or a list of strings, got {type(value).__name__}")
        return value
    if isinstance(value, (list, tuple)) and not (key == "video" and all(map(_is_frame, value))):
        return [_check_part(key, part, limits) for part in value]
    if isinstance(value, (str, Path)) and not str(value).startswith(REMOTE):
        value = read_image(value, limits.max_pixels) if key == "image" else read_video(value)
    if value is None:
        raise ValueError(f"'{key}' is None; leave the key out or set it to media")
    return _check_image(value, limits) if key == "image" else value


def _check_image(image: Any, limits: ImageLimits) -> Any:
    """Refuse images smaller than one patch, which the processor would enlarge silently, and pixels that are not
    finite."""
    if isinstance(image, Image.Image) and min(image.size) < limits.patch_size:
        raise ValueError(
            f"image of {image.width} x {image.height} pixels is smaller than one patch of {limits.patch_size} pixels; "
            "enlarge it or remove it"
        )
    if isinstance(image, (np.ndarray, torch.Tensor)) and not np.isfinite(np.asarray(image)).all():
        raise ValueError("image array has NaN or infinite pixels; replace them")
    return image


def is_messages(value: Any) -> bool:
    """Whether an input is a chat message (a dict with a role) or a list of chat messages."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return isinstance(first, dict) and "role" in first


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_frame(value: Any) -> bool:
    return isinstance(value, (Image.Image, np.ndarray, torch.Tensor))


def text_of(value: Any) -> str | None:
    """The text of an input: a string itself, or the text in an input dict or in chat messages. `None` without text."""
    if isinstance(value, str):
        return None if is_media_path(value) else value.strip() or None
    if isinstance(value, dict):
        value = value.get("content", value.get("text"))
        if isinstance(value, str):  # in a dict, text is never a file path
            return value.strip() or None
    if isinstance(value, (list, tuple)):
        texts = [text_of(part) for part in value if not isinstance(part, dict) or part.get("type", "text") == "text"]
        return " ".join(text for text in texts if text) or None
    return None


def content_hash(value: Any) -> int:
    """A stable 63-bit hash of the content of an input. Equal content has equal hashes.

    Args:
        value: A text, image, array, bytes, or a dict or list of them. `{"text": …}` has the hash of its text.

    Returns:
        `int`: At least 0.
    """
    digest = hashlib.blake2b(digest_size=8)

    def add(part: Any) -> None:
        if isinstance(part, Image.Image):
            # The bytes of a palette image are indices of colours. The same bytes with another palette differ.
            part = part.convert("RGBA") if part.mode in ("P", "PA") else part
            part = (part.mode, part.size, part.tobytes())
        elif isinstance(part, (np.ndarray, torch.Tensor)):
            part = np.ascontiguousarray(part)
            part = (str(part.dtype), part.shape, part.tobytes())
        if isinstance(part, dict):
            part = part["text"] if set(part) == {"text"} else sorted(part.items())
        if isinstance(part, (list, tuple)):
            digest.update(f"[{len(part)}".encode())
            for item in part:
                add(item)
        else:
            part = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
            digest.update(f"{len(part)}:".encode() + part)

    add(value)
    return int.from_bytes(digest.digest(), "big") >> 1


def is_media_path(text: str) -> bool:
    """Whether a text looks like an image or video file: no spaces, and a known suffix."""
    return Path(text).suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES and not any(map(str.isspace, text))


def estimate_tokens(
    item: Any, processor: ProcessorMixin | None = None, tokenize: Callable[[str], Sized] | None = None
) -> int:
    """Estimate the number of tokens of an input. Files are opened to read their size, but not decoded.

    Args:
        item (`Input`): An input of `encode`. Other values count as 0 tokens.
        processor (`ProcessorMixin`, *optional*): The model's processor. If it is not a Qwen-VL processor, images count
            as in Qwen2-VL.
        tokenize (`Callable`, *optional*): Function from a text to its tokens. Default: one token for three bytes,
            which is rarely too low.

    Returns:
        `int`
    """
    if isinstance(item, (str, Path)):
        text = str(item)
        if not is_media_path(text):
            return len(tokenize(text)) if tokenize else len(text.encode("utf-8", "replace")) // 3
        if Path(text).suffix.lower() in VIDEO_SUFFIXES:
            return VIDEO_FRAMES // 2 * _pixel_tokens(math.inf, processor, "video_processor")
        try:
            with Image.open(text) as image:
                return _pixel_tokens(image.width * image.height, processor)
        except (UnidentifiedImageError, OSError, ValueError):
            return _pixel_tokens(math.inf, processor)  # remote, or not an image
    if isinstance(item, Image.Image):
        return _pixel_tokens(item.width * item.height, processor)
    if hasattr(item, "ndim"):  # an array: three axes for an image, four for a video
        if item.ndim < 4:
            return _pixel_tokens(math.prod(item.shape) // 3, processor)
        pixels = math.prod(item.shape[1:]) // 3
        return -(-item.shape[0] // 2) * _pixel_tokens(pixels, processor, "video_processor")
    if isinstance(item, dict):
        item = [value for key, value in item.items() if key not in ("role", "type", "video_metadata")]
    return sum(estimate_tokens(part, processor, tokenize) for part in item) if isinstance(item, (list, tuple)) else 0


def _pixel_tokens(pixels: float, processor: ProcessorMixin | None, kind: str = "image_processor") -> int:
    """Tokens of an image, or of two video frames, with this many pixels, after the processor's resizing."""
    part: Any = getattr(processor, kind, None)
    least, most, side = 56**2, 28**2 * 1280, 28
    if hasattr(part, "merge_size"):
        least, most = part.size["shortest_edge"], part.size["longest_edge"]
        side = part.patch_size * part.merge_size
    return int(min(max(pixels, least), most) // side**2)
