"""What the card says about the training run: results, losses, command, licences."""

import io
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image as PILImage
from support.cards import (
    LAST_SECTIONS,
    SECTIONS,
    TOKEN,
    assert_well_formed,
    blocks,
    execute,
    numbers,
    section,
    sections,
)
from support.media import image

from btok_hf.hub_card.card import PLACEHOLDER, CardArguments
from btok_hf.hub_card.training_run import _command, card_files, loss_curves
from btok_hf.training import CondensationConfig


def test_pictures(trained):
    loss = trained.folder / "assets" / "loss.png"
    assert PILImage.open(loss).size == (960, 240) and PILImage.open(loss).format == "PNG"
    assert loss.stat().st_size < 60_000
    assert "](assets/loss.png)" in section(trained.files["README.md"], "Training")
    examples = [PILImage.open(trained.folder / "assets" / f"example_{n}.png") for n in (1, 2, 3)]
    assert [example.size for example in examples] == [(60, 40), (40, 90), (512, 171)]
    assert examples[0].tobytes() == image(60, 40, 0).tobytes()
    log = [{"loss": 1.0, "infonce": 1.0, "step": step} for step in range(1, 500)]
    assert PILImage.open(io.BytesIO(loss_curves(log))).size == (640, 240)  # nothing was condensed
    assert len(loss_curves(log)) < 60_000
    assert loss_curves([{"train_loss": 1.0, "step": 1}, {"eval_loss": 1.0, "step": 1}]) is None


def test_training_is_described_as_it_was(trained):
    text = section(trained.files["README.md"], "Training")
    last = [log for log in trained.trainer.state.log_history if "loss" in log][-1]
    assert "| steps | 6 (3.00 epochs) |" in text and "| rows per step | 4 |" in text
    assert f"loss {last['loss']:.4f}, infonce {last['infonce']:.4f}, condensation {last['condensation']:.4f}" in text
    assert f"{sum(p.numel() for p in trained.trainer.model.parameters() if p.requires_grad):,} |" in text
    assert "rank 4, alpha 8" in text and "float32 weights |" in text and "threads) |" in text
    assert blocks(text, "bash") == [_command(trained.facts["command"], trained.trainer.args) + "\n"]
    arguments = yaml.safe_load(blocks(text, "yaml")[0])
    assert arguments["learning_rate"] == 1e-2 and arguments["condensation_weight"] == 5.0
    assert arguments["condense"] == "query" and arguments["max_steps"] == 6 and arguments["seed"] == 42
    assert not {"output_dir", "hub_token", "hub_model_id", "report_to", "logging_steps"} & set(arguments)
    # The YAML can be used as arguments.
    CondensationConfig(output_dir="unused", use_cpu=True, report_to="none", **arguments)
    data = section(trained.files["README.md"], "Training data and licences")
    assert "| pic\\|tures | training | 8 rows | [org/pictures](https://huggingface.co/datasets/org/pictures) |" in data
    assert (
        "| evaluation | 8 queries, 8 candidates | local file pairs \\| of \\`run\\`.parquet | not recorded |" in data
    )
    assert "Languages of the training data: en, de." in data


def test_no_token_gets_into_any_file(trained):
    for name, content in trained.files.items():
        assert TOKEN not in (content.decode("latin-1") if isinstance(content, bytes) else content), name
    assert "--hub_token '***'" in trained.files["README.md"]
    args = SimpleNamespace(hub_token="secret", world_size=1)
    for words in (["--hub_token=secret"], ["--hub_tok", "secret"], [f"--note={TOKEN}"], ['{"token": "secret"}']):
        shown = _command(words, args)
        assert "secret" not in shown and TOKEN not in shown and "***" in shown


def test_command_runs_in_a_shell_as_it_was_given(monkeypatch):
    monkeypatch.setenv("HOME", "/home/some one")
    words = [
        "a b",
        "/home/some one/z",
        "it's",
        "",
        '{"a": "/home/some one/x.parquet"}',
        "--file=/home/some one/y",
        "$HOME `ls`",
        "c\nd",
    ]
    shown = _command(words, SimpleNamespace(hub_token=None, world_size=1))
    assert "some one" not in shown and shown.startswith("python 'a b' \"$HOME\"/z ")
    script = f"printf '%s\\0' {shown.removeprefix('python ')}"
    output = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.split("\0")[:-1] == words
    distributed = _command(["train.py"], SimpleNamespace(hub_token=None, world_size=8))
    assert distributed == "accelerate launch --num_processes 8 train.py"


def test_eval_results_only_for_a_task_of_a_benchmark(trained):
    assert not any(name.startswith(".eval_results") for name in trained.files)
    arguments = CardArguments(eval_task="retrieval")
    arguments.check(["any"], "org/bench")
    with pytest.raises(ValueError, match=r"eval_task is 'retrieval', but the evaluation data is .*parquet"):
        card_files(trained.trainer, arguments, **trained.facts)
    files = card_files(trained.trainer, arguments, **{**trained.facts, "eval_source": "org/bench"})
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/bench.yaml"]))
    assert (entry.dataset_id, entry.task_id) == ("org/bench", "retrieval")
    assert entry.value == trained.facts["after"]["pairs | of `run`_cosine_ndcg@10"]
    assert entry.notes == "cosine_ndcg@10, 8 queries, 8 candidates" and entry.date
    assert 'retrieval_evaluator("org/bench")' in files["README.md"].replace("'", '"')
    assert ModelCard(files["README.md"]).data.datasets == ["org/pictures"]  # not what it was evaluated on


def test_licences_are_stated_or_said_to_be_unknown(trained):
    assert trained.files["LICENSE"] == (Path(__file__).parents[1] / "LICENSE").read_text("utf-8")
    stated = CardArguments(
        model_license="other",
        license_name="my licence",
        license_link="https://example.org/licence",
        base_license="apache-2.0 | notice",
        data_licenses='{"pic|tures": "CC BY 4.0"}',
    )
    files = card_files(trained.trainer, stated, **trained.facts)
    data = ModelCard(files["README.md"]).data
    assert (data.license, data.license_name, data.license_link) == (
        "other",
        "my licence",
        "https://example.org/licence",
    )
    text = section(files["README.md"], "Training data and licences")
    assert "[my licence](<https://example.org/licence>)" in text and "Its licence: apache-2.0 \\| notice." in text
    assert "| CC BY 4.0 |" in text and "| not recorded |" in text and "Languages of the training data: not rec" in text
    assert "LICENSE" not in files

    files = card_files(trained.trainer, **trained.facts)
    text = section(files["README.md"], "Training data and licences")
    assert "No licence is stated for these weights" in text and "Its licence: unknown." in text
    assert "LICENSE" not in files and ModelCard(files["README.md"]).data.license is None


def test_a_trainer_that_did_not_train_gives_no_card_of_a_training(trained, monkeypatch):
    monkeypatch.setattr(trained.trainer.state, "global_step", 0)
    card = card_files(trained.trainer)["README.md"]
    assert "No training is recorded" in card and "trained but not evaluated" not in card
    assert_well_formed(card)


def test_a_run_without_evaluation_and_hub_id(trained, monkeypatch):
    monkeypatch.setattr(trained.trainer.args, "hub_model_id", None)
    monkeypatch.setattr(trained.trainer.state, "log_history", [])
    files = card_files(trained.trainer)
    card = files["README.md"]
    assert set(files) == {"README.md"}
    assert sections(card) == [*SECTIONS, "Training", *LAST_SECTIONS]
    assert_well_formed(card)
    assert "trained but not evaluated" in card and "No losses were logged" in card and "results above" not in card
    assert "| pic\\|tures | training | 8 rows | not recorded | not recorded |" in card
    assert ModelCard(card).data.metrics is None
    for block in blocks(card, "python")[:2]:
        printed, expected, _ = execute(block, (f'"{PLACEHOLDER}"', repr(str(trained.folder))))
        assert numbers(printed) == pytest.approx(numbers(expected), abs=2e-4)
