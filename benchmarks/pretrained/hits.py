"""The picture of README.md: what the built model finds for some queries, and what its four tokens hold.

    python -m benchmarks.pretrained.hits runs/btok-135m           # five minutes on two cores

Texts are asked among all definitions of the held-out books, and a drawing that training never saw among 411 names
of drawings. Beside them, what is decoded from the Bottleneck Tokens of a definition alone. The examples were chosen:
docs/pretrained.md has scores, and misses.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

import matplotlib

from benchmarks import ROOT
from benchmarks.pretrained.run import PRETRAINED
from benchmarks.pretrained.tasks import tasks
from benchmarks.unified.tasks import tasks as drawings
from btok_hf import BTokSentenceTransformer

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from PIL.Image import Image

PICTURE, RESULT = ROOT / "docs" / "images" / "hits.png", PRETRAINED / "hits.json"
QUERIES = ("a vote by the people on a law", "people who leave their country")
DRAWN, SIDE = "honeybee", 112  # a held-out drawing, and its pixels
# Terms whose definitions are decoded.
DEFINED = ("oligarchy", "checks and balances", "partisanship", "minority rights")
SHOWN = 2  # hits of a query
BLUE, GREY = "#2563eb", "#6b7280"


def drawing() -> tuple[Image, list[str]]:
    """The held-out drawing, and the names among which its own is looked for."""
    task = drawings(SIDE)["drawing → name"]
    return task.queries[task.candidates.index(DRAWN)], task.candidates


def found(model: BTokSentenceTransformer) -> dict:
    """The first hits of every query and of the drawing, and the texts decoded from the definitions of `DEFINED`."""
    task = tasks()["term → definition"]
    candidates = model.encode([{"text": text} for text in task.candidates], prompt_name="definition")
    queries = model.encode([{"text": text} for text in QUERIES], prompt_name="term")
    hits = {
        query: [(task.queries[index], task.candidates[index]) for index in row.argsort()[::-1][:SHOWN].tolist()]
        for query, row in zip(QUERIES, queries @ candidates.T)
    }
    image, names = drawing()
    scores = model.encode([{"text": name} for name in names], prompt_name="term") @ model.encode(
        image, prompt_name="picture"
    )
    definitions = [task.candidates[task.queries.index(term)] for term in DEFINED]
    decoded = model.reconstruct(
        [{"text": text} for text in definitions], prompt=model.prompts["definition"], max_new_tokens=10
    )
    return {
        "candidates": len(candidates),
        "hits": hits,
        "names": len(names),
        "drawing": [names[index] for index in scores.argsort()[::-1][:SHOWN].tolist()],
        "decoded": list(zip(DEFINED, definitions, decoded)),
    }


def box(axis: Axes, x: float, y: float, text: str, width: float, colour: str) -> None:
    """A text in a rounded frame, whose left edge is at x and whose middle is at y."""
    frame = FancyBboxPatch((x, y - 0.055), width, 0.11, boxstyle="round,pad=0.008", fc="white", ec=colour, lw=1.4)
    axis.add_patch(frame)
    axis.text(x + width / 2, y, text, ha="center", va="center", fontsize=10.5, color=colour, weight="bold")


def draw(result: dict, path: Path) -> None:
    """Draw what `found` gives."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13.6, 4.5), layout="constrained")
    for axis, title in (
        (
            left,
            f"First hits among {result['candidates']:,} held-out definitions, and {result['names']} names",
        ),
        (right, "What the model says when it sees four tokens, and no text"),
    ):
        axis.set(xlim=(0, 1), ylim=(0, 1))
        axis.set_axis_off()
        axis.set_title(title, fontsize=11.5, loc="left", weight="bold")
    for row, (query, hits) in enumerate(result["hits"].items()):
        y = 0.86 - 0.33 * row
        box(left, 0.01, y, textwrap.fill(query, 18), 0.28, BLUE)
        left.annotate("", (0.37, y), (0.31, y), arrowprops={"arrowstyle": "->", "color": GREY})
        for number, (term, definition) in enumerate(hits):
            top = y + 0.1 - 0.16 * number
            left.text(0.39, top, f"{number + 1}. {term}", fontsize=10.5, weight="bold", va="center")
            line = textwrap.shorten(definition, 68, placeholder=" …")
            left.text(0.39, top - 0.065, line, fontsize=8.5, color=GREY, va="center")
    y = 0.86 - 0.33 * len(result["hits"])
    left.imshow(drawing()[0], extent=(0.07, 0.24, y - 0.14, y + 0.14), aspect="auto")
    left.set(xlim=(0, 1), ylim=(0, 1))
    left.annotate("", (0.37, y), (0.31, y), arrowprops={"arrowstyle": "->", "color": GREY})
    for number, name in enumerate(result["drawing"]):
        left.text(0.39, y + 0.06 - 0.12 * number, f"{number + 1}. {name}", fontsize=10.5, weight="bold", va="center")
    for row, (term, definition, decoded) in enumerate(result["decoded"]):
        y = 0.9 - 0.25 * row
        right.text(
            0.0, y, textwrap.fill(textwrap.shorten(definition, 96, placeholder=" …"), 34), fontsize=8.5, va="center"
        )
        for token in range(4):
            right.add_patch(plt.Rectangle((0.475 + 0.03 * token, y - 0.05), 0.02, 0.1, fc=BLUE, ec="none"))
        for start, end in ((0.42, 0.465), (0.6, 0.645)):
            right.annotate("", (end, y), (start, y), arrowprops={"arrowstyle": "->", "color": GREY})
        right.text(0.66, y + 0.03, decoded, fontsize=10.5, weight="bold", color=BLUE, va="center")
        right.text(0.66, y - 0.045, f"the book's term: {term}", fontsize=8.5, color=GREY, va="center")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of an exported repository")
    options = parser.parse_args()
    result = found(BTokSentenceTransformer(options.model, device="cpu"))
    command = "python -m benchmarks.pretrained.hits " + " ".join(sys.argv[1:])
    RESULT.write_text(json.dumps({"command": command, **result}, indent=1, ensure_ascii=False) + "\n", "utf-8")
    draw(result, PICTURE)


if __name__ == "__main__":
    main()
