"""Teach the vision tower: drawings to the vectors of their names, without the language model.

    python -m benchmarks.pretrained.tower --model runs/pretrained/btok-condensation-all-s0/model

40 minutes on two cores, before `eyes.py`. The model is one that `run.py` exported: the tower of `runs/btok-135m` has
learned this already, and factors that are trained on it do not fit another.

LoRA on all matrices of the tower and a linear head bring every drawing to the vectors of its name and of its keywords,
away from those of all other training drawings. The texts stay what they are (locked-image tuning, arXiv 2111.07991,
with the texts locked instead). The head is thrown away.

Printed on the way: mean reciprocal ranks in percent, of names among drawings and among concepts that training leaves
out. Their categories are those that the tasks of `pictures.py` leave out.
"""

import argparse
import random
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import ROOT
from benchmarks.pretrained import half
from benchmarks.pretrained.tasks import positions
from benchmarks.unified.inputs import CATEGORIES, emoji
from btok_hf import BTokSentenceTransformer
from examples.prepare_emoji import draw

SIZES = (48, 56, 72, 96, 112)  # pixels of a drawing before it is enlarged to a tile
WHOLE = 96  # of one that is not changed otherwise
MATRICES = ["q_proj", "k_proj", "v_proj", "projection_layer", "fc1", "fc2"]
TEMPERATURE = 0.07
WEIGHTS = "tower.safetensors"


@torch.no_grad()
def text_vectors(model: BTokSentenceTransformer, texts: list[tuple[str, str]]) -> Tensor:
    """The vectors of (kind, text), in fp32 on the CPU."""
    vectors = torch.empty(len(texts), model.get_embedding_dimension())
    for kind in sorted({kind for kind, _ in texts}):
        rows = [index for index, (name, _) in enumerate(texts) if name == kind]
        given = [{"text": texts[index][1]} for index in rows]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half()):
            found = model.encode(given, prompt_name=kind, batch_size=128, convert_to_tensor=True)
        vectors[rows] = found.float().cpu()
        print(f"{len(rows)} texts: {kind}", flush=True)
    return vectors


class Head(nn.Module):
    """Class token and mean of the patches, to unit vectors as texts have them."""

    def __init__(self, hidden: int, size: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(2 * hidden, elementwise_affine=False), nn.Linear(2 * hidden, size)

    def forward(self, states: Tensor) -> Tensor:
        pooled = torch.cat([states[:, 0], states[:, 1:].mean(1)], 1).float()
        return F.normalize(self.linear(self.norm(pooled)).float(), dim=1)  # bf16 under autocast


def keywords(row: dict) -> str:
    """Some keywords of a drawing; its name if it has none."""
    return ", ".join(row["keywords"]["en"][:4]) or row["names"]["en"]


def left_out(split: str) -> tuple[list[dict], list[int]]:
    """A drawing of each left-out concept, and which of them are of other categories than those of the tasks."""
    rows = list({row["emoji"]: row for row in emoji(None)[split]}.values())
    return rows, [index for index, row in enumerate(rows) if row["category"] not in CATEGORIES]


class Watch:
    """The left-out drawings, and how well they are found."""

    def __init__(self, model: BTokSentenceTransformer, mean: Tensor):
        (drawings, asked), (concepts, strange) = left_out("unseen_drawings"), left_out("unseen_concepts")
        self.rows = [*concepts, *drawings]
        self.images = [draw(row["image"], size=WHOLE) for row in self.rows]
        names = text_vectors(model, [("term", row["names"]["en"]) for row in self.rows])
        self.names = F.normalize(names - mean, dim=1)
        self.first = {"drawings": len(concepts), "concepts": 0}  # of the rows that are candidates
        self.asked = {"drawings": [len(concepts) + index for index in asked], "concepts": strange}

    def scores(self, vectors: Tensor) -> dict[str, float]:
        """MRR in percent for vectors of `images`. Drawings are looked for among drawings, concepts among all."""
        found = {}
        for name, rows in self.asked.items():
            first = self.first[name]
            similar = (self.names[rows] @ vectors[first:].T).numpy()
            ranks = positions(similar, [row - first for row in rows])
            found[name] = 100 * sum(1 / rank for rank in ranks) / len(ranks)
        return found


def merge(tower: nn.Module, factors: dict[str, Tensor]) -> None:
    """Add the products of what `train` learned to the matrices of the tower.

    Raises:
        ValueError: The factors are those of another tower.
    """
    for name in sorted({name.rpartition(".")[0] for name in factors}):
        try:
            weight = tower.get_parameter(f"{name}.weight")
            weight.data += (factors[f"{name}.B"].float() @ factors[f"{name}.A"].float()).to(weight)
        except (AttributeError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"The factors do not fit the tower at {name}: {error}. Train them on this base."
            ) from None


def train(model: BTokSentenceTransformer, options: argparse.Namespace) -> dict[str, Tensor]:
    """The factors of LoRA by matrix, `A` of shape `(rank, inputs)` and `B` of shape `(outputs, rank)`."""
    rng, device = random.Random(options.seed), model.device
    rows = emoji(None)["train"]
    texts = [("term", text) for row in rows for text in (row["names"]["en"], keywords(row))]
    said = list(dict.fromkeys(texts))
    vectors = dict(zip(said, text_vectors(model, said)))
    concepts = {row["emoji"]: number for number, row in enumerate({row["emoji"]: row for row in rows}.values())}
    first = {row["emoji"]: row for row in reversed(rows)}
    mean = torch.stack(list(vectors.values())).mean(0)
    banks = [
        F.normalize(torch.stack([vectors["term", say(first[name])] for name in concepts]) - mean, dim=1).to(device)
        for say in (lambda row: row["names"]["en"], keywords)
    ]
    watch = Watch(model, mean)
    torch.manual_seed(options.seed)
    processor = model.transformer.processor.image_processor
    tower = model.transformer.model.vision_tower.requires_grad_(False)
    config = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=MATRICES)
    tower = inject_adapter_in_model(config, tower)
    factors = {name: tensor for name, tensor in tower.named_parameters() if tensor.requires_grad}
    head = Head(tower.config.hidden_size, vectors[said[0]].shape[0]).to(device)
    groups = [{"params": list(factors.values())}, {"params": list(head.parameters())}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [options.learning_rate, 2 * options.learning_rate], options.steps, pct_start=0.1
    )

    def embed(images: Iterable[Image]) -> Tensor:
        pixels = processor(list(images), return_tensors="pt")["pixel_values"].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half()):
            return head(tower(pixel_values=pixels).last_hidden_state)

    order, losses, started = [], [], time.perf_counter()
    for step in range(1, options.steps + 1):
        if len(order) < options.batch:
            order += rng.sample(rows, len(rows))
        chosen, order = order[: options.batch], order[options.batch :]
        found = embed(draw(row["image"], rng if rng.random() < 0.9 else None, rng.choice(SIZES)) for row in chosen)
        right = torch.tensor([concepts[row["emoji"]] for row in chosen], device=device)
        loss = sum(F.cross_entropy(found @ bank.T / TEMPERATURE, right) for bank in banks) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors.values(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % options.every == 0 or step == options.steps:
            with torch.no_grad():
                images = [watch.images[start : start + 64] for start in range(0, len(watch.images), 64)]
                scores = watch.scores(torch.cat([embed(part) for part in images]).cpu())
            recent = losses[-options.every :]
            print(
                f"step {step}: loss {sum(recent) / len(recent):.2f}, "
                + ", ".join(f"{name} {score:.1f}" for name, score in scores.items())
                + f"; {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    return {
        name.replace("lora_", "").removesuffix(".default.weight"): tensor.detach().cpu().contiguous()
        for name, tensor in factors.items()
    }


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The options of a training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a trained model: a folder that a run exported")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rank", type=int, default=32, help="of LoRA")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--every", type=int, default=100, help="steps from one look at left-out drawings to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "pretrained" / "eyes")
    return parser.parse_args(words)


def main() -> None:
    options = arguments()
    factors = train(BTokSentenceTransformer(str(options.model)), options)
    options.output.mkdir(parents=True, exist_ok=True)
    save_file(factors, options.output / WEIGHTS)
    print(f"written: {options.output / WEIGHTS}")


if __name__ == "__main__":
    main()
