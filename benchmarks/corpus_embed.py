"""`btok embed` on CPU cores: rows a second by processes and threads, going on after a kill, memory by number of rows.

And the memory of `btok index`, by number of rows, and the start of the Space.

The model is btok-small. Every run is a fresh process, or several, and its seconds include the start of Python and the
loading of the model.

    python -m benchmarks.corpus_embed                          # everything: about 10 minutes on two CPU cores
    python -m benchmarks.corpus_embed --table memory --sizes 1000 100000

`throughput` embeds the 3,112 emoji drawings. `kill` does it with two processes, kills both with SIGKILL after a third
of the units, goes on with one, and compares with an undisturbed run. `memory` embeds short texts, all different.
`index` indexes random vectors of 128 numbers with random thumbnails of 4 kB.
`space` starts the page of `examples/space` twice: the first time it embeds and indexes its 300 files.
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from benchmarks import RESULTS, ROOT

MODEL = ROOT / "benchmarks" / "unified" / "models" / "btok-small"
DRAWINGS = (ROOT / "data" / "emoji", "--image", "image", "--columns", "emoji,category")
UNITS = ("--unit-rows", 128)
ARMS = ((1, 1), (1, 2), (2, 1))  # processes, threads of each


def start(out, given, *flags, processes=1, threads=1):
    """Processes of one run."""
    command = [sys.executable, "-m", "btok_hf", "embed", *given[:1], out, "--model", MODEL, *given[1:], *flags]
    started = []
    for rank in range(processes):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        environment |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
        process = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        started.append(process)
    return started


def finish(started):
    """Peak memory in MB of each process. All must succeed."""
    peaks = []
    for process in started:
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"status {status}: {process.args}")
        peaks.append(usage.ru_maxrss // 1000)
    return peaks


def rows_of(out):
    """Embeddings by id."""
    from btok_hf.corpus.units import read_units

    settings, batches = read_units(str(out), ["id", "embedding"])
    assert settings["units_planned"] == settings["units_written"]
    pairs = [row for batch in batches for row in batch.to_pylist()]
    rows = {row["id"]: row["embedding"] for row in pairs}
    assert len(rows) == len(pairs)
    return rows


def throughput(folder, arms):
    """Seconds and rows a second of each arm, and the largest difference of its vectors to those of the first."""
    import numpy as np

    found, first = [], None
    for processes, threads in arms:
        out = folder / f"{processes}x{threads}"
        begin = time.perf_counter()
        finish(start(out, DRAWINGS, *UNITS, processes=processes, threads=threads))
        seconds = time.perf_counter() - begin
        rows = rows_of(out)
        first = first or rows
        assert rows.keys() == first.keys()
        difference = max(float(np.abs(np.subtract(rows[id], first[id])).max()) for id in rows)
        row = {"processes": processes, "threads": threads, "rows": len(rows), "seconds": round(seconds, 1)}
        found.append(row | {"rows_per_second": round(len(rows) / seconds, 1), "difference": difference})
        print(found[-1], flush=True)
    return found


def kill(folder, _):
    """Whether anything is lost, doubled or done again after SIGKILL."""
    import numpy as np

    finish(start(folder / "whole", DRAWINGS, *UNITS))
    whole = rows_of(folder / "whole")
    units, out = folder / "killed" / "units", folder / "killed"
    planned = len(list((folder / "whole" / "units").glob("*.parquet")))
    started = start(out, DRAWINGS, *UNITS, processes=2)
    while len(list(units.glob("*.parquet")) if units.is_dir() else ()) < planned // 3:
        time.sleep(0.01)
    for process in started:
        process.kill()
        process.wait()
    before = {path: path.stat().st_mtime_ns for path in units.glob("*.parquet")}
    finish(start(out, DRAWINGS, *UNITS))
    rows = rows_of(out)
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    row = {
        "units": planned,
        "written_before_the_kill": len(before),
        "ids_equal": rows.keys() == whole.keys(),
        "difference": max(float(np.abs(np.subtract(rows[id], whole[id])).max()) for id in whole),
    }
    print(row, flush=True)
    return [row]


def memory(folder, sizes):
    """Peak memory of one process by the number of rows."""
    found = []
    for size in sizes:
        table = folder / f"{size}.jsonl"
        with open(table, "w") as file:
            for number in range(size):
                print(json.dumps({"words": f"a dog on the beach, photograph {number}"}), file=file)
        begin = time.perf_counter()
        (peak,) = finish(start(folder / f"out-{size}", (table, "--text", "words")))
        found.append({"rows": size, "peak_mb": peak, "seconds": round(time.perf_counter() - begin, 1)})
        print(found[-1], flush=True)
    return found


def index(folder, sizes):
    """Peak memory of one run into a new database, and of a second one in which nothing changed."""
    found = []
    for size in sizes:
        write_units(folder / "out", size)
        for run in ("new", "again"):
            begin = time.perf_counter()
            words = ("-m", "btok_hf", "index", folder / "out", "--db", folder / f"db-{size}")
            (peak,) = finish([subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.DEVNULL)])
            seconds = round(time.perf_counter() - begin, 1)
            found.append({"rows": size, "run": run, "peak_mb": peak, "seconds": seconds})
            print(found[-1], flush=True)
    return found


def write_units(out, size, rows=500, dimensions=128):
    """Units of `rows` rows. Only those that another size has not written."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from btok_hf.corpus.units import Corpus, unit_schema

    corpus, schema, generator = Corpus(str(out)), unit_schema(dimensions), np.random.default_rng(size)
    corpus.claim({"format": 1, "model": "none", "revision": None, "dimensions": dimensions})
    names = [f"{start:09d}" for start in range(0, size, rows)]
    for start in set(map(int, names)) - set(map(int, corpus.written())):
        columns = {name: pa.nulls(rows, schema.field(name).type) for name in schema.names}
        columns |= {"id": [f"pictures/{start + row}.png" for row in range(rows)], "kind": ["image"] * rows}
        columns["thumbnail"] = [generator.bytes(4096) for _ in range(rows)]
        vectors = generator.standard_normal(rows * dimensions, np.float32)
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(vectors, dimensions)
        content = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, schema), content)
        corpus.write(f"{start:09d}", content.getvalue().to_pybytes(), {})
    corpus.set_plan(names)


def space(folder, _):
    """Seconds until the page answers, and seconds of CPU time until then."""
    command = [sys.executable, "-m", "examples.space.prepare", str(folder), "--model", str(MODEL)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found = []
    for run in ("first", "again"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        given = {"GRADIO_SERVER_PORT": port, "GRADIO_TEMP_DIR": str(folder / "uploads"), "OMP_NUM_THREADS": "1"}
        given |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        begin = time.perf_counter()
        command = [sys.executable, str(folder / "app.py")]
        process = subprocess.Popen(command, env={**os.environ, **given}, stdout=subprocess.DEVNULL)
        while not answers(port):
            if process.poll() is not None:
                raise SystemExit("the page did not start")
            time.sleep(0.1)
        seconds = round(time.perf_counter() - begin, 1)
        process.kill()
        usage = os.wait4(process.pid, 0)[2]
        cpu = round(usage.ru_utime + usage.ru_stime, 1)
        found.append({"start": run, "seconds": seconds, "cpu_seconds": cpu, "peak_mb": usage.ru_maxrss // 1000})
        print(found[-1], flush=True)
    return found


def answers(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}"):
            return True
    except OSError:
        return False


def main():
    tables = {"throughput": throughput, "kill": kill, "memory": memory, "index": index, "space": space}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="+", choices=tables, default=list(tables), help="tables to measure")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000], help="rows of `memory`, `index`"
    )
    options = parser.parse_args()
    path = RESULTS / "corpus_embed.json"
    report = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for name in options.table:
        with tempfile.TemporaryDirectory() as folder:
            report[name] = tables[name](Path(folder), ARMS if name == "throughput" else options.sizes)
    report["machine"] = f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
