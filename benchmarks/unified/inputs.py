"""The unified benchmark's inputs: its data as they are read, and what is drawn from them.

The data are `data/emoji` and `benchmarks/unified/data`. Pages are typeset from the text of textbook modules. Motion
clips are made from emoji drawings. So nothing large is stored.

Images have sizes that are multiples of 28 pixels, a token of Qwen2-VL: drawings and frames 56 x 56 (4 tokens), figures
112 x 112 (16), pages 196 x 224 (56).
"""

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from datasets import load_dataset
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont, ImageOps

from benchmarks import ROOT
from btok_hf.media import video_input

CATEGORIES = ("Animals & Nature", "Food & Drink", "Smileys & Emotion")
DRAWING, FIGURE, FRAMES = 56, 112, 4  # pixels a side, pixels a side, frames a clip
WORDS = 32  # longer captions, questions and definitions are cut
# Pages are set in a fixed-width font, each line 28 pixels below the last: a patch of 14 x 14 holds two characters, a
# token four, in reading order.
COLUMNS, LINES, GLYPH, LEADING = 28, 8, (7, 14), 28
TITLE_LINES = 2
BOILERPLATE = "By the end of this section, you will be able to:"
# Each motion and its reversal: the frames of one, backwards, are the other's.
MOTIONS = ("moves left", "moves right", "moves up", "moves down", "grows", "shrinks", "turns left", "turns right")


@cache
def emoji(categories=CATEGORIES):
    """The drawings of the chosen categories (`None`: all), by split."""
    whole = load_dataset(str(ROOT / "data" / "emoji"))
    if categories is not None:
        whole = whole.filter(lambda c: c in categories, input_columns="category")
    return {split: list(part) for split, part in whole.items()}


def books(config, split):
    """One split of a config of `benchmarks/unified/data`."""
    return load_dataset(str(ROOT / "benchmarks" / "unified" / "data"), config, split=split)


def training_clips():
    """The training clips, without those of the held-out concepts of `emoji`: clips have a split of their own."""
    held_out = set(load_dataset(str(ROOT / "data" / "emoji"), split="unseen_concepts")["emoji"])
    return books("clips", "train").filter(lambda concept: concept not in held_out, input_columns="emoji")


def pages(split):
    """One dict a page: module, title, text, and what asks for it."""
    questions = {}
    for row in books("questions", split):
        questions.setdefault(row["module"], []).append(cut(row["question"]))
    for row in books("modules", split):
        text, start = " ".join(row["text"].removeprefix(BOILERPLATE).split()), 0
        parts = []
        while start < len(text) and len(parts) < (4 if split == "train" else 1):
            lines = wrap(text[start : start + COLUMNS * LINES * 2], LINES - TITLE_LINES)
            part = " ".join(lines)
            parts.append(part)
            start += len(part) + 1
        for part in parts:
            asks = {
                "title": [row["title"]],
                "objective": [cut(text) for text in row["objectives"]],
                "question": questions.get(row["id"], []),
            }
            yield {"module": row["id"], "title": row["title"], "text": part, "asks": asks}


def describe(name, keywords):
    """Name and keywords: a target that says more than the name alone."""
    rest = [word for word in keywords if word.casefold() != name.casefold()]
    return f"{name}: {', '.join(rest)}" if rest else name


def cut(text):
    """The first words of a text."""
    return " ".join(text.split()[:WORDS])


def clip(frames):
    """Frames as a video input of the size that training has."""
    frames = np.stack([np.asarray(frame.convert("RGB").resize((DRAWING,) * 2)) for frame in frames])
    return {"video": video_input(frames, fps=2.0)}


def strip(frames):
    """Frames side by side, as they are stored."""
    image = PILImage.new("RGB", (DRAWING * len(frames), DRAWING))
    for index, frame in enumerate(frames):
        image.paste(frame, (DRAWING * index, 0))
    return image


def unstrip(image):
    """The video input of a strip."""
    return clip([image.crop((DRAWING * i, 0, DRAWING * (i + 1), DRAWING)) for i in range(image.width // DRAWING)])


def move(sprite, motion, background=(255, 255, 255)):
    """`FRAMES` frames of a drawing that moves."""
    frames = []
    for t in np.linspace(-1, 1, FRAMES):
        t = -t if motion.split()[1:] in (["left"], ["up"]) or motion == "shrinks" else t
        size, place, angle = 36, (10, 10), 0
        if motion in ("moves left", "moves right"):
            place = (round(10 + 10 * t), 10)
        elif motion in ("moves up", "moves down"):
            place = (10, round(10 + 10 * t))
        elif motion in ("grows", "shrinks"):
            size = round(36 + 16 * t)
            place = ((DRAWING - size) // 2,) * 2
        else:
            angle = -60 * t
        image = sprite.convert("RGBA").rotate(angle, PILImage.Resampling.BILINEAR).resize((size, size))
        frame = PILImage.new("RGB", (DRAWING, DRAWING), background)
        frame.paste(image, place, image.getchannel("A"))
        frames.append(frame)
    return frames


def sprite_clips(row, rng=None):
    """The motions of a drawing with their texts; with `rng`, on a random background."""
    background = (255, 255, 255) if rng is None else tuple(rng.randint(200, 255) for _ in range(3))
    return [(f"{row['names']['en']} {m}", move(row["image"], m, background)) for m in MOTIONS]


def tint(colour):
    """A frame of one colour."""
    return PILImage.new("RGB", (DRAWING, DRAWING), colour)


def square(image):
    """A figure on a white square."""
    return ImageOps.pad(image.convert("RGB"), (FIGURE, FIGURE), color="white")


@cache
def font(bold):
    """A fixed-width font, which matplotlib brings along."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    # The basic layout rounds every advance, to 7 pixels at this size.
    return ImageFont.truetype(
        folder / f"DejaVuSansMono{'-Bold' if bold else ''}.ttf", 11, layout_engine=ImageFont.Layout.BASIC
    )


def wrap(text, limit):
    """Lines of at most `COLUMNS` characters, cut between words (long words inside), at most `limit` lines."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + bool(lines[-1]) > COLUMNS and lines[-1]:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
        while len(lines[-1]) > COLUMNS:
            lines[-1:] = [lines[-1][:COLUMNS], lines[-1][COLUMNS:]]
    return lines[:limit]


def page(title, text):
    """A document page: the title in bold, below it the text."""
    image = PILImage.new("L", (COLUMNS * GLYPH[0], LINES * LEADING), 255)
    canvas = ImageDraw.Draw(image)
    head = wrap(title, TITLE_LINES)
    for row, line in enumerate([*head, *wrap(text, LINES - len(head))]):
        canvas.text((0, row * LEADING + 1), line, fill=0, font=font(row < len(head)))
    return image.convert("RGB")
