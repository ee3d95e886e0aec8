"""The model that a training starts from: written once, completely, and never mixed up with another."""

import shutil

import pytest
from support.training import config

from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens
from btok_hf.training.start import check_starting_point, starting_point


def test_a_folder_that_was_made_from_something_else_is_refused(bases, tmp_path):
    args, folder = config(tmp_path), tmp_path / "start"
    base = str(bases["qwen2_vl"])
    assert starting_point(base, f"{folder}/", args, 4) == str(folder)
    model = BTokSentenceTransformer(str(folder), device="cpu")
    assert model.transformer.model.config.btok_num_tokens == 4
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert starting_point(base, f"{folder}/", args) == str(folder)  # 4 is the default
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    shutil.copytree(base, tmp_path / "another" / "qwen2_vl")
    for other, settings in ((base, {"num_tokens": 2}), (base, {"max_pixels": 56 * 56}), (tmp_path / "another", {})):
        other = other if other == base else str(other / "qwen2_vl")
        for refuse in (check_starting_point, lambda *given, **more: starting_point(*given, args, **more)):
            with pytest.raises(ValueError, match=r"start was made from .*'num_tokens': 4.*Remove it, or name another"):
                refuse(other, folder, **settings)
    (folder / "made_from.json").unlink()
    with pytest.raises(ValueError, match="start was made from something that it does not record"):
        starting_point(base, folder, args)


def test_a_model_that_was_written_in_part_is_written_again(bases, tmp_path, monkeypatch):
    """A run that was killed while it wrote the base would otherwise never start again."""
    args, folder, base = config(tmp_path), tmp_path / "start", str(bases["qwen2_vl"])

    def killed(base, output_dir, *given, **settings):
        add_bottleneck_tokens(base, output_dir, *given, **settings)
        (output_dir / "config.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("btok_hf.training.start.add_bottleneck_tokens", killed)
    with pytest.raises(KeyboardInterrupt):
        starting_point(base, folder, args)
    assert not folder.exists()
    monkeypatch.undo()
    BTokSentenceTransformer(starting_point(base, folder, args), device="cpu")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("start")] == ["start"]


def test_a_model_that_has_tokens_is_its_own_start(repo, tmp_path):
    args, folder = config(tmp_path), tmp_path / "start"
    for number in (4, None):
        assert check_starting_point(repo, folder, number)
        assert starting_point(repo, folder, args, number) == repo
    assert not folder.exists()
    with pytest.raises(ValueError, match="has 4 Bottleneck Tokens, and num_tokens is 8"):
        check_starting_point(repo, folder, 8)
