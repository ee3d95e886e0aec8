"""The trainer: steps, batches, resuming, several processes, and what is refused before training."""

import json
import math
import resource
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, Features, Image, Value, concatenate_datasets
from packaging.version import Version
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from support import tiny
from support.gradients import assert_same_gradients, named_gradients
from support.media import image
from support.processes import run_two
from support.source_tree import all_sources
from support.training import checkpointed_trainer, config, losses, reference_loss, text_pairs

from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, export_model, golden
from btok_hf.hub_card import training_run
from btok_hf.training import CondensationConfig, CondensationLoss, CondensationTrainer
from btok_hf.training.checkpoints import checkpoints, incomplete_reason
from btok_hf.training.condensation_collator import CondensationCollator
from btok_hf.training.evaluator import metric_names, retrieval_evaluator
from btok_hf.training.mixture import load_mixture
from btok_hf.training.sampler import MixtureBatchSampler, check_full_batches


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


@pytest.mark.parametrize("sharded", ["is_fsdp_enabled", "is_deepspeed_enabled", None])
def test_sharded_processes_encode_every_copy(repo, tmp_path, monkeypatch, sharded):
    """With sharded parameters, all processes must encode equally many rows, so copies are encoded too."""

    class Sharded(CondensationTrainer):  # accelerate supports both on accelerators only
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            if sharded:
                setattr(self, sharded, True)

    monkeypatch.setattr("btok_hf.training.condensation_trainer.check_parallelism", lambda trainer, args: None)
    rows = Dataset.from_dict({"query": ["one", "two", "three", "four"], "positive": ["cat", "cat", "dog", "cat"]})
    args = config(tmp_path, per_device_train_batch_size=4)
    trainer = Sharded(model=BTokSentenceTransformer(repo, device="cpu"), args=args, train_dataset=rows)
    (batch,) = trainer.get_train_dataloader()
    assert len(batch["positive_input_ids"]) == (4 if sharded else 2)
    assert ("positive_rows" in batch) == (sharded is None)


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
    assert "condensation" not in logs[4]
    for log in logs[:4]:
        assert log["loss"] == pytest.approx(log["infonce"] + 5 * log["condensation"], rel=2e-3)
        assert log["tokens_per_second"] > log["samples_per_second"] > 0
    assert last["eval_infonce"] < first["eval_infonce"]
    assert recall() >= 0.9 > before + 0.3


@pytest.mark.parametrize("lora", [None, "lora", "dora"])
def test_resuming_ends_where_an_uninterrupted_run_does(either, tmp_path, lora):
    whole, resumed = (checkpointed_trainer(either, tmp_path / name, lora) for name in ("whole", "resumed"))
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
    # An untied head, which is used in the forward of one side only.
    untied = add_bottleneck_tokens(tiny.build("qwen2_vl", tmp_path / "base", tied=False), tmp_path / "untied")
    with_head = checkpointed_trainer(str(untied), tmp_path / "with_head")
    with_head.train()
    run_two("two_trainers.py", repo, untied, tmp_path)
    whole, resumed, mixed, mixed_resumed, head = json.loads((tmp_path / "losses.json").read_text())
    assert head == pytest.approx(losses(with_head), rel=1e-5)
    assert len(mixed) == 6 and mixed_resumed == pytest.approx(mixed, rel=1e-6)
    assert whole == pytest.approx(losses(one), rel=1e-5) and resumed == pytest.approx(whole, rel=1e-6)
    for name, tensor in torch.load(tmp_path / "weights.pt").items():
        # A key's bias does not change attention. Its gradient is rounding noise, which AdamW enlarges; on some CPUs
        # also that of single other weights. With a wrong gradient, steps would differ by the learning rate, 1e-3.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(tensor, one.model.state_dict()[name], atol=1e-4, rtol=0, msg=name)
    assert all(incomplete_reason(path) is None for path in checkpoints(tmp_path / "resumed" / "out"))
    assert "| pairs | training | 12 rows |" in (tmp_path / "exported" / "README.md").read_text()


def test_datasets_that_would_give_no_full_batch_are_refused(repo, tmp_path):
    pairs = {"first": text_pairs(), "second": text_pairs(3)}
    with pytest.raises(ValueError, match=r"'second' has 3 rows, fewer than a batch of 4, .* lower per_device"):
        checkpointed_trainer(repo, tmp_path, pairs=pairs, dataloader_drop_last=True)
    checkpointed_trainer(repo, tmp_path, pairs=pairs)
    check_full_batches({"pairs": 8}, 4, 2)
    with pytest.raises(ValueError, match=r"7 rows make 1 full batches of 4, fewer than the 2 processes"):
        check_full_batches({"pairs": 7}, 4, 2)


def test_training_starts_where_the_output_folder_is_gone(repo, tmp_path):
    """One of several processes makes the folder, perhaps after another one needs it."""
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
    with pytest.raises(ValueError, match=r"out' has 0.00 GB free, .*: 1 checkpoints of .* GB\. Free space"):
        checkpointed_trainer(repo, tmp_path).train()


@pytest.mark.parametrize("steps", [1, 3])
def test_a_loss_that_is_not_finite_ends_the_training(repo, tmp_path, steps):
    """It is not hidden by finite ones before it, as transformers does by default."""

    class Break(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == steps - 1:
                with torch.no_grad():
                    trainer.model[0].model.language_model.norm.weight.fill_(torch.nan)

    trainer = checkpointed_trainer(repo, tmp_path, logging_steps=steps)
    trainer.add_callback(Break())
    with pytest.raises(ValueError, match=rf"loss is nan at step {steps}\. Start a new training from"):
        trainer.train()
    assert math.isnan(losses(trainer)[-1]) and math.isnan(trainer.state.log_history[-1]["infonce"])


def test_weights_that_are_not_finite_are_not_saved(repo, tmp_path):
    """They would be found by the next log only."""

    class Break(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    trainer.model[0].model.language_model.norm.weight[1] = torch.inf

    trainer = checkpointed_trainer(repo, tmp_path, logging_steps=100)
    trainer.add_callback(Break())
    says = r"not finite at step 4, so no checkpoint .* newest complete one is .*checkpoint-2\. Start a new training"
    with pytest.raises(ValueError, match=says):
        trainer.train()
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]


def test_the_best_checkpoint_is_kept_and_loaded(repo, tmp_path):
    """The learning rate grows until the model breaks, so the best checkpoint is not the last."""
    dataset = text_pairs()
    dataset.to_json(tmp_path / "pairs.jsonl")
    evaluator = retrieval_evaluator(str(tmp_path / "pairs.jsonl"))
    metric = "pairs_cosine_accuracy@1"
    trainer = checkpointed_trainer(
        repo,
        tmp_path,
        evaluator=evaluator,
        weight_decay=0.0,
        **{"per_device_train_batch_size": 12, "max_steps": 16, "save_steps": 4, "eval_strategy": "steps"},
        **{"eval_steps": 4, "learning_rate": 0.3, "warmup_steps": 16, "max_grad_norm": 0.0, "save_total_limit": 1},
        **{"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": True},
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if f"eval_{metric}" in log]
    scores = {log["step"]: log[f"eval_{metric}"] for log in logs}
    best = max(scores, key=scores.get)
    assert scores[16] < scores[best]
    assert evaluator(trainer.model)[metric] == pytest.approx(scores[best])
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-16", f"checkpoint-{best}"]
    assert trainer.model.kept_card() is None  # it tells of the start


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
    # Only the group counts. Equal queries of different groups may share a batch.
    rows = {"query": ["the same"] * 24, "positive": [f"p{i}" for i in range(24)]}
    dataset = Dataset.from_dict({**rows, "group": [str(i % 8) for i in range(24)]})
    args = config(tmp_path, per_device_train_batch_size=8, batch_sampler="no_duplicates", max_steps=1)
    trainer = CondensationTrainer(
        model=BTokSentenceTransformer(repo, device="cpu"), args=args, train_dataset={"pairs": dataset}
    )
    batches = list(trainer.get_train_dataloader().batch_sampler)
    assert len(batches) == 3 and all(len({i % 8 for i in batch}) == 8 for batch in batches)


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
    with pytest.raises(
        ValueError, match="Row 0 of p: condensation generates the text of its positive, which has none"
    ):
        trainer({"p": pictures})
    trainer({"p": pictures}, condense="query")
    with pytest.raises(ValueError, match=r"is streamed \(IterableDataset\)"):
        trainer(text_pairs(4).to_iterable_dataset(), max_steps=1)
    with pytest.raises(ValueError, match="Row 1 of eval_dataset: its query is empty"):
        bad = Dataset.from_dict({"query": ["a", ""], "positive": ["x", "y"]})
        CondensationTrainer(model=model, args=config(tmp_path), train_dataset=good, eval_dataset=bad)
    with pytest.raises(ValueError, match="Row 2 of b: its query is empty"):
        trainer({"a": good, "b": Dataset.from_dict({"query": ["a", "b", ""], "positive": ["x", "y", "z"]})})
    for weights, message in (
        ({"a": 1, "c": 2}, r"unknown \['c'\]; missing \['b'\]"),
        ({"a": 1, "b": 0}, "weight of dataset 'b' must be a number above 0, got 0"),
        ({"a": 1, "b": 1}, "Dataset 'b' has 2 rows, fewer than a batch of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(
                {"a": good, "b": text_pairs(2)}, dataset_weights=weights, per_device_train_batch_size=4, max_steps=1
            )
    with pytest.raises(ValueError, match=r"condense names the datasets \['other'\] but not 'p'"):
        trainer({"p": pictures}, condense={"other": "none"})
    with pytest.raises(ValueError, match="trains a BTokSentenceTransformer, got SentenceTransformer"):
        CondensationTrainer(model=SentenceTransformer(repo, device="cpu"), train_dataset=good)
    with pytest.raises(ValueError, match=r"lora_dropout must be 0, got 0.1: GradCache"):
        CondensationTrainer(
            model=model, args=config(tmp_path), train_dataset=good, peft_config=LoraConfig(lora_dropout=0.1)
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_decoded_is_named(repo, tmp_path, workers):
    """And a second trainer checks the rows of the datasets that the first one got."""
    features = Features({"query": Value("string"), "positive": {"image": Image(), "text": Value("string")}})
    pictures = [{"image": image(56, 56, i), "text": "x"} for i in range(4)]
    rows = Dataset.from_dict({"query": list("abcd"), "positive": pictures}, features=features)
    cells = rows.to_list()
    cells[2]["positive"]["image"]["bytes"] = b"damaged"
    parts = {"good": rows, "bad": Dataset.from_list(cells, features=features)}
    args = {"per_device_train_batch_size": 2, "max_steps": 8, "dataloader_num_workers": workers}

    def trainer(**datasets):
        model = BTokSentenceTransformer(repo, device="cpu")
        return CondensationTrainer(model=model, args=config(tmp_path, **args), train_dataset=datasets)

    with pytest.raises(
        ValueError, match=r"Row 2 of 'bad', its positive \{'image': .*not an image that Pillow can read"
    ):
        trainer(**parts).train()
    assert all(part.features == features and part.format["type"] is None for part in parts.values())
    assert not hasattr(parts["good"][0]["positive"]["image"], "keys")  # decoded, as it was
    cells[3]["query"] = ""
    parts["bad"] = Dataset.from_list(cells, features=features)
    for _ in range(2):
        with pytest.raises(ValueError, match="Row 3 of bad: its query is empty"):
            trainer(**parts)


def test_only_an_epoch_of_training_must_be_complete(repo, tmp_path):
    rows = concatenate_datasets([text_pairs()] * 3)
    uneven = rows.add_column("group", [0] * 28 + list(range(1, 9)))
    even = rows.add_column("group", list(range(36)))
    model = BTokSentenceTransformer(repo, device="cpu")
    sampler = {"batch_sampler": "no_duplicates", "dataloader_drop_last": True, "per_device_eval_batch_size": 4}

    def trainer(train, **options):
        args = config(tmp_path, per_device_train_batch_size=4, max_steps=5, **sampler, **options)
        return CondensationTrainer(model=model, args=args, train_dataset=train, eval_dataset=uneven)

    for train in (uneven, {"a": uneven, "b": even}):
        refused = trainer(train)
        with pytest.raises(ValueError, match=r"cannot fill 9 batches of 4 .*the 36 rows give 9 groups"):
            refused.get_train_dataloader()
        assert list(refused.get_eval_dataloader(refused.train_dataset))
    for of_mixture in (trainer(even), trainer({"a": uneven, "b": even}, dataset_weights={"a": 1.0, "b": 1.0})):
        assert len(list(of_mixture.get_train_dataloader())) >= 5 and list(of_mixture.get_eval_dataloader())
    # A dataset that never fills a batch would end a run where it is drawn first, perhaps hours after its start.
    few = rows.add_column("group", [0, 1, 2] * 12)
    weights = {"a": 1.0, "b": 0.001}
    with pytest.raises(ValueError, match=r"Dataset 'b' has 3 groups, .*: no batch of 4 would be full\. Lower per_dev"):
        trainer({"a": even, "b": few}, dataset_weights=weights)


@pytest.mark.parametrize("sampler", ["batch_sampler", "no_duplicates"])
def test_the_order_of_several_datasets_follows_the_data_seed(repo, tmp_path, sampler):
    def order(**seeds):
        rows = text_pairs().add_column("group", list(range(12)))
        args = config(tmp_path, per_device_train_batch_size=2, batch_sampler=sampler, max_steps=1, **seeds)
        model = BTokSentenceTransformer(repo, device="cpu")
        trainer = CondensationTrainer(model=model, args=args, train_dataset={"a": rows, "b": rows})
        return list(trainer.get_train_dataloader().batch_sampler)

    assert order(data_seed=1) == order(data_seed=1, seed=5) != order(data_seed=2)
    assert order(seed=5) != order(seed=6) and order(seed=1) == order(data_seed=1)


def test_rows_without_a_group_are_refused(repo, tmp_path):
    grouped = text_pairs(4).add_column("group", ["a", None, "b", None])
    model = BTokSentenceTransformer(repo, device="cpu")
    trainer = CondensationTrainer(
        model=model, args=config(tmp_path, batch_sampler="no_duplicates"), train_dataset=grouped
    )
    with pytest.raises(ValueError, match="treats rows without a group as rows of one group"):
        trainer.get_train_dataloader()


@pytest.mark.parametrize(
    ("options", "evaluated", "says"),
    [
        (
            {"per_device_train_batch_size": 1, "condensation_steps": 0},
            None,
            r"'train_dataset' has one row .*is always 0. Raise",
        ),
        (
            {"dataloader_drop_last": True, "eval_strategy": "epoch"},
            text_pairs(4),
            r"'eval_dataset' has 4 rows to evaluate, fewer than a batch of 8",
        ),
        (
            {"batch_sampler": "no_duplicates", "eval_strategy": "epoch"},
            {"a": text_pairs(8)},
            "compares rows by the column group",
        ),
    ],
)
def test_batches_that_train_or_measure_nothing_are_refused(repo, tmp_path, options, evaluated, says):
    model = BTokSentenceTransformer(repo, device="cpu")
    rows = text_pairs(8).add_column("group", list(range(8)))

    def trainer(rows, **changed):
        data = {"train_dataset": rows, "eval_dataset": evaluated}
        return CondensationTrainer(model=model, args=config(tmp_path, max_steps=1, **{**options, **changed}), **data)

    with pytest.raises(ValueError, match=says):
        trainer(rows)
    if evaluated is None:  # a hard negative is something to compare, and condensation trains a row alone
        trainer(rows.add_column("negative", [f"another {row}" for row in range(8)]))
        trainer(rows, condensation_steps=None)
    else:
        trainer(rows, eval_strategy="no")


def test_a_given_loss_keeps_its_settings(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")
    loss = CondensationLoss(model, condensation_weight=0.25)
    args = config(tmp_path, max_steps=2, condensation_steps=1, per_device_train_batch_size=4, logging_steps=1)
    trainer = CondensationTrainer(model=model, args=args, train_dataset=text_pairs(8), loss=loss)
    trainer.train()
    assert [log["condensation_weight"] for log in trainer.state.log_history if "loss" in log] == [0.25, 0.0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dataset_weights": {"a": 1.0}}, "there is only one. Give a dict"),
        ({"block_size": 8}, "block_size is used with dataset_weights only"),
    ],
)
def test_settings_without_effect_are_refused(repo, tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        CondensationTrainer(
            model=BTokSentenceTransformer(repo, device="cpu"),
            args=config(tmp_path, max_steps=1, **options),
            train_dataset=text_pairs(4),
        )


@pytest.mark.parametrize("name", ["eval", "pairs"])
def test_metrics_are_those_of_the_evaluator(repo, tmp_path, name):
    """Before training with FSDP too, where accelerate cannot shard a model without an optimizer."""
    text_pairs().to_json(tmp_path / f"{name}.jsonl")
    evaluator = retrieval_evaluator(str(tmp_path / f"{name}.jsonl"))
    trainer = checkpointed_trainer(repo, tmp_path, evaluator=evaluator)
    found = trainer.evaluate_retrieval()
    assert list(found) == metric_names(evaluator, trainer.model)
    trainer.is_fsdp_enabled, trainer.evaluate = True, None
    assert trainer.evaluate_retrieval() == pytest.approx(found)


def test_metrics_of_several_evaluators(repo, tmp_path):
    evaluators = [retrieval_evaluator(text_pairs(), name=name) for name in ("first", "second")]
    trainer = checkpointed_trainer(repo, tmp_path, evaluator=evaluators)
    found = trainer.evaluate_retrieval()
    names = [name for part in evaluators for name in metric_names(part, trainer.model)]
    assert list(found) == [*names, "sequential_score"]


def test_metrics_of_an_evaluator_without_a_name_beside_datasets_to_evaluate(repo, tmp_path):
    evaluator = InformationRetrievalEvaluator({"q": "a"}, {"d": "a", "e": "b"}, {"q": {"d"}})
    datasets = {"first": text_pairs(4), "second": text_pairs(4)}
    data = {"train_dataset": text_pairs(), "eval_dataset": datasets}
    model = BTokSentenceTransformer(repo, device="cpu")
    trainer = CondensationTrainer(model=model, args=config(tmp_path), evaluator=evaluator, **data)
    found = trainer.evaluate_retrieval()
    assert [path.suffix for path in (tmp_path / "out" / "eval").iterdir()] == [".csv"]  # as in a training
    assert found == pytest.approx(evaluator(trainer.model)) and found["cosine_ndcg@10"] > 0
    (log,) = trainer.state.log_history
    assert log["eval_cosine_ndcg@10"] == found["cosine_ndcg@10"]


def test_a_best_checkpoint_that_cannot_be_loaded_is_an_error(repo, tmp_path):
    trainer = checkpointed_trainer(repo, tmp_path)
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(OSError, match="checkpoint-2"):
        trainer._load_best_model()


def test_every_layout_trains(repo, tmp_path, monkeypatch):
    names = all_sources(tmp_path)
    loaded, weights, condense, _ = load_mixture({name: {"weight": 1} for name in names}, tmp_path)
    args = config(
        tmp_path,
        dataset_weights=weights,
        condense=condense,
        per_device_train_batch_size=2,
        mini_batch_size=1,
        max_steps=24,
        logging_steps=1,
        dataloader_num_workers=1,
    )
    model = BTokSentenceTransformer(repo, device="cpu")
    trainer = CondensationTrainer(model=model, args=args, train_dataset=loaded)
    drawn, draw = [], MixtureBatchSampler.__iter__
    monkeypatch.setattr(MixtureBatchSampler, "__iter__", lambda self: (drawn.append(b) or b for b in draw(self)))
    trainer.train()
    assert {batch[0] // 8 for batch in drawn} == set(range(8))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 24 and all(np.isfinite(log["loss"]) for log in logs)
    condensed = [log.get("condensation", 0) > 0 for log in logs]
    assert condensed == [names[batch[0] // 8] != "CIRR" for batch in drawn[:24]]


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_resumed_run_sees_the_batches_it_has_not_seen(repo, tmp_path, monkeypatch, epochs):
    batches, collate = [], CondensationCollator.__call__
    monkeypatch.setattr(
        CondensationCollator,
        "__call__",
        lambda self, rows: batches.append([row["query"] for row in rows]) or collate(self, rows),
    )
    if epochs > 1:  # so that the checkpoint lies in the middle of the second epoch
        monkeypatch.setattr(MixtureBatchSampler, "__len__", lambda self: self.num_batches // epochs)
        draw = MixtureBatchSampler.__iter__
        monkeypatch.setattr(MixtureBatchSampler, "__iter__", lambda self: (b for b, _ in zip(draw(self), range(8))))
    words = ["red", "old", "tall", "wet", "loud", "thin", "deep", "odd", "warm", "slow", "flat", "gray"]
    parts = {
        name: Dataset.from_dict({"query": [f"{name} {w}" for w in words], "positive": [f"{w} thing" for w in words]})
        for name in ("a", "b")
    }

    def run(folder, resume=None):
        args = config(
            folder,
            dataset_weights={"a": 1, "b": 2},
            block_size=8,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=12,
            save_strategy="steps",
            save_steps=6,
        )
        model = BTokSentenceTransformer(repo, device="cpu")
        trainer = CondensationTrainer(model=model, args=args, train_dataset=dict(parts))
        batches.clear()
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.epoch == epochs
        return [tuple(batch) for batch in batches], model

    whole, model = run(tmp_path / "whole")
    assert len(whole) == 24 and len(set(whole)) > 20
    rest, resumed = run(tmp_path / "rest", str(tmp_path / "whole" / "out" / "checkpoint-6"))
    assert rest == whole[12:]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_the_card_is_written_once_and_never_says_less_than_the_run(repo, tmp_path, monkeypatch):
    """An export that is killed before its last file has no card but that of the run."""
    trainer = checkpointed_trainer(repo, tmp_path / "run")
    trainer.train()

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(golden, "write_golden", stop)  # the last file
        with pytest.raises(KeyboardInterrupt):
            trainer.export(tmp_path / "killed")
    assert not (tmp_path / "killed" / "golden.json").exists()
    card = (tmp_path / "killed" / "README.md").read_text("utf-8")
    assert "last logged losses" in card and "No training is recorded" not in card


def test_an_error_of_the_card_does_not_lose_the_model(repo, tmp_path, monkeypatch):
    trainer = checkpointed_trainer(repo, tmp_path / "run")
    trainer.train()

    def fail(*arguments, **options):
        raise RuntimeError("no card")

    monkeypatch.setattr(training_run, "card_files", fail)
    with pytest.raises(RuntimeError, match="no card"):
        trainer.export(tmp_path / "exported")
    assert (tmp_path / "exported" / "golden.json").is_file()
    card = (tmp_path / "exported" / "README.md").read_text("utf-8")
    assert "How these weights were trained is not described here" in card
