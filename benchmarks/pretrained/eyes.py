"""Let the pretrained model see: train the projector between its vision tower and its language model.

    python -m benchmarks.pretrained.eyes --model runs/pretrained/btok-condensation-all-s0/model

Everything but the projector is frozen, so texts keep their vectors (locked-image tuning, arXiv 2111.07991, with the
texts locked instead). A picture is pulled to the vectors of its name or caption, away from those of all other training
texts, which are computed once; and condensation has the language model say the name from the Bottleneck Tokens alone.
The tower's states of all training pictures are computed once, too: half an hour on one core, 3 GB.

Pictures and texts are those of the training splits: drawings of all categories, figures of the training books with
their captions and alternative texts, single frames of training clips, and typeset pages and definitions, whose texts
are what is printed on them.
"""

import argparse
import hashlib
import math
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch
from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks import ROOT
from benchmarks.pretrained.run import KINDS, PICTURE
from benchmarks.unified.inputs import books, cut, emoji, page, pages, square
from btok_hf import BTokSentenceTransformer
from btok_hf.condensation import condense
from btok_hf.features import IGNORED
from examples.prepare_emoji import draw

VARIANTS = 1  # augmented copies of a drawing, beside the drawing itself
SIZES = (56, 72, 96)  # pixels of a drawing before it is enlarged to a tile
SHARES = {"drawings": 0.4, "figures": 0.25, "clips": 0.05, "pages": 0.15, "definitions": 0.15}  # of a batch
PAGES, DEFINITIONS = 2500, 3000
TARGET_TOKENS = 16
TEMPERATURE = 0.05  # of the text training


class Picture(NamedTuple):
    """A training picture: how often it was drawn, what says the same, and what it is about."""

    source: str
    images: list[Image]
    texts: list[tuple[str, str]]  # (kind of the text, text)
    group: str


def pictures(seed: int = 0) -> list[Picture]:
    """The training pictures. Those of one group are not negatives of each other."""
    rng = random.Random(seed)
    found = []
    for row in emoji(None)["train"]:
        images = [draw(row["image"], None, SIZES[-1])]
        images += [draw(row["image"], rng, rng.choice(SIZES)) for _ in range(VARIANTS)]
        texts = [("term", row["names"]["en"]), ("term", ", ".join(row["keywords"]["en"][:4]))]
        found.append(Picture("drawings", images, [pair for pair in texts if pair[1]], row["emoji"]))
    for row in books("figures", "train"):
        texts = [("caption", cut(row["caption"]))] + ([("caption", cut(row["alt"]))] if row["alt"] else [])
        found.append(Picture("figures", [square(row["image"])], texts, row["id"]))
    for row in books("clips", "train"):
        images = [frame.convert("RGB") for frame in (row["frames"][0], row["frames"][len(row["frames"]) // 2])]
        texts = [("term", row["name"]), ("term", ", ".join(row["keywords"][:4]))]
        found.append(Picture("clips", images, texts, row["emoji"]))
    for sheet in rng.sample(list(pages("train")), PAGES):
        whole = f"{sheet['title']}. {sheet['text']}"
        texts = [("text", whole), ("title", sheet["title"])]
        found.append(Picture("pages", [page(sheet["title"], sheet["text"])], texts, sheet["module"]))
    terms = {cut(row["definition"]): row["term"] for row in books("glossary", "train")}
    for definition, term in rng.sample(sorted(terms.items()), DEFINITIONS):
        texts = [("definition", definition), ("term", term)]
        found.append(Picture("definitions", [page("", definition)], texts, term.casefold()))
    return found


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


def targets(tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and labels of texts, as the collator of the library makes them."""
    prompt = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    rows = [
        [*tokenizer(text, add_special_tokens=False)["input_ids"][:TARGET_TOKENS], tokenizer.eos_token_id]
        for text in texts
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([prompt + row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    labels = torch.tensor([[IGNORED] * len(prompt) + row + [IGNORED] * (longest - len(row)) for row in rows])
    return ids, labels


def info_nce(images: Tensor, texts: Tensor, bank: Tensor, of_image: Tensor, of_bank: Tensor) -> Tensor:
    """Both directions, in nats. Images find their text among all texts of `bank`, texts their image in the batch.

    `of_image` and `of_bank` number the groups; others of the own group are no negatives.
    """
    own = (images * texts).sum(1, keepdim=True)
    others = (images @ bank.T).masked_fill(of_image[:, None] == of_bank, -torch.inf)
    forth = torch.cat([own, others], 1) / TEMPERATURE
    back = (texts @ images.T).masked_fill(
        (of_image[:, None] == of_image) & ~torch.eye(len(images), dtype=torch.bool), -torch.inf
    )
    first = torch.zeros(len(images), dtype=torch.long)
    return (F.cross_entropy(forth, first) + F.cross_entropy(back / TEMPERATURE, torch.arange(len(images)))) / 2


def train(model: BTokSentenceTransformer, options: argparse.Namespace) -> list[dict[str, float]]:
    """Train the projector of `model` in place and save it. Returns the losses of each step."""
    kinds = {PICTURE, *(kind for pair in KINDS.values() for kind in pair)}
    if not kinds <= model.prompts.keys():
        raise ValueError(
            f"The model must have the prompts that run.py gives it, got {', '.join(model.prompts) or 'none'}. Train "
            "it with python -m benchmarks.pretrained.run --save."
        )
    found = pictures()
    states = tower_states(model, [image for part in found for image in part.images], options.cache)
    first = torch.tensor([0, *(len(part.images) for part in found)]).cumsum(0)
    group = {name: number for number, name in enumerate(dict.fromkeys(part.group for part in found))}
    said = list(dict.fromkeys((*pair, group[part.group]) for part in found for pair in part.texts))
    place = {entry: index for index, entry in enumerate(said)}
    of_bank = torch.tensor([entry[2] for entry in said])
    bank = torch.empty(len(said), model.get_embedding_dimension())
    with torch.autocast("cpu", torch.bfloat16):
        for kind in sorted({entry[0] for entry in said}):
            rows = [index for index, entry in enumerate(said) if entry[0] == kind]
            texts = [{"text": said[index][1]} for index in rows]
            vectors = model.encode(texts, prompt_name=kind, batch_size=128, convert_to_tensor=True)
            bank[rows] = vectors.float()
    print(f"{len(found)} pictures, {len(states)} drawings of them, {len(said)} texts", flush=True)
    backbone = model.transformer.model
    model.requires_grad_(False)
    backbone.multi_modal_projector.requires_grad_(True)
    tower, backbone.vision_tower = backbone.vision_tower, Recorded()
    row = model.preprocess([found[0].images[0]], prompt=model.prompts[PICTURE])["input_ids"]
    parameters = list(backbone.multi_modal_projector.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=options.steps, pct_start=0.05, anneal_strategy="cos"
    )
    rng, started = random.Random(options.seed), time.perf_counter()
    by_source = {name: [i for i, part in enumerate(found) if part.source == name] for name in SHARES}
    log: list[dict[str, float]] = []
    for step in range(options.steps):
        chosen: dict[str, int] = {}  # one of each group
        while len(chosen) < options.batch:
            [source] = rng.choices(list(SHARES), list(SHARES.values()))
            index = rng.choice(by_source[source])
            chosen[found[index].group] = index
        parts = [found[index] for index in chosen.values()]
        pairs = [rng.choice(part.texts) for part in parts]
        pixels = torch.stack([states[first[i] + rng.randrange(len(found[i].images))] for i in chosen.values()])
        of_image = torch.tensor([group[name] for name in chosen])
        texts = bank[[place[*pair, group[part.group]] for pair, part in zip(pairs, parts)]]
        ids, labels = targets(model.tokenizer, [part.texts[0][1] for part in parts])
        inputs = {"input_ids": row.expand(len(parts), -1), "pixel_values": pixels.float()}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.autocast("cpu", torch.bfloat16):
            condensed = condense(backbone, inputs, ids, labels)
        losses = {
            "infonce": info_nce(condensed.embeddings, texts, bank, of_image, of_bank),
            "condensation": condensed.token_losses.mean(),
        }
        (losses["infonce"] + options.weight * losses["condensation"]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        log.append({key: loss.item() for key, loss in losses.items()})
        if step % 10 == 9 or step == 0:
            recent = log[-10:]
            line = ", ".join(f"{key} {sum(entry[key] for entry in recent) / len(recent):.2f}" for key in losses)
            print(f"step {step + 1} of {options.steps}: {line}; {time.perf_counter() - started:.0f} s", flush=True)
        if step % 100 == 99 or step == options.steps - 1:
            options.output.mkdir(parents=True, exist_ok=True)
            projector = {name: tensor.clone() for name, tensor in backbone.multi_modal_projector.state_dict().items()}
            save_file(projector, options.output / "projector.safetensors")
    backbone.vision_tower = tower
    return log


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The options of a training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a trained model: a folder that a run exported")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight", type=float, default=0.5, help="of condensation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "pretrained" / "eyes")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "pretrained" / "eyes")
    return parser.parse_args(words)


def main() -> None:
    options = arguments()
    model = BTokSentenceTransformer(str(options.model), device="cpu")
    train(model, options)


if __name__ == "__main__":
    main()
