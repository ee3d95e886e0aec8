"""Peak memory of an evaluation over a corpus of pages, by the number of pages.

The evaluation runs from files to scores, on a dataset of pages in its published layout with one small image per page
and 1,000 queries. The model is a function that returns a random vector of 1,536 numbers (the size of Qwen2-VL-2B) for
each input. Every size runs in a fresh process, and its peak includes Python and its libraries.

    python -m benchmarks.corpus_memory            # about 10 minutes on one CPU core, 4 GB of disk
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import RESULTS

DATASET, DIMENSION, QUERIES = "ViDoRe_arxivqa", 1536, 1000
SIZES = (1_000, 10_000, 100_000, 200_000)


def write_pages(root, pages):
    """Queries, grades and a corpus whose images lie in the folder of images."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from btok_hf.evaluation.tasks import TASKS

    info = TASKS[DATASET]
    blob = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    tables = {
        "queries": pa.table({"query-id": range(QUERIES), "query": [f"page {row}?" for row in range(QUERIES)]}),
        "qrels": pa.table({"query-id": range(QUERIES), "corpus-id": range(QUERIES), "score": [1] * QUERIES}),
        "corpus": pa.table({"corpus-id": range(pages), "image": pa.nulls(pages, blob)}),
    }
    for name, table in tables.items():
        path = root / "visdoc-tasks" / "data" / info.data / name / f"{info.split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(table, path)
    folder = root / "visdoc-tasks" / "images" / info.media
    folder.mkdir(parents=True)
    Image.new("RGB", (28, 28)).save(folder / "0.png")
    content = (folder / "0.png").read_bytes()
    for page in range(1, pages):
        (folder / f"{page}.png").write_bytes(content)


def measure(pages):
    import numpy as np

    from btok_hf.evaluation import evaluate

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_pages(root, pages)
        start = time.perf_counter()
        scores, errors = evaluate(
            lambda inputs: rng.normal(size=(len(inputs), DIMENSION)).astype(np.float32),
            root,
            root / "results",
            datasets=[DATASET],
            name="random",
        )
        seconds = time.perf_counter() - start
    if errors:
        raise SystemExit(errors[DATASET])
    return {
        "pages": pages,
        "queries": scores[DATASET]["num_data"],
        "vectors_gb": round(pages * DIMENSION * 4 / 1e9, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "seconds": round(seconds),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=int, help="measure this number of pages only, and print it")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    rows = []
    for pages in SIZES:
        # Nothing large is imported here: a process's peak counts what it was forked from.
        command = [sys.executable, "-m", "benchmarks.corpus_memory", "--one", str(pages)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(rows[-1], flush=True)
    from importlib.metadata import version

    report = {
        "command": "python -m benchmarks.corpus_memory",
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU",
        "versions": {name: version(name) for name in ("torch", "numpy", "pyarrow")},
        "rows": rows,
    }
    path = RESULTS / "corpus_memory.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
