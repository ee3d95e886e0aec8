"""Loss, collator, trainer and script: what training computes, and what it refuses."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import transformers
from conftest import image, video
from datasets import Dataset, Features, Image, Value
from packaging.version import Version
from peft import LoraConfig
from PIL import Image as PILImage
from sentence_transformers import SentenceTransformer
from test_condensation import assert_same_gradients
from torch.nn import functional as F
from trl import TrlParser, get_peft_config

from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, export_adapters, export_model
from btok_hf.condensation import condense
from btok_hf.hub_card.card import CardArguments
from btok_hf.inputs import content_hash, text_of
from btok_hf.training import CondensationConfig, CondensationLoss, CondensationTrainer
from btok_hf.training.checkpoints import checkpoints, incomplete_reason, newest_complete
from btok_hf.training.condensation_collator import CondensationCollator
from btok_hf.training.data import load_pairs, retrieval_evaluator
from btok_hf.training.mixture import condense_of, read_mixture
from btok_hf.training.sources import SOURCES
from btok_hf.training.train import ModelArguments, ScriptArguments, main, starting_point

ROOT = Path(__file__).resolve().parents[1]
QUERIES = [
    "a short one",
    {"image": image(60, 40), "text": "and a picture"},
    "a much longer query than all of the others here",
    {"image": image(56, 84), "text": "see"},
    "five",
    {"image": [image(30, 30), image(40, 60)], "text": "two"},
]
POSITIVES = ["yes", "the answer is longer", "no", "an image of noise", "5", {"image": image(50, 50), "text": "both"}]
NEGATIVES = ["wrong", "also wrong", "not it", "other", "6", "none of them"]


def config(tmp_path, **kwargs):
    defaults = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "warmup_steps": 0}
    return CondensationConfig(output_dir=str(tmp_path / "out"), **{**defaults, **kwargs})


def batch_features(model, rows=slice(None), condense="both", negatives=True, **kwargs):
    """Features as the trainer hands them to the loss."""
    args = CondensationConfig(output_dir="unused", condense=condense, report_to="none", use_cpu=True, **kwargs)
    collator = CondensationCollator(preprocess_fn=model.preprocess, tokenizer=model.tokenizer, args=args)
    columns = [QUERIES, POSITIVES, NEGATIVES][: 3 if negatives else 2]
    batch = collator([dict(zip(("query", "positive", "negative"), row)) for row in list(zip(*columns))[rows]])
    prefixes = ["query_", "positive_", "negative_"][: 3 if negatives else 2]
    return [{key[len(p) :]: value for key, value in batch.items() if key.startswith(p)} for p in prefixes]


def torchrun(script, *arguments):
    """Run a script of this folder in two processes."""
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"),
            *(str(ROOT / "tests" / script), *arguments),
        ],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")},
        timeout=300,
    )


def named_gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference_loss(model, features, weight, temperature=0.02, symmetric=False, mask=True):
    """The loss by definition: whole batch, one graph, no Sentence-Transformers."""
    embeddings, losses = [], []
    for feature in features:
        target = [feature[key][:, 0] if key in feature else None for key in ("target_ids", "target_labels")]
        output = condense(model[0].model, feature, *target, condensation_mask=mask)
        embeddings.append(output.embeddings)
        losses.append(output.token_losses)
    scores = embeddings[0] @ torch.cat(embeddings[1:]).T / temperature
    right = torch.arange(len(scores))
    infonce = F.cross_entropy(scores, right)
    if symmetric:
        infonce = (infonce + F.cross_entropy(scores[:, : len(scores)].T, right)) / 2
    return infonce, torch.cat(losses).mean(), infonce + weight * torch.cat(losses).mean()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("mini_batch_size", [1, 2, 4, 6, 100])
def test_gradcache_equals_the_full_batch(repo, mini_batch_size, symmetric):
    model = BTokSentenceTransformer(repo, device="cpu").train()
    infonce, condensation, total = reference_loss(model, batch_features(model), 0.7, symmetric=symmetric)
    total.backward()
    expected = named_gradients(model)
    model.zero_grad()
    loss = CondensationLoss(model, mini_batch_size=mini_batch_size, condensation_weight=0.7, symmetric=symmetric)
    (loss(batch_features(model)) * 3).backward()  # as a gradient scaler or accumulation would
    torch.testing.assert_close(loss.infonce, infonce.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss.condensation, condensation.detach(), atol=1e-5, rtol=1e-5)
    assert_same_gradients({name: g / 3 for name, g in named_gradients(model).items()}, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_gradcache_with_checkpointing_and_without_mask(repo, checkpointing, mask):
    model = BTokSentenceTransformer(repo, device="cpu").train()
    _, _, total = reference_loss(model, batch_features(model, condense="query"), 2.0, mask=mask)
    total.backward()
    expected = named_gradients(model)
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = CondensationLoss(model, mini_batch_size=4, condensation_weight=2.0, condensation_mask=mask)
    loss(batch_features(model, condense="query")).backward()
    assert_same_gradients(named_gradients(model), expected)


def test_evaluation_gives_the_same_value_without_gradients(repo):
    model = BTokSentenceTransformer(repo, device="cpu").eval()
    _, _, total = reference_loss(model, batch_features(model), 0.7)
    for mini_batch_size in (2, 100):
        loss = CondensationLoss(model, mini_batch_size=mini_batch_size, condensation_weight=0.7)
        with torch.no_grad():
            torch.testing.assert_close(loss(batch_features(model)), total.detach(), atol=1e-4, rtol=1e-5)


def test_weight_zero_runs_no_targets(repo):
    model = BTokSentenceTransformer(repo, device="cpu").train()
    loss = CondensationLoss(model, mini_batch_size=2, condensation_weight=0.0)
    loss(batch_features(model)).backward()
    assert loss.condensation is None and loss.infonce is not None


@pytest.mark.parametrize("mini_batch_size", [2, 100])
def test_copies_of_the_right_answer_are_no_negatives(repo, mini_batch_size):
    """By content, by group and by query; a query's own positive stays."""
    picture = image(40, 40)
    rows = [
        {"query": "q0", "positive": "same", "negative": "other"},
        {"query": "q1", "positive": "same", "negative": None},
        {"query": "q2", "positive": {"image": picture}, "group": "cats", "negatives": ["same"]},
        {"query": {"text": "q3"}, "positive": "b", "group": "cats", "negative": "one more"},
        {"query": {"text": "q1"}, "positive": {"image": picture.copy()}, "negative": "b"},
    ]
    rows = [{"group": None, "negative": None, "negatives": [], **row} for row in rows]
    # positives: same, same, picture, b, picture; negatives: other, one more, b, same
    false = torch.zeros(5, 9, dtype=torch.bool)
    for query, candidates in {0: [1, 8], 1: [0, 4, 8], 2: [3, 4], 3: [2, 7], 4: [1, 2]}.items():
        false[query, candidates] = True
    model = BTokSentenceTransformer(repo, device="cpu").train()

    def trained(**kwargs):
        args = CondensationConfig(output_dir="unused", condense="none", report_to="none", use_cpu=True, **kwargs)
        collate = CondensationCollator(preprocess_fn=model.preprocess, tokenizer=model.tokenizer, args=args)
        batch = collate(rows)
        sides = ("query_", "positive_", "negative_")
        features = [{k[len(side) :]: v for k, v in batch.items() if k.startswith(side)} for side in sides]
        loss = CondensationLoss(model, mini_batch_size=mini_batch_size, symmetric=True)
        model.zero_grad()
        loss(features).backward()
        return loss.infonce, named_gradients(model), features

    def expected(false, features):
        queries, positives, negatives = (
            condense(model[0].model, feature).embeddings[feature.get("rows", slice(None))] for feature in features
        )
        scores = queries @ torch.cat([positives, negatives]).T / 0.02
        forth = F.cross_entropy(scores.masked_fill(false, -torch.inf), torch.arange(5))
        back = F.cross_entropy(scores[:, :5].T.masked_fill(false[:, :5], -torch.inf), torch.arange(5))
        model.zero_grad()
        ((forth + back) / 2).backward()
        return (forth + back).detach() / 2, named_gradients(model)

    for masked, kwargs in ((false, {}), (false & False, {"mask_false_negatives": False})):
        infonce, gradients, features = trained(**kwargs)
        value, right = expected(masked, features)
        torch.testing.assert_close(infonce, value, atol=1e-4, rtol=1e-5)
        assert_same_gradients(gradients, right)


@pytest.mark.parametrize("mini_batch_size", [2, 100])
def test_what_a_batch_holds_twice_is_encoded_once(repo, mini_batch_size):
    """Labels of label datasets, with their targets; loss and gradients are those of encoding each of them."""
    picture = image(60, 40)
    rows = [
        {"query": {"image": picture, "text": "which"}, "positive": "cat", "target": "a cat", "negative": "dog"},
        {"query": "q1", "positive": "cat", "target": "a cat", "negative": "dog"},
        {"query": {"image": picture, "text": "which"}, "positive": "cat", "target": "another", "negative": None},
        {"query": "q3", "positive": {"image": picture}, "target": "a cat", "negative": "owl"},
        {"query": "q4", "positive": {"image": picture}, "target": "a cat", "negative": "dog"},
    ]
    args = CondensationConfig(output_dir="unused", condense="query", report_to="none", use_cpu=True)
    found = {}
    for copies in (False, True):
        model = BTokSentenceTransformer(repo, device="cpu").train()
        collator = CondensationCollator(
            preprocess_fn=model.preprocess, tokenizer=model.tokenizer, args=args, deduplicate=not copies
        )
        batch = collator(rows)
        prefixes = ("query_", "positive_", "negative_")
        features = [{k[len(p) :]: v for k, v in batch.items() if k.startswith(p)} for p in prefixes]
        assert [len(f["input_ids"]) for f in features] == ([5, 5, 4] if copies else [4, 3, 2])
        loss = CondensationLoss(model, mini_batch_size=mini_batch_size, condensation_weight=0.7)
        value = loss(features)
        value.backward()
        found[copies] = value.detach(), loss.infonce, loss.condensation, named_gradients(model)
    for actual, expected in zip(found[False][:3], found[True][:3]):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert_same_gradients(found[False][3], found[True][3])


@pytest.mark.parametrize("mini_batch_size", [1, 2])
def test_intervals_of_frames_stay_with_their_videos(repos, mini_batch_size):
    """Qwen2.5-VL takes one for each video, and rows have none, one or two of them."""
    model = BTokSentenceTransformer(repos["qwen2_5_vl"], device="cpu").train()
    clips = [
        {"array": video(4, 56, i)["array"], "video_metadata": {**video()["video_metadata"], "fps": 2.0 / (i + 1)}}
        for i in range(4)
    ]
    queries = ["text", {"video": clips[:2]}, {"video": clips[2]}, {"video": clips[3], "text": "see"}]
    losses = []
    for size in (mini_batch_size, 8):
        features = [model.preprocess(queries), model.preprocess(["a", "b", "c", "d"])]
        assert len(features[0]["second_per_grid_ts"]) == 4 and len(set(features[0]["second_per_grid_ts"].tolist())) > 1
        loss = CondensationLoss(model, mini_batch_size=size)
        losses.append(loss(features).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_batches_stay_on_the_host(repo, tmp_path, monkeypatch):
    """A large batch of images does not fit on a device; a mini-batch does."""
    rows = [{"query": {"image": image(56, 84, i), "text": "see"}, "positive": f"{i}"} for i in range(4)]
    trainer = CondensationTrainer(
        model=BTokSentenceTransformer(repo, device="cpu"),
        args=config(tmp_path, per_device_train_batch_size=4),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
    )
    monkeypatch.setattr(CondensationConfig, "device", torch.device("meta"))
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        assert loader.device is None  # accelerate moves nothing
        (batch,) = loader
        prepared = trainer._prepare_inputs(batch)
        assert "query_pixel_values" in prepared and prepared.keys() == batch.keys()
        assert {value.device.type for value in prepared.values() if torch.is_tensor(value)} == {"cpu"}


def test_pixels_in_bf16_are_what_the_vision_tower_sees(repo, tmp_path):
    """With bf16 they take half the memory, and the loss is the same to the bit."""
    model = BTokSentenceTransformer(repo, device="cpu").train()
    features = batch_features(model, bf16=True)
    assert features[0]["pixel_values"].dtype == torch.bfloat16
    losses = []
    for inputs in (features, batch_features(model)):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(CondensationLoss(model, mini_batch_size=2)(inputs).item())
    assert losses[0] == losses[1]


def test_dicts_are_what_they_were_before_arrow(repo, tmp_path):
    """Arrow gives all of them the same keys, and `datasets` encodes images in them."""
    pairs = [
        {"query": {"text": "a"}, "positive": "x"},
        {"query": {"image": [image(60, 40), image(56, 84)], "text": "both"}, "positive": "y"},
        {"query": {"image": [image(60, 40)]}, "positive": "z"},
    ]
    dataset = Dataset.from_list(pairs)
    assert dataset[0]["query"]["image"] is None and dataset[2]["query"]["text"] is None
    assert set(dataset[2]["query"]["image"][0]) == {"bytes", "path"}
    collate, _ = collator(repo, tmp_path)
    actual, expected = collate(list(dataset)), collate(pairs)
    tensors = {key for key, value in expected.items() if torch.is_tensor(value)}
    assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in tensors)
    dataset.to_parquet(tmp_path / "pairs.parquet")
    evaluator = retrieval_evaluator(str(tmp_path / "pairs.parquet"))
    assert evaluator(BTokSentenceTransformer(repo, device="cpu"))["pairs_cosine_accuracy@10"] == 1.0


@pytest.mark.parametrize("sharded", ["is_fsdp_enabled", "is_deepspeed_enabled", None])
def test_sharded_processes_encode_every_copy(repo, tmp_path, monkeypatch, sharded):
    """All processes must have equally many rows to encode, however many copies a batch holds."""

    class Sharded(CondensationTrainer):  # accelerate has both on accelerators only
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            if sharded:
                setattr(self, sharded, True)

        def _check_deepspeed(self):
            pass

    rows = Dataset.from_dict({"query": ["one", "two", "three", "four"], "positive": ["cat", "cat", "dog", "cat"]})
    args = config(tmp_path, per_device_train_batch_size=4)
    trainer = Sharded(model=BTokSentenceTransformer(repo, device="cpu"), args=args, train_dataset=rows)
    (batch,) = trainer.get_train_dataloader()
    assert len(batch["positive_input_ids"]) == (4 if sharded else 2)
    assert ("positive_rows" in batch) == (sharded is None)


def test_a_file_and_its_name_as_a_text_are_not_copies(repo, tmp_path):
    path = str(tmp_path / "photo.png")
    image(60, 40).save(path)
    model = BTokSentenceTransformer(repo, device="cpu")
    args = CondensationConfig(output_dir="unused", condense="none", report_to="none", use_cpu=True)
    collator = CondensationCollator(preprocess_fn=model.preprocess, tokenizer=model.tokenizer, args=args)
    batch = collator([{"query": path, "positive": "a"}, {"query": {"text": path}, "positive": "b"}])
    assert len(batch["query_input_ids"]) == 2 and "query_rows" not in batch


def test_pictures_that_differ_by_their_palette_are_not_copies():
    """Recoloured drawings hold equal bytes in palette mode."""
    red = PILImage.new("P", (60, 40), 1)
    red.putpalette([0, 0, 0, 255, 0, 0])
    blue = red.copy()
    blue.putpalette([0, 0, 0, 0, 0, 255])
    assert red.tobytes() == blue.tobytes()
    assert content_hash(red) != content_hash(blue) and content_hash(red) == content_hash(red.copy())


def test_samples_of_a_step_are_counted_before_copies_are_left_out(repo, tmp_path):
    rows = Dataset.from_dict({"query": ["same"] * 4, "positive": ["one", "two"] * 2})
    args = config(tmp_path, max_steps=1, per_device_train_batch_size=4, logging_steps=1)
    trainer = CondensationTrainer(model=BTokSentenceTransformer(repo, device="cpu"), args=args, train_dataset=rows)
    counted = []
    trainer.log = lambda logs, start_time=None: counted.append(trainer._samples)
    trainer.train()
    assert counted[0] == 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_vision_tower_runs_once(repos, checkpointing):
    """Its outputs of GradCache's first pass serve the second: images and videos, all backbones."""
    for name, repo in repos.items():
        model = BTokSentenceTransformer(repo, device="cpu").train()
        backbone, calls = model[0].model, []
        backbone.visual.requires_grad_(False)
        backbone.visual.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        features = batch_features(model)
        clip = {"video": video(4, 56), "image": image(40, 40), "text": "both kinds"}
        features[1] |= model.preprocess([clip] * 6)
        with torch.no_grad():
            once = CondensationLoss(model, mini_batch_size=100)(features)
        whole = CondensationLoss(model, mini_batch_size=100)
        whole(features).backward()
        expected = named_gradients(model)
        model.zero_grad()
        del calls[:]
        loss = CondensationLoss(model, mini_batch_size=2)
        value = loss(features)
        first = len(calls)
        value.backward()
        assert len(calls) == first > 0, name
        torch.testing.assert_close(value.detach() + 5 * loss.condensation, once, atol=1e-4, rtol=1e-5)
        assert_same_gradients(named_gradients(model), expected)
        assert "get_image_features" not in vars(backbone)

        backbone.visual.requires_grad_(True)  # now it has gradients, which need a second forward
        del calls[:]
        CondensationLoss(model, mini_batch_size=2)(features).backward()
        assert len(calls) == 2 * first


def test_a_token_budget_bounds_every_forward_and_changes_nothing_else(repo):
    model = BTokSentenceTransformer(repo, device="cpu").train()
    _, _, total = reference_loss(model, batch_features(model), 0.7)
    total.backward()
    expected = named_gradients(model)
    model.zero_grad()
    loss = CondensationLoss(model, mini_batch_num_tokens=210, condensation_weight=0.7)
    sizes = []
    model[0].model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append((kwargs["inputs_embeds"].shape[1], torch.is_grad_enabled())),
        with_kwargs=True,
    )
    loss(batch_features(model)).backward()
    assert_same_gradients(named_gradients(model), expected)
    second = [size for size, with_grad in sizes if with_grad]
    assert max(second) <= 210 and len(second) > 3
    # The same budget without targets takes fewer forwards: their tokens were counted.
    sizes.clear()
    CondensationLoss(model, mini_batch_num_tokens=210, condensation_weight=0.0)(batch_features(model)).backward()
    assert 0 < len([size for size, with_grad in sizes if with_grad]) < len(second)


@pytest.mark.parametrize("mini_batch_size", [2, 100])
def test_matryoshka_dimensions_are_trained_through_gradcache(repo, mini_batch_size):
    model = BTokSentenceTransformer(repo, device="cpu").train()
    features = batch_features(model, condense="none")
    embeddings = [condense(model[0].model, feature).embeddings for feature in features]
    value = 0
    for dim in (64, 16, 8):
        queries, *candidates = (F.normalize(embedding[:, :dim], dim=1) for embedding in embeddings)
        value = value + F.cross_entropy(queries @ torch.cat(candidates).T / 0.02, torch.arange(6)) / 3
    value.backward()
    expected = named_gradients(model)
    model.zero_grad()
    loss = CondensationLoss(model, mini_batch_size=mini_batch_size, matryoshka_dims=[64, 16, 8])
    loss(batch_features(model, condense="none")).backward()
    torch.testing.assert_close(loss.infonce, value.detach(), atol=1e-4, rtol=1e-5)
    assert_same_gradients(named_gradients(model), expected)
    with pytest.raises(ValueError, match=r"between 1 and the embedding's 64 dimensions, got \[128\]"):
        CondensationLoss(model, matryoshka_dims=[128])


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_equal_one(repo, tmp_path, how):
    """Gathered candidates, unequally many; images on one process more than on the other; unequally many targets."""
    output = tmp_path / "gradients.pt"
    torchrun("two_processes.py", repo, str(output), how)
    two = torch.load(output)
    model = BTokSentenceTransformer(repo, device="cpu").train()
    features = batch_features(model)
    if how == "ddp":
        features[2] = {k: v[[0, 1, 3, 4, 5]] for k, v in features[2].items() if isinstance(v, torch.Tensor)}
    loss = CondensationLoss(model, mini_batch_size=2, condensation_weight=0.5)
    loss(features).backward()
    torch.testing.assert_close(two["loss"], loss.infonce + 0.5 * loss.condensation, atol=1e-5, rtol=1e-5)
    assert_same_gradients(two["gradients"], named_gradients(model))
    if how == "fsdp2":
        saved = BTokSentenceTransformer(str(output) + ".model", device="cpu").state_dict()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


def test_sharded_processes_need_equally_many_mini_batches(repo, tmp_path):
    torchrun("two_processes.py", repo, "unused", "fsdp2_unequal")


# ---------------------------------------------------------------- trainer


def text_pairs(count=12):
    words = ["red", "old", "tall", "wet", "loud", "thin", "deep", "odd", "warm", "slow", "flat", "gray"][:count]
    return Dataset.from_dict({"query": [f"find {w}" for w in words], "positive": [f"{w} thing" for w in words]})


@pytest.mark.parametrize("mini_batch_size", [2, 4])
def test_gradient_accumulation_averages_the_batches(repo, tmp_path, monkeypatch, mini_batch_size):
    """One SGD step over two accumulated batches moves the weights by the mean of their full-batch gradients."""
    model = BTokSentenceTransformer(repo, device="cpu")
    dataset = text_pairs(8)
    args = config(
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        mini_batch_size=mini_batch_size,
        max_steps=1,
        logging_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        optim="sgd",
        weight_decay=0.0,
        max_grad_norm=0.0,
        condensation_weight=0.5,
    )
    trainer = CondensationTrainer(model=model, args=args, train_dataset=dataset)
    batches, collate = [], CondensationCollator.__call__
    monkeypatch.setattr(
        CondensationCollator, "__call__", lambda self, rows: batches.append(rows) or collate(self, rows)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    after = {name: p.detach().clone() for name, p in model.named_parameters()}

    model = BTokSentenceTransformer(repo, device="cpu").train()
    totals = []
    for rows in batches[-2:]:
        batch = collate(trainer.data_collator, rows)
        features = [{k[len(p) :]: v for k, v in batch.items() if k.startswith(p)} for p in ("query_", "positive_")]
        totals.append(reference_loss(model, features, 0.5)[2])
    mean = sum(totals) / 2
    mean.backward()
    expected = named_gradients(model)
    moved = {name: (before[name] - after[name]) / 1e-3 for name in expected}
    assert_same_gradients(moved, expected, 2e-3)  # a difference of fp32 weights has few digits
    assert trainer.state.log_history[0]["loss"] == pytest.approx(mean.item(), rel=1e-3)


def test_training_lowers_both_losses_and_finds_pairs(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")
    dataset = text_pairs()

    def recall():
        queries, positives = (model.encode(dataset[column]) for column in ("query", "positive"))
        return np.mean((queries @ positives.T).argmax(1) == np.arange(len(dataset)))

    args = config(
        tmp_path, per_device_train_batch_size=12, mini_batch_size=6, max_steps=25, logging_steps=5, learning_rate=3e-3
    )
    args.condensation_steps = 20
    before = recall()
    trainer = CondensationTrainer(model=model, args=args, train_dataset=dataset, eval_dataset=dataset)
    trainer.evaluate()
    first = trainer.state.log_history[-1]
    trainer.train()
    trainer.evaluate()
    last = next(log for log in reversed(trainer.state.log_history) if "eval_infonce" in log)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[3]["infonce"] < 0.5 * logs[0]["infonce"] and logs[3]["condensation"] < 0.7 * logs[0]["condensation"]
    assert [log["condensation_weight"] for log in logs] == [5.0, 5.0, 5.0, 5.0, 0.0]
    assert "condensation" not in logs[4] or logs[4]["condensation"] == 0
    for log in logs[:4]:
        assert log["loss"] == pytest.approx(log["infonce"] + 5 * log["condensation"], rel=2e-3)
        assert log["tokens_per_second"] > log["samples_per_second"] > 0
    assert last["eval_infonce"] < first["eval_infonce"]
    assert recall() >= 0.9 > before + 0.3


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
        with pytest.raises(ValueError, match=r"leave the magnitudes of DoRA out .* Export the model whole"):
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


def checkpointed_trainer(repo, folder, lora=None, evaluator=None, **kwargs):
    """A trainer of 6 steps in 2 epochs with a checkpoint every 2."""
    args = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-3, "logging_steps": 1}
    args = {**args, "save_strategy": "steps", "save_steps": 2, **kwargs}
    return CondensationTrainer(
        model=BTokSentenceTransformer(repo, device="cpu"),
        args=config(Path(folder), **args),
        train_dataset=text_pairs(),
        evaluator=evaluator,
        peft_config=LoraConfig(r=4, lora_dropout=0.0, use_dora=lora == "dora") if lora else None,
    )


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("lora", [None, "lora", "dora"])
def test_resuming_ends_where_an_uninterrupted_run_does(repo, tmp_path, lora):
    whole, resumed = (checkpointed_trainer(repo, tmp_path / name, lora) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, atol=1e-6, rtol=0, msg=name)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers 5.17 cannot resume in several CPU processes: it maps tensors to the device cpu:0",
)
def test_training_in_two_processes_equals_one_whole_and_resumed(repo, tmp_path):
    one = checkpointed_trainer(repo, tmp_path / "one")
    one.train()
    torchrun("two_trainers.py", repo, str(tmp_path))
    whole, resumed = json.loads((tmp_path / "losses.json").read_text())
    assert whole == pytest.approx(losses(one), rel=1e-5) and resumed == pytest.approx(whole, rel=1e-6)
    for name, tensor in torch.load(tmp_path / "weights.pt").items():
        # A key's bias does not change attention: its gradient is rounding, which AdamW blows up.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(tensor, one.model.state_dict()[name], atol=2e-5, rtol=0, msg=name)
    assert all(incomplete_reason(path) is None for path in checkpoints(tmp_path / "resumed" / "out"))
    assert "| pairs | training | 12 rows |" in (tmp_path / "exported" / "README.md").read_text()


def test_a_killed_run_resumes_from_its_last_whole_checkpoint(repo, tmp_path):
    whole = checkpointed_trainer(repo, tmp_path / "whole")
    whole.train()
    killed = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "killed.py"), repo, str(tmp_path / "killed")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
    )
    assert killed.returncode == -9
    run = tmp_path / "killed" / "out"
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    assert (
        "not written to its end" in incomplete_reason(run / "checkpoint-4")
        and incomplete_reason(run / "checkpoint-2") is None
    )
    resumed = checkpointed_trainer(repo, tmp_path / "killed")
    with pytest.raises(
        ValueError, match=r"checkpoint-4' is not complete: .*the newest complete one here is .*checkpoint-2"
    ):
        resumed.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert incomplete_reason(run / "checkpoint-4") is None  # written anew
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_checkpoints_are_rotated_and_damage_is_noticed(repo, tmp_path):
    trainer = checkpointed_trainer(repo, tmp_path, save_total_limit=2)
    trainer.train()
    run = tmp_path / "out"
    assert [path.name for path in checkpoints(run)] == ["checkpoint-6", "checkpoint-4"]
    assert trainer.args.save_total_limit == 2
    (run / "checkpoint-6" / "scheduler.pt").write_bytes(b"short")
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(
        ValueError, match=r"no complete checkpoint in .*scheduler.pt has 5 bytes instead.*optimizer.pt is"
    ):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="there is none at all"):
        checkpointed_trainer(repo, tmp_path / "new").train(resume_from_checkpoint=True)


def test_training_starts_where_the_output_folder_is_gone(repo, tmp_path):
    """With several processes one makes it, perhaps after another one gets there."""
    trainer = checkpointed_trainer(repo, tmp_path)
    shutil.rmtree(trainer.args.output_dir)
    trainer.train()
    assert len(losses(trainer)) == trainer.state.max_steps


def test_a_full_disk_stops_with_a_way_on(repo, tmp_path, monkeypatch):
    trainer = checkpointed_trainer(repo, tmp_path)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # less than the weights need
    try:
        with pytest.raises(
            RuntimeError, match=r"checkpoint-2 could not be written .* newest complete checkpoint is None"
        ):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1e6))
    with pytest.raises(ValueError, match=r"needs about 0.0 GB, but '.*out' has 0.0 GB free. Free space"):
        checkpointed_trainer(repo, tmp_path).train()


def test_the_best_checkpoint_is_kept_and_loaded(repo, tmp_path):
    """The learning rate grows until it destroys the model: the best checkpoint is not the last."""
    dataset = text_pairs()
    dataset.to_json(tmp_path / "pairs.jsonl")
    evaluator = retrieval_evaluator(str(tmp_path / "pairs.jsonl"))
    metric = "pairs_cosine_accuracy@1"
    trainer = checkpointed_trainer(
        repo,
        tmp_path,
        evaluator=evaluator,
        **{"per_device_train_batch_size": 12, "max_steps": 16, "save_steps": 4, "eval_strategy": "steps"},
        **{"eval_steps": 4, "learning_rate": 0.05, "warmup_steps": 16, "max_grad_norm": 0.0, "save_total_limit": 1},
        **{"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": True},
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if f"eval_{metric}" in log]
    scores = {log["step"]: log[f"eval_{metric}"] for log in logs}
    best = max(scores, key=scores.get)
    assert scores[16] < scores[best]
    assert evaluator(trainer.model)[metric] == pytest.approx(scores[best])
    assert [path.name for path in checkpoints(tmp_path / "out")] == [f"checkpoint-{best}"]


def test_an_earlier_run_that_went_further_leaves_the_new_checkpoints(repo, tmp_path):
    """What is newest is told by time: by step, the new ones would be deleted, and the old ones resumed from."""
    checkpointed_trainer(repo, tmp_path, max_steps=8, save_total_limit=2).train()
    checkpointed_trainer(repo, tmp_path, max_steps=4, save_total_limit=2).train()
    run = tmp_path / "out"
    assert [path.name for path in checkpoints(run)] == ["checkpoint-4", "checkpoint-2"]
    assert newest_complete(run) == run / "checkpoint-4"


def test_zero_tokens_train_too(bases, tmp_path):
    repo = add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "repo", num_tokens=0)
    model = BTokSentenceTransformer(repo, device="cpu")
    args = config(tmp_path, per_device_train_batch_size=6, max_steps=2, logging_steps=1)
    trainer = CondensationTrainer(
        model=model, args=args, train_dataset=text_pairs(6), peft_config=LoraConfig(r=2, lora_dropout=0.0)
    )
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    trainer.train()
    export_model(model, tmp_path / "export")
    stock = SentenceTransformer(str(tmp_path / "export"), device="cpu")
    np.testing.assert_allclose(stock.encode(["x y"]), model.encode(["x y"]), atol=2e-6)


def test_groups_never_meet_in_a_batch(repo, tmp_path):
    # Only the group counts: equal queries of different groups may meet.
    rows = {"query": ["the same"] * 24, "positive": [f"p{i}" for i in range(24)]}
    dataset = Dataset.from_dict({**rows, "group": [str(i % 8) for i in range(24)]})
    args = config(tmp_path, per_device_train_batch_size=8, batch_sampler="no_duplicates", max_steps=1)
    trainer = CondensationTrainer(
        model=BTokSentenceTransformer(repo, device="cpu"), args=args, train_dataset={"pairs": dataset}
    )
    batches = list(trainer.get_train_dataloader().batch_sampler)
    assert len(batches) == 3 and all(len({i % 8 for i in batch}) == 8 for batch in batches)


# ---------------------------------------------------------------- targets and bad input


def collator(repo, tmp_path, **kwargs):
    model = BTokSentenceTransformer(repo, device="cpu")
    args = config(tmp_path, **kwargs)
    return CondensationCollator(preprocess_fn=model.preprocess, tokenizer=model.tokenizer, args=args), model.tokenizer


def test_targets_are_the_other_sides_text(repo, tmp_path):
    collate, tokenizer = collator(repo, tmp_path, condense="both", max_target_length=10)
    rows = [
        {"query": "q <|im_end|>", "positive": "a positive that is too long"},
        {"query": {"text": "with text", "image": image(40, 40)}, "positive": "p"},
    ]
    batch = collate(rows)
    decoded = {}
    for side in ("query", "positive"):
        ids, labels = batch[f"{side}_target_ids"][:, 0], batch[f"{side}_target_labels"][:, 0]
        decoded[side] = [tokenizer.decode(row[label != -100]) for row, label in zip(ids, labels)]
        prompts = [tokenizer.decode(row[: len(row) - len(label[label != -100])]) for row, label in zip(ids, labels)]
        assert prompts[0].startswith("<|im_start|>assistant\n")
        assert all((label[:11] == -100).all() for label in labels)
    assert decoded["query"] == ["a positive<|im_end|>", "p<|im_end|>"]
    assert decoded["positive"] == ["q < |im_en<|im_end|>", "with text<|im_end|>"]
    collate, tokenizer = collator(repo, tmp_path, condense="positive")
    batch = collate([{"query": image(40, 40), "positive": image(30, 30), "target": "instead"}])
    assert "positive_target_ids" not in batch
    assert tokenizer.decode(batch["query_target_ids"][0, 0]).endswith("instead<|im_end|>")


def test_text_of_every_kind_of_side():
    assert text_of("plain ") == "plain"
    assert text_of({"image": 1, "text": ["a", "b"]}) == "a b"
    assert text_of({"role": "user", "content": [{"type": "image", "image": 1}, {"type": "text", "text": "m"}]}) == "m"
    for nothing in (image(30, 30), {"image": 1}, "", "photo.png", None):
        assert text_of(nothing) is None


def test_bad_datasets_are_refused_before_training(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")

    def trainer(dataset, **kwargs):
        return CondensationTrainer(model=model, args=config(tmp_path, **kwargs), train_dataset=dataset)

    good = text_pairs(4)
    with pytest.raises(ValueError, match=r"missing \['query'\]; unknown \['anchor'\].*rename_column"):
        trainer(good.rename_column("query", "anchor"))
    with pytest.raises(ValueError, match=r"Dataset 'b'.*unknown \['id'\]"):
        trainer({"a": good, "b": good.add_column("id", [1, 2, 3, 4])})
    pictures = Dataset.from_dict(
        {"query": ["a"], "positive": [image(40, 40)]},
        features=Features({"query": Value("string"), "positive": Image()}),
    )
    with pytest.raises(ValueError, match="generates the text of 'positive', but a row of 'p' has none"):
        trainer({"p": pictures})
    trainer({"p": pictures}, condense="query")
    with pytest.raises(ValueError, match=r"condense names the datasets \['other'\] but not 'p'"):
        trainer({"p": pictures}, condense={"other": "none"})
    for wrong in ("positve", {"p": "target"}, None):
        with pytest.raises(ValueError, match="condense must be one of positive, query, both, none"):
            config(tmp_path, condense=wrong)
    for name, value in (("temperature", 0), ("mini_batch_size", 0), ("condensation_weight", -1)):
        with pytest.raises(ValueError, match=name):
            config(tmp_path, **{name: value})
    with pytest.raises(ValueError, match="trains a BTokSentenceTransformer, got SentenceTransformer"):
        CondensationTrainer(model=SentenceTransformer(repo, device="cpu"), train_dataset=good)
    with pytest.raises(ValueError, match=r"lora_dropout must be 0, got 0.1: GradCache"):
        CondensationTrainer(
            model=model, args=config(tmp_path), train_dataset=good, peft_config=LoraConfig(lora_dropout=0.1)
        )


def test_what_would_go_wrong_without_a_word_is_refused(repo, tmp_path, monkeypatch):
    grouped = text_pairs(4).add_column("group", ["a", None, "b", None])
    model = BTokSentenceTransformer(repo, device="cpu")
    trainer = CondensationTrainer(
        model=model, args=config(tmp_path, batch_sampler="no_duplicates"), train_dataset=grouped
    )
    with pytest.raises(ValueError, match="treats rows without a group as rows of one group"):
        trainer.get_train_dataloader()
    monkeypatch.setattr(CondensationConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"One process sees 2 GPUs.*accelerate launch"):
        CondensationTrainer(model=model, args=config(tmp_path), train_dataset=text_pairs(4))


def test_images_in_dicts_are_told_apart_by_their_pixels(tmp_path):
    """Not by the address of an object, or by the name of the file that they came from."""
    cells = [{"image": image(40, 40, i % 10), "text": "a"} for i in range(30)]
    features = Features({"query": Value("string"), "positive": {"image": Image(), "text": Value("string")}})
    pairs = {"query": [f"q{i}" for i in range(30)], "positive": cells}
    Dataset.from_dict(pairs, features=features).to_parquet(tmp_path / "pairs.parquet")
    evaluator = retrieval_evaluator(str(tmp_path / "pairs.parquet"))
    assert (len(evaluator.queries), len(evaluator.corpus)) == (30, 10)


def test_pair_files(tmp_path, repo):
    (tmp_path / "pairs.jsonl").write_text('{"query": "a", "positive": "b"}\n{"query": "a", "positive": "c"}\n')
    (tmp_path / "pairs.csv").write_text("query,positive\nx,y\n")
    assert load_pairs(str(tmp_path / "pairs.jsonl"))[1] == {"query": "a", "positive": "c"}
    assert load_pairs(str(tmp_path / "pairs.csv"))[0] == {"query": "x", "positive": "y"}
    with pytest.raises(FileNotFoundError, match=r"none\.parquet"):
        load_pairs(str(tmp_path / "none.parquet"))
    (tmp_path / "pairs.txt").write_text("")
    with pytest.raises(ValueError, match="unknown format"):
        load_pairs(str(tmp_path / "pairs.txt"))
    evaluator = retrieval_evaluator(str(tmp_path / "pairs.jsonl"))
    assert len(evaluator.queries) == 1 and len(evaluator.corpus) == 2
    assert evaluator(BTokSentenceTransformer(repo, device="cpu"))["pairs_cosine_accuracy@10"] == 1.0


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "training" / "recipes").glob("[!m]*.yaml")))
def test_recipes_are_read(recipe, tmp_path):
    """Every key is an argument, and the paper's recipe says the paper's setting."""
    classes = (ScriptArguments, CondensationConfig, ModelArguments, CardArguments)
    flags = ["--use_cpu", "true", "--output_dir", str(tmp_path)]
    script, args, model_args, _ = TrlParser(classes).parse_args_and_config(
        ["--config", str(ROOT / "training" / "recipes" / recipe), *flags]
    )
    if recipe.startswith("btok"):
        mixture = read_mixture(script.train_files)
        assert len(mixture) == 25 and set(mixture) <= set(SOURCES)
        assert (script.num_tokens, model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout) == (4, 16, 32, 0)
        assert (args.temperature, args.learning_rate, args.warmup_steps) == (0.02, 5e-5, 100)
        assert (args.condensation_weight, args.condensation_steps, args.max_steps) == (5.0, 2000, 5000)
        assert get_peft_config(model_args).target_modules is None


BEST = "load_best_model_at_end: true\neval_strategy: steps\neval_steps: 1\nsave_steps: 1\n"


@pytest.mark.parametrize("lora", [False, True])
def test_the_script_trains_evaluates_and_exports(repo, tmp_path, lora):
    features = Features({"query": Value("string"), "positive": Image()})
    pairs = {"query": [f"picture {i}" for i in range(8)], "positive": [image(40, 40, i) for i in range(8)]}
    for name in ("pairs", "eval_pairs"):  # the Trainer does not put its "eval_" in front of the second
        Dataset.from_dict(pairs, features=features).to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "config.yaml").write_text(
        f"model_name_or_path: {repo}\n"
        f"train_files:\n  pictures: {tmp_path}/pairs.parquet\n"
        f"eval_file: {tmp_path}/eval_pairs.parquet\n"
        f"output_dir: {tmp_path}/unused\n"
        + ("metric_for_best_model: eval_pairs_cosine_recall@1\n" if lora else BEST)
        + "condense:\n  pictures: query\n"
        "per_device_train_batch_size: 4\nmax_steps: 2\nlogging_steps: 1\nreport_to: none\nuse_cpu: true\n"
    )
    output = tmp_path / "model"
    flags = ["--output_dir", str(output), "--model_license", "apache-2.0", *(["--use_peft"] if lora else [])]
    run = subprocess.run(
        [sys.executable, "training/train.py", "--config", str(tmp_path / "config.yaml"), *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "before" in run.stdout and "Exported to" in run.stdout
    metrics = json.loads((output / "metrics.json").read_text())
    assert set(metrics["eval_pairs_cosine_recall@1"]) == {"before", "after"}
    if not lora:  # with the evaluator's own metric, of which more is better
        state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
        scores = [log[key] for log in state["log_history"] if (key := "eval_pairs_cosine_ndcg@10") in log]
        assert state["best_metric"] == max(scores[-2:]) and state["best_model_checkpoint"]
    assert not list(output.glob("*.bin")) and not (output / "adapter_config.json").exists()
    card = (output / "README.md").read_text()
    assert (
        "license: apache-2.0" in card
        and "| pictures | training | 8 rows |" in card
        and "8 queries, 8 candidates" in card
    )
    assert SentenceTransformer(str(output), device="cpu").encode(["picture 1"]).shape == (1, 64)


@pytest.mark.parametrize("flag", ["--load_in_4bit", "--load_in_8bit", "--attn_implementation=sdpa"])
def test_flags_that_would_change_nothing_are_refused(repo, tmp_path, monkeypatch, flag):
    monkeypatch.setattr(sys, "argv", ["train.py", "--model_name_or_path", repo, "--train_files", "none.csv", flag])
    with pytest.raises(ValueError, match=rf"{flag[2:].partition('=')[0]} is not supported: .* Remove"):
        main()
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "--load_best_model_at_end", "--save_strategy", "no"])
    with pytest.raises(ValueError, match="nothing is evaluated: set eval_file"):
        main()


def test_a_condense_that_was_chosen_is_not_overridden_by_sources():
    own = {"a": "query"}
    assert condense_of(["a", "b"], "positive", own) == {"a": "query", "b": "positive"}
    assert condense_of(["a", "b"], "none", own) == {"a": "none", "b": "none"}
    assert condense_of(["a", "b"], {"a": "both", "b": "none"}, own) == {"a": "both", "b": "none"}


def test_a_folder_with_another_start_is_refused(bases, tmp_path):
    args, base = config(tmp_path), ModelArguments(model_name_or_path=bases["qwen2_vl"])
    start, _ = starting_point(base, 4, {}, args)
    assert starting_point(base, 4, {}, args) == (start, None)
    for other in ((base, 2, {}), (base, 4, {"max_pixels": 56 * 56})):
        with pytest.raises(
            ValueError, match=r"start was made from .*'num_tokens': 4.*Remove it, or name another output_dir"
        ):
            starting_point(*other, args)


def test_the_example_fine_tunes_on_a_csv_of_texts_and_image_paths(bases, tmp_path):
    image(60, 50).save(tmp_path / "a.png")
    rows = ["query,positive", "a red cat,yes", f"{tmp_path}/a.png,noise", "one more,no"]
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    command = [sys.executable, "examples/finetune.py", tmp_path / "pairs.csv", tmp_path / "mine"]
    command += ["--base", bases["qwen2_vl"], "--steps", "2"]
    for _ in range(2):  # it can be run again
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "No training is recorded" not in card and "| pairs | training | 3 rows |" in card
    model = SentenceTransformer(str(tmp_path / "mine"), device="cpu")
    assert model.encode(["a red cat", str(tmp_path / "a.png")]).shape == (2, 64)
