"""What each part of the method is worth on the pretrained base: arms side by side, seed by seed.

    python -m benchmarks.pretrained.claims --minutes 8 --processes 4     # on one GPU; again: what is still missing
    python -m benchmarks.pretrained.claims --report                      # the tables of docs/pretrained.md

Every run is one of `run.py` on the same rows in the same order, seed by seed, with passages of 40 to 160 words, so
that there is something to compress. Tables are run one after the other, and in a table a seed through all arms before
the next seed, so that whatever is finished when the time ends can be compared. The step of so small a model waits for
Python and not for the GPU, which is why several should run at once there. A run takes up to 20 GB of a GPU. On CPU
cores it takes up to 13 GB of memory, and the first table, 25 runs, days.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks import ROOT
from benchmarks.pretrained.base import OUTPUT
from benchmarks.pretrained.report import PAGE
from benchmarks.pretrained.run import PRETRAINED
from benchmarks.pretrained.tasks import tasks
from benchmarks.tables import insert
from benchmarks.unified.report import bootstrap, half_width, over_seeds, seeds_for

RESULTS = PRETRAINED / "claims"
# The arms by table, in the order in which they are run.
TABLES = {
    "arms": {
        "last-token": "last token",
        "mean": "mean of all tokens",
        "btok": "BToks",
        "btok-unmasked": "BToks + condensation, no mask",
        "btok-condensation": "BToks + condensation",
    },
    "tokens": {
        "btok-condensation": "K = 4",
        "btok-condensation-k1": "K = 1",
        "btok-condensation-k8": "K = 8",
        "btok-condensation-k16": "K = 16",
    },
    "weights": {
        "btok-condensation": "λ = 1",
        "btok-condensation-w5": "λ = 5",
        "btok-condensation-early": "λ = 5 for 40 % of the steps, then 0",
    },
}
PASSAGE = (40, 160)


def run_all(options: argparse.Namespace) -> list[str]:
    """Run what has no result yet, until the time ends. Returns the names of the runs that are still missing."""
    deadline = time.monotonic() + 60 * options.minutes

    def one(job: tuple[int, str]) -> None:
        seed, arm = job
        left = deadline - time.monotonic()
        if left <= 0 or (options.results / f"{arm}-s{seed}.json").exists():
            return
        command = [sys.executable, "-m", "benchmarks.pretrained.run", "--arm", arm, "--seed", str(seed)]
        command += ["--steps", str(options.steps), "--batch", str(options.batch), "--only", options.only]
        command += ["--passage", *map(str, options.passage), "--base", str(options.base)]
        command += ["--decoded", str(options.decoded)]
        command += ["--results", str(options.results), "--output", str(options.output)]
        log = options.output / f"{arm}-s{seed}.log"
        with log.open("w") as file:
            try:
                subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, timeout=left, check=True)
            except subprocess.TimeoutExpired:
                return print(f"{arm}, seed {seed}: the time is over; it goes on from its last checkpoint", flush=True)
            except subprocess.CalledProcessError as error:
                return print(f"{arm}, seed {seed} failed with {error.returncode}: {log}", flush=True)
        print(log.read_text().splitlines()[-1], flush=True)

    options.output.mkdir(parents=True, exist_ok=True)
    # An arm of two tables is run once.
    jobs = list(dict.fromkeys((s, arm) for table in options.tables for s in options.seeds for arm in TABLES[table]))
    with ThreadPoolExecutor(options.processes) as pool:
        list(pool.map(one, jobs))
    return [f"{arm}-s{seed}" for seed, arm in jobs if not (options.results / f"{arm}-s{seed}.json").exists()]


def results(folder: Path, arms: list[str]) -> dict[str, dict[int, dict]]:
    """The results of the arms by seed, of the seeds that all arms have.

    Raises:
        ValueError: They were run with different settings.
    """
    found = {
        arm: {part["seed"]: part for part in (json.loads(p.read_text()) for p in folder.glob(f"{arm}-s[0-9]*.json"))}
        for arm in arms
    }
    seeds = sorted(set.intersection(*(set(parts) for parts in found.values())))
    found = {arm: {seed: parts[seed] for seed in seeds} for arm, parts in found.items()}
    same = ("max_steps", "per_device_train_batch_size", "learning_rate", "temperature")
    ways = {
        json.dumps([part["passage"], [part["settings"][key] for key in same], list(part["ranks"])])
        for parts in found.values()
        for part in parts.values()
    }
    if len(ways) > 1:
        raise ValueError(
            f"{folder} mixes runs with other passages, settings or tasks: {'; '.join(sorted(ways))}. Remove those of "
            "one kind, or run with another --results."
        )
    return found


def table(found: dict[str, dict[int, dict]], labels: dict[str, str]) -> str:
    """Scores of each arm, then the differences of all pairs, in Markdown.

    A score is the mean reciprocal rank in percent. "±" of a score is over queries, of the mean over seeds.
    """
    rng = np.random.default_rng(0)
    arms, known = list(found), tasks()
    names = [name for name in known if name in next(iter(found[arms[0]].values()))["ranks"]]
    scores = {  # arrays of shape (seeds, queries)
        arm: {name: np.stack([100 / np.array(part["ranks"][name]) for part in parts.values()]) for name in names}
        for arm, parts in found.items()
    }

    def over_queries(by_task: dict[str, np.ndarray]) -> tuple[float, dict[str, float]]:
        draws = {name: bootstrap(values.mean(0), known[name].groups, rng) for name, values in by_task.items()}
        return half_width(np.mean(list(draws.values()), axis=0)), {name: half_width(d) for name, d in draws.items()}

    def of_seeds(values: np.ndarray) -> str:
        return f"{over_seeds(values):.2f}" if len(values) > 1 else "–"

    def means(by_task: dict[str, np.ndarray]) -> np.ndarray:
        return np.mean([values.mean(1) for values in by_task.values()], axis=0)

    lines = [f"| task | {' | '.join(labels[arm] for arm in arms)} |", "|---" * (len(arms) + 1) + "|"]
    widths = {arm: over_queries(by_task) for arm, by_task in scores.items()}
    for name in names:
        cells = [f"{scores[arm][name].mean():.1f} ± {widths[arm][1][name]:.1f}" for arm in arms]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    seeds = {arm: means(scores[arm]) for arm in arms}
    cells = [f"**{each.mean():.2f}** ± {of_seeds(each)}" for each in seeds.values()]
    lines += [f"| **mean over tasks**, ± over seeds | {' | '.join(cells)} |", ""]
    head = ["difference", *names, "mean", "± over seeds", "± over queries", "seeds to show 1 point"]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for number, arm in enumerate(arms[1:], 1):
        for other in arms[:number]:
            gain = {name: scores[arm][name] - scores[other][name] for name in names}
            width, by_task = over_queries(gain)
            mean = means(gain)
            need = str(seeds_for(1, np.std(mean, ddof=1))) if len(mean) > 1 else "–"
            cells = [f"{gain[name].mean():+.1f} ± {by_task[name]:.1f}" for name in names]
            cells += [f"{mean.mean():+.2f}", of_seeds(mean), f"{width:.2f}", need]
            lines.append(f"| {labels[arm]} − {labels[other]} | {' | '.join(cells)} |")
    one = next(iter(found[arms[0]].values()))
    lines += [
        "",
        f"Seeds {', '.join(map(str, found[arms[0]]))}; {one['settings']['max_steps']} steps of "
        f"{one['settings']['per_device_train_batch_size']} rows; {one['machine']}.",
    ]
    return "\n".join(lines) + "\n"


def decoded(folder: Path) -> str:
    """What can be decoded from the Bottleneck Tokens: means over the seeds of each arm, in Markdown."""
    lines: list[str] = []
    named: dict[str, str] = {}
    for labels in TABLES.values():
        named |= {arm: label for arm, label in labels.items() if arm not in named}
    for arm, label in named.items():
        parts = [json.loads(path.read_text()).get("decoded") for path in sorted(folder.glob(f"{arm}-s[0-9]*.json"))]
        if parts := [part for part in parts if part]:
            lines = lines or [f"| arm | seeds | {' | '.join(parts[0])} |", "|---" * (2 + len(parts[0])) + "|"]
            cells = [f"{np.mean([part[name] for part in parts]):.1f}" for name in parts[0]]
            lines.append(f"| {label} | {len(parts)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(folder: Path) -> None:
    """Put the tables into docs/pretrained.md, of the arms that have results, and say which have none."""
    page = PAGE.read_text("utf-8")
    for name, labels in TABLES.items():
        there = [arm for arm in labels if any(folder.glob(f"{arm}-s[0-9]*.json"))]
        found = results(folder, there) if len(there) > 1 else {}
        if not any(found.values()):
            print(f"{name}: no seed has two arms in {folder}")
            continue
        missing = [label for arm, label in labels.items() if arm not in there]
        more = f"\nNot run yet: {', '.join(missing)}.\n" if missing else ""
        page = insert(page, f"claims {name}", table(found, labels) + more)
    if lines := decoded(folder):
        page = insert(page, "claims decoded", lines)
    PAGE.write_text(page, "utf-8")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The options of the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="make the tables of what has been run, and run nothing")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--minutes", type=float, default=8, help="runs that are not finished then are stopped")
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--passage", nargs=2, type=int, default=PASSAGE, help="words of a module in a training row")
    parser.add_argument("--decoded", type=int, default=256, help="definitions to decode a text from")
    parser.add_argument("--only", default="", help="score only tasks whose names hold this")
    parser.add_argument("--base", type=Path, default=OUTPUT)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "pretrained" / "claims")
    return parser.parse_args(words)


def main() -> None:
    options = arguments()
    if options.report:
        return report(options.results)
    missing = run_all(options)
    if missing:
        raise SystemExit(f"missing: {', '.join(missing)}. Give the command again.")


if __name__ == "__main__":
    main()
