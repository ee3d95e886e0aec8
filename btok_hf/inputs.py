"""What an input is: a text, an image, a video, a dict of them, or chat messages; read, checked, sized and hashed.

`encode`, training, evaluation and cards ask here, so that one value means the same thing everywhere.
"""

import hashlib
import math
import os
import reprlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from btok_hf.media import IMAGE_SUFFIXES, VIDEO_FRAMES, VIDEO_SUFFIXES, read_image, read_video

# Keys of an input dict, in the order in which a row holds them.
INPUT_KEYS = ("image", "video", "text")
REMOTE = ("http://", "https://", "data:")


class ImageLimits(NamedTuple):
    """What a model's processor does with images, as far as reading them depends on it.

    Args:
        max_pixels (`int`): What larger images are reduced to.
        patch_size (`int`): Pixels of a patch's side; smaller images are refused.
    """

    max_pixels: int
    patch_size: int


def check_input(item, limits):
    """`item` with its files read, ready for the processor.

    Args:
        item: What `encode` takes. Chat messages and arrays of frames are returned as they are.
        limits (`ImageLimits`): Of the model's processor.

    Raises:
        FileNotFoundError, ValueError: The input cannot be embedded faithfully. The message shows the input and not its
            index: `encode` sorts.
    """
    try:
        if isinstance(item, (str, Path)):
            return _read_path(str(item), limits)
        if isinstance(item, dict) and "role" not in item and "array" not in item:
            unknown = set(item) - set(INPUT_KEYS)
            if unknown or not item:
                raise ValueError(f"unknown keys {sorted(unknown)}; an input dict has keys of {sorted(INPUT_KEYS)}")
            return {key: _check_part(key, item[key], limits) for key in INPUT_KEYS if key in item}
        if isinstance(item, Image.Image):
            return _check_image(item, limits)
        return item
    except (ValueError, FileNotFoundError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"Input {reprlib.repr(item)}: {error}") from error


def _read_path(text, limits):
    """Read the media file that a string names. One that looks like a file name but names none is refused."""
    is_file = is_media_path(text) or (is_media_path(text.replace(" ", "")) and os.path.isfile(text))
    if text.startswith(REMOTE) or not is_file:
        return text
    if Path(text).suffix.lower() in IMAGE_SUFFIXES:
        return _check_image(read_image(text, limits.max_pixels), limits)
    return {"video": read_video(text)}


def _check_part(key, value, limits):
    """The value of one key of an input dict."""
    if key == "text":
        if not (isinstance(value, str) or (isinstance(value, (list, tuple)) and all(map(_is_text, value)))):
            raise ValueError(f"'text' must be a string or a list of strings, got {type(value).__name__}")
        return value
    if isinstance(value, (list, tuple)) and not (key == "video" and all(map(_is_frame, value))):
        return [_check_part(key, part, limits) for part in value]
    if isinstance(value, (str, Path)) and not str(value).startswith(REMOTE):
        value = read_image(value, limits.max_pixels) if key == "image" else read_video(value)
    if value is None:
        raise ValueError(f"'{key}' is None; leave the key out or give it media")
    return _check_image(value, limits) if key == "image" else value


def _check_image(image, limits):
    """Images smaller than one patch hold nothing to embed; the processor would enlarge them without a word."""
    if isinstance(image, Image.Image) and min(image.size) < limits.patch_size:
        raise ValueError(
            f"image of {image.width} x {image.height} pixels is smaller than one patch of {limits.patch_size} pixels; "
            "enlarge it or remove it"
        )
    if isinstance(image, (np.ndarray, torch.Tensor)) and not np.isfinite(np.asarray(image)).all():
        raise ValueError("image array holds NaN or infinite pixels; clean it")
    return image


def is_messages(value):
    """Whether an input is chat messages: one dict with a role, or a list of them."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return isinstance(first, dict) and "role" in first


def _is_text(value):
    return isinstance(value, str)


def _is_frame(value):
    return isinstance(value, (Image.Image, np.ndarray, torch.Tensor))


def text_of(value):
    """The text of one side of a pair: a string, or the text in an input dict or chat messages; `None` without any."""
    if isinstance(value, str):
        return None if is_media_path(value) else value.strip() or None
    if isinstance(value, dict):
        value = value.get("content", value.get("text"))
        if isinstance(value, str):  # never the name of a file
            return value.strip() or None
    if isinstance(value, (list, tuple)):
        texts = [text_of(part) for part in value if not isinstance(part, dict) or part.get("type", "text") == "text"]
        return " ".join(text for text in texts if text) or None
    return text_of(value) if isinstance(value, str) else None


def content_hash(value):
    """A stable 63-bit id of what a side of a pair holds: equal content, equal id.

    Args:
        value: A text, image, array, bytes, or a dict or list of them. `{"text": …}` alone is its text.

    Returns:
        `int`: At least 0.
    """
    digest = hashlib.blake2b(digest_size=8)

    def add(part):
        if isinstance(part, Image.Image):
            # The bytes of a palette image are numbers of colours: with another palette it is another image.
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


def is_media_path(text):
    """Whether a text looks like the name of an image or video file: one word with such a suffix."""
    return Path(text).suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES and not any(map(str.isspace, text))


def estimate_tokens(item, processor=None, tokenize=None):
    """About how many tokens an input takes, judged by its size: files are looked into but not decoded.

    Args:
        item: What `encode` takes. Anything else counts nothing.
        processor (*optional*): With the `image_processor` and `video_processor` of a Qwen-VL model; for others, images
            count as in Qwen2-VL.
        tokenize (`Callable`, *optional*): From a text to its tokens. Default: three bytes are one, which is seldom too
            little.
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
    if hasattr(item, "ndim"):  # an array: an image has three axes, a video four
        if item.ndim < 4:
            return _pixel_tokens(math.prod(item.shape) // 3, processor)
        pixels = math.prod(item.shape[1:]) // 3
        return -(-item.shape[0] // 2) * _pixel_tokens(pixels, processor, "video_processor")
    if isinstance(item, dict):
        item = [value for key, value in item.items() if key not in ("role", "type", "video_metadata")]
    return sum(estimate_tokens(part, processor, tokenize) for part in item) if isinstance(item, (list, tuple)) else 0


def _pixel_tokens(pixels, processor, kind="image_processor"):
    """Tokens of an image, or of two frames of a video, of this many pixels, within the processor's bounds."""
    processor = getattr(processor, kind, None)
    least, most, side = 56**2, 28**2 * 1280, 28
    if hasattr(processor, "merge_size"):
        least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
        side = processor.patch_size * processor.merge_size
    return min(max(pixels, least), most) // side**2
