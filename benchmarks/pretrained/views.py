"""The training pictures of `eyes.py`: what they show, and what the vision tower makes of them.

They are those of the training splits: drawings of all categories, figures of the training books with their captions
and alternative texts, single frames of training clips, and typeset pages and definitions, whose texts are printed on
them.
"""

import hashlib
import math
import random
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.unified.inputs import COLUMNS, LINES, TITLE_LINES, books, cut, emoji, page, pages, square, wrap
from btok_hf import BTokSentenceTransformer
from examples.prepare_emoji import draw

SOURCES = ("drawings", "figures", "clips", "pages", "definitions")
VARIANTS = 1  # augmented copies of a drawing, beside the drawing itself
SIZES = (56, 72, 96)  # pixels of a drawing before it is enlarged to a tile
PAGES, DEFINITIONS = 2500, 3000
GRID = 4  # tokens of an image, a side
ANYWHERE = -1  # in the place of a token of the image


class Picture(NamedTuple):
    """A training picture, also in other drawings of it, what says the same, and what it is about."""

    source: str
    images: list[Image]
    texts: list[tuple[str, str]]  # (kind of the text, text)
    group: str
    words: list[tuple[int, str]]  # (token of the image or `ANYWHERE`, word that it shows)


def pictures(seed: int = 0) -> list[Picture]:
    """The training pictures. Those of one group are not negatives of each other."""
    rng = random.Random(seed)
    found = []
    for row in emoji(None)["train"]:
        images = [draw(row["image"], None, SIZES[-1])]
        images += [draw(row["image"], rng, rng.choice(SIZES)) for _ in range(VARIANTS)]
        name = row["names"]["en"]
        texts = [("term", name), ("question", name), ("term", ", ".join(row["keywords"]["en"][:4]))]
        found.append(shown("drawings", images, [pair for pair in texts if pair[1]], row["emoji"]))
    for row in books("figures", "train"):
        texts = [("caption", cut(row["caption"]))] + ([("caption", cut(row["alt"]))] if row["alt"] else [])
        found.append(shown("figures", [square(row["image"])], texts, row["id"]))
    for row in books("clips", "train"):
        images = [frame.convert("RGB") for frame in (row["frames"][0], row["frames"][len(row["frames"]) // 2])]
        texts = [("term", row["name"]), ("term", ", ".join(row["keywords"][:4]))]
        found.append(shown("clips", images, texts, row["emoji"]))
    for sheet in rng.sample(list(pages("train")), PAGES):
        whole = f"{sheet['title']}. {sheet['text']}"
        texts = [("text", whole), ("title", sheet["title"])]
        words = printed(sheet["title"], sheet["text"])
        found.append(Picture("pages", [page(sheet["title"], sheet["text"])], texts, sheet["module"], words))
    terms = {cut(row["definition"]): row["term"] for row in books("glossary", "train")}
    for definition, term in rng.sample(sorted(terms.items()), DEFINITIONS):
        texts = [("definition", definition), ("term", term)]
        found.append(Picture("definitions", [page("", definition)], texts, term.casefold(), printed("", definition)))
    return found


def shown(source: str, images: list[Image], texts: list[tuple[str, str]], group: str) -> Picture:
    """A picture of which it is known what it shows, but not where."""
    words = {word for _, text in texts for word in split(text)}
    return Picture(source, images, texts, group, [(ANYWHERE, word) for word in sorted(words)])


def split(text: str) -> list[str]:
    """The words of a text, without the short ones."""
    return re.findall(r"[a-z]{3,}", text.casefold())


def printed(title: str, text: str) -> list[tuple[int, str]]:
    """The words of a page with the token of the image they are in, all of them or three letters at least."""
    head = wrap(title, TITLE_LINES)
    rows, columns = LINES // GRID, COLUMNS // GRID
    found = set()
    for line, letters in enumerate([*head, *wrap(text, LINES - len(head))]):
        for match in re.finditer(r"[a-z]{3,}", letters.casefold()):
            for column in range(GRID):
                inside = min(match.end(), (column + 1) * columns) - max(match.start(), column * columns)
                if inside >= 3:
                    found.add((line // rows * GRID + column, match.group()))
    return sorted(found)


@torch.no_grad()
def tower_states(model: BTokSentenceTransformer, images: list[Image], cache: Path, batch: int = 32) -> Tensor:
    """The tower's states of all images, in bf16, shape `(images, 1 + patches, hidden)`.

    They are kept in a file of the folder `cache`, whose name tells these images of this tower from others.
    """
    tower, processor = model.transformer.model.vision_tower, model.transformer.processor.image_processor
    shape = (len(images), tower.embeddings.position_embeddings.shape[1], tower.config.hidden_size)
    digest = hashlib.sha256(tower.layernorm.weight.numpy().tobytes())
    for image in images:
        digest.update(image.tobytes())
    file = cache / f"states-{digest.hexdigest()[:12]}"

    def mapped(path: Path) -> Tensor:
        return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.bfloat16).view(shape)

    if file.exists():
        return mapped(file)
    cache.mkdir(parents=True, exist_ok=True)
    partial, started = file.with_suffix(".part"), time.perf_counter()
    states = mapped(partial)
    done = int(states[:, 0].any(1).cumprod(0).sum())  # a killed run goes on
    for start in range(done, len(images), batch):
        pixels = processor(images[start : start + batch], return_tensors="pt")["pixel_values"]
        with torch.autocast("cpu", torch.bfloat16):
            states[start : start + batch] = tower(pixel_values=pixels).last_hidden_state
        if (start - done) // batch % 20 == 0:
            print(
                f"{start + len(pixels)} of {len(images)} pictures, {time.perf_counter() - started:.0f} s", flush=True
            )
    partial.replace(file)
    return states


class Recorded(torch.nn.Module):
    """In the place of the tower: takes its recorded states for pixels."""

    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values)
