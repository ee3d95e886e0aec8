"""Let the pretrained model see: train the projector between its vision tower and its language model.

    python -m benchmarks.pretrained.eyes --model runs/pretrained/btok-condensation-all-s0/model

Everything but the projector is frozen, so texts keep their vectors (locked-image tuning, arXiv 2111.07991, with the
texts locked instead). Two stages:

1. Words first, without the language model: the tokens of a picture become the input embeddings of the words that it
   shows. So the language model gets something that it can read.
2. Through the language model: a picture is pulled to the vector of its name or caption, away from those of all other
   training texts, which are computed once; and condensation has the model say the name from the Bottleneck Tokens
   alone.

The pictures are those of `views.py`. The tower's states of all of them are computed once, too: 20 minutes on one core,
3 GB. So are the vectors of the texts, in ten minutes.
"""

import argparse
import hashlib
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks import ROOT
from benchmarks.pretrained.run import KINDS, PICTURE
from benchmarks.pretrained.views import ANYWHERE, SOURCES, Picture, Recorded, pictures, tower_states
from btok_hf import BTokSentenceTransformer
from btok_hf.condensation import condense
from btok_hf.features import IGNORED

CALLED = (PICTURE, "query", "document")  # prompts of pictures
# Shares of the sources in a batch. Reading takes more of the first stage.
WORD_SHARES = dict(zip(SOURCES, (0.25, 0.2, 0.05, 0.3, 0.2)))
SHARES = dict(zip(SOURCES, (0.5, 0.25, 0.05, 0.1, 0.1)))
WORD_TEMPERATURE = 0.03
TEMPERATURE = 0.05  # of the text training
TARGET_TOKENS = 16
CONDENSED = 16  # pictures of a batch that condensation is asked for, which costs as much as their embedding


class Album:
    """The training pictures with the tower's states of them."""

    def __init__(self, found: list[Picture], states: Tensor):
        self.found, self.states = found, states
        self.first = [0]
        for part in found:
            self.first.append(self.first[-1] + len(part.images))
        self.of_source = {name: [i for i, part in enumerate(found) if part.source == name] for name in SOURCES}

    def draw(self, rng: random.Random, shares: dict[str, float]) -> int:
        """The index of a picture."""
        [source] = rng.choices(list(shares), list(shares.values()))
        return rng.choice(self.of_source[source])

    def pixels(self, rng: random.Random, chosen: list[int]) -> Tensor:
        """One view of each of these pictures, as `Recorded` takes it."""
        places = [self.first[i] + rng.randrange(len(self.found[i].images)) for i in chosen]
        return torch.stack([self.states[place] for place in places]).float()


class Step(NamedTuple):
    """An optimizer with its schedule, and what it prints."""

    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    log: list[dict[str, float]]
    started: float

    @classmethod
    def of(cls, projector: torch.nn.Module, steps: int, first: float, last: float) -> "Step":
        """`first` and `last` are the rates of the projector's two layers: 6,144 and 576 inputs."""
        parameters = list(projector.parameters())
        groups = [[], []]
        for name, parameter in projector.named_parameters():
            groups[name.startswith("linear_2.")].append(parameter)
        optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=last, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [first, last], total_steps=steps, pct_start=0.05, anneal_strategy="cos"
        )
        return cls(parameters, optimizer, schedule, [], time.perf_counter())

    def take(self, loss: Tensor, losses: dict[str, float], every: int) -> None:
        """Go one step down and print the means of `losses` now and then."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.log.append(losses)
        if len(self.log) % every == 0:
            recent = self.log[-every:]
            means = ", ".join(f"{key} {sum(entry[key] for entry in recent) / every:.2f}" for key in losses)
            print(f"step {len(self.log)}: {means}; {time.perf_counter() - self.started:.0f} s", flush=True)


def tokens_of(backbone, pixels: Tensor) -> Tensor:
    """What the language model gets for pictures, of shape `(pictures, tokens, hidden)`."""
    features = backbone.get_image_features(
        pixels, vision_feature_layer=-1, vision_feature_select_strategy="default"
    ).pooler_output
    return features.float()


@torch.no_grad()
def standardise(backbone, states: Tensor) -> None:
    """Let the norm of the projector give every feature mean 0 and variance 1 over some training pictures."""
    seen: list[Tensor] = []
    norm = backbone.multi_modal_projector.layer_norm
    hook = norm.register_forward_hook(lambda module, args, output: seen.append(output.flatten(0, 1)))
    for chunk in some(states).split(50):
        tokens_of(backbone, chunk)
    hook.remove()
    mean, deviation = torch.cat(seen).mean(0), torch.cat(seen).std(0).clamp(min=1e-3)
    norm.weight /= deviation
    norm.bias.sub_(mean).div_(deviation)


def some(states: Tensor, count: int = 500) -> Tensor:
    """The states of some pictures of every source."""
    return states[:: max(1, len(states) // count)].float()


def words_first(model: BTokSentenceTransformer, album: Album, options: argparse.Namespace) -> list[dict[str, float]]:
    """Train the projector to put out the input embeddings of the words that pictures show.

    The embeddings of words share a large mean. What is compared, by cosine, is their difference to it. Where it is
    unknown at which place a word is shown, the mean over all places has to show it. Words that many pictures show
    count less.
    """
    backbone, rng = model.transformer.model, random.Random(options.seed)
    counts = Counter(word for part in album.found for _, word in set(part.words))
    known = {word: index for index, word in enumerate(sorted(word for word in counts if counts[word] > 1))}
    rarity = torch.tensor([math.log(len(album.found) / counts[word]) for word in known]).clamp(min=0.1)
    table = backbone.get_input_embeddings().weight
    pieces = [model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in known]
    words = torch.stack([table[ids].mean(0) for ids in pieces]).float()
    mean = words.mean(0)
    directions = F.normalize(words - mean, dim=1)
    projector = backbone.multi_modal_projector
    standardise(backbone, album.states)
    step = Step.of(projector, options.word_steps, options.word_rate / 10, options.word_rate)
    for _ in range(options.word_steps):
        chosen = [album.draw(rng, WORD_SHARES) for _ in range(options.word_batch)]
        rows = [(row, *entry) for row, index in enumerate(chosen) for entry in album.found[index].words]
        row, place, word = torch.tensor([(row, place, known[word]) for row, place, word in rows if word in known]).T
        with torch.autocast("cpu", torch.bfloat16):
            tokens = tokens_of(backbone, album.pixels(rng, chosen))
        tokens = torch.cat([tokens, tokens.mean(1, keepdim=True)], 1)  # the last is `ANYWHERE`, -1
        count = tokens.shape[1]
        asked, index = (row * count + place % count).unique(return_inverse=True)
        with torch.autocast("cpu", torch.bfloat16):
            logits = F.normalize(tokens.flatten(0, 1)[asked] - mean, dim=1) @ directions.T / WORD_TEMPERATURE
        losses = -logits.float().log_softmax(1)[index, word]
        total = torch.zeros(len(asked)).index_add(0, index, rarity[word])
        losses = torch.zeros(len(asked)).index_add(0, index, losses * rarity[word] / total[index])
        shown = torch.zeros(len(asked), dtype=torch.bool).index_fill(0, index[place == ANYWHERE], True)
        named = {"words shown": losses[shown].mean().item(), "words printed": losses[~shown].mean().item()}
        step.take(losses.mean(), named, 100)
    with torch.no_grad():  # as long as embeddings are
        length = (tokens_of(backbone, some(album.states)) - mean).norm(dim=2).mean()
        scale = (words - mean).norm(dim=1).mean() / length
        projector.linear_2.weight *= scale
        projector.linear_2.bias.sub_(mean).mul_(scale).add_(mean)
    return step.log


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


def kept(cache: Path, name: str, key: bytes, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` gives, in a file of `cache` from the first time on. `key` says all that it depends on."""
    file = cache / f"{name}-{hashlib.sha256(key).hexdigest()[:12]}.safetensors"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".part")
        save_file(make(), partial)
        partial.replace(file)
    return load_file(file)


def content(tensor: Tensor) -> bytes:
    """The bytes of a tensor, for a key."""
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


@torch.no_grad()
def text_vectors(model: BTokSentenceTransformer, texts: list[tuple[str, str]]) -> Tensor:
    """The vectors of (kind, text)."""
    vectors = torch.empty(len(texts), model.get_embedding_dimension())
    for kind in sorted({kind for kind, _ in texts}):
        rows = [index for index, (name, _) in enumerate(texts) if name == kind]
        given = [{"text": texts[index][1]} for index in rows]
        with torch.autocast("cpu", torch.bfloat16):
            vectors[rows] = model.encode(given, prompt_name=kind, batch_size=128, convert_to_tensor=True).float()
        print(f"{len(rows)} texts: {kind}", flush=True)
    return vectors


def meaning(model: BTokSentenceTransformer, album: Album, options: argparse.Namespace) -> list[dict[str, float]]:
    """Train the projector through the language model and save it every 100 steps."""
    found, rng = album.found, random.Random(options.seed)
    group = {name: number for number, name in enumerate(dict.fromkeys(part.group for part in found))}
    said = list(dict.fromkeys((*pair, group[part.group]) for part in found for pair in part.texts))
    place = {entry: index for index, entry in enumerate(said)}
    of_bank = torch.tensor([entry[2] for entry in said])
    backbone = model.transformer.model
    pairs = [entry[:2] for entry in said]
    key = json.dumps(pairs).encode() + content(backbone.language_model.layers[-1].mlp.down_proj.weight)
    bank = kept(options.cache, "texts", key, lambda: {"vectors": text_vectors(model, pairs)})["vectors"]
    print(f"{len(found)} pictures, {len(album.states)} drawings of them, {len(said)} texts", flush=True)
    blank = found[0].images[0]
    prompted = [model.preprocess([blank], prompt=model.prompts[name])["input_ids"] for name in CALLED]
    step = Step.of(backbone.multi_modal_projector, options.steps, options.learning_rate, options.learning_rate)
    for number in range(1, options.steps + 1):
        chosen: dict[str, int] = {}  # one of each group
        while len(chosen) < options.batch:
            index = album.draw(rng, SHARES)
            chosen[found[index].group] = index
        parts = [found[index] for index in chosen.values()]
        pairs = [rng.choice(part.texts) for part in parts]
        texts = bank[[place[*pair, group[part.group]] for pair, part in zip(pairs, parts)]]
        of_image = torch.tensor([group[name] for name in chosen])
        ids, labels = targets(model.tokenizer, [part.texts[0][1] for part in parts])
        labels[CONDENSED:] = IGNORED
        inputs = {"input_ids": rng.choice(prompted).expand(len(parts), -1)}
        inputs["pixel_values"] = album.pixels(rng, list(chosen.values()))
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.autocast("cpu", torch.bfloat16):
            condensed = condense(backbone, inputs, ids, labels)
        infonce = info_nce(condensed.embeddings, texts, bank, of_image, of_bank)
        condensation = condensed.token_losses.mean()
        named = {"infonce": infonce.item(), "condensation": condensation.item()}
        step.take(infonce + options.weight * condensation, named, 20)
        if number % 100 == 0 or number == options.steps:
            options.output.mkdir(parents=True, exist_ok=True)
            projector = {name: tensor.clone() for name, tensor in backbone.multi_modal_projector.state_dict().items()}
            save_file(projector, options.output / "projector.safetensors")
    return step.log


def train(model: BTokSentenceTransformer, options: argparse.Namespace) -> list[dict[str, float]]:
    """Train the projector of `model` in place and save it. Returns the losses of each step of the second stage."""
    kinds = {*CALLED, *(kind for pair in KINDS.values() for kind in pair)}
    if not kinds <= model.prompts.keys():
        raise ValueError(
            f"The model must have the prompts that run.py gives it, got {', '.join(model.prompts) or 'none'}. Train "
            "it with python -m benchmarks.pretrained.run --save."
        )
    found = pictures()
    album = Album(found, tower_states(model, [image for part in found for image in part.images], options.cache))
    backbone = model.transformer.model
    model.requires_grad_(False)
    backbone.multi_modal_projector.requires_grad_(True)
    tower, backbone.vision_tower = backbone.vision_tower, Recorded()
    projector = backbone.multi_modal_projector
    chosen = {name: value for name, value in vars(options).items() if name.startswith("word_") or name == "seed"}
    settings = [chosen, WORD_SHARES, WORD_TEMPERATURE, [part.words for part in found]]
    # The states of the class token stand for the pictures and the tower.
    key = json.dumps(settings).encode() + content(album.states[:, 0]) + content(backbone.get_input_embeddings().weight)

    def first_stage() -> dict[str, Tensor]:
        words_first(model, album, options)
        return {name: tensor.detach().clone() for name, tensor in projector.state_dict().items()}

    projector.load_state_dict(kept(options.cache, "words", key, first_stage))
    log = meaning(model, album, options)
    backbone.vision_tower = tower
    return log


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The options of a training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a trained model: a folder that a run exported")
    parser.add_argument("--word-steps", type=int, default=8000, help="of the first stage")
    parser.add_argument("--word-batch", type=int, default=32)
    parser.add_argument("--word-rate", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=400, help="of the second stage")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
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
