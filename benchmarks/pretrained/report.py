"""Make the tables of docs/pretrained.md from the ranks that `tasks.py --anchors`, `run.py` and `pictures.py` wrote.

    python -m benchmarks.pretrained.report

A score is the mean reciprocal rank in percent. Intervals are at 95 %, over queries: bootstrap over the modules,
or concepts, that queries are about. Of an arm with several seeds, the score of a query is the mean over them.
"""

import json

import numpy as np

from benchmarks import ROOT
from benchmarks.pretrained.pictures import asked
from benchmarks.pretrained.run import PRETRAINED
from benchmarks.pretrained.tasks import ANCHORS, BUILT, tasks
from benchmarks.tables import insert
from benchmarks.unified.report import bootstrap, half_width
from benchmarks.unified.tasks import CLIPS, chance, drawn, score

PAGE = ROOT / "docs" / "pretrained.md"
LABELS = {
    "last-token-untrained": "untrained, last token, words",
    "last-token": "last token",
    "btok": "BToks",
    "btok-unmasked": "BToks + condensation, no mask",
    "btok-condensation": "BToks + condensation",
    "btok-condensation-terms": "BToks + condensation, terms alone",
    "btok-condensation-all": "then all sources",
    "btok-no-words": "BToks, no words",
}
SEEING = ("btok-small", "btok-135m")
REFERENCE = "all-MiniLM-L6-v2"


def results() -> dict[str, dict[str, np.ndarray]]:
    """Reciprocal ranks in percent, by anchor or arm and task: the mean over seeds for each query."""
    ranks: dict[str, list[dict]] = {name: [found] for name, found in json.loads(ANCHORS.read_text())["ranks"].items()}
    for arm, label in LABELS.items():
        found = [json.loads(path.read_text())["ranks"] for path in sorted(PRETRAINED.glob(f"{arm}-s[0-9]*.json"))]
        if found:
            ranks[label] = found
    if BUILT.exists():
        ranks["`make model`, fp32"] = list(json.loads(BUILT.read_text())["ranks"].values())
    return {
        name: {task: np.mean([100 / np.array(each[task]) for each in found], axis=0) for task in found[0]}
        for name, found in ranks.items()
    }


def cell(values: np.ndarray | None, groups: list[str], rng: np.random.Generator, sign: str) -> str:
    """The mean of a task with its interval; nothing for a task that was not scored."""
    if values is None:
        return ""
    [draws] = bootstrap({"": values}, {"": groups}, rng).values()
    return f"{values.mean():{sign}.1f} ± {half_width(draws):.1f}"


def table(scores: dict[str, dict[str, np.ndarray]]) -> str:
    """The table in Markdown: scores, then differences to the reference, query by query."""
    rng = np.random.default_rng(0)
    lines = [f"| task | queries / candidates | {' | '.join(scores)} |", "|---" * (len(scores) + 2) + "|"]
    for name, task in tasks().items():
        cells = [cell(by_task.get(name), task.groups, rng, "") for by_task in scores.values()]
        lines.append(f"| {name} | {len(task.queries):,} / {len(task.candidates):,} | {' | '.join(cells)} |")
    anchors = json.loads(ANCHORS.read_text())["ranks"]
    ours = [name for name in scores if name not in anchors]
    lines += ["", f"| minus {REFERENCE} | {' | '.join(ours)} |", "|---" * (len(ours) + 1) + "|"]
    for name, task in tasks().items():
        gains = [scores[arm][name] - scores[REFERENCE][name] if name in scores[arm] else None for arm in ours]
        cells = [cell(gain, task.groups, rng, "+") for gain in gains]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def pictures_table() -> str:
    """The table of the tasks with pictures: the small model, this one, and the difference, query by query."""
    rng = np.random.default_rng(0)
    small, this = (json.loads((PRETRAINED / f"pictures-{name}.json").read_text())["ranks"] for name in SEEING)
    lines = [f"| task | queries / candidates | chance | {' | '.join(SEEING)} | difference |", "|---" * 6 + "|"]
    both, this_one = drawn(), drawn(None)  # drawings with the name of the clip's emoji
    of_clips = {
        "": both | True,
        ", of emoji with training drawings of both": both,
        ", of emoji with training drawings of btok-135m": this_one & ~both,
        ", of emoji without training drawings": ~this_one,
    }
    for name, task in asked().items():
        for part, chosen in (of_clips if name == CLIPS else {"": np.full(len(task.queries), True)}).items():
            before, after = (score(task, ranks[name])[chosen] for ranks in (small, this))
            pairs = ((before, ""), (after, ""), (after - before, "+"))
            groups = list(np.array(task.groups)[chosen])
            cells = [cell(values, groups, rng, sign) for values, sign in pairs]
            sizes = f"{chosen.sum():,} / {len(task.candidates):,}"
            lines.append(f"| {name}{part} | {sizes} | {chance(task):.1f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    page = insert(PAGE.read_text("utf-8"), "pretrained", table(results()))
    PAGE.write_text(insert(page, "pictures", pictures_table()), "utf-8")


if __name__ == "__main__":
    main()
