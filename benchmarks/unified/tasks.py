"""What the unified benchmark trains on and asks: texts, images, videos and document pages, in one vector space.

    python -m benchmarks.unified.tasks        # lists the sources and the tasks with their sizes

The data are `data/emoji` and `benchmarks/unified/data`. Pages are typeset and motion clips made here, from the text of
textbook modules and from emoji drawings, so that nothing large is stored. Everything follows from the seed.

Images have sizes that are multiples of 28 pixels, a token of Qwen2-VL: drawings and frames 56 x 56 (4 tokens), figures
112 x 112 (16), pages 196 x 224 (56).
"""

import random
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont, ImageOps

ROOT = Path(__file__).resolve().parents[2]
from examples.prepare_emoji import build_base, draw, png

CATEGORIES = ("Animals & Nature", "Food & Drink", "Smileys & Emotion")
LANGUAGES = ("en", "de", "fr", "es")
DRAWING, FIGURE, FRAMES = 56, 112, 4  # pixels a side, pixels a side, frames a clip
WORDS = 32  # longer captions, questions and definitions are cut
VARIANTS = 24  # augmented copies of a training drawing

# Pages are set in a fixed-width font, each line 28 pixels below the last: a patch of 14 x 14 holds two characters, a
# token four, in reading order.
COLUMNS, LINES, GLYPH, LEADING = 28, 8, (7, 14), 28
TITLE_LINES = 2
BOILERPLATE = "By the end of this section, you will be able to:"

# Each motion and its reversal: the frames of one, backwards, are the other's.
MOTION = "motion → video or its reversal"
MOTIONS = ("moves left", "moves right", "moves up", "moves down", "grows", "shrinks", "turns left", "turns right")

# Which side condensation encodes (see `CondensationConfig.condense`), and the weight of each source in the mixture.
CONDENSE = {
    "names": "query",
    "drawings": "none",
    "clips": "query",
    "motion": "query",
    "pages": "query",
    "glossary": "both",
    "figures": "positive",
}
WEIGHTS = {"names": 6, "drawings": 1, "clips": 2, "motion": 1, "pages": 1, "glossary": 1, "figures": 1}


@dataclass
class Task:
    """Queries with one right answer each, among candidates that all queries share (or, per query, a few of them)."""

    name: str
    queries: list
    candidates: list
    right: list  # index of the right candidate of each query
    groups: list  # what the queries are about: those of one group are not independent
    baseline: tuple = None  # texts or images of queries and candidates for the trivial baseline
    choices: list = None  # candidates of each query, where they are not all


def clip(frames):
    """Frames as a video input of the size that training has."""
    return {
        "video": {
            "array": np.stack([np.asarray(frame.convert("RGB").resize((DRAWING,) * 2)) for frame in frames]),
            "video_metadata": {
                "fps": 2.0,
                "total_num_frames": len(frames),
                "duration": len(frames) / 2,
                "frames_indices": list(range(len(frames))),
            },
        }
    }


def strip(frames):
    """Frames side by side, as they are stored."""
    image = PILImage.new("RGB", (DRAWING * len(frames), DRAWING))
    for index, frame in enumerate(frames):
        image.paste(frame, (DRAWING * index, 0))
    return image


def unstrip(image):
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


@cache
def font(bold):
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


def square(image):
    """A figure on a white square."""
    return ImageOps.pad(image.convert("RGB"), (FIGURE, FIGURE), color="white")


def describe(name, keywords):
    """Name and keywords: a target that says more than the name alone."""
    rest = [word for word in keywords if word.casefold() != name.casefold()]
    return f"{name}: {', '.join(rest)}" if rest else name


def cut(text):
    return " ".join(text.split()[:WORDS])


def books(config, split):
    return load_dataset(str(ROOT / "benchmarks" / "unified" / "data"), config, split=split)


@cache
def emoji():
    whole = load_dataset(str(ROOT / "data" / "emoji"))
    return {
        split: [row for row in part if row["category"] in CATEGORIES]
        for split, part in whole.filter(lambda c: c in CATEGORIES, input_columns="category").items()
    }


def sprite_clips(row, rng=None):
    """The motions of a drawing with their texts; with `rng`, one of each pair on a random background."""
    background = (255, 255, 255) if rng is None else tuple(rng.randint(200, 255) for _ in range(3))
    return [(f"{row['names']['en']} {m}", move(row["image"], m, background)) for m in MOTIONS]


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


def training_rows(seed=0):
    """Rows of each source: `query`, `positive`, `target` (the text to generate), `group`."""
    rng = random.Random(seed)
    rows = {name: [] for name in CONDENSE}
    drawings = {}
    for row in emoji()["train"]:
        drawings.setdefault(row["emoji"], []).append(row)
    for parts in drawings.values():
        for row in parts:
            english = describe(row["names"]["en"], row["keywords"]["en"])
            for _ in range(VARIANTS):
                language = rng.choice(LANGUAGES)
                text = row["names"][language]
                if rng.random() < 0.25 and row["keywords"][language]:
                    text = ", ".join(rng.sample(row["keywords"][language], min(4, len(row["keywords"][language]))))
                image = png(draw(row["image"], rng, DRAWING))
                rows["names"].append({"query": text, "positive": image, "target": english, "group": row["emoji"]})
            texts = sprite_clips(row, rng)
            for text, frames in rng.sample(texts, 4):
                rows["motion"].append({"query": text, "positive": png(strip(frames)), "target": text, "group": None})
        for _ in range(VARIANTS // 2):
            first, second = rng.sample(parts, 2) if len(parts) == 2 else parts * 2
            first, second = (png(draw(part["image"], rng, DRAWING)) for part in (first, second))
            rows["drawings"].append({"query": first, "positive": second, "target": None, "group": parts[0]["emoji"]})
    for row in books("clips", "train"):
        target = describe(row["name"], row["keywords"])
        for _ in range(8):
            background = tuple(rng.randint(160, 255) for _ in range(3))
            mirrored, state = rng.random() < 0.5, rng.random()
            frames = [ImageOps.mirror(frame) if mirrored else frame for frame in row["frames"]]
            frames = [
                PILImage.blend(frame.convert("RGB").resize((DRAWING,) * 2), tint(background), 0.3 * state)
                for frame in frames
            ]
            text = row["name"] if rng.random() < 0.75 else ", ".join(row["keywords"][:4])
            rows["clips"].append(
                {"query": text, "positive": png(strip(frames)), "target": target, "group": row["emoji"]}
            )
    for part in pages("train"):
        asks = part["asks"]
        image, target = png(page(part["title"], part["text"])), f"{part['title']}. {part['text']}"
        texts = asks["title"] + rng.sample(asks["objective"], min(1, len(asks["objective"])))
        texts += rng.sample(asks["question"], min(3, len(asks["question"])))
        for text in texts:
            rows["pages"].append({"query": text, "positive": image, "target": target, "group": part["module"]})
    for row in books("glossary", "train"):
        rows["glossary"].append(
            {"query": row["term"], "positive": cut(row["definition"]), "target": None, "group": row["term"].casefold()}
        )
    for row in books("figures", "train"):
        rows["figures"].append(
            {
                "query": png(square(row["image"])),
                "positive": cut(row["caption"]),
                "target": cut(row["caption"]),
                "group": None,
            }
        )
    return rows


def tint(colour):
    return PILImage.new("RGB", (DRAWING, DRAWING), colour)


def prepare(folder, seed=0):
    """Write the sources to `folder` as parquet files, unless they are there."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in training_rows(seed).items():
        kinds = {key: Image() if isinstance(rows[0][key], dict) else Value("string") for key in rows[0]}
        Dataset.from_list(rows, features=Features(kinds)).to_parquet(folder / f"{name}.parquet")
    (folder / "done").write_text(f"seed {seed}\n")


def training_sets(folder):
    """The prepared sources as datasets; strips of frames become videos when a row is read."""
    sets = {}
    for name in CONDENSE:
        part = load_dataset("parquet", data_files=str(folder / f"{name}.parquet"), split="train")
        part = part.remove_columns([column for column in ("target", "group") if part[0][column] is None])
        if name in ("clips", "motion"):
            part.set_transform(lambda batch: {**batch, "positive": [unstrip(image) for image in batch["positive"]]})
        sets[name] = part
    return sets


@cache
def tasks():
    """All tasks, by name."""
    seen, unseen, strange = (emoji()[split] for split in ("train", "unseen_drawings", "unseen_concepts"))
    held_out = {row["emoji"]: row for row in unseen}
    # One drawing of every concept: the unseen one, or else a training drawing as a distractor.
    pool = list(unseen) + list({row["emoji"]: row for row in seen if row["emoji"] not in held_out}.values())
    pictures = [draw(row["image"], size=DRAWING) for row in pool]
    concepts = [row["emoji"] for row in unseen]
    own = list(range(len(unseen)))
    other = [row for row in seen if row["emoji"] in held_out]
    names = [row["names"]["en"] for row in pool]
    foreign = [(language, index) for language in LANGUAGES[1:] for index in own]
    found = [
        Task("name → drawing", names[: len(own)], pictures, own, concepts),
        Task(
            "name in de, fr, es → drawing",
            [unseen[index]["names"][language] for language, index in foreign],
            pictures,
            [index for _, index in foreign],
            [concepts[index] for _, index in foreign],
        ),
        Task("drawing → name", pictures[: len(own)], names, own, concepts),
        Task(
            "drawing → other artist's",
            [draw(row["image"], size=DRAWING) for row in other],
            pictures,
            [concepts.index(row["emoji"]) for row in other],
            [row["emoji"] for row in other],
            ([draw(row["image"], size=DRAWING) for row in other], pictures),
        ),
    ]
    new = list({row["emoji"]: row for row in strange}.values())
    # Names of concepts that training never saw, among all drawings: only words shared with others can help.
    found.append(
        Task(
            "name of an unseen concept → drawing",
            [row["names"]["en"] for row in new],
            [draw(row["image"], size=DRAWING) for row in new] + pictures,
            list(range(len(new))),
            [row["emoji"] for row in new],
        )
    )
    clips = list(books("clips", "test"))
    videos = [clip(row["frames"]) for row in clips]
    every = range(len(clips))
    found.append(Task("name → video", [r["name"] for r in clips], videos, list(every), [r["emoji"] for r in clips]))
    motions = [(row["emoji"], text, frames) for row in unseen for text, frames in sprite_clips(row)]
    found.append(
        Task(
            MOTION,
            [text for _, text, _ in motions],
            [clip(frames) for _, _, frames in motions],
            list(range(len(motions))),
            [concept for concept, _, _ in motions],
            choices=[(index, index ^ 1) for index in range(len(motions))],
        )
    )
    sheets = list(pages("test"))
    images = [page(sheet["title"], sheet["text"]) for sheet in sheets]
    for kind in ("title", "question"):
        asked = [(text, index) for index, sheet in enumerate(sheets) for text in sheet["asks"][kind][:3]]
        texts = [text for text, _ in asked]
        readable = [f"{sheet['title']} {sheet['text']}" for sheet in sheets]
        found.append(
            Task(
                f"{kind} → page",
                texts,
                images,
                [index for _, index in asked],
                [sheets[index]["module"] for _, index in asked],
                (texts, readable),
            )
        )
    terms = {cut(row["definition"]).casefold(): row for row in books("glossary", "test")}
    terms = list({row["term"].casefold(): row for row in terms.values()}.values())
    queries, answers = [row["term"] for row in terms], [cut(row["definition"]) for row in terms]
    modules = [row["module"] for row in terms]
    found.append(
        Task("term → definition", queries, answers, list(range(len(terms))), modules, (queries, answers)),
    )
    figures = list({cut(row["caption"]): row for row in books("figures", "test")}.values())
    images, captions = [square(row["image"]) for row in figures], [cut(row["caption"]) for row in figures]
    each, modules = list(range(len(figures))), [row["module"] for row in figures]
    found.append(Task("figure → caption", images, captions, each, modules))
    found.append(Task("caption → figure", captions, images, each, modules))
    return {task.name: task for task in found}


def score(name, ranks):
    """The score of each query, in percent."""
    ranks = np.asarray(ranks)
    return 100.0 * (ranks == 1) if name == MOTION else 100.0 / ranks


def chance(task):
    """The expected score of a random order."""
    if task.choices is not None:
        return 100 / len(task.choices[0])
    return 100 * np.mean(1 / np.arange(1, len(task.candidates) + 1))


if __name__ == "__main__":
    for name, rows in training_rows().items():
        size = sum(len(row[key]["bytes"]) for row in rows for key in row if isinstance(row[key], dict))
        print(f"{name:40} {len(rows):6,} rows {size / 1e6:6.1f} MB")
    for task in tasks().values():
        print(f"{task.name:40} {len(task.queries):6,} queries {len(task.candidates):6,} candidates")
