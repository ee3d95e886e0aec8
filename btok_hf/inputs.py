"""Inputs to embed: texts, images, videos, dicts of them, and chat messages. Here they are read and checked.

`encode`, training, evaluation and model cards use these functions, so that a value means the same everywhere. The kind
of an input is told in `btok_hf/input_kinds.py`. Files are read in `btok_hf/media.py` and `btok_hf/video.py`, and
contents are compared in `btok_hf/content.py`.
"""

import io
import os
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from btok_hf.download import REMOTE, download
from btok_hf.input_kinds import (
    INPUT_KEYS,
    Array,
    Input,
    as_list,
    is_cell,
    is_frame,
    is_messages,
    names_media,
    suffix_of,
)
from btok_hf.media import (
    FRAMES,
    MAX_RATIO,
    VIDEO_SUFFIXES,
    VideoInput,
    VideoMetadata,
    array_as_rgb,
    as_rgb,
    frames_as_rgb,
    is_still,
    read_image,
    video_input,
    with_metadata,
)
from btok_hf.video import read_video

# Where the parts of a chat message may have their content, as in transformers.
PART_KEYS = {"text": ("text",), "image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}


class _Short(reprlib.Repr):
    """Shows arrays and images by type and size: their values would say little, and take long to print."""

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, Array):
            return f"<{type(x).__name__} of {x.dtype}, shape {tuple(x.shape)}>"
        if isinstance(x, Image.Image):
            return f"<image of {x.width} x {x.height}, mode {x.mode}>"
        return super().repr1(x, level)


shown = _Short().repr


class ImageLimits(NamedTuple):
    """Image settings of a model's processor.

    Args:
        max_pixels (`int`): Larger images are reduced to this many pixels.
        patch_size (`int`): Side of a patch in pixels. Images with a smaller side are refused.
        takes_video (`bool`): `False`: videos are refused.
        fits (`Callable`): Whether the processor takes an image of this width and height, which is not too small.
    """

    max_pixels: int
    patch_size: int
    takes_video: bool = True
    fits: Callable[[int, int], bool] = lambda width, height: True


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
        OSError: A file of the input cannot be opened.
        ValueError: The input cannot be embedded correctly. The message shows the input in short.
    """
    try:
        if is_messages(item):
            messages: Any = [item] if isinstance(item, Mapping) else item
            return _read_messages(messages, limits)
        return _read_dict(_as_dict(item), limits)
    except (ValueError, OSError) as error:
        kind = next(kind for kind in (FileNotFoundError, OSError, ValueError) if isinstance(error, kind))
        place = "" if position is None else f" {position}"
        raise kind(f"Input{place} {shown(item)}: {error}") from error


def _as_dict(item: Any) -> Mapping[str, Any]:
    """An input as a dict whose keys say what it is."""
    if isinstance(item, Mapping):
        if "array" in item:
            return {"video": item}
        if is_cell(item):
            of_video = suffix_of(str(item["path"])) in VIDEO_SUFFIXES and not is_still(item["bytes"])
            return {"video" if of_video else "image": item}
        return item
    if isinstance(item, FRAMES):
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
    if not names_media(text):
        return "text"
    if text != text.strip() and not os.path.isfile(text):
        raise ValueError(
            f"{text!r} has white space around a path or address: use text.strip(). If it is a text, give it as "
            '{"text": …}'
        )
    if not text.startswith(REMOTE) and not os.path.isfile(text):
        raise FileNotFoundError(
            f'{text!r} does not exist. If it is a text, give it as {{"text": …}}; relative paths start at the '
            "current folder, in pair files at the folder of the file"
        )
    return "video" if text.startswith("data:video/") or suffix_of(text) in VIDEO_SUFFIXES else "image"


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
    """Read the value of one key of an input dict: one part, or a list of them."""
    if value is None:
        raise ValueError(
            f"'{key}' is None; leave the key out or set it to a value. `datasets` fills in keys: keep "
            "{key: part for key, part in row.items() if part is not None}"
        )
    if isinstance(value, (list, tuple)) and not (key == "video" and value and all(map(is_frame, value))):
        if not value:
            raise ValueError(f"'{key}' is an empty list; leave the key out or fill it")
        return [_read_value(key, part, limits) for part in value]
    return _read_value(key, value, limits)


def _read_value(key: str, value: Any, limits: ImageLimits) -> Any:
    """One text, image or video."""
    if key == "text":
        return read_text(value)
    return _read_image(value, limits) if key == "image" else _read_video(value, limits)


def read_text(text: Any) -> str:
    """A text that has a form in UTF-8.

    Raises:
        ValueError: It is not a string, or has a lone surrogate, which UTF-8 cannot encode.
    """
    if not isinstance(text, str):
        raise ValueError(f"'text' must be a string or a list of strings, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate at position {error.start}, which UTF-8 cannot encode. Repair it, e.g. "
            "with text.encode('utf-8', 'replace').decode()"
        ) from error
    return text


def _read_image(image: Any, limits: ImageLimits) -> Image.Image:
    """An image in mode RGB, from any form that it may have."""
    image = _as_file(image)
    if isinstance(image, (str, Path, io.BytesIO)):
        rgb = read_image(image, limits.max_pixels)
    elif isinstance(image, Image.Image):
        rgb = as_rgb(image)
    elif isinstance(image, Array):
        rgb = array_as_rgb(image)
    else:
        raise ValueError(f"'image' must be an image, an array or a path, got {type(image).__name__}")
    _check_size(*rgb.size, limits)
    return rgb


def _as_file(value: Any) -> Any:
    """Addresses, and media as `datasets` stores them, as a path or an open file. All else as it is."""
    if isinstance(value, Mapping) and is_cell(value):
        content = value["bytes"]
        if content is not None and not isinstance(content, (bytes, bytearray)):
            raise ValueError(f"'bytes' must be the content of a file, got {type(content).__name__}")
        value = value["path"] if content is None else io.BytesIO(content)
    if isinstance(value, str) and value.startswith(REMOTE):
        return io.BytesIO(download(value))
    return value


def _read_video(video: Any, limits: ImageLimits) -> VideoInput:
    """A video with its metadata, from any form that it may have."""
    if not limits.takes_video:
        raise ValueError("this model takes no video; give some of its frames as images, e.g. {'image': [first, last]}")
    video = _as_file(video)
    if isinstance(video, (str, Path, io.BytesIO)):
        video = read_video(video)
    elif isinstance(video, Mapping) and "array" in video:
        _refuse_others(video, "a video", ("array", "video_metadata"))
        frames, metadata = frames_as_rgb(video["array"]), video.get("video_metadata")
        single = len(frames) != len(video["array"])  # it is doubled, and its metadata no longer hold
        video = video_input(frames, 2.0) if metadata is None or single else with_metadata(frames, metadata)
    elif isinstance(video, (list, tuple, *Array)):
        if isinstance(video, (list, tuple)):
            whole = limits._replace(max_pixels=sys.maxsize)  # all in full size: only a JPEG would be decoded smaller
            video = [
                frame if isinstance(frame, FRAMES) or not is_frame(frame) else _read_image(frame, whole)
                for frame in video
            ]
        # Frames alone have no rate. At 2 per second processors keep all of them.
        video = video_input(frames_as_rgb(video), 2.0)
    else:
        raise ValueError(f"'video' must be frames, a dict with 'array' or a path, got {type(video).__name__}")
    height, width = video["array"].shape[1:3]
    _check_size(width, height, limits)
    return video


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    """Refuse images that the processor would silently enlarge, or refuse without saying which image it is."""
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
    if not limits.fits(width, height):
        raise ValueError(
            f"image of {width} x {height} pixels becomes more tokens than an image may have, because its sides are "
            "rounded to whole ones; raise max_pixels, lower min_pixels, or cut or remove it"
        )


def _read_messages(messages: Sequence[Mapping[str, Any]], limits: ImageLimits) -> list[dict[str, Any]]:
    """Chat messages with their media read."""
    read, filled = [], False
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"a chat message must be a dict with a role and content, got {shown(message)}")
        _refuse_others(message, "a chat message", ("role", "content"))
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, (list, tuple)) or not all(isinstance(part, Mapping) for part in parts):
            raise ValueError("the content of a message must be a text or a list of parts with a type")
        parts = [_read_message_part(part, limits) for part in parts]
        of_user = message["role"] != "system"
        filled |= any(part["type"] != "text" or (of_user and part["text"].strip()) for part in parts)
        read.append({"role": message["role"], "content": parts})
    if not filled:
        raise ValueError("An input is empty: no media, and no text but white space. Remove it or fill it")
    return read


def _read_message_part(part: Mapping[str, Any], limits: ImageLimits) -> dict[str, Any]:
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in PART_KEYS:
        raise ValueError(f"a message has a part of type {shown(kind)}; use {', '.join(PART_KEYS)}")
    given = [key for key in PART_KEYS[kind] if part.get(key) is not None]
    _refuse_others(part, f"a part of type {kind}", ("type", *PART_KEYS[kind]))
    if len(given) != 1:
        raise ValueError(f"a part of type {kind} needs one of the keys {', '.join(PART_KEYS[kind])}, got {given}")
    value = part[given[0]]
    if given == ["base64"] and not str(value).startswith("data:"):
        value = f"data:;base64,{value}"
    return {"type": kind, kind: _read_value(kind, value, limits)}


def _refuse_others(given: Mapping[str, Any], name: str, known: Sequence[str]) -> None:
    """Raise `ValueError` for keys that would be ignored. Empty values may stand there: `datasets` fills in `None`."""
    filled = (
        key for key, value in given.items() if not (value is None or (isinstance(value, Sized) and not len(value)))
    )
    if others := sorted(str(key) for key in filled if key not in known):
        raise ValueError(f"{name} has the keys {others}, which are not read; use {', '.join(known)}")


def as_messages(checked: Any) -> tuple[list[dict[str, Any]], list[VideoMetadata]]:
    """A checked input as chat messages, and the metadata of its videos.

    In messages every part has a type. In dicts Sentence-Transformers guesses: two texts become a pair of inputs, and a
    text of it that looks like a path or address is read as an image.

    Args:
        checked: What `check_input` returns.

    Returns:
        The messages, with videos as arrays of shape `(frames, height, width, 3)`, because processors take the metadata
        apart; and the metadata of the videos, in order.
    """
    if isinstance(checked, Mapping):
        parts = [(key, part) for key, value in checked.items() for part in as_list(value)]
        checked = [{"role": "user", "content": [{"type": key, key: part} for key, part in parts]}]
    metadata, messages = [], []
    for message in checked:
        content = []
        for part in message["content"]:
            if part["type"] == "video":
                metadata.append(part["video"]["video_metadata"])
                part = {"type": "video", "video": part["video"]["array"]}
            content.append(part)
        messages.append({**message, "content": content})
    return messages, metadata
