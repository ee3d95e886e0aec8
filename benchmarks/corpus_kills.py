"""`btok embed` and `btok index`, each killed with SIGKILL at random moments of its run, and then run to the end.

    python -m benchmarks.corpus_kills    # five minutes on two CPU cores

A run that is killed goes on where the last one was. After the last kill a run ends by itself, and its rows must be
those of a run that nobody disturbed: the same ids, no id twice, equal vectors. It writes
benchmarks/results/corpus_kills.json.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import RESULTS
from benchmarks.corpus_embed import MODEL, rows_of

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def begin(*words):
    command = [sys.executable, "-m", "btok_hf", *map(str, words)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def killed(words, kills, rng, first, last):
    """Seconds of each kill, from `first` to `last` after the start, and how many runs ended before theirs."""
    moments, ended = [], 0
    for _ in range(kills):
        moment, process = rng.uniform(first, last), begin(*words)
        try:
            process.wait(moment)
            ended += 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        moments.append(round(moment, 2))
        print(f"{words[0]}: {len(moments)} of {kills}, at {moments[-1]} s", flush=True)
    return moments, ended


def finished(*words):
    """Seconds of a run that must succeed."""
    started = time.perf_counter()
    status = begin(*words).wait()
    if status:
        raise SystemExit(f"btok {words[0]} ended with {status}")
    return time.perf_counter() - started


def indexed(path):
    """Vectors by id, from all rows of a database."""
    from btok_hf.corpus.index import Index

    table = Index.open(path)._table.search().select(["id", "vector"]).to_arrow()
    rows = dict(zip(table.column("id").to_pylist(), table.column("vector").to_pylist()))
    assert len(rows) == len(table), "an id stands twice"
    return rows


def row(name, moments, ended, found, right):
    assert found.keys() == right.keys()
    difference = max(float(np.abs(np.subtract(found[key], right[key])).max()) for key in right)
    result = {"command": name, "kills": len(moments) - ended, "ended_before": ended, "rows": len(right)}
    result |= {"moments_s": moments, "difference": difference}
    print(result, flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = folder / "texts.jsonl"
        lines = (json.dumps({"words": f"a dog on the beach, photograph {n}"}) for n in range(options.rows))
        table.write_text("\n".join(lines))
        given = ("--model", MODEL, "--text", "words", "--unit-rows", 64)
        whole = finished("embed", table, folder / "whole", *given)
        embed = ("embed", table, folder / "out", *given)
        # A tenth of a run is the start of Python, and three tenths leave work for the kills that follow.
        found = killed(embed, options.kills, rng, 0.1 * whole, 0.3 * whole)
        finished(*embed)
        rows = [row("embed", *found, rows_of(folder / "out"), rows_of(folder / "whole"))]
        whole = finished("index", folder / "whole", "--db", folder / "whole.db")
        index = ("index", folder / "whole", "--db", folder / "killed.db")
        found = killed(index, options.kills, rng, 0.2 * whole, whole)
        finished(*index)
        rows.append(row("index", *found, indexed(folder / "killed.db"), indexed(folder / "whole.db")))
    command = " ".join(["python -m benchmarks.corpus_kills", *sys.argv[1:]])
    report = {"command": command, "date": time.strftime("%Y-%m-%d"), "rows": rows}
    (RESULTS / "corpus_kills.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
