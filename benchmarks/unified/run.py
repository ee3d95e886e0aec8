"""Train and score the arms of the unified benchmark, with and without Bottleneck Tokens, condensation and its mask.

    python -m benchmarks.unified.run --table arms       # last token, tokens, condensation without and with mask
    python -m benchmarks.unified.run --table tokens     # K = 1, 4, 8, 16
    python -m benchmarks.unified.run --table weights    # condensation weight 0, 1, 5
    python -m benchmarks.unified.run --table throughout # condensation in all steps, without and with mask
    python -m benchmarks.unified.run --table model --seeds 0    # the method trained longer: the model of the examples

All arms start from one generative base (`base.py`). With the same seed they see the same rows in the same order. Each
run writes one JSON file with the rank of the right answer for every query, and `report.py` makes the tables. A
finished run is not repeated, so a killed command can be given again.
"""

import argparse
import json
import platform
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from benchmarks import RESULTS, ROOT
from benchmarks.unified.base import MODELS, SIZES, arguments_for, make
from benchmarks.unified.tasks import chance, score, tasks
from benchmarks.unified.training_rows import CONDENSE, LANGUAGES, WEIGHTS, prepare, training_sets
from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, export_model
from btok_hf.hub_card.card import CardArguments
from btok_hf.hub_card.training_run import card_files
from btok_hf.training import CondensationTrainer

UNIFIED = RESULTS / "unified"
WEIGHT = 5.0  # of condensation, as in the paper


class Arm(NamedTuple):
    num_tokens: int
    weight: float  # of condensation
    mask: bool = True
    throughout: bool = False  # condense in all steps, instead of the first 40 %


ARMS = {
    "last-token": Arm(0, 0.0),
    "btok": Arm(4, 0.0),
    "btok-unmasked": Arm(4, WEIGHT, mask=False),
    "btok-condensation": Arm(4, WEIGHT),
    "btok-condensation-k1": Arm(1, WEIGHT),
    "btok-condensation-k8": Arm(8, WEIGHT),
    "btok-condensation-k16": Arm(16, WEIGHT),
    "btok-condensation-w1": Arm(4, 1.0),
    "btok-throughout-unmasked": Arm(4, 1.0, mask=False, throughout=True),
    "btok-throughout": Arm(4, 1.0, throughout=True),
    "btok-long": Arm(4, WEIGHT),
    "btok-long-throughout": Arm(4, 1.0, throughout=True),
}
TABLES = {
    "arms": ["last-token", "btok", "btok-unmasked", "btok-condensation"],
    "tokens": ["btok-condensation-k1", "btok-condensation", "btok-condensation-k8", "btok-condensation-k16"],
    "weights": ["btok", "btok-condensation-w1", "btok-condensation"],
    "throughout": ["last-token", "btok", "btok-throughout-unmasked", "btok-throughout"],
    "model": ["btok-long"],
    "decode": ["btok-long-throughout"],
}
EMOJI, BOOKS = "Apache-2.0, Unicode-3.0, MIT: data/emoji/LICENSES.md", "CC-BY-4.0: benchmarks/unified/data/LICENSES.md"
LICENSES = dict.fromkeys(CONDENSE, BOOKS) | dict.fromkeys(("names", "drawings", "motion", "name-to-drawing"), EMOJI)
NOISE = 0.5  # of the new token rows, relative to the EOS row; without noise they would be equal


def ranks(model, batch_size=256):
    """Rank of the right answer of every query, by task."""
    known = {}

    def encode(inputs):
        # Tasks share most of their inputs.
        new = [item for item in inputs if _key(item) not in known]
        if new:
            for item, vector in zip(new, model.encode(new, batch_size=batch_size, convert_to_tensor=True)):
                known[_key(item)] = vector.float().cpu()
        return torch.stack([known[_key(item)] for item in inputs])

    return {
        name: positions(encode(task.queries) @ encode(task.candidates).T, task.right, task.choices)
        for name, task in tasks().items()
    }


def positions(scores, right, choices=None):
    """Rank of candidate `right[i]` in row i of `scores`, among all or among `choices[i]`. Ties count as the worst."""
    at_least = scores >= scores.gather(1, torch.tensor(right)[:, None])
    if choices is not None:
        at_least = at_least.gather(1, torch.tensor(choices))
    return at_least.sum(1).tolist()


def _key(item):
    return item if isinstance(item, str) else id(item)


def model_folder(arm, seed, size, output):
    """The folder of a run's model. The one that the examples use is in the repository."""
    kept = (arm, seed) == ("btok-long", 0)  # another seed must not overwrite it
    return MODELS / f"btok-{size}" if kept else output / size / f"{arm}-s{seed}" / "model"


def card_section(ranks):
    """The model's results by task, for its card."""
    found = tasks()
    lines = [
        "## Unified benchmark",
        "",
        "Mean reciprocal rank of one run, in percent (of right choices for motion):",
        "",
    ]
    lines += ["| task | queries | candidates | this model | chance |", "|---|---|---|---|---|"]
    for name, task in found.items():
        pool = len(task.choices[0]) if task.choices is not None else len(task.candidates)
        cells = (
            f"{len(task.queries):,}",
            f"{pool:,}",
            f"{score(task, ranks[name]).mean():.1f}",
            f"{chance(task):.1f}",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", "Made by `python -m benchmarks.unified.run`; docs/results.md compares the arms.", "", ""]
    )


def evaluator():
    """The first task, as the card reports it."""
    task = next(iter(tasks().values()))
    return InformationRetrievalEvaluator(
        dict(enumerate(task.queries)),
        dict(enumerate(task.candidates)),
        {query: {right} for query, right in enumerate(task.right)},
        name="name-to-drawing",
        accuracy_at_k=[1, 10],
        precision_recall_at_k=[1, 10],
        mrr_at_k=[len(task.candidates)],
        ndcg_at_k=[10],
        map_at_k=[100],
        batch_size=256,
        write_csv=False,
    )


def run(arm, seed, size, output, steps_between=None):
    """Train one arm with one seed and write its result, unless the result exists."""
    target = UNIFIED / size / f"{arm}-s{seed}.json"
    if target.exists():
        return
    num_tokens, weight, mask, throughout = ARMS[arm]
    base = make(size, output)
    folder = output / size / f"{arm}-s{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    add_bottleneck_tokens(base, folder / "start", num_tokens=num_tokens, noise_std=NOISE, seed=seed)
    model = BTokSentenceTransformer(str(folder / "start"))
    settings = SIZES[size]["long" if "long" in arm else "arm"] | ({"condensation_steps": None} if throughout else {})
    args = arguments_for(
        folder / "run",
        seed=seed,
        condense=CONDENSE,
        dataset_weights=WEIGHTS,
        condensation_weight=weight,
        condensation_mask=mask,
        temperature=0.05,
        symmetric=True,
        save_strategy="no",
        **settings,
    )
    started, curve = time.perf_counter(), {0: ranks(model)} if steps_between else {}
    names = evaluator()
    before = names(model)
    trainer = CondensationTrainer(model=model, args=args, train_dataset=training_sets(output / "pairs"))
    if steps_between:
        trainer.add_callback(Curve(model, curve, steps_between))
    trained = time.perf_counter()
    trainer.train()
    trained = time.perf_counter() - trained
    curve[args.max_steps] = ranks(model)
    table = next(name for name, arms in TABLES.items() if arm in arms)
    command = f"-m benchmarks.unified.run --table {table} --size {size} --seeds {seed}"
    card = card_files(
        trainer,
        CardArguments(
            model_license="cc-by-4.0", base_license="cc-by-4.0", data_licenses=LICENSES, languages=list(LANGUAGES)
        ),
        evaluator=names,
        before=before,
        after=names(model),
        command=command.split(),
    )
    origin = f"`{base.relative_to(ROOT)}` of the btok-hf repository" if base.is_relative_to(ROOT) else str(base)
    text = card["README.md"].replace("a local checkpoint whose origin is not recorded", origin, 1)
    card["README.md"] = text.replace("## Training\n", card_section(curve[args.max_steps]) + "## Training\n", 1)
    export_model(model, model_folder(arm, seed, size, output), files=card)
    shutil.rmtree(folder / "run", ignore_errors=True)
    result = {
        "arm": arm,
        "seed": seed,
        "num_tokens": num_tokens,
        "condensation_weight": weight,
        "condensation_mask": mask,
        "settings": settings,
        "train_minutes": round(trained / 60, 2),
        "minutes": round((time.perf_counter() - started) / 60, 2),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": f"python {command}",
        "losses": [
            {key: entry[key] for key in ("step", "loss", "infonce", "condensation") if key in entry}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
        "ranks": curve,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".part")
    partial.write_text(json.dumps(result))
    partial.replace(target)


class Curve(transformers.TrainerCallback):
    """Computes the ranks at regular steps of training."""

    def __init__(self, model, curve, every):
        self.model, self.curve, self.every = model, curve, every

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.model.eval()
            self.curve[state.global_step] = ranks(self.model)
            self.model.train()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, required=True)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "unified", help="folder for models")
    parser.add_argument("--threads", type=int, help="CPU threads, instead of torch's choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    prepare(options.output / "pairs")
    for seed in options.seeds:
        for arm in TABLES[options.table]:
            print(f"=== {arm}, seed {seed}", flush=True)
            # Learning curves of the first seed, in the first table.
            every = SIZES[options.size]["arm"]["max_steps"] // 4 if seed == 0 and options.table == "arms" else None
            run(arm, seed, options.size, options.output, steps_between=every)


if __name__ == "__main__":
    main()
