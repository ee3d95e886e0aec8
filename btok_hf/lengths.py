"""How many tokens inputs have, before they are read; and the end of a text that is too long to be tokenized whole."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any, cast

from PIL import Image
from transformers import ProcessorMixin

from btok_hf.inputs import INPUT_KEYS, is_cell, is_frame, names_media
from btok_hf.media import VIDEO_FRAMES, VIDEO_SUFFIXES

# Lists within lists of an input: messages, parts, video, frames. Deeper ones are refused when they are read.
DEPTH = 8
# Characters of a text's end that are tried for each token that is needed; English has four or five a token.
CHARACTERS = 8
# A space between the end of a word and a letter. The tokenizers of all families split texts there first of all.
BETWEEN_WORDS = re.compile(r"(?<=\S) (?=[^\W\d_])")


def text_end(text: str, count: int, tokenize: Callable[[str], Sized]) -> str:
    """The end of a text with at least `count` tokens, cut between words; the text itself, if it is not much longer.

    Rows keep their last tokens, so this gives the tokens of the whole text. Tokenizing that takes a second or two for
    each megabyte, and 160 to 280 times its bytes (docs/experiments.md, 2026-11-28).

    Args:
        text (`str`): The text.
        count (`int`): Tokens that are needed at least.
        tokenize (`Callable`): Function from a text to its tokens.

    Returns:
        `str`: Also the whole text, if it is nowhere divided by spaces.
    """
    size = CHARACTERS * count
    while size < len(text):
        cut = BETWEEN_WORDS.search(text, len(text) - size)
        if cut is not None and len(tokenize(text[cut.start() :])) >= count:
            return text[cut.start() :]
        size *= 4
    return text


def media_tokens(checked: Any, processor: ProcessorMixin) -> int:
    """Estimated tokens of the images and videos of an input that `check_input` returned."""
    if isinstance(checked, Mapping):
        return _estimate([value for key, value in checked.items() if key != "text"], processor, None, DEPTH)
    parts = [part for message in checked for part in message["content"] if part["type"] != "text"]
    return _estimate(parts, processor, None, DEPTH)


def estimate_tokens(
    item: Any, processor: ProcessorMixin | None = None, tokenize: Callable[[str], Sized] | None = None
) -> int:
    """Estimate the number of tokens of an input. Files are opened to read their size, but not decoded.

    Args:
        item (`Input`): An input of `encode`. Other values count as 0 tokens.
        processor (`ProcessorMixin`, *optional*): The model's processor. If it is that of no supported family,
            images count as in Qwen2-VL.
        tokenize (`Callable`, *optional*): Function from a text to its tokens. Default: one token for three bytes,
            which is rarely too low.

    Returns:
        `int`
    """
    return _estimate(item, processor, tokenize, DEPTH)


def _estimate(
    item: Any,
    processor: ProcessorMixin | None,
    tokenize: Callable[[str], Sized] | None,
    depth: int,
    key: str | None = None,
) -> int:
    """`key`: what the item is, if it stands under `text`, `image` or `video`."""
    if isinstance(item, str) and (key == "text" or (key is None and not names_media(item))):
        return len(tokenize(item)) if tokenize else len(item.encode("utf-8", "replace")) // 3
    if isinstance(item, (str, Path, io.BytesIO)) or (isinstance(item, Mapping) and is_cell(item)):
        return _file_tokens(item, processor, key)
    if isinstance(item, Image.Image):
        return _pixel_tokens(item.size, processor)
    if hasattr(item, "ndim"):  # an array: three axes for an image, four for a video
        if item.ndim < 2 or 0 in item.shape:
            return 0  # refused where it is read
        *_, height, width = item.shape[:-1] if item.shape[-1] in (1, 3, 4) else (1, *item.shape)
        if item.ndim < 4:
            return _pixel_tokens((width, height), processor)
        return -(-item.shape[0] // 2) * _pixel_tokens((width, height), processor, "video_processor")
    if not isinstance(item, (list, tuple, Mapping)) or not depth:
        return 0
    parts: Any = [(key, part) for part in item]
    if isinstance(item, Mapping):
        kind = item.get("type", key)  # of a part of a message, whose content may be under another name
        parts = [
            (name if name in INPUT_KEYS else "text" if name == "content" else kind, value)
            for name, value in item.items()
            if name not in ("role", "type", "video_metadata")
        ]
    return sum(_estimate(part, processor, tokenize, depth - 1, name) for name, part in parts)


def _file_tokens(item: Any, processor: ProcessorMixin | None, key: str | None) -> int:
    """Estimated tokens of a file: a path, an address, or its content."""
    file = item
    if isinstance(item, Mapping):
        file = io.BytesIO(item["bytes"]) if isinstance(item["bytes"], bytes) else str(item["path"])
    named = Path(file).suffix.lower() if isinstance(file, (str, Path)) else ""
    if key != "image" and (named in VIDEO_SUFFIXES or (key == "video" and not is_frame(item))):
        return VIDEO_FRAMES // 2 * _pixel_tokens(None, processor, "video_processor")
    try:
        with Image.open(file) as image:
            return _pixel_tokens(image.size, processor)
    except Exception:  # decoders raise any type; the error belongs to where the image is read
        return _pixel_tokens(None, processor)  # remote, or not an image


def _pixel_tokens(
    size: tuple[int, int] | None, processor: ProcessorMixin | None, kind: str = "image_processor"
) -> int:
    """Tokens of an image, or of two video frames, of this width and height after the processor's resizing.

    Without a size, those of the largest image.
    """
    part: Any = getattr(processor, kind, None)
    if kind == "image_processor" and hasattr(part, "max_image_size"):
        # Tiles of one size and a view of the whole, for an image of any size.
        tiles = math.ceil(part.size["longest_edge"] / part.max_image_size["longest_edge"]) ** 2 + 1
        return tiles * cast(Any, processor).image_seq_len
    if hasattr(getattr(processor, "image_processor", None), "max_patches"):  # tiles; a frame is one
        tiles = 2
        if kind == "image_processor":
            # Beside the tiles of a large image, there is a view of the whole.
            whole = part.max_patches + 1
            tiles = whole if size is None else part.get_number_of_image_patches(*size[::-1], {"crop_to_patches": True})
        return tiles * cast(Any, processor).image_seq_length
    pixels = math.inf if size is None else math.prod(size)
    if hasattr(part, "max_image_tokens"):
        unit, most = (part.encoder_patch_size * part.downsample_factor) ** 2, part.max_image_tokens
        if part.do_image_splitting and pixels > most * unit * part.max_pixels_tolerance:
            # Beside the tiles, there may be a view of the whole.
            layout = (part.min_tiles, part.max_tiles, part.tile_size)
            tiles = part.max_tiles if size is None else part._get_grid_layout(*size[::-1], *layout)[-1]
            return tiles * part.tile_size**2 // unit + part.use_thumbnail * most
        return int(min(max(pixels / unit, part.min_image_tokens), most))
    least, most, side = 56**2, 28**2 * 1280, 28
    if hasattr(part, "merge_size"):
        least, most = part.size["shortest_edge"], part.size["longest_edge"]
        side = part.patch_size * part.merge_size
    return int(min(max(pixels, least), most) // side**2)
