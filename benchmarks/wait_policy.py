"""What `OMP_WAIT_POLICY=PASSIVE` does: encoding on two threads, alone and beside another process that does the same.

    python -m benchmarks.wait_policy    # 2 minutes on two CPU cores

OpenMP reads the variable when torch is imported, so every time is that of a fresh process.
"""

import argparse
import os
import subprocess
import sys

from benchmarks import ROOT

CODE = """
import sys, time
from btok_hf import BTokSentenceTransformer
model = BTokSentenceTransformer(sys.argv[1], device="cpu")
texts = [{"text": f"a dog on the beach, photograph {number}"} for number in range(int(sys.argv[2]))]
model.encode(texts[:64])
start = time.perf_counter()
model.encode(texts)
print(time.perf_counter() - start)
"""
MODEL = ROOT / "benchmarks" / "unified" / "models" / "btok-small"


def seconds(policy, processes, count):
    """Seconds that each of some processes takes, at once."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_NUM_THREADS": "2"} | ({"OMP_WAIT_POLICY": policy} if policy else {})
    command = [sys.executable, "-c", CODE, str(MODEL), str(count)]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(processes)
    ]
    return [float(process.communicate()[0]) for process in started]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2048, help="texts to encode")
    options = parser.parse_args()
    for processes in (1, 2):
        for policy in ("PASSIVE", None):
            times = ", ".join(f"{value:.1f}" for value in seconds(policy, processes, options.count))
            print(f"{processes} process(es), {policy or 'not set':8} {times} s", flush=True)


if __name__ == "__main__":
    main()
