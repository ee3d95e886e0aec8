"""The benchmarks, each a module to run from the root of the checkout: `python -m benchmarks.encode`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"  # what was measured, as JSON
