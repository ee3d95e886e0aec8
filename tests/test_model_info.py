"""A model without its weights in memory: which files make its identity, and its dimensions."""

import shutil
from pathlib import Path

import pytest
from support import tiny
from support.repositories import edit
from transformers import AutoConfig

from btok_hf.model_info import check_dimensions, identify, model_hash, trained_dimensions


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "LICENSE",
        "golden.json",
        "metrics.json",
        "trainer_state.json",
        "training_args.bin",
        "optimizer.pt",
        "assets/loss.png",
        "modeling_btok.py",
        ".eval_results/mmeb-v2.yaml",
        "checkpoint-5/model.safetensors",
        "checkpoint-5/config.json",
    ],
)
def test_files_that_no_vector_depends_on(copied, exported, name):
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_bytes(b"x")
    assert identify(str(copied))[0] == model_hash(copied) == model_hash(exported)  # wherever the folder is


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_every_other_file_of_a_repository_is_part_of_the_identity(repos, backbone, tmp_path):
    folder = Path(shutil.copytree(repos[backbone], tmp_path / "repo"))
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("README.md", "golden.json") and path.suffix != ".py":
            content, before = path.read_bytes(), model_hash(folder)
            path.write_bytes(content + b"\n")
            assert model_hash(folder) != before, path
            path.write_bytes(content)


def test_weights_in_another_format_count_where_there_are_no_safetensors(copied):
    before = model_hash(copied)
    (copied / "pytorch_model.bin").write_bytes(b"x")
    assert model_hash(copied) == before
    (copied / "model.safetensors").rename(copied / "elsewhere")
    with_bin = model_hash(copied)
    (copied / "pytorch_model.bin").write_bytes(b"y")
    assert model_hash(copied) != with_bin


def test_folders_without_a_merged_model_are_refused(tmp_path, bases):
    with pytest.raises(ValueError, match=r"has no config.json.*btok export"):
        identify(str(tmp_path))
    with pytest.raises(ValueError, match="no Bottleneck Tokens"):
        identify(bases["qwen2_vl"])


def test_dimensions_that_a_model_was_trained_for(repo, tmp_path):
    config = AutoConfig.from_pretrained(repo)
    assert trained_dimensions(config) == [64]
    folder = shutil.copytree(repo, tmp_path / "trained")
    edit(folder, "config.json", lambda config: config.update(matryoshka_dimensions=[32, 8]))
    config = AutoConfig.from_pretrained(folder)
    assert trained_dimensions(config) == [8, 32, 64]
    check_dimensions("org/model", config, 32)
    with pytest.raises(ValueError, match=r"org/model was trained for, 8 or 32 or 64, got 16\..*matryoshka_dims"):
        check_dimensions("org/model", config, 16)
    with pytest.raises(ValueError, match="8 or 32, got 64"):
        check_dimensions("org/model", config, 64, full=32)
