"""Make the tables and pictures of the unified benchmark from the ranks that `benchmarks.unified.run` wrote.

    python -m benchmarks.unified.report --size small      # fills the tables of docs/results.md; docs/results/*.png

A task's score is its mean reciprocal rank in percent (the share of right choices for the motion task), an arm's score
the mean over tasks. Two intervals, both at 95 %:

- Over queries: bootstrap of the seed-averaged scores over groups of queries (the names of a concept, the questions of
  a module). A group is drawn for all tasks at once, since tasks ask about the same concepts and modules. It says how
  much the score of these models may change with other queries.
- Over seeds: Student's t of the arm's scores, or of their differences seed by seed. It says how much the score may
  change with another training run, on the same queries.
"""

import argparse
import json

import matplotlib
import numpy as np
from scipy.stats import nct
from scipy.stats import t as student

from benchmarks import ROOT
from benchmarks.tables import insert
from benchmarks.unified.run import ARMS, TABLES, UNIFIED
from benchmarks.unified.tasks import CLIPS, MOTION, chance, drawn, score, tasks

matplotlib.use("Agg")
from matplotlib import pyplot as plt

REFERENCE = {"tokens": "btok-condensation", "weights": "btok"}  # elsewhere every pair of arms is compared
LABELS = {
    "last-token": "last token",
    "btok": "BToks",
    "btok-unmasked": "BToks + condensation, no mask",
    "btok-condensation": "BToks + condensation",
    "btok-condensation-k1": "K = 1",
    "btok-condensation-k8": "K = 8",
    "btok-condensation-k16": "K = 16",
    "btok-condensation-w1": "λ = 1",
    "btok-throughout-unmasked": "BToks + condensation throughout, no mask",
    "btok-throughout": "BToks + condensation throughout",
}
SAMPLES = 2000


def baseline(task):
    """Ranks of a task's baseline, if it has one: TF-IDF for texts and the text of pages, pixels for images."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics.pairwise import cosine_similarity

    if task.baseline is None:
        return None
    queries, candidates = task.baseline
    if isinstance(candidates[0], str):
        vectors = TfidfVectorizer(sublinear_tf=True, stop_words="english").fit(candidates)
        queries, candidates = vectors.transform(queries), vectors.transform(candidates)
    else:
        queries, candidates = (np.stack([np.asarray(i, float).ravel() - 255 for i in x]) for x in task.baseline)
    scores = cosine_similarity(queries, candidates)
    right = scores[np.arange(len(scores)), task.right][:, None]
    return (scores >= right).sum(1)


def load(size):
    """All results by arm and seed."""
    found = {}
    for path in sorted((UNIFIED / size).glob("*.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["arm"], {})[result["seed"]] = result
    return found


def final(result):
    return result["ranks"][max(result["ranks"], key=int)]


def matrix(results, seeds, step=None):
    """Scores by task: arrays of shape (seeds, queries)."""
    ranks = [final(results[seed]) if step is None else results[seed]["ranks"][str(step)] for seed in seeds]
    return {name: np.stack([score(task, part[name]) for part in ranks]) for name, task in tasks().items()}


def over_queries(scores, found, rng):
    """Half-widths of the intervals over queries: of the mean over tasks, and by task.

    `scores` has an array of shape (queries,) by task, `found` the tasks by name.
    """
    draws = bootstrap(scores, {name: found[name].groups for name in scores}, rng)
    return half_width(np.mean(list(draws.values()), axis=0)), {name: half_width(part) for name, part in draws.items()}


def bootstrap(values, groups, rng):
    """Means of `values` by task over samples of the groups, with replacement: each sample is one for all tasks."""
    known, index = np.unique(np.concatenate([groups[name] for name in values]), return_inverse=True)
    picks = rng.integers(0, len(known), (SAMPLES, len(known)))
    ends = np.cumsum([len(groups[name]) for name in values])
    draws = {}
    for name, part in zip(values, np.split(index, ends[:-1])):
        sums, counts = np.bincount(part, values[name], len(known)), np.bincount(part, minlength=len(known))
        draws[name] = sums[picks].sum(1) / counts[picks].sum(1)
    return draws


def half_width(draws):
    """Half of the interval that holds 95 % of the draws."""
    return np.subtract(*np.percentile(draws, [97.5, 2.5])) / 2


def over_seeds(values):
    """Half-width of Student's interval for the mean; infinite for a single number."""
    if len(values) < 2:
        return np.inf
    return student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))


def seeds_for(difference, spread):
    """How many paired seeds show a difference with power 0.8: Student's test at 5 %, two-sided, as the intervals."""
    seeds = 2
    # Without spread two seeds show everything. The power is NaN where scipy cannot tell it from 1, which ends this.
    while spread and power(seeds, difference / spread) < 0.8:
        seeds += 1
    return seeds


def power(seeds, effect):
    """How often Student's interval of this many seeds lies beyond 0, for a difference of `effect` deviations."""
    return nct.sf(student.ppf(0.975, seeds - 1), seeds - 1, effect * np.sqrt(seeds))


def arm_table(table, results):
    """One table in Markdown: a column for each arm, a row for each task, then means, differences and seeds needed."""
    rng = np.random.default_rng(0)
    arms = [arm for arm in TABLES[table] if arm in results]
    seeds = sorted(set.intersection(*(set(results[arm]) for arm in arms)))
    scores = {arm: matrix(results[arm], seeds) for arm in arms}
    label = {**LABELS, **({"btok-condensation": "K = 4"} if table == "tokens" else {})}
    label |= {"btok": "λ = 0", "btok-condensation": "λ = 5"} if table == "weights" else {}
    lines = [f"| task | queries / candidates | chance | baseline | {' | '.join(label[arm] for arm in arms)} |"]
    lines.append("|---" * (len(arms) + 4) + "|")
    widths = {arm: over_queries({n: s.mean(0) for n, s in scores[arm].items()}, tasks(), rng) for arm in arms}
    for name, task in tasks().items():
        simple = baseline(task)
        cells = [f"{scores[arm][name].mean():.1f} ± {widths[arm][1][name]:.1f}" for arm in arms]
        pool = len(task.choices[0]) if task.choices is not None else len(task.candidates)
        lines.append(
            f"| {name} | {len(task.queries):,} / {pool:,} | {chance(task):.1f} | "
            f"{'–' if simple is None else f'{score(task, simple).mean():.1f}'} | {' | '.join(cells)} |"
        )
    means = {arm: np.mean([part.mean(1) for part in scores[arm].values()], axis=0) for arm in arms}
    lines.append(
        "| **mean over tasks**, ± over queries | | | | "
        + " | ".join(f"**{means[arm].mean():.2f}** ± {widths[arm][0]:.2f}" for arm in arms)
        + " |"
    )
    lines.append("| by seed | | | | " + " | ".join(", ".join(f"{v:.2f}" for v in means[arm]) for arm in arms) + " |")
    # Some seeds learn the order of frames and others do not, which moves the mean more than anything else.
    still = {arm: np.mean([part.mean(1) for n, part in scores[arm].items() if n != MOTION], axis=0) for arm in arms}
    cells = (f"{still[arm].mean():.2f}: " + ", ".join(f"{v:.2f}" for v in still[arm]) for arm in arms)
    lines.append("| without motion, and by seed | | | | " + " | ".join(cells) + " |")
    seen = drawn()
    parts = ((part[:, seen].mean(), part[:, ~seen].mean()) for part in (scores[arm][CLIPS] for arm in arms))
    lines.append(
        f"| clips whose emoji has training drawings ({seen.sum()}) / the others ({(~seen).sum()}) | | | | "
        + " | ".join(f"{some:.1f} / {others:.1f}" for some, others in parts)
        + " |"
    )
    moving = (", ".join(f"{v:.1f}" for v in scores[arm][MOTION].mean(1)) for arm in arms)
    lines.append("| motion by seed | | | | " + " | ".join(moving) + " |")
    lines += [
        "",
        "| difference | mean | ± over seeds | ± over queries | seeds to show 2 points |",
        "|---|---|---|---|---|",
    ]
    pairs = [(b, a) for i, a in enumerate(arms) for b in arms[i + 1 :]]
    if table in REFERENCE:
        pairs = [(a, REFERENCE[table]) for a in arms if a != REFERENCE[table]]
    for arm, other in pairs:
        gain = means[arm] - means[other]
        width, _ = over_queries({n: (scores[arm][n] - scores[other][n]).mean(0) for n in scores[arm]}, tasks(), rng)
        need = seeds_for(2, np.std(gain, ddof=1)) if len(gain) > 1 else "–"
        lines.append(
            f"| {label[arm]} − {label[other]} | {gain.mean():+.2f} | {over_seeds(gain):.2f} | {width:.2f} | {need} |"
        )
    minutes = {arm: np.median([results[arm][seed]["train_minutes"] for seed in seeds]) for arm in arms}
    note = ", ".join(f"{label[arm]} {minutes[arm]:.1f}" for arm in arms)
    lines += ["", f"Seeds {', '.join(map(str, seeds))}.", f"Minutes of training (median): {note}."]
    return "\n".join(lines) + "\n"


def curves(results, path):
    """Learning curves of the arms and seeds that have them: the mean over tasks, and the losses."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for colour, arm in enumerate(TABLES["arms"]):
        for seed, result in results.get(arm, {}).items():
            if len(result["ranks"]) > 2:
                steps = sorted(map(int, result["ranks"]))
                means = [
                    np.mean([part[0].mean() for part in matrix({seed: result}, [seed], step).values()])
                    for step in steps
                ]
                axes[0].plot(steps, means, f"C{colour}o-", label=f"{LABELS[arm]} (seed {seed})")
                for axis, key in ((axes[1], "infonce"), (axes[2], "condensation")):
                    # It is 0 where it is off.
                    points = [(entry["step"], entry[key]) for entry in result["losses"] if entry.get(key)]
                    if points:
                        axis.plot(*zip(*points), f"C{colour}")
    for axis, title in zip(axes, ("mean score over tasks", "InfoNCE", "condensation loss (nats a token)")):
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    options = parser.parse_args()
    results = load(options.size)
    unknown = set(results) - set(ARMS)
    if unknown or not results:
        held = sorted(unknown) or "no results"
        raise SystemExit(f"{UNIFIED / options.size} holds {held}. Run `python -m benchmarks.unified.run` first.")
    document = ROOT / "docs" / "results.md"
    page = document.read_text("utf-8")
    for table, arms in TABLES.items():
        if len(set(arms) & set(results)) > 1:
            page = insert(page, f"{options.size} {table}", arm_table(table, results))
    document.write_text(page, "utf-8")
    (ROOT / "docs" / "results").mkdir(exist_ok=True)
    curves(results, ROOT / "docs" / "results" / f"{options.size}-curves.png")


if __name__ == "__main__":
    main()
