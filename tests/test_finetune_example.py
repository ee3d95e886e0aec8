"""The example that fine-tunes on a CSV file."""

import os
import subprocess
import sys

from sentence_transformers import SentenceTransformer
from support import ROOT
from support.media import image


def test_the_example_fine_tunes_on_a_csv_of_texts_and_image_paths(bases, tmp_path):
    image(60, 50).save(tmp_path / "a.png")
    rows = ["query,positive", "a red cat,yes", f"{tmp_path}/a.png,noise", "one more,no"]
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    command = [sys.executable, "examples/finetune.py", tmp_path / "pairs.csv", tmp_path / "mine"]
    command += ["--base", bases["qwen2_vl"], "--steps", "2"]
    for _ in range(2):  # it can be run again
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "No training is recorded" not in card and "| pairs | training | 3 rows |" in card
    model = SentenceTransformer(str(tmp_path / "mine"), device="cpu")
    assert model.encode(["a red cat", str(tmp_path / "a.png")]).shape == (2, 64)
