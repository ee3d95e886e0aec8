"""The training rows of the unified benchmark, by source. They depend on nothing but the data and the seed."""

import random

from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as PILImage
from PIL import ImageOps

from benchmarks.unified.inputs import (
    DRAWING,
    books,
    cut,
    describe,
    emoji,
    page,
    pages,
    sprite_clips,
    square,
    strip,
    tint,
    training_clips,
    unstrip,
)
from examples.prepare_emoji import draw, png

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
LANGUAGES = ("en", "de", "fr", "es")
VARIANTS = 24  # augmented copies of a training drawing


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
    for row in training_clips():
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


def prepare(folder, seed=0):
    """Write the sources to `folder` as parquet files, unless they exist."""
    # Folders of older versions hold clips of concepts that a task holds out.
    done, made = folder / "done", f"seed {seed}, no clips of unseen concepts\n"
    if done.exists() and done.read_text() == made:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in training_rows(seed).items():
        kinds = {key: Image() if isinstance(rows[0][key], dict) else Value("string") for key in rows[0]}
        Dataset.from_list(rows, features=Features(kinds)).to_parquet(folder / f"{name}.parquet")
    done.write_text(made)


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
