"""Inputs to embed: texts, images, videos, dicts of them, and chat messages. Here they are read, checked and hashed.

`encode`, training, evaluation and model cards use these functions, so that a value means the same everywhere. Reading
files is in `btok_hf/media.py`.
"""

import hashlib
import io
import math
import os
import reprlib
import urllib.request
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers import ProcessorMixin

from btok_hf.media import (
    IMAGE_SUFFIXES,
    MAX_RATIO,
    VIDEO_FRAMES,
    VIDEO_SUFFIXES,
    array_as_rgb,
    as_rgb,
    frames_as_rgb,
    read_image,
    read_video,
    video_input,
)

# What `encode` accepts: a text, a file path, an image, frames, an input dict, one chat message or a list of them.
Input = str | Path | Image.Image | np.ndarray | torch.Tensor | Mapping[str, Any] | Sequence[Mapping[str, Any]]

# Keys of an input dict.
INPUT_KEYS = ("image", "video", "text")
REMOTE = ("http://", "https://", "data:")
DOWNLOAD_SECONDS = 30
Array = (np.ndarray, torch.Tensor)


class ImageLimits(NamedTuple):
    """Image settings of a model's processor.

    Args:
        max_pixels (`int`): Larger images are reduced to this many pixels.
        patch_size (`int`): Side of a patch in pixels. Images with a smaller side are refused.
    """

    max_pixels: int
    patch_size: int


def check_input(item: Input, limits: ImageLimits, position: int | None = None) -> Any:
    """Read the files of an input and give every kind of input one form.

    Args:
        item (`Input`): An input of `encode`.
        limits (`ImageLimits`): Limits of the model's processor.
        position (`int`, *optional*): Its place in the user's list, for the message of an error.

    Returns:
        Chat messages with their media read, or a dict with some of the keys `image`, `video` and `text`: images in
        mode RGB, videos as `{"array", "video_metadata"}`, texts, each alone or in a list.

    Raises:
        FileNotFoundError: A file of the input does not exist.
        ValueError: The input cannot be embedded correctly. The message shows the input in short.
    """
    try:
        if is_messages(item):
            messages: Any = [item] if isinstance(item, Mapping) else item
            return _read_messages(messages, limits)
        return _read_dict(_as_dict(item), limits)
    except (ValueError, FileNotFoundError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        place = "" if position is None else f" {position}"
        raise kind(f"Input{place} {reprlib.repr(item)}: {error}") from error


def _as_dict(item: Any) -> Mapping[str, Any]:
    """An input as a dict whose keys say what it is."""
    if isinstance(item, Mapping):
        if "array" in item:
            return {"video": item}
        return {"image": item} if _is_cell(item) else item
    if isinstance(item, (Image.Image, *Array)):
        is_video = not isinstance(item, Image.Image) and item.ndim == 4
        return {"video" if is_video else "image": item}
    if isinstance(item, Path):
        return {"video" if item.suffix.lower() in VIDEO_SUFFIXES else "image": item}
    if isinstance(item, str):
        return {_kind_of(item): item}
    way_out = "Remove it"
    if isinstance(item, (list, tuple)):
        way_out = 'Several texts or images of one input are {"text": […]} and {"image": […]}, frames {"video": […]}'
    elif isinstance(item, bytes):
        way_out = "Decode an image with PIL.Image.open(io.BytesIO(…)), a text with .decode()"
    raise ValueError(f"an input cannot be of type {type(item).__name__}. {way_out}")


def _kind_of(text: str) -> str:
    """Whether a string is a text, or names an image or a video."""
    if text.startswith(REMOTE):
        if text.startswith("data:image/"):
            return "image"
        named = is_media_path(text) and not text.startswith("data:")
    else:
        named = os.path.isfile(text) or is_media_path(text)
        if named and not os.path.isfile(text):
            raise FileNotFoundError(
                f'{text!r} does not exist. If it is a text, give it as {{"text": …}}; relative paths start at the '
                "current folder"
            )
    if not named:
        return "text"
    return "video" if _suffix(text) in VIDEO_SUFFIXES else "image"


def _read_dict(item: Mapping[str, Any], limits: ImageLimits) -> dict[str, Any]:
    unknown = set(item) - set(INPUT_KEYS)
    if unknown or not item:
        raise ValueError(f"unknown keys {sorted(map(str, unknown))}; use the keys {sorted(INPUT_KEYS)}")
    row = {key: _read_part(key, item[key], limits) for key in item}
    if row.keys() == {"text"}:
        texts = [row["text"]] if isinstance(row["text"], str) else row["text"]
        if not any(text.strip() for text in texts):
            raise ValueError("An input is empty: no media, and no text but white space. Remove it or fill it")
    return row


def _read_part(key: str, value: Any, limits: ImageLimits) -> Any:
    """The value of one key of an input dict: one part, or a list of them."""
    if value is None:
        raise ValueError(f"'{key}' is None; leave the key out or set it to a value")
    read = {"text": _read_text, "image": _read_image, "video": _read_video}[key]
    if isinstance(value, (list, tuple)) and not (key == "video" and value and all(map(_is_frame, value))):
        if not value:
            raise ValueError(f"'{key}' is an empty list; leave the key out or fill it")
        return [read(part, limits) for part in value]
    return read(value, limits)


def _read_text(text: Any, limits: ImageLimits) -> str:
    if not isinstance(text, str):
        raise ValueError(f"'text' must be a string or a list of strings, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half a character at position {error.start} (a lone surrogate). Repair it, e.g. with "
            "text.encode('utf-8', 'replace').decode()"
        ) from error
    return text


def _read_image(image: Any, limits: ImageLimits) -> Image.Image:
    """An image in mode RGB, from any form that it may have."""
    if isinstance(image, Mapping) and _is_cell(image):
        image = image["path"] if image["bytes"] is None else read_image(io.BytesIO(image["bytes"]), limits.max_pixels)
    if isinstance(image, str) and image.startswith(REMOTE):
        rgb = read_image(io.BytesIO(_download(image)), limits.max_pixels)
    elif isinstance(image, (str, Path)):
        rgb = read_image(image, limits.max_pixels)
    elif isinstance(image, Image.Image):
        rgb = as_rgb(image)
    elif isinstance(image, Array):
        rgb = array_as_rgb(image)
    else:
        raise ValueError(f"'image' must be an image, an array or a path, got {type(image).__name__}")
    _check_size(*rgb.size, limits)
    return rgb


def _read_video(video: Any, limits: ImageLimits) -> Any:
    """A video as `{"array", "video_metadata"}`. Addresses are left to Sentence-Transformers, which downloads them."""
    if isinstance(video, str) and video.startswith(REMOTE):
        return video
    if isinstance(video, (str, Path)):
        video = read_video(video)
    elif isinstance(video, Mapping) and "array" in video:
        frames = frames_as_rgb(video["array"])
        metadata = video.get("video_metadata")
        if metadata is None or len(frames) != len(video["array"]):  # no metadata, or those of a single frame
            video = video_input(frames, 2.0)
        else:
            video = {**video, "array": frames}
    elif isinstance(video, (list, tuple, *Array)):
        # Frames alone have no rate. At 2 per second processors keep all of them.
        video = video_input(frames_as_rgb(video), 2.0)
    else:
        raise ValueError(f"'video' must be frames, a dict with 'array' or a path, got {type(video).__name__}")
    height, width = video["array"].shape[1:3]
    _check_size(width, height, limits)
    return video


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    """Refuse what the processor would enlarge without a word, or refuse without a name."""
    if min(width, height) < limits.patch_size:
        raise ValueError(
            f"image of {width} x {height} pixels is smaller than one patch of {limits.patch_size} pixels; enlarge it "
            "or remove it"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(
            f"image of {width} x {height} pixels is more than {MAX_RATIO} times as long as wide, which Qwen-VL does "
            "not take; cut it or remove it"
        )


def _read_messages(messages: Sequence[Mapping[str, Any]], limits: ImageLimits) -> list[dict[str, Any]]:
    """Chat messages with their images and frames read. Video files are left to the processor."""
    read, filled = [], False
    for message in messages:
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, (list, tuple)) or not all(isinstance(part, Mapping) for part in parts):
            raise ValueError("the content of a message must be a text or a list of parts with a type")
        parts = [_read_message_part(part, limits) for part in parts]
        of_user = message.get("role") != "system"
        filled |= any(part.get("type") != "text" or (of_user and part["text"].strip()) for part in parts)
        read.append({**message, "content": content if isinstance(content, str) else parts})
    if not filled:
        raise ValueError("An input is empty: no media, and no text but white space. Remove it or fill it")
    return read


def _read_message_part(part: Mapping[str, Any], limits: ImageLimits) -> dict[str, Any]:
    kind = part.get("type")
    value = part.get(kind) if isinstance(kind, str) else None
    if kind == "text":
        return {**part, "text": _read_text(value, limits)}
    if kind == "image" and value is not None:
        return {**part, "image": _read_image(value, limits)}
    if kind == "video" and isinstance(value, (list, tuple, *Array)):
        return {**part, "video": frames_as_rgb(value)}
    return dict(part)


def _download(address: str) -> bytes:
    """What an address (http, https, data) holds."""
    try:
        with urllib.request.urlopen(address, timeout=DOWNLOAD_SECONDS) as response:
            return response.read()
    except (OSError, ValueError) as error:
        raise ValueError(f"{reprlib.repr(address)} cannot be downloaded ({error}). Check the address") from error


def _is_cell(value: Mapping[str, Any]) -> bool:
    """Whether this is an image as `datasets` stores it."""
    return set(value) == {"bytes", "path"}


def _is_frame(value: Any) -> bool:
    return isinstance(value, (Image.Image, *Array))


def _suffix(text: str) -> str:
    """The suffix of a path or address in lower case, without its query."""
    try:
        return Path(urlsplit(text).path if text.startswith(REMOTE) else text).suffix.lower()
    except ValueError:  # a text that begins like an address and is none
        return ""


def is_messages(value: Any) -> bool:
    """Whether an input is a chat message (a dict with a role) or a list of chat messages."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return isinstance(first, Mapping) and "role" in first


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
            The order of keys does not count.

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
    return _suffix(text) in IMAGE_SUFFIXES + VIDEO_SUFFIXES and not any(map(str.isspace, text))


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
        if isinstance(item, str) and not is_media_path(text):
            return len(tokenize(text)) if tokenize else len(text.encode("utf-8", "replace")) // 3
        if Path(text).suffix.lower() in VIDEO_SUFFIXES:
            return VIDEO_FRAMES // 2 * _pixel_tokens(math.inf, processor, "video_processor")
        try:
            with Image.open(text) as image:
                return _pixel_tokens(image.width * image.height, processor)
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError):
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
