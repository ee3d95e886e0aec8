"""Random inputs and files against the library: each gives a finite unit vector, or an error that names it.

    python -m benchmarks.fuzz.run --inputs 100000 --minutes 30 --seed 0      # make fuzz
    python -m benchmarks.fuzz.run --only images:1234                         # one input again, with its findings

Inputs run in child processes, because native decoders can crash or hang: both are findings. An input depends on the
seed, its kind and its number only. Findings and counts go to `--output`.
"""

import argparse
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from benchmarks import ROOT
from benchmarks.fuzz.files import REPOSITORY

# Inputs of each kind, of 1,000.
SHARES = {"texts": 425, "junk": 150, "arrays": 100, "images": 130, "videos": 30, "dicts": 70, "messages": 70,
          "pictures": 8, "clips": 4, "pairs": 8, "recipes": 3, "repositories": 2}  # fmt: skip
SECONDS = 60  # without a sign of life, a batch hangs; the start of a process included


def child(kind, start, stop, options, rows=0):
    """Run inputs in a child process. Yields its reports; returns where it crashed or hung, if it did."""
    words = [sys.executable, "-m", "benchmarks.fuzz.worker", kind, f"--start={start}", f"--stop={stop}"]
    words += [f"--seed={options.seed}", f"--rows={rows}", f"--model={options.model}"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors)
        lines: queue.Queue = queue.Queue()

        def read():
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        begun = None
        try:
            while True:
                try:
                    line = lines.get(timeout=SECONDS)
                except queue.Empty:
                    return begun, "hangs"
                if line is None:
                    break
                try:
                    report = json.loads(line)
                except ValueError:
                    continue  # a library that writes to standard output
                begun = report if "begun" in report else None
                if "done" in report:
                    yield report
                    if time.monotonic() > options.end:
                        return None
            status = process.wait()
            if status == 0:
                return None
            errors.seek(0)
            return begun, f"ends the process with status {status}: {errors.read()[-2000:].decode(errors='replace')}"
        finally:
            process.kill()
            process.wait()


def fuzz(kind, start, stop, options, rows=0):
    """Inputs of one kind, through crashes and hangs. Yields reports."""
    while start < stop and time.monotonic() < options.end:
        reports = child(kind, start, stop, options, rows)
        while True:
            try:
                report = next(reports)
            except StopIteration as ended:
                fault = ended.value
                break
            start = report["done"]
            yield report
        if fault is None:
            return
        place, what = fault
        if place is None:
            raise SystemExit(f"A child process of kind {kind} {what}")
        if place["stop"] - place["begun"] > 1:  # which one is it?
            yield from fuzz(kind, place["begun"], place["stop"], options, rows=1)
        else:
            finding = {"input": f"{kind}:{place['begun']}", "what": what, "place": ""}
            yield {"done": place["stop"], "counts": {"findings": 1}, "warnings": {}, "findings": [finding]}
        start = place["stop"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="number of inputs, if all kinds are run")
    parser.add_argument("--minutes", type=float, default=30, help="stop after this time")
    parser.add_argument("--seed", type=int, default=0, help="seed of all inputs")
    parser.add_argument("--kinds", nargs="+", choices=SHARES, default=list(SHARES), help="only these kinds")
    parser.add_argument("--only", help="KIND:NUMBER, one input again")
    parser.add_argument("--output", default="runs/fuzz.json", help="file of counts and findings")
    parser.add_argument("--model", default=str(REPOSITORY), help="repository with Bottleneck Tokens")
    options = parser.parse_args()
    began = time.monotonic()
    options.end = began + options.minutes * 60
    if options.only:
        kind, number = options.only.split(":")
        for report in fuzz(kind, int(number), int(number) + 1, options, rows=1):
            print(json.dumps(report, indent=1))
        return
    result, findings, warned = {}, [], Counter()
    for kind in options.kinds:
        counts, since = Counter(), time.monotonic()
        wanted = max(1, options.inputs * SHARES[kind] // 1000)
        start, done = 0, 0
        for report in fuzz(kind, start, wanted, options):
            done = report["done"]
            counts.update(report["counts"])
            warned.update(report["warnings"])
            for finding in report["findings"]:
                findings.append(finding)
                print(f"{finding['input']}  {finding['what']}\n    {finding['place']}", flush=True)
        result[kind] = {"inputs": done, **counts, "seconds": round(time.monotonic() - since)}
        print(f"{kind}: {result[kind]}", flush=True)
    total = {"inputs": sum(row["inputs"] for row in result.values()), "findings": len(findings)}
    total |= {"seed": options.seed, "seconds": round(time.monotonic() - began)}
    print(json.dumps(total))
    for text, count in warned.most_common(12):
        print(f"  warned {count} times: {text}")
    content = {**total, "kinds": result, "warnings": dict(warned.most_common(50)), "found": findings[:500]}
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
