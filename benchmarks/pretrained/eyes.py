"""Let the pretrained model see: train the projector between its vision tower and its language model.

    python -m benchmarks.pretrained.tower --model runs/pretrained/btok-condensation-all-s0/model
    python -m benchmarks.pretrained.eyes --model runs/pretrained/btok-condensation-all-s0/model

The language model is frozen, so texts keep their vectors. The first command teaches the tower. The second has two
stages more:

1. Words, without the language model: the tokens of a picture become the input embeddings of the words that it shows.
   So the language model gets something that it can read.
2. Through the language model: a picture is pulled to the vector of its name or caption, away from those of all other
   training texts, which are computed once; and condensation has the model say the name from the Bottleneck Tokens
   alone.

The pictures are those of `views.py`. The tower's states of all of them are computed once, too.
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
from benchmarks.pretrained import half
from benchmarks.pretrained.run import ARMS, PICTURE, prompts
from benchmarks.pretrained.tower import WEIGHTS, merge, text_vectors
from benchmarks.pretrained.views import SOURCES, Picture, Recorded, pictures, tower_states
from btok_hf import BTokSentenceTransformer
from btok_hf.condensation import condense
from btok_hf.features import IGNORED

CALLED = (PICTURE, "query", "document")  # prompts of pictures
SHARES = dict(zip(SOURCES, (0.65, 0.25, 0.1)))  # of the sources in a batch
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

    def draw(self, rng: random.Random) -> int:
        """The index of a picture."""
        [source] = rng.choices(list(SHARES), list(SHARES.values()))
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
        tokens_of(backbone, chunk.to(norm.weight.device))
    hook.remove()
    mean, deviation = torch.cat(seen).mean(0), torch.cat(seen).std(0).clamp(min=1e-3)
    norm.weight /= deviation
    norm.bias.sub_(mean).div_(deviation)


def some(states: Tensor, count: int = 500) -> Tensor:
    """The states of some pictures of every source."""
    return states[:: max(1, len(states) // count)].float()


def words_first(model: BTokSentenceTransformer, album: Album, options: argparse.Namespace) -> list[dict[str, float]]:
    """Train the projector to put out the input embeddings of the words that pictures show.

    The embeddings of words share a large mean. What is compared, by cosine, is their difference to it. It is not known
    at which place a word is shown: the mean over all places has to show it. Words that many pictures show count less.
    """
    backbone, rng, device = model.transformer.model, random.Random(options.seed), model.device
    counts = Counter(word for part in album.found for word in part.words)
    known = {word: index for index, word in enumerate(sorted(word for word in counts if counts[word] > 1))}
    shown = [[known[word] for word in part.words if word in known] for part in album.found]
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
        chosen = [album.draw(rng) for _ in range(options.word_batch)]
        asked = torch.zeros(len(chosen), len(known))
        for row, index in enumerate(chosen):
            asked[row, shown[index]] = rarity[shown[index]]
        asked = (asked / asked.sum(1, keepdim=True).clamp(min=1e-6)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half()):
            tokens = tokens_of(backbone, album.pixels(rng, chosen).to(device)).mean(1)
            logits = F.normalize(tokens - mean, dim=1) @ directions.T / WORD_TEMPERATURE
        loss = -(asked * logits.float().log_softmax(1)).sum(1).mean()
        step.take(loss, {"words": loss.item()}, 100)
    with torch.no_grad():  # as long as embeddings are
        length = (tokens_of(backbone, some(album.states).to(device)) - mean).norm(dim=2).mean()
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


def info_nce(images: Tensor, bank: Tensor, place: Tensor, right: Tensor) -> Tensor:
    """Both directions, in nats. Images find their text among all texts of `bank`, texts their image in the batch.

    `place` has the row of `bank` that is the text of each image. `right` says which rows are right for an image,
    `(images, texts)`: others than its text are no negatives.
    """
    similar = images @ bank.T / TEMPERATURE
    each = torch.arange(len(images), device=images.device)
    out = right.clone()  # right, but not what is asked for
    out[each, place] = False
    forth = F.cross_entropy(similar.masked_fill(out, -torch.inf), place)
    out = right[:, place].T.clone().fill_diagonal_(False)  # text i with image j
    return (forth + F.cross_entropy(similar[:, place].T.masked_fill(out, -torch.inf), each)) / 2


def kept(cache: Path, name: str, key: bytes, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` gives, in a file of `cache` from the first time on. `key` says all that it depends on."""
    file = cache / f"{name}-{hashlib.sha256(key).hexdigest()[:12]}.safetensors"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".part")
        save_file(make(), partial)
        partial.replace(file)
    return load_file(file)


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the weights, to be saved."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def content(tensor: Tensor) -> bytes:
    """The bytes of a tensor, for a key."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def meaning(model: BTokSentenceTransformer, album: Album, options: argparse.Namespace) -> list[dict[str, float]]:
    """Train the projector through the language model and save it every 100 steps."""
    found, rng, device = album.found, random.Random(options.seed), model.device
    said = list(dict.fromkeys(pair for part in found for pair in part.texts))
    place = {pair: index for index, pair in enumerate(said)}
    own: dict[str, set[int]] = {}  # the texts of each group; some belong to several
    for part in found:
        own.setdefault(part.group, set()).update(place[pair] for pair in part.texts)
    backbone = model.transformer.model
    key = json.dumps(said).encode() + content(backbone.language_model.layers[-1].mlp.down_proj.weight)
    bank = kept(options.cache, "texts", key, lambda: {"vectors": text_vectors(model, said)})["vectors"].to(device)
    print(f"{len(found)} pictures, {len(album.states)} drawings of them, {len(said)} texts", flush=True)
    blank = found[0].images[0]
    prompted = [model.preprocess([blank], prompt=model.prompts[name])["input_ids"] for name in CALLED]
    step = Step.of(backbone.multi_modal_projector, options.steps, options.learning_rate, options.learning_rate)
    for number in range(1, options.steps + 1):
        chosen: dict[str, int] = {}  # one of each group
        while len(chosen) < options.batch:
            index = album.draw(rng)
            chosen[found[index].group] = index
        parts = [found[index] for index in chosen.values()]
        texts = torch.tensor([place[rng.choice(part.texts)] for part in parts], device=device)
        right = torch.zeros(len(parts), len(said), dtype=torch.bool)
        for row, part in enumerate(parts):
            right[row, list(own[part.group])] = True
        ids, labels = targets(model.tokenizer, [part.texts[0][1] for part in parts])
        labels[CONDENSED:] = IGNORED
        inputs = {"input_ids": rng.choice(prompted).expand(len(parts), -1).to(device)}
        inputs["pixel_values"] = album.pixels(rng, list(chosen.values())).to(device)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.autocast(device.type, torch.bfloat16, enabled=half()):
            condensed = condense(backbone, inputs, ids.to(device), labels.to(device))
        infonce = info_nce(condensed.embeddings.float(), bank, texts, right.to(device))
        condensation = condensed.token_losses.mean()
        named = {"infonce": infonce.item(), "condensation": condensation.item()}
        step.take(infonce + options.weight * condensation, named, 20)
        if number % 100 == 0 or number == options.steps:
            options.output.mkdir(parents=True, exist_ok=True)
            save_file(weights(backbone.multi_modal_projector), options.output / "projector.safetensors")
    return step.log


def train(model: BTokSentenceTransformer, options: argparse.Namespace) -> list[dict[str, float]]:
    """Put what the tower learned into `model`, train its projector and save it.

    Returns the losses of each step through the language model.
    """
    if not prompts(ARMS["btok"]).keys() <= model.prompts.keys():
        raise ValueError(
            f"The model must have the prompts that run.py gives it, got {', '.join(model.prompts) or 'none'}. Train "
            "it with python -m benchmarks.pretrained.run --save."
        )
    if not (options.output / WEIGHTS).exists():
        raise FileNotFoundError(
            f"{options.output / WEIGHTS} does not exist. Train the tower first: python -m benchmarks.pretrained.tower."
        )
    merge(model.transformer.model.vision_tower, load_file(options.output / WEIGHTS))
    found = pictures()
    album = Album(found, tower_states(model, [image for part in found for image in part.images], options.cache))
    backbone = model.transformer.model
    model.requires_grad_(False)
    backbone.multi_modal_projector.requires_grad_(True)
    tower, backbone.vision_tower = backbone.vision_tower, Recorded()
    projector = backbone.multi_modal_projector
    chosen = {name: value for name, value in vars(options).items() if name.startswith("word_") or name == "seed"}
    settings = [chosen, SHARES, WORD_TEMPERATURE, [part.words for part in found]]
    # The states of the class token stand for the pictures and the tower.
    key = json.dumps(settings).encode() + content(album.states[:, 0]) + content(backbone.get_input_embeddings().weight)

    def words() -> dict[str, Tensor]:
        words_first(model, album, options)
        return weights(projector)

    projector.load_state_dict(kept(options.cache, "words", key, words))
    log = meaning(model, album, options)
    backbone.vision_tower = tower
    return log


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The options of a training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a trained model: a folder that a run exported")
    parser.add_argument("--word-steps", type=int, default=8000, help="of the words")
    parser.add_argument("--word-batch", type=int, default=32)
    parser.add_argument("--word-rate", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=240, help="through the language model")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--weight", type=float, default=0.5, help="of condensation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "pretrained" / "eyes")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "pretrained" / "eyes")
    return parser.parse_args(words)


def main() -> None:
    options = arguments()
    train(BTokSentenceTransformer(str(options.model)), options)


if __name__ == "__main__":
    main()
