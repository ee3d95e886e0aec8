"""What each part of the method is worth on the pretrained base: arms side by side, seed by seed.

    python -m benchmarks.pretrained.claims --minutes 8 --processes 4     # on one GPU; again: what is still missing
    python -m benchmarks.pretrained.claims --report                      # the tables of docs/pretrained.md
    python -m benchmarks.pretrained.claims --report --results benchmarks/results/pretrained/claims-16

Every run is one of `run.py` on the same rows in the same order, seed by seed, with passages of 40 to 160 words, so
that there is something to compress. Tables are run one after the other, and in a table a seed through all arms before
the next seed, so that whatever is finished when the time ends can be compared. What is not finished goes on from its
last checkpoint, or starts again on a GPU. With K = 4, a run took 12 GB of a GPU. On CPU cores it takes up to 13 GB of
memory, and the first table, 25 runs, days.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks import ROOT
from benchmarks.pretrained import lists
from benchmarks.pretrained.base import OUTPUT
from benchmarks.pretrained.report import PAGE
from benchmarks.pretrained.run import PRETRAINED
from benchmarks.pretrained.tasks import tasks
from benchmarks.tables import insert
from benchmarks.unified.report import over_queries, over_seeds, seeds_for

RESULTS = PRETRAINED / "claims"
# The arms by table, in the order in which they are run.
TABLES = {
    "arms": {
        "last-token": "last token",
        "last-word": "last word",
        "mean": "mean of all tokens",
        "btok-k1": "one BTok",
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
                return print(f"{arm}, seed {seed}: the time is over", flush=True)
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
    """The results of the arms that have any, by seed.

    Raises:
        ValueError: They were run with different settings.
    """
    found = {
        arm: {part["seed"]: part for part in (json.loads(p.read_text()) for p in folder.glob(f"{arm}-s[0-9]*.json"))}
        for arm in arms
    }
    found = {arm: dict(sorted(parts.items())) for arm, parts in found.items() if parts}
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
    """Scores of each arm, then the differences of all pairs over the seeds that both have, in Markdown.

    A score is the mean reciprocal rank in percent. "±" of a score is over queries, of the mean over seeds.
    """
    rng = np.random.default_rng(0)
    arms, known = list(found), tasks() | lists.tasks()
    one = next(iter(found[arms[0]].values()))
    names = [name for name in known if name in one["ranks"]]

    def scores(arm: str, seeds: Iterable[int]) -> dict[str, np.ndarray]:
        """Arrays of shape (seeds, queries) by task."""
        return {name: np.stack([100 / np.array(found[arm][seed]["ranks"][name]) for seed in seeds]) for name in names}

    def widths_of(by_task: dict[str, np.ndarray]) -> tuple[float, dict[str, float]]:
        return over_queries({name: values.mean(0) for name, values in by_task.items()}, known, rng)

    def means(by_task: dict[str, np.ndarray]) -> np.ndarray:
        return np.mean([values.mean(1) for values in by_task.values()], axis=0)

    def of_seeds(values: np.ndarray) -> str:
        return f"{over_seeds(values):.2f}" if len(values) > 1 else "–"

    def listed(seeds: Iterable[int]) -> str:
        return ", ".join(map(str, seeds))

    lines = [f"| task | {' | '.join(labels[arm] for arm in arms)} |", "|---" * (len(arms) + 1) + "|"]
    own = {arm: scores(arm, found[arm]) for arm in arms}
    widths = {arm: widths_of(by_task)[1] for arm, by_task in own.items()}
    for name in names:
        cells = [f"{own[arm][name].mean():.1f} ± {widths[arm][name]:.1f}" for arm in arms]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cells = [f"**{means(by_task).mean():.2f}** ± {of_seeds(means(by_task))}" for by_task in own.values()]
    lines += [f"| **mean over tasks**, ± over seeds | {' | '.join(cells)} |"]
    lines += [f"| seeds | {' | '.join(listed(found[arm]) for arm in arms)} |", ""]
    head = ["difference", "seeds", *names, "mean", "± over seeds", "± over queries", "seeds to show 1 point"]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for number, arm in enumerate(arms[1:], 1):
        for other in arms[:number]:
            if not (seeds := [seed for seed in found[arm] if seed in found[other]]):
                continue
            ours, theirs = scores(arm, seeds), scores(other, seeds)
            gain = {name: ours[name] - theirs[name] for name in names}
            width, by_task = widths_of(gain)
            mean = means(gain)
            need = str(seeds_for(1, np.std(mean, ddof=1))) if len(mean) > 1 else "–"
            cells = [f"{gain[name].mean():+.1f} ± {by_task[name]:.1f}" for name in names]
            cells = [listed(seeds), *cells, f"{mean.mean():+.2f}", of_seeds(mean), f"{width:.2f}", need]
            lines.append(f"| {labels[arm]} − {labels[other]} | {' | '.join(cells)} |")
    settings = one["settings"]
    of_precision: dict[str, list[str]] = {}
    for arm, parts in found.items():
        for precision in sorted({run.get("precision", "precision not recorded") for run in parts.values()}):
            of_precision.setdefault(precision, []).append(labels[arm])
    several = len(of_precision) > 1
    said = [f"{name} ({', '.join(those)})" if several else name for name, those in of_precision.items()]
    lines += [
        "",
        f"{settings['max_steps']} steps of {settings['per_device_train_batch_size']} rows; {one['machine']}; "
        f"{', '.join(said)}.",
    ]
    return "\n".join(lines) + "\n"


def decoded(folder: Path) -> str:
    """What can be decoded from the Bottleneck Tokens: means over the seeds that all arms have, in Markdown, or "".

    Raises:
        ValueError: Different numbers of definitions were decoded.
    """
    labels: dict[str, str] = {}
    for part in TABLES.values():
        labels |= {arm: label for arm, label in part.items() if arm not in labels}
    found = {
        arm: {seed: run["decoded"] for seed, run in runs.items() if run.get("decoded")}
        for arm, runs in results(folder, list(labels)).items()
    }
    found = {arm: runs for arm, runs in found.items() if runs}
    seeds = sorted(set.intersection(*map(set, found.values()))) if found else []
    if not seeds:
        return ""
    counts = {run.pop("definitions") for runs in found.values() for run in runs.values()}
    if len(counts) > 1:
        raise ValueError(
            f"{folder} mixes runs with {sorted(counts)} decoded definitions. Keep those of one --decoded."
        )
    names = next(iter(found.values()))[seeds[0]]
    lines = [f"| arm | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for arm, runs in found.items():
        cells = [f"{np.mean([runs[seed][name] for seed in seeds]):.1f}" for name in names]
        lines.append(f"| {labels[arm]} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{counts.pop()} definitions; seeds {', '.join(map(str, seeds))}."])


def report(folder: Path) -> None:
    """Put the tables into docs/pretrained.md, of the arms that have results, and say which have none.

    Marks on the page begin with the name of the folder: runs of other settings are other tables.
    """
    page = PAGE.read_text("utf-8")
    for name, labels in TABLES.items():
        found = results(folder, list(labels))
        if len(found) < 2:
            print(f"{name}: {folder} has results of {len(found)} arms")
            continue
        missing = [label for arm, label in labels.items() if arm not in found]
        more = f"\nNot run yet: {', '.join(missing)}.\n" if missing else ""
        page = insert(page, f"{folder.name} {name}", table(found, labels) + more)
    if lines := decoded(folder):
        page = insert(page, f"{folder.name} decoded", lines)
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
