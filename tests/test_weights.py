"""Weights: written as stock models write them, checked, and computed with in fp32 layer by layer."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.inputs import process
from support.pictures import colours
from transformers import AutoConfig, AutoProcessor

from btok_hf import weights
from btok_hf.adapters import MergedTensors
from btok_hf.modeling.modeling_btok import STOCK_CLASSES, load_stock_model, stock_class


@pytest.mark.parametrize("backbone", STOCK_CLASSES)
def test_names_and_bytes_are_those_of_save_pretrained(repos, backbone, tmp_path):
    config = AutoConfig.from_pretrained(repos[backbone])
    torch.manual_seed(0)
    model = stock_class(config)(config)
    model.save_pretrained(tmp_path / "stock", max_shard_size="100KB")
    tensors = MergedTensors(model.model)
    names = weights.names_on_disk(type(model), config, tensors)
    plan = weights.plan_shards({name: tensors.empty(names[name]) for name in names}, "100KB")
    (tmp_path / "ours").mkdir()
    weights.write_weights(tmp_path / "ours", lambda name: tensors[names[name]], plan)
    files = {path.name for path in (tmp_path / "stock").glob("model*")}
    assert len(files) > 3 and files == {path.name for path in (tmp_path / "ours").iterdir()}
    for file in files:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes(), file


def test_a_file_that_is_not_what_was_written_is_refused(tmp_path, monkeypatch):
    tensors = {"a": torch.ones(3), "b": torch.zeros(1)}
    plan = weights.plan_shards(tensors)
    weights.write_weights(tmp_path, tensors.__getitem__, plan)

    def save_others(shard, path, **kwargs):
        save_file({**shard, "a": shard["a"] + 1}, path, **kwargs)

    monkeypatch.setattr(weights, "save_file", save_others)
    with pytest.raises(OSError, match=r"a in .*model.safetensors is not what was written"):
        weights.write_weights(tmp_path, tensors.__getitem__, plan)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    tensors = {"a": torch.zeros(4), "b": torch.tensor([1.0, torch.inf]), "c": torch.arange(3)}
    with pytest.raises(ValueError, match=r"1 weights are not finite, the first is b\. Nothing was written"):
        weights.write_weights(tmp_path, tensors.__getitem__, weights.plan_shards(tensors, "1GB"))
    assert not list(tmp_path.iterdir())


def test_one_shard_is_in_memory_at_a_time(tmp_path):
    """A tensor is asked for when its shard is written, and again to check it."""
    asked = []

    def read(name):
        asked.append((name, len(list(tmp_path.iterdir()))))
        return torch.zeros(1000)

    weights.write_weights(tmp_path, read, weights.plan_shards({name: torch.empty(1000) for name in "abc"}, "4KB"))
    assert asked == [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("c", 2), ("c", 3)]


def test_sizes_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"such as '5GB' or '500MB', got 'large'"):
        weights.plan_shards({"a": torch.empty(3)}, "large")


@pytest.mark.parametrize("backbone", STOCK_CLASSES)
def test_computing_in_fp32_equals_the_converted_model(repos, backbone, tmp_path):
    config = AutoConfig.from_pretrained(repos[backbone])
    model, _ = load_stock_model(repos[backbone], config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    for file in (tmp_path / "bf16").glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    config = AutoConfig.from_pretrained(tmp_path / "bf16")
    rows = [{"role": "user", "content": [{"type": "image", "image": colours()}, {"type": "text", "text": "a b"}]}]
    features = process(AutoProcessor.from_pretrained(repos[backbone]), [rows])
    outputs = []
    for dtype in (torch.float32, "auto"):
        backbone_model = load_stock_model(tmp_path / "bf16", config, dtype=dtype)[0].model.eval()
        if dtype == "auto":
            stored = {name: parameter.data_ptr() for name, parameter in backbone_model.named_parameters()}
            weights.compute_in_fp32(backbone_model)
        with torch.no_grad():
            outputs.append(backbone_model(**features).last_hidden_state)
    assert outputs[1].dtype == torch.float32 and torch.equal(*outputs)
    kept = [name for name, p in backbone_model.named_parameters() if p.data_ptr() == stored[name]]
    assert {p.dtype for n, p in backbone_model.named_parameters() if n in kept} == {torch.bfloat16}
    assert len(kept) > 10 and all(re.search(r"(layers?|blocks|deepstack_merger_list)\.\d+\.", name) for name in kept)
