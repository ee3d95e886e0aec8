"""Tokens of inputs, estimated without decoding them, texts that are far too long, and the words that end rows."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any, cast

from PIL import Image
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from btok_hf.backbones import family_of_processor
from btok_hf.input_kinds import INPUT_KEYS, is_cell, is_frame, names_media
from btok_hf.media import VIDEO_FRAMES, VIDEO_SUFFIXES

# Deepest nesting in an input: messages, parts, video, frames. What is deeper counts as 0 tokens and is refused later.
DEPTH = 8
# Characters per token that the first attempt of `text_end` keeps. English text has four or five.
CHARACTERS = 8
# A space between a word and a letter. The tokenizers of all families split texts there before they merge characters.
BETWEEN_WORDS = re.compile(r"(?<=\S) (?=[^\W\d_])")


def suffix_ids(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> list[int]:
    """The tokens of the words that stand between the content and the Bottleneck Tokens of every row; often none."""
    suffix = getattr(config, "btok_suffix", None)
    return tokenizer.encode(f" {suffix}", add_special_tokens=False) if suffix else []


def text_end(text: str, count: int, tokenize: Callable[[str], Sized]) -> str:
    """The end of a text with at least `count` tokens, cut between words; the text itself, if it is not much longer.

    A row keeps its last tokens, so the end of the text gives the same row as the whole text. Tokenizing a whole text
    takes one to two seconds per megabyte, and memory of 160 to 280 times its size (docs/experiments.md, 2026-11-28).

    Args:
        text (`str`): The text.
        count (`int`): Least number of tokens.
        tokenize (`Callable`): Function from a text to its tokens.

    Returns:
        `str`: The whole text, if no space divides it.
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
    """`key`: the key of the dict that the item is the value of: `text`, `image`, `video` or none of them."""
    if isinstance(item, str) and (key == "text" or (key is None and not names_media(item))):
        return len(tokenize(item)) if tokenize else len(item.encode("utf-8", "replace")) // 3
    if isinstance(item, (str, Path, io.BytesIO)) or (isinstance(item, Mapping) and is_cell(item)):
        return _file_tokens(item, processor, key)
    if isinstance(item, Image.Image):
        return _image_tokens(item.size, processor)
    if hasattr(item, "ndim"):  # an array: three axes for an image, four for a video
        if item.ndim < 2 or 0 in item.shape:
            return 0  # refused where it is read
        *_, height, width = item.shape[:-1] if item.shape[-1] in (1, 3, 4) else (1, *item.shape)
        if item.ndim < 4:
            return _image_tokens((width, height), processor)
        return -(-item.shape[0] // 2) * _frame_tokens((width, height), processor)
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
        return VIDEO_FRAMES // 2 * _frame_tokens(None, processor)
    try:
        with Image.open(file) as image:
            return _image_tokens(image.size, processor)
    except Exception:  # decoders raise any type; the error belongs to where the image is read
        return _image_tokens(None, processor)  # remote, or not an image


def _image_tokens(size: tuple[int, int] | None, processor: ProcessorMixin | None) -> int:
    """Tokens of an image of this width and height; without a size, those of the largest one."""
    family = family_of_processor(processor)
    return _default_tokens(size) if family is None else family.image_tokens(cast(Any, processor), size)


def _frame_tokens(size: tuple[int, int] | None, processor: ProcessorMixin | None) -> int:
    """Tokens of two frames of a video, which Qwen-VL merges."""
    family = family_of_processor(processor)
    return _default_tokens(size) if family is None else family.frame_tokens(cast(Any, processor), size)


def _default_tokens(size: tuple[int, int] | None) -> int:
    """Tokens of an image with the default settings of Qwen2-VL."""
    pixels = math.inf if size is None else math.prod(size)
    return int(min(max(pixels, 56**2), 28**2 * 1280) // 28**2)
