"""Golden vectors: they match for every model and loader, and differ for changed repositories."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.repositories import differences
from transformers import AutoProcessor

import btok_hf
from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, export_model, golden
from btok_hf.golden import read_golden


def test_a_changed_template_gives_other_vectors(copied):
    path = copied / "chat_template.jinja"
    template = path.read_text("utf-8")
    two_spaces = template.replace('set after_media = " "', 'set after_media = "  "').replace("(' ' if", "('  ' if")
    path.write_text(two_spaces, "utf-8")
    # Only inputs of two parts change: media and text, instruction and text.
    assert {name for (_, name), value in differences(copied).items() if value > golden.TOLERANCE} == {
        "image and text",
        "two images",
        "long video",
        "system message",
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


@pytest.mark.parametrize("num_tokens", [0, 4])
def test_golden_vectors_of_a_smolvlm_with_other_options(tmp_path, num_tokens):
    """An untied head and a full vocabulary, as they are published, with the order as given and a suffix."""
    base = tiny.build("idefics3", tmp_path / "base", vocab_size=264, tied=False)
    repo = add_bottleneck_tokens(base, tmp_path / "repo", num_tokens, order="as_given", suffix="In one word:")
    folder = export_model(BTokSentenceTransformer(repo, device="cpu"), tmp_path / "model")
    found = differences(folder)
    assert max(found.values()) <= 1e-6 and ("AutoModel", "texts and images") in found


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
        "same words": BTokSentenceTransformer(repo, device="cpu", prompts={"document": "Doc.", "text": "Doc."}),
    }
    for name, model in models.items():
        folder = export_model(model, tmp_path / name)
        found = differences(folder)
        assert max(found.values()) <= 1e-6, name
        assert ("AutoModel", "prompt document") in found or name not in ("defaults", "same words")
        assert ("AutoModel", "prompt text") not in found
        assert json.loads((folder / "golden.json").read_text("utf-8"))["closest"] > 0.01
    assert load_file(tmp_path / "cast" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert models["cast"][0].model.dtype == torch.bfloat16  # the export leaves the model as it was


def test_golden_vectors_stay_small(exported):
    assert (exported / "golden.json").stat().st_size < 40_000  # at 64 dimensions


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


def changed(folder, name, change, tmp_path):
    """The largest difference of a golden input whose content is changed, after the check of the unchanged one."""
    content = json.loads((folder / "golden.json").read_text("utf-8"))
    [row] = [row for row in content["inputs"] if row["name"] == name]
    change(row)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps({**content, "inputs": [row]}), "utf-8")
    return {loader: max(rows[name]) for loader, rows in golden.check(str(folder), str(path), None, "cpu").items()}


def test_each_golden_input_notices_what_it_is_for(bases, tmp_path):
    start = add_bottleneck_tokens(bases["qwen2_5_vl"], tmp_path / "start", noise_std=0.5, order="as_given")
    folder = export_model(BTokSentenceTransformer(start, device="cpu"), tmp_path / "model")
    assert max(differences(folder).values()) <= 1e-6
    changes = {
        "two images": lambda row: row["image"].reverse(),
        "system message": lambda row: row["messages"].pop(0),
        "long video": lambda row: row["video"]["array"].reverse(),
        "texts and images": lambda row: row["messages"][0]["content"].reverse(),
        "text and image": lambda row: row.update(text=row.pop("text")),  # now after the image
    }
    for name, change in changes.items():
        found = changed(folder, name, change, tmp_path)
        assert min(found.values()) > golden.TOLERANCE, (name, found)


@pytest.mark.parametrize("backbone", [name for name in tiny.BACKBONES if name.startswith("qwen")])
def test_the_temporal_positions_of_the_long_video_exceed_its_grid(repos, backbone):
    """Releases go on after a video at its longest side or at its last position, which are equal for a short one."""
    processor = AutoProcessor.from_pretrained(repos[backbone])
    merge = processor.video_processor.merge_size
    side = 2 * merge * processor.video_processor.patch_size
    item = golden.golden_inputs({}, side)["long video"][0]
    features = BTokSentenceTransformer(repos[backbone], device="cpu").preprocess([item])
    time, height, width = features["video_grid_thw"].sum(0).tolist()
    assert time > max(height, width) // merge


def test_old_golden_files_still_verify(exported, tmp_path):
    """Files of earlier releases have fewer inputs, and none of messages."""
    content = json.loads((exported / "golden.json").read_text("utf-8"))
    old = [row for row in content["inputs"] if "messages" not in row and "two" not in row["name"]]
    path = tmp_path / "golden.json"
    path.write_text(json.dumps({**content, "inputs": old[:-1]}), "utf-8")
    found = golden.check(str(exported), str(path), None, "cpu")
    assert max(max(pair) for rows in found.values() for pair in rows.values()) <= 1e-6


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", '{"inputs": 3, "tolerance": 0, "closest": 0, "versions": {}}', "\udcff"]
)
def test_damaged_golden_files_are_named(tmp_path, text):
    (tmp_path / "golden.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"golden.json is no file of golden vectors \(.+\). Export the model again"):
        read_golden(tmp_path / "golden.json")
