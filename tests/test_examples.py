"""The examples run as they are described: search, the notebook, the command line of fine-tuning."""

import os
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer
from support import ROOT, forks
from support.media import image

from examples import search

EXAMPLES = ROOT / "examples"


def run_search(capsys, monkeypatch, *arguments):
    """The lines that a search with the small model prints."""
    monkeypatch.setattr(search, "BUILT", EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["search.py", *map(str, arguments)])
    search.main()
    return capsys.readouterr().out.splitlines()


def test_the_model_that_was_built_is_the_default(monkeypatch, tmp_path):
    monkeypatch.setattr(search, "BUILT", tmp_path)
    assert search.default_model() == search.SMALL
    (tmp_path / "golden.json").touch()
    assert search.default_model() == tmp_path


@pytest.mark.parametrize(
    "query, hit",
    [("tiger face", "tiger-face.png"), ("octopus", "octopus.mp4"), ("bacteria", "bacteria.md")],
)
def test_search_finds_files_of_each_kind(capsys, monkeypatch, query, hit):
    lines = run_search(capsys, monkeypatch, EXAMPLES / "files", query, "--top", 3)
    scores = [float(line.split()[0]) for line in lines]
    assert len(lines) == 3 and scores == sorted(scores, reverse=True)
    assert lines[0].endswith(hit)


def test_search_takes_an_image_and_names_what_it_skips(capsys, monkeypatch, tmp_path):
    inner = tmp_path / "of two words"
    inner.mkdir()
    image = (EXAMPLES / "files" / "turtle.png").read_bytes()
    (inner / "a turtle.png").write_bytes(image)
    for name in ("crab.png", "octopus.mp4"):
        (tmp_path / name).write_bytes((EXAMPLES / "files" / name).read_bytes())
    for name, content in (("broken.png", image[:99]), ("broken.mp4", b"x"), ("table.csv", b"a,b"), ("empty.txt", b"")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    (tmp_path / "long.txt").write_text("A long text. " * 5000)
    Image.new("RGB", (400, 400)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    lines = run_search(capsys, monkeypatch, tmp_path, "--image", EXAMPLES / "files" / "turtle.png")
    skipped = [line for line in lines if line.startswith("skipped ")]
    names = ["broken.mp4", "broken.png", "empty.txt", "huge.png", "latin.txt", "table.csv"]
    assert sorted(Path(line.split(": ")[0]).name for line in skipped) == names
    assert not any("Input" in line for line in skipped)
    hits = [line.split(maxsplit=1)[1] for line in lines if line not in skipped]
    assert hits[0].endswith("a turtle.png") and len(hits) == 4


def test_a_text_that_looks_like_a_file_is_a_text(capsys, monkeypatch, tmp_path):
    (tmp_path / "name.txt").write_text("tiger.png")
    lines = run_search(capsys, monkeypatch, tmp_path, "tiger.png")
    assert [line.split()[1] for line in lines] == [str(tmp_path / "name.txt")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere", "tiger"], "nowhere is not a folder"),
        ([EXAMPLES / "files"], "give a text or --image"),
        ([EXAMPLES / "files", ""], "the query is empty"),
        ([EXAMPLES / "files", "tiger", "--top", "0"], "--top must be 1 or more, got 0"),
        ([EXAMPLES / "files", "--image", "nothing.png"], "--image nothing.png is not a file"),
        # Before the model is loaded.
        ([ROOT / "training" / "recipes", "tiger", "--model", "nope"], "recipes holds no file that can be read"),
        ([EXAMPLES / "files", "tiger", "--model", "nope"], "error: "),
    ],
)
def test_search_explains_wrong_arguments(capsys, monkeypatch, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run_search(capsys, monkeypatch, *arguments)
    assert message in f"{stop.value} {capsys.readouterr().err}"


def test_the_notebook_runs_in_a_fresh_kernel():
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    printed = {
        cell.source.splitlines()[-1]: "".join(output.get("text", "") for output in cell.outputs) for cell in cells
    }
    assert printed['search("tiger face")'].split()[1] == "tiger-face.png"
    assert printed['search("octopus")'].split()[1] == "octopus.mp4"


@pytest.mark.parametrize("script", ["finetune.py", "demo.py", "prepare_emoji.py"])
def test_scripts_explain_themselves(script):
    run = forks.run(EXAMPLES / script, "--help", check=True)
    assert "usage:" in run.stdout and f"python examples/{script}" in run.stdout


def test_fine_tuning_checks_the_pairs_before_it_writes(bases, tmp_path):
    (tmp_path / "pairs.csv").write_text("question,positive\na,b\n")
    command = ["examples/finetune.py", tmp_path / "pairs.csv", tmp_path / "mine"]
    run = forks.run(*command, "--base", bases["qwen2_vl"], cwd=ROOT)
    assert run.returncode == 1 and "error: Dataset" in run.stderr and "Traceback" not in run.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("mine")] == []


def test_the_example_fine_tunes_on_a_csv_of_texts_and_image_paths(bases, tmp_path):
    image(60, 50).save(tmp_path / "a.png")
    rows = ["query,positive", "a red cat,yes", f"{tmp_path}/a.png,noise", "one more,no"]
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    command = ["examples/finetune.py", tmp_path / "pairs.csv", f"{tmp_path}/mine/", "--base", bases["qwen2_vl"]]
    for steps in ("2", "3"):  # the second run continues the first
        forks.run(*command, "--steps", steps, cwd=ROOT, check=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    assert {path.name for path in tmp_path.glob("mine*")} == {"mine", "mine-qwen2_vl", "mine-qwen2_vl-run"}
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "No training is recorded" not in card and "| pairs | training | 3 rows |" in card
    model = SentenceTransformer(str(tmp_path / "mine"), device="cpu")
    assert model.encode(["a red cat", str(tmp_path / "a.png")]).shape == (2, 64)
