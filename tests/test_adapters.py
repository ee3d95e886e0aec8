"""Adapters: what they train, in which precision, and what an export makes of them."""

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from support import tiny
from support.training import config, text_pairs

from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, export_adapters, export_model
from btok_hf.training import CondensationTrainer


@pytest.mark.parametrize("dora", [False, True])
def test_lora_trains_exactly_the_token_rows_and_the_adapters(repo, tmp_path, dora):
    model = BTokSentenceTransformer(repo, device="cpu")
    untouched = {name: p.detach().clone() for name, p in model[0].model.named_parameters()}
    trainer = CondensationTrainer(
        model=model,
        args=config(tmp_path, per_device_train_batch_size=6, max_steps=4, learning_rate=1e-2),
        train_dataset=text_pairs(6),
        peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, use_dora=dora),
    )
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in trainable)
    assert sum("trainable_tokens_delta" in name for name in trainable) == 1
    assert not any("visual" in name for name in trainable)
    trainer.train()
    expected = model.encode(["find red", "flat thing"])
    assert (
        np.abs(expected - BTokSentenceTransformer(repo, device="cpu").encode(["find red", "flat thing"])).max() > 0.01
    )

    export_model(model, tmp_path / "export")
    merged = BTokSentenceTransformer(tmp_path / "export", device="cpu")
    np.testing.assert_allclose(merged.encode(["find red", "flat thing"]), expected, atol=2e-6)
    np.testing.assert_allclose(model.encode(["find red", "flat thing"]), expected, atol=0)  # untouched by the export
    stock = SentenceTransformer(str(tmp_path / "export"), device="cpu")
    np.testing.assert_allclose(stock.encode(["find red", "flat thing"]), expected, atol=2e-6)
    rows = list(model.config.btok_token_ids)
    changed = set()
    for name, parameter in merged[0].model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            assert set((parameter != untouched[name]).any(1).nonzero().flatten().tolist()) == set(rows)
        elif not torch.equal(parameter, untouched[name]):
            changed.add(name.rsplit(".", 2)[-2])
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

    model.save_pretrained(str(tmp_path / "adapter"))
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    # Stock loaders go through transformers' load_adapter, which left adapters random at 5.17, and DoRA's magnitudes
    # as they were at 5.23.
    stock = [SentenceTransformer] if Version(transformers.__version__) >= Version("5.23") and not dora else []
    for loader in (BTokSentenceTransformer, *stock):
        again = loader(str(tmp_path / "adapter"), device="cpu")
        np.testing.assert_allclose(again.encode(["find red", "flat thing"]), expected, atol=2e-6)
    if dora:
        with pytest.raises(ValueError, match=r"ignore the magnitudes of DoRA .* Export the merged model"):
            export_adapters(model, tmp_path / "published", "org/start")


def test_adapters_of_a_bf16_model_are_trained_in_fp32(repo, tmp_path):
    """Steps far below the resolution of bf16 (2^-8 of a weight) move every adapter and token row."""
    model = BTokSentenceTransformer(repo, device="cpu", model_kwargs={"dtype": "bfloat16"})
    trainer = CondensationTrainer(
        model=model,
        args=config(
            tmp_path, per_device_train_batch_size=6, mini_batch_size=3, max_steps=2, learning_rate=1e-5, bf16=True
        ),
        train_dataset=text_pairs(6),
        peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, init_lora_weights=False),
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in before else torch.bfloat16)
        if name in before:
            assert (parameter != before[name]).float().mean() > 0.9, name
    model.save_pretrained(str(tmp_path / "checkpoint"))
    loaded = BTokSentenceTransformer(tmp_path / "checkpoint", device="cpu", model_kwargs={"dtype": "bfloat16"})
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == model.state_dict()[name].dtype and torch.equal(tensor, model.state_dict()[name]), name
    expected = model.encode(["find red", "flat thing"])
    export_model(model, tmp_path / "export")
    exported = BTokSentenceTransformer(tmp_path / "export", device="cpu")
    assert (exported.encode(["find red", "flat thing"]) * expected).sum(1).min() > 0.999


def test_lora_freezes_an_untied_head_and_exports_it(tmp_path):
    base = tiny.build("qwen2_vl", tmp_path / "base", tied=False)
    model = BTokSentenceTransformer(add_bottleneck_tokens(base, tmp_path / "repo"), device="cpu")
    head = model[0].lm_head.weight.detach().clone()
    trainer = CondensationTrainer(
        model=model,
        args=config(tmp_path, per_device_train_batch_size=6, max_steps=2, learning_rate=1e-2),
        train_dataset=text_pairs(6),
        peft_config=LoraConfig(r=4, lora_dropout=0.0),
    )
    trainer.train()
    export_model(model, tmp_path / "export")
    exported = BTokSentenceTransformer(tmp_path / "export", device="cpu")
    assert torch.equal(exported[0].lm_head.weight, head)
    np.testing.assert_allclose(exported.encode(["a b"]), model.encode(["a b"]), atol=2e-6)
