"""Tables of docs/performance.md, from what the benchmarks wrote to benchmarks/results.

python -m benchmarks.tables
"""

import json
import re
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks import RESULTS, ROOT

WAYS = {
    "inputs": "{inputs}",
    "attention": "{way}",
    "seconds": "{median_s}",
    "times as fast as ours": "**{speed_ratio:.2f}** ({ratio_quartiles[0]:.2f} to {ratio_quartiles[1]:.2f})",
}
# mark in the page: (file, table or None, {heading: how a row is shown})
TABLES = {
    "throughput": (
        "encode",
        "throughput",
        {
            "inputs": "{count} {inputs}",
            "tokens": "{tokens:,}",
            "tokens that stock computes for each": "{stock_padding:.2f}",
            "stock, tokens/s": "{stock_tokens_per_s:,}",
            "btok-hf, tokens/s": "{btok_tokens_per_s:,}",
            "times as fast": "**{speed_ratio:.2f}** ({quartiles[0]:.2f} to {quartiles[1]:.2f})",
            "share of the matrix rate": "{share_of_limit:.0%}",
        },
    ),
    "profile": (
        "encode",
        "profile",
        {
            "inputs": "{inputs}",
            "matrix products": "{matrix products} %",
            "attention": "{attention} %",
            "gathering and copies": "{gathering} %",
            "other operations": "{other operations} %",
        },
    ),
    "overhead": (
        "encode",
        "overhead",
        {
            "inputs": "{inputs}",
            "tokens of a row": "{row_length}",
            "path": "{path}",
            "cost of K = 4": "{cost_of_tokens:.3f} ({quartiles[0]:.3f} to {quartiles[1]:.3f})",
            "more tokens": "{more_tokens:.3f}",
        },
    ),
    "speed": (
        "train_step",
        "speed",
        {
            "batch": "{batch}, {rows} rows, mini-batches of {mini_batch}",
            "tokens + targets": "{tokens:,} + {target_tokens:,}",
            "contender": "{contender}",
            "seconds": "{median_s} ({quartiles_s[0]} to {quartiles_s[1]})",
            "times the time of packed": "{times_packed:.2f}",
        },
    ),
    "memory": (
        "train_step",
        "memory",
        {
            "contender": "{contender}",
            "batch": "{batch}, {rows} rows, mini-batches of {mini_batch}",
            "checkpointing": "{checkpointing}",
            "peak above the start": "{peak_gb:.2f} GB",
        },
    ),
    "savings": (
        "train_savings",
        None,
        {
            "what": "{saving}",
            "with": "{with_s} s",
            "without": "{without_s} s",
            "times as fast": "**{speed_ratio:.2f}** ({quartiles[0]:.2f} to {quartiles[1]:.2f})",
            "losses and gradients differ by": "{differ_by:.0e}",
        },
    ),
    "vision": (
        "vision",
        None,
        {
            "images": "{images}",
            "patches": "{patches:,}",
            "mode": "{mode}",
            "a call each": "{loop_s} s",
            "grouped": "{grouped_s} s",
            "times as fast": "**{speed_ratio:.2f}** ({quartiles[0]:.2f} to {quartiles[1]:.2f})",
        },
    ),
    "startup": (
        "startup",
        None,
        {
            "what": "{table}: {what}",
            "seconds": "{median_s}",
            "against": "{against}",
            "its seconds": "{against_s}",
            "times": "{times:.2f}",
        },
    ),
    "attention": ("attention", "attention", WAYS),
    "attention on a GPU": ("attention-gpu", "attention", WAYS),
    "throughput on a GPU": (
        "throughput-gpu",
        "throughput",
        {
            "inputs": "{count} {inputs}",
            "tokens": "{tokens:,}",
            "stock, tokens/s": "{stock_tokens_per_s:,}",
            "btok-hf, tokens/s": "{btok_tokens_per_s:,}",
            "times as fast": "**{speed_ratio:.2f}** ({quartiles[0]:.2f} to {quartiles[1]:.2f})",
            "share of the matrix rate": "{share_of_limit:.0%}",
            "before: tokens/s, times as fast": "{before_tokens_per_s:,}, {before_ratio:.2f}",
        },
    ),
    "recipe on a GPU": ("recipe-gpu", None, {"what": "{what}", "seconds": "{seconds}"}),
    "decoding": (
        "data_path",
        "decoding",
        {
            "JPEG": "{pixels} to at most {max_pixels:,} pixels",
            "decoded whole": "{whole_s:.3f} s",
            "at a reduced size": "{reduced_s:.3f} s",
            "times as fast": "**{speed_ratio:.2f}** ({quartiles[0]:.2f} to {quartiles[1]:.2f})",
            "smallest cosine": "{smallest_cosine}",
        },
    ),
    "waiting": (
        "data_path",
        "waiting",
        {"workers": "{workers}", "samples/s": "{samples_per_s}", "time spent waiting": "{waiting:.1%}"},
    ),
}


def markdown(rows, columns):
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join(lines + [f"| {' | '.join(cell(shown, row) for shown in columns.values())} |" for row in rows])


def cell(shown, row):
    """What a column shows of a row. One that failed has no numbers."""
    try:
        return shown.format(**row)
    except KeyError:
        if "failed" not in row:
            raise
        return "not measured"


def memory_curve(rows, path):
    """Peak memory of a training step against its batch, with the mini-batch fixed."""
    points = [(row["rows"], row["peak_gb"]) for row in rows if row["table"] == "memory" and row["batch"] == "names"]
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    axis.plot(*zip(*points), "o-")
    axis.set(
        xscale="log", ylim=(0, None), xlabel="pairs in a batch (mini-batches of 32)", ylabel="peak above start, GB"
    )
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def insert(page, name, text):
    """Put a table between its two marks."""
    before, mark, rest = page.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    if not (mark and end):
        raise SystemExit(f"The page has no marks '<!-- {name} -->' and '<!-- end of {name} -->'. Add them.")
    return f"{before}{mark}\n{text.rstrip()}\n\n{end}{after}"


def main():
    document = ROOT / "docs" / "performance.md"
    page, machines = document.read_text("utf-8"), []
    for name, (file, table, columns) in TABLES.items():
        path = RESULTS / f"{file}.json"
        if not path.exists():
            print(f"{path.name} is not there: {name} stays as it is", file=sys.stderr)
            continue
        result = json.loads(path.read_text("utf-8"))
        rows = [row for row in result["rows"] if table in (None, row.get("table"))]
        text = markdown(rows, columns)
        page = insert(page, name, text)
        if name == "memory":
            memory_curve(rows, ROOT / "docs" / "results" / "train_memory.png")
        limit = result.get("matrix_gflop_per_s")
        # Older records name the script that the benchmark was before it became a module.
        command = re.sub(r"benchmarks/(\w+)\.py", r"-m benchmarks.\1", result["command"])
        machines.append(
            f"- `{command}`, {result['date']}: {result['machine']}, torch {result['versions']['torch']}, "
            f"transformers {result['versions']['transformers']}"
            + (f"; large matrices multiply at {limit} GFLOP/s" if limit else "")
            + ("; unfinished" if result.get("unfinished") else "")
        )
    document.write_text(insert(page, "machine", "\n".join(dict.fromkeys(machines))), "utf-8")


if __name__ == "__main__":
    main()
