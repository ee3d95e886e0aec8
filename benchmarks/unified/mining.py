"""What one round of hard-negative mining changes: the examples' model is trained on, without and with mined negatives.

    python -m benchmarks.unified.mining               # about 25 minutes on one CPU core
    python -m benchmarks.unified.mining --report      # the table, from the results

`btok mine` finds negatives for a sample of the training rows with `models/btok-small`. With the same seed, both arms
take the same rows in the same order for the same number of steps, so that `mined` encodes twice as many inputs.
`report.py` says what the intervals are.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset

from benchmarks import ROOT
from benchmarks.unified.base import MODELS, arguments_for
from benchmarks.unified.report import over_queries, over_seeds
from benchmarks.unified.run import UNIFIED, ranks
from benchmarks.unified.tasks import score, tasks
from benchmarks.unified.training_rows import prepare
from btok_hf import BTokSentenceTransformer
from btok_hf.training import CondensationTrainer
from btok_hf.training.data import load_pairs
from btok_hf.training.mining import mine_hard_negatives

START = MODELS / "btok-small"
RESULTS = UNIFIED / "mining"
ARMS = ("in-batch", "mined")
ROWS = {"names": 8000, "glossary": 6926, "figures": 4400}  # of each source
WEIGHTS = {"names": 4, "glossary": 1, "figures": 1}
STEPS, RATE = 240, 1e-3
# Without a margin: this model places most positives behind ten other candidates, so that one leaves nothing to mine.
OPTIONS = {"num_negatives": 2}


def mine(folder: Path) -> None:
    """Write the mined rows of each source, unless they exist."""
    prepare(folder / "pairs")
    model = BTokSentenceTransformer(START)
    for name, count in ROWS.items():
        target = folder / "mined" / f"{name}.parquet"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            pairs = load_dataset("parquet", data_files=str(folder / "pairs" / f"{name}.parquet"), split="train")
            pairs = pairs.shuffle(seed=0).select(range(min(count, len(pairs)))).remove_columns("target")
            started = time.perf_counter()
            report = mine_hard_negatives(pairs, model, target, batch_size=256, **OPTIONS)
            print(f"{name}, {time.perf_counter() - started:.0f} s: {report}", flush=True)


def run(arm: str, seed: int, folder: Path) -> None:
    """Train one arm with one seed and write its ranks, unless they exist."""
    target = RESULTS / f"{arm}-s{seed}.json"
    if target.exists():
        return
    sets = {name: load_pairs(str(folder / "mined" / f"{name}.parquet")) for name in ROWS}
    if arm == "in-batch":
        sets = {
            name: part.remove_columns([column for column in part.column_names if column.startswith("negative")])
            for name, part in sets.items()
        }
    model = BTokSentenceTransformer(START)
    args = arguments_for(
        folder / "runs" / f"{arm}-s{seed}",
        seed,
        dataset_weights=WEIGHTS,
        condensation_weight=0.0,
        temperature=0.05,
        symmetric=True,
        save_strategy="no",
        max_steps=STEPS,
        learning_rate=RATE,
    )
    trainer = CondensationTrainer(model=model, args=args, train_dataset=sets)
    started = time.perf_counter()
    trainer.train()
    minutes = (time.perf_counter() - started) / 60
    result = {
        "arm": arm,
        "seed": seed,
        "command": "python -m benchmarks.unified.mining",
        "train_minutes": round(minutes, 2),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "ranks": ranks(model),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result))
    print(f"{arm}, seed {seed}: {minutes:.1f} minutes, loss {result['losses'][-1]:.3f}", flush=True)


def report() -> str:
    """Scores by task before and after, and paired differences, in Markdown."""
    found = {arm: [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{arm}-s*.json"))] for arm in ARMS}
    start = json.loads((RESULTS / "start.json").read_text())
    rng, known = np.random.default_rng(0), tasks()
    before = {name: score(task, start[name]).mean() for name, task in known.items()}
    scores = {
        arm: {name: np.stack([score(task, part["ranks"][name]) for part in parts]) for name, task in known.items()}
        for arm, parts in found.items()
    }
    difference = {name: scores["mined"][name] - scores["in-batch"][name] for name in known}
    mean, widths = over_queries({name: part.mean(0) for name, part in difference.items()}, known, rng)
    lines = ["| task | start | in-batch | mined | difference | over queries | over seeds |", "|---" * 7 + "|"]

    def line(name, start, both, change, queries):
        cells = [f"{start:.1f}", *(f"{value:.1f}" for value in both), f"{change.mean():+.1f}"]
        return f"| {name} | {' | '.join(cells)} | ± {queries:.1f} | ± {over_seeds(change):.1f} |"

    for name, part in difference.items():
        both = [scores[arm][name].mean() for arm in ARMS]
        lines.append(line(name, before[name], both, part.mean(1), widths[name]))
    change = np.mean([part.mean(1) for part in difference.values()], axis=0)
    both = [np.mean([scores[arm][name].mean() for name in known]) for arm in ARMS]
    lines.append(line("**mean**", np.mean(list(before.values())), both, change, mean))
    minutes = {arm: np.mean([part["train_minutes"] for part in parts]) for arm, parts in found.items()}
    lines.append(f"\nMinutes of training: {', '.join(f'{arm} {value:.1f}' for arm, value in minutes.items())}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "mining")
    parser.add_argument("--report", action="store_true", help="print the table of the results that exist")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.report:
        mine(options.output)
        RESULTS.mkdir(parents=True, exist_ok=True)
        if not (RESULTS / "start.json").exists():
            (RESULTS / "start.json").write_text(json.dumps(ranks(BTokSentenceTransformer(START))))
        for seed in options.seeds:
            for arm in ARMS:
                run(arm, seed, options.output)
    print(report())


if __name__ == "__main__":
    main()
