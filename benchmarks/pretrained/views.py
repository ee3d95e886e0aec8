"""The training pictures of `eyes.py`: what they show, and what the vision tower makes of them.

They are those of the training splits: drawings of all categories, figures of the training books with their captions,
and single frames of training clips, without those of concepts that the drawings hold out.
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

from benchmarks.pretrained import half
from benchmarks.pretrained.tower import SIZES, WHOLE
from benchmarks.unified.inputs import books, cut, emoji, square, training_clips
from btok_hf import BTokSentenceTransformer
from examples.prepare_emoji import draw

SOURCES = ("drawings", "figures", "clips")
VARIANTS = 3  # augmented copies of a drawing, beside the drawing itself


class Picture(NamedTuple):
    """A training picture, also in other drawings of it, what says the same, and what it is about."""

    source: str
    images: list[Image]
    texts: list[tuple[str, str]]  # (kind of the text, text)
    group: str

    @property
    def words(self) -> list[str]:
        """The words of its texts, without the short ones."""
        return sorted({word for _, text in self.texts for word in re.findall(r"[a-z]{3,}", text.casefold())})


def pictures(seed: int = 0) -> list[Picture]:
    """The training pictures. Those of one group are not negatives of each other."""
    rng = random.Random(seed)
    found = []
    for row in emoji(None)["train"]:
        images = [draw(row["image"], None, WHOLE)]
        images += [draw(row["image"], rng, rng.choice(SIZES)) for _ in range(VARIANTS)]
        name = row["names"]["en"]
        texts = [("term", name), ("question", name), ("term", ", ".join(row["keywords"]["en"][:4]))]
        found.append(Picture("drawings", images, [pair for pair in texts if pair[1]], row["emoji"]))
    for row in books("figures", "train"):
        found.append(Picture("figures", [square(row["image"])], [("caption", cut(row["caption"]))], row["id"]))
    for row in training_clips():
        images = [frame.convert("RGB") for frame in (row["frames"][0], row["frames"][len(row["frames"]) // 2])]
        texts = [("term", row["name"]), ("term", ", ".join(row["keywords"][:4]))]
        found.append(Picture("clips", images, texts, row["emoji"]))
    return found


@torch.no_grad()
def tower_states(model: BTokSentenceTransformer, images: list[Image], cache: Path, batch: int = 32) -> Tensor:
    """The tower's states of all images, in bf16, shape `(images, 1 + patches, hidden)`.

    They are kept in a file of the folder `cache`, whose name tells these images of this tower from others.
    """
    tower, processor = model.transformer.model.vision_tower, model.transformer.processor.image_processor
    shape = (len(images), tower.embeddings.position_embeddings.shape[1], tower.config.hidden_size)
    digest = hashlib.sha256()
    for tensor in tower.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
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
        pixels = processor(images[start : start + batch], return_tensors="pt")["pixel_values"].to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half()):
            states[start : start + batch] = tower(pixel_values=pixels).last_hidden_state.cpu()
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
