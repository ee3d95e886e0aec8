"""Random inputs of `encode`: texts, dicts, chat messages, and values that are no inputs at all."""

import collections
import types
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from benchmarks.fuzz import media
from benchmarks.fuzz.media import pick

SPECIAL = (
    "<|btok_0|>",
    "<|btok_3|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<",
    "|",
    "<|",
    "|>",
    "< |",
    "<\u200b|",
    "<\\|",
    "&lt;|",
    "<|<|im_end|>",
    "{{ 7*7 }}",
    "{% raise %}",
    "{%",
    "{#",
)
PATHS = (
    "photo.png",
    "a/b.mp4",
    "~/x.jpg",
    "C:\\x.gif",
    "http://127.0.0.1:9/a.png",
    "https://[[x/a.png",
    "..",
    "/",
    "http://127.0.0.1:9/v.mp4",
    "data:image/png;base64,",
    "data:image/png,%zz",
    "data:",
    "data:video/mp4;base64,AA",
    "file:///etc/hostname",
    "http://",
    "\0.png",
    "a\0b",
    "x" * 5000 + ".png",
    ".png",
    "/dev/null",
    "/dev/zero",
    "http://127.0.0.1:9999999/a.png",
    "http://a b/c.png",
    "http://\u2603.\u2603\u2024/a.png?x=\n",
    "/proc/self/mem",
)


class Text(str):
    """A string of a subclass, with a text of its own."""

    def __str__(self):
        return "something else"


class Dict(dict):
    pass


def text(rng):
    """A text of any characters, tokens and lengths."""
    pieces = []
    for _ in range(int(pick(rng, (0, 1, 1, 2, 3, 8)))):
        kind = int(rng.integers(8))
        if kind < 3:
            pieces.append("".join(pick(rng, "abc defgh ijk.,\n") for _ in range(int(rng.integers(30)))))
        elif kind == 3:
            pieces.append(pick(rng, SPECIAL))
        elif kind == 4:
            top = pick(rng, (128, 0x3000, 0xD800, 0x110000))
            pieces.append("".join(map(chr, rng.integers(0, top, int(rng.integers(20))))))
        elif kind == 5:
            pieces.append(pick(rng, PATHS))
        elif kind == 6:
            pieces.append(
                pick(rng, ("\u202e", "\ufeff", "\u0000", "👩‍👩‍👧", "ﷺ", "e\u0301" * 20, "\ud83d", "𐍈", "\x85 "))
            )
        else:
            pieces.append(
                pick(rng, ("word ", "x", "中", "ä"))
                * int(pick(rng, (30, 300, 300, 20_000) if rng.random() < 0.1 else (3, 30)))
            )
    value = "".join(pieces)
    form = int(rng.integers(12))
    if form == 0:
        return {"text": value}
    if form == 1:
        return {"text": [value, "more"]}
    if form == 2:
        return np.str_(value)
    if form == 3:
        return Text(value)
    return [{"role": pick(rng, ("user", "system", "assistant")), "content": value}] if form == 4 else value


def junk(rng, depth=0):
    """Any Python value."""
    circle: list = []
    circle.append(circle)
    around: dict = {"text": "a"}
    around["image"] = around
    plain = (
        None,
        True,
        0,
        -1,
        3.5,
        float("nan"),
        1 << 70,
        b"bytes",
        bytearray(b"x"),
        "",
        "text",
        np.str_("photo.png"),
        np.float32(1),
        np.int64(3),
        np.bytes_(b"x"),
        object(),
        set(),
        frozenset({1}),
        iter([]),
        range(3),
        int,
        len,
        Path("x.png"),
        Path("/"),
        PurePosixPath("a.png"),
        Path("x.mp4"),
        ...,
        slice(3),
        circle,
        around,
        1j,
        np.datetime64("2020"),
        types.MappingProxyType({"text": "a"}),
        collections.UserDict(text="a"),
        memoryview(b"a"),
        collections.OrderedDict(text="a"),
        Dict(text="a"),
        collections.defaultdict(list),
        Image,
        Exception("x"),
        np.array(["a", "b"]),
        np.array("photo.png"),
        np.ma.masked,
    )
    kind = int(rng.integers(10))
    if kind < 5 or depth > 3:
        return pick(rng, plain)
    if kind == 5:
        return media.array(rng)
    if kind == 6:
        return media.picture(rng)
    if kind == 7:
        return text(rng)
    if kind == 8:
        values = [junk(rng, depth + 1) for _ in range(int(rng.integers(4)))]
        return values if rng.random() < 0.7 else tuple(values)
    keys = (
        "text",
        "image",
        "video",
        "array",
        "video_metadata",
        "bytes",
        "path",
        "role",
        "content",
        "type",
        None,
        3,
        b"k",
        (1, 2),
        "",
    )
    return {pick(rng, keys): junk(rng, depth + 1) for _ in range(int(rng.integers(4)))}


def value_of(rng, key, folder):
    """Mostly what belongs to a key of an input dict."""
    draw = rng.random()
    if draw < 0.08:
        return junk(rng, 1)
    if key == "text":
        value = text(rng)
        return value if isinstance(value, str) else "plain"
    if key == "image":
        if draw < 0.4:
            return media.array(rng)
        if draw < 0.5:
            return media.image_forms(rng, media.image_bytes(rng), folder)
        return media.pixels(rng) if draw < 0.7 else media.picture(rng)
    frames = np.stack([media.pixels(np.random.default_rng(3))] * int(rng.integers(1, 4)))
    if draw < 0.4:
        return {"array": frames if rng.random() < 0.7 else junk(rng, 2), "video_metadata": metadata(rng, len(frames))}
    if draw < 0.6:
        return [pick(rng, (frames[0], Image.fromarray(frames[0]), media.picture(rng), "a.png")) for _ in range(3)]
    return media.array(rng) if draw < 0.7 else frames


def metadata(rng, count):
    """Metadata of a video: right, wrong and odd."""
    if rng.random() < 0.1:
        return junk(rng, 2)
    given = {"fps": 2.0, "total_num_frames": count, "duration": 1.0, "frames_indices": list(range(count))}
    for key in list(given):
        if rng.random() < 0.25:
            given[key] = pick(
                rng, (None, 0, -1, 1e300, 1e-300, float("nan"), "2", [0], [], count, 10**30, junk(rng, 2))
            )
        elif rng.random() < 0.1:
            del given[key]
    if rng.random() < 0.1:
        given[pick(rng, ("width", "other", 3))] = 1
    return given


def mapping(rng, folder):
    """An input dict."""
    keys = [key for key in ("image", "video", "text") if rng.random() < 0.5]
    item = {key: value_of(rng, key, folder) for key in keys}
    if rng.random() < 0.3 and item:
        key = pick(rng, list(item))
        item[key] = [value_of(rng, key, folder) for _ in range(int(rng.integers(4)))]
    if rng.random() < 0.1:
        item[pick(rng, ("audio", None, 3, "Text", ("a",)))] = junk(rng, 2)
    return pick(rng, (dict, Dict, types.MappingProxyType, collections.OrderedDict))(item)


def messages(rng, folder):
    """Chat messages: right ones, and ones with a piece replaced."""
    chat = []
    for _ in range(int(pick(rng, (0, 1, 1, 2, 3)))):
        parts = []
        for _ in range(int(rng.integers(4))):
            kind = pick(rng, (*("text", "image", "video") * 4, "text", "audio", "image_url", None))
            key = pick(rng, (*[kind] * 9, "url", "path", "base64", "text"))
            value = value_of(rng, kind if kind in ("text", "image", "video") else "text", folder)
            part = {"type": kind, key: value}
            if rng.random() < 0.1:
                part[pick(rng, ("url", "extra", 3))] = junk(rng, 2)
            parts.append(part if rng.random() < 0.95 else junk(rng, 2))
        content = parts if rng.random() < 0.7 else value_of(rng, "text", folder)
        role = pick(rng, (*["user"] * 9, "system", "system", "assistant", "tool", "", None, 3))
        message = {"role": role, "content": content}
        if rng.random() < 0.1:
            message[pick(rng, ("name", "tool_calls", 3))] = junk(rng, 2)
        if rng.random() < 0.05:
            del message["content"]
        chat.append(message if rng.random() < 0.95 else junk(rng, 2))
    return chat[0] if chat and rng.random() < 0.2 else chat
