"""Golden vectors: they match for every model and loader, and differ for changed repositories."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.repositories import add_noise, differences

import btok_hf
from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, export_model, golden
from btok_hf.golden import read_golden


def test_a_changed_template_gives_other_vectors(copied):
    path = copied / "chat_template.jinja"
    template = path.read_text("utf-8")
    path.write_text(template.replace("join(' ')", "join('  ')"), "utf-8")
    # Only inputs of two parts change: media and text, instruction and text.
    assert {name for (_, name), value in differences(copied).items() if value > golden.TOLERANCE} == {
        "image and text",
        "prompt query",
    }
    path.write_text(template.replace("'< |'", "'<|'"), "utf-8")
    assert golden.check(str(copied), str(copied / "golden.json"), None, "cpu")["AutoModel"].startswith("ValueError")
    path.write_text(template.replace("<|btok_3|>", ""), "utf-8")
    results = golden.check(str(copied), str(copied / "golden.json"), None, "cpu")
    assert "Row 0 has 3 Bottleneck Token(s) but must have 4" in results["AutoModel"]
    assert min(min(pair) for pair in results["SentenceTransformer"].values()) > golden.TOLERANCE


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_golden_vectors_hold_for_every_backbone(repos, tmp_path, backbone):
    folder = export_model(BTokSentenceTransformer(repos[backbone], device="cpu"), tmp_path / "model")
    assert max(differences(folder).values()) <= 1e-6


def test_golden_vectors_of_special_models(bases, repo, with_adapters, tmp_path):
    """Last-token pooling, bf16 weights, weights cast after loading, adapters, and changed defaults of `encode`."""
    last = add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "base", 0)
    options = {"prompts": {"document": "Doc."}, "default_prompt_name": "document", "truncate_dim": 16}
    models = {
        "last": BTokSentenceTransformer(last, device="cpu"),
        "bf16": BTokSentenceTransformer(repo, device="cpu", model_kwargs={"dtype": "bfloat16"}),
        "cast": BTokSentenceTransformer(repo, device="cpu").to(torch.bfloat16),
        "adapters": with_adapters,
        "defaults": BTokSentenceTransformer(repo, device="cpu", **options),
    }
    for name, model in models.items():
        folder = export_model(model, tmp_path / name)
        found = differences(folder)
        assert max(found.values()) <= 1e-6, name
        assert ("AutoModel", "prompt document") in found or name != "defaults"
        assert json.loads((folder / "golden.json").read_text("utf-8"))["closest"] > 0.01
    assert load_file(tmp_path / "cast" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert models["cast"][0].model.dtype == torch.bfloat16  # the export leaves the model as it was


def test_golden_vectors_come_from_memory_and_stay_small(exported, monkeypatch, tmp_path, repo):
    """If the written weights differ from those in memory, the check fails."""
    assert (exported / "golden.json").stat().st_size < 15_000  # at 64 dimensions; 100 kB at 1,536
    model = BTokSentenceTransformer(repo, device="cpu")
    save = type(model[0].merged()).save_pretrained

    def save_others(self, folder, **kwargs):
        save(self, folder, **kwargs)
        add_noise(Path(folder), 0.01)

    monkeypatch.setattr(type(model[0].merged()), "save_pretrained", save_others)
    found = differences(export_model(model, tmp_path / "model"))
    assert min(found.values()) > golden.TOLERANCE


def test_golden_vectors_that_prove_nothing_are_refused(exported, copied, repo, tmp_path):
    (copied / "golden.json").unlink()
    with pytest.raises(ValueError, match=r"has no golden.json.*export_model writes it"):
        btok_hf.verify(copied)
    model = BTokSentenceTransformer(repo, device="cpu")
    model.save_pretrained(str(exported.parent / "saved"))
    assert not (exported.parent / "saved" / "golden.json").exists()
    export_model(model, tmp_path / "again")
    model.save_pretrained(str(tmp_path / "again"))  # other weights may be saved over an export
    assert not (tmp_path / "again" / "golden.json").exists()
    with torch.no_grad():
        model[0].model.language_model.norm.weight.zero_()
    collapsed = export_model(model, tmp_path / "collapsed")
    assert max(differences(collapsed).values()) == 0.0
    with pytest.raises(ValueError, match="too similar to verify"):
        btok_hf.verify(collapsed)


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", '{"inputs": 3, "tolerance": 0, "closest": 0, "versions": {}}', "\udcff"]
)
def test_damaged_golden_files_are_named(tmp_path, text):
    (tmp_path / "golden.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"golden.json is no file of golden vectors \(.+\). Export the model again"):
        read_golden(tmp_path / "golden.json")
