"""What several test files share: builders of tiny models and trees, reference computations, a Hub server, scripts."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
