"""Golden vectors of a repository that was just written. That loaders reproduce them is in test_golden.py."""

import json

import numpy as np
import torch
from support.repositories import differences

from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, export_model
from btok_hf.golden import read_golden
from btok_hf.golden_writer import write_golden_vectors


def test_golden_inputs_that_do_not_fit_the_model_are_left_out(bases, tmp_path, caplog):
    repo = add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "repo", min_pixels=448 * 448, max_pixels=896 * 896)
    model = BTokSentenceTransformer(repo, device="cpu")
    with caplog.at_level("WARNING"):
        folder = export_model(model, tmp_path / "model")
    names = {row["name"] for row in json.loads((folder / "golden.json").read_text("utf-8"))["inputs"]}
    assert "long video" not in names and "short text" in names and "'long video' is left out" in caplog.text
    assert max(differences(folder).values()) <= 1e-6


def test_golden_vectors_are_in_fp32_and_not_cut_to_the_length_that_is_set(exported, copied):
    """Of a model in another precision, with another length."""
    expected = {row["name"]: row["embedding"] for row in read_golden(exported / "golden.json")["inputs"]}
    model = BTokSentenceTransformer(copied, device="cpu", max_seq_length=8, model_kwargs={"dtype": "bfloat16"})
    (copied / "golden.json").unlink()
    write_golden_vectors(copied, model)
    found = {row["name"]: row["embedding"] for row in read_golden(copied / "golden.json")["inputs"]}
    assert found.keys() == expected.keys() and model.max_seq_length == 8
    assert max(np.abs(found[name] - expected[name]).max() for name in found) <= 1e-6


def test_a_collapsed_model_is_warned_of(repo, copied, caplog):
    model = BTokSentenceTransformer(copied, device="cpu")
    with torch.no_grad():
        model[0].model.language_model.norm.weight.zero_()
    with caplog.at_level("WARNING"):
        export_model(model, copied)
    assert "gives nearly the same vector for different inputs" in caplog.text
