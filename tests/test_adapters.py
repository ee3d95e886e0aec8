"""Adapters: what they train, in which precision, and what an export makes of them."""

import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import IA3Config, LoHaConfig, LoraConfig
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from support import tiny
from support.pictures import colours
from support.training import config, text_pairs

from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, export_adapters, export_model
from btok_hf.adapters import MergedTensors, find_base, has_adapters
from btok_hf.training import CondensationTrainer


def test_add_adapter_is_peft_config(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")
    with pytest.raises(ValueError, match="lora_dropout must be 0"):
        model.add_adapter(LoraConfig(lora_dropout=0.3))
    half = BTokSentenceTransformer(repo, device="cpu", model_kwargs={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match=r"modules_to_save=\['merger'\] needs weights in fp32, got torch.bfloat16"):
        half.add_adapter(LoraConfig(modules_to_save=["merger"]))
    with pytest.raises(ValueError, match="modules_to_save must not name embed_tokens"):
        model.add_adapter(LoraConfig(modules_to_save=["embed_tokens"]))
    with pytest.raises(ValueError, match="modules_to_save must not name embed_tokens"):
        model.add_adapter(LoraConfig(modules_to_save=["language_model.embed_tokens"]))
    for option in ("target_modules", "modules_to_save"):
        with pytest.raises(ValueError, match=rf"{option} of peft_config must name .*, got lm_head, roj: nothing"):
            model.add_adapter(LoraConfig(**{"target_modules": ["q_proj"], option: ["q_proj", "lm_head", "roj"]}))
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "trainable_tokens_delta" in name}
    args = config(tmp_path, per_device_train_batch_size=6, max_steps=2, learning_rate=1e-2)
    with pytest.raises(ValueError, match="The model has adapters already"):
        CondensationTrainer(model=model, args=args, train_dataset=text_pairs(6), peft_config=LoraConfig())
    CondensationTrainer(model=model, args=args, train_dataset=text_pairs(6)).train()
    after = dict(model.named_parameters())
    assert len(before) == 1 and all((after[name] != value).any(1).all() for name, value in before.items())


def test_the_seed_decides_where_adapters_start(repo, tmp_path):
    def start(seed):
        torch.randn(seed + 5)  # whatever the process did before
        trainer = CondensationTrainer(
            model=BTokSentenceTransformer(repo, device="cpu"),
            args=config(tmp_path, seed=seed),
            train_dataset=text_pairs(4),
            peft_config=LoraConfig(r=2),
        )
        return next(p.tolist() for name, p in trainer.model.named_parameters() if "lora_A" in name)

    assert start(1) == start(1) != start(2)


@pytest.mark.parametrize("dora", [False, True])
def test_lora_trains_exactly_the_token_rows_and_the_adapters(either, tmp_path, dora):
    model = BTokSentenceTransformer(either, device="cpu")
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
        np.abs(expected - BTokSentenceTransformer(either, device="cpu").encode(["find red", "flat thing"])).max()
        > 0.01
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
    usual = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    others = {
        "qwen3_5": usual | {"in_proj_qkv", "in_proj_z", "out_proj"},
        "lfm2_vl": {"q_proj", "k_proj", "v_proj", "in_proj", "out_proj", "w1", "w2", "w3"},
    }
    assert changed == others.get(model.config.model_type, usual)

    model.save_pretrained(str(tmp_path / "adapter"))
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    # Stock loaders go through transformers' load_adapter, which left adapters random at 5.17, and DoRA's magnitudes
    # as they were at 5.23.
    random = Version(transformers.__version__) < Version("5.18")
    stock = [] if random or dora else [SentenceTransformer]
    for loader in (BTokSentenceTransformer, *stock):
        again = loader(str(tmp_path / "adapter"), device="cpu")
        np.testing.assert_allclose(again.encode(["find red", "flat thing"]), expected, atol=2e-6)
    if random:
        with pytest.raises(ImportError, match=r"transformers>=5\.18"):
            SentenceTransformer(str(tmp_path / "adapter"), device="cpu")
    if dora:
        with pytest.raises(ImportError, match="adapters with DoRA, whose magnitudes stock loaders ignore"):
            SentenceTransformer(str(tmp_path / "adapter"), device="cpu")
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


COLOURS = ["red", "green", "blue", "white", "black", "grey"]


def solid(colour):
    return PIL.Image.new("RGB", (56, 56), colour)


def trained(repo, folder, **options):
    """A model with adapters that moved, and its trainer."""
    model = BTokSentenceTransformer(repo, device="cpu")
    trainer = CondensationTrainer(
        model=model,
        args=config(folder, per_device_train_batch_size=6, max_steps=2, learning_rate=1e-2, condense="query"),
        train_dataset=Dataset.from_dict({"query": COLOURS, "positive": [solid(c) for c in COLOURS]}),
        peft_config=LoraConfig(r=4, lora_dropout=0.0, **options),
    )
    trainer.train()
    return model, trainer


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["merger"]},
        {"use_rslora": True},
        {"target_modules": ["qkv", "q_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"qkv": 3}},
    ],
)
def test_what_is_trained_is_exported_and_resumed(repo, tmp_path, options):
    model, _ = trained(repo, tmp_path / "run", **options)
    inputs = ["a b", {"image": colours(), "text": "c"}]
    expected = model.encode(inputs)
    start = BTokSentenceTransformer(repo, device="cpu")
    moved = MergedTensors(model.transformer.model)
    changed = {name for name, x in MergedTensors(start.transformer.model).items() if not torch.equal(x, moved[name])}
    kind = "merger" if "modules_to_save" in options else "q"
    assert any(kind in name.rsplit(".", 2)[-2] or kind in name for name in changed)
    exported = BTokSentenceTransformer(export_model(model, tmp_path / "export"), device="cpu")
    np.testing.assert_allclose(exported.encode(inputs), expected, atol=2e-6)
    np.testing.assert_array_equal(model.encode(inputs), expected)  # untouched by the export
    model.save(tmp_path / "saved")
    np.testing.assert_allclose(BTokSentenceTransformer(tmp_path / "saved").encode(inputs), expected, atol=2e-6)


@pytest.mark.parametrize(
    "peft_config, named",
    [
        (LoraConfig(r=2, bias="all"), "bias='all'"),
        (LoraConfig(r=2, bias="lora_only"), "bias='lora_only'"),
        (LoraConfig(r=2, lora_bias=True), "lora_bias=True"),
        (LoraConfig(r=2, target_parameters=["q_proj.weight"]), "target_parameters="),
        (LoraConfig(r=2, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (IA3Config(), "IA3Config"),
        (LoHaConfig(), "LoHaConfig"),
    ],
)
def test_what_could_not_be_exported_is_refused_before_training(repo, tmp_path, peft_config, named):
    model = BTokSentenceTransformer(repo, device="cpu")
    with pytest.raises(ValueError, match=named):
        CondensationTrainer(model=model, args=config(tmp_path), train_dataset=text_pairs(6), peft_config=peft_config)
    assert not has_adapters(model.transformer.model)


def test_a_folder_that_looks_like_an_id_is_found_and_not_published(repo, tmp_path, monkeypatch):
    """Training in `a` names the base `a/start`, which could be a repository of a stranger."""
    shutil.copytree(repo, tmp_path / "a" / "start")
    monkeypatch.chdir(tmp_path)
    model, trainer = trained("a/start", Path("a"))
    trainer.save_model("a/checkpoint-2")
    with pytest.raises(ValueError, match="must be a Hub id, got 'a/start'"):
        export_adapters(model, tmp_path / "lora")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = BTokSentenceTransformer(tmp_path / "a" / "checkpoint-2", device="cpu")
    np.testing.assert_allclose(again.encode(["a b"]), model.encode(["a b"]), atol=2e-6)
    with pytest.raises(ValueError, match=r"must be a Hub id, got '.*a/start'"):
        export_adapters(again, tmp_path / "lora")


def test_the_base_of_the_same_run_comes_before_that_of_the_working_directory(repo, tmp_path, monkeypatch):
    shutil.copytree(repo, tmp_path / "one" / "run" / "start")
    shutil.copytree(repo, tmp_path / "other" / "run" / "start")
    weights = tmp_path / "other" / "run" / "start" / "model.safetensors"
    save_file({name: tensor + 0.1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    monkeypatch.chdir(tmp_path / "one")
    model, trainer = trained("run/start", Path("run"))
    trainer.save_model("run/checkpoint-2")
    monkeypatch.chdir(tmp_path / "other")
    again = BTokSentenceTransformer(tmp_path / "one" / "run" / "checkpoint-2", device="cpu")
    np.testing.assert_allclose(again.encode(["a b"]), model.encode(["a b"]), atol=2e-6)


def test_the_base_of_adapters_on_the_hub_is_not_looked_for_here(repo, tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "start").symlink_to(repo)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert find_base("org/lora", "org/start") == "org/start"
    with pytest.raises(FileNotFoundError, match="which is in none of these places: a/run/start"):
        find_base("org/lora", "a/run/start")


def test_the_base_is_found_when_the_run_was_moved(repo, tmp_path, monkeypatch):
    """Training names the base by a relative path; the run is then moved and loaded from elsewhere."""
    run = tmp_path / "runs" / "a"
    shutil.copytree(repo, run / "start")
    monkeypatch.chdir(tmp_path)
    model, trainer = trained("runs/a/start", Path("runs/a"))
    trainer.save_model("runs/a/checkpoint-2")
    expected = model.encode(["a b"])
    shutil.move(run, tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = BTokSentenceTransformer(tmp_path / "moved" / "checkpoint-2", device="cpu")
    np.testing.assert_allclose(again.encode(["a b"]), expected, atol=2e-6)
    shutil.rmtree(tmp_path / "moved" / "start")
    with pytest.raises(FileNotFoundError, match=r"'runs/a/start'.*moved/start.*its folder start.*adapter_config.json"):
        BTokSentenceTransformer(tmp_path / "moved" / "checkpoint-2", device="cpu")
