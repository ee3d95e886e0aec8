"""What a training logs."""

from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict, concatenate_datasets
from support.media import image
from support.training import config, text_pairs

from btok_hf import BTokSentenceTransformer
from btok_hf.training import CondensationTrainer


def logs(trainer):
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def test_samples_of_a_step_are_counted_before_copies_are_left_out(repo, tmp_path):
    rows = Dataset.from_dict({"query": ["same"] * 4, "positive": ["one", "two"] * 2})
    args = config(tmp_path, max_steps=1, per_device_train_batch_size=4, logging_steps=1)
    trainer = CondensationTrainer(model=BTokSentenceTransformer(repo, device="cpu"), args=args, train_dataset=rows)
    counted = []
    trainer.log = lambda logs, start_time=None: counted.append(trainer._samples)
    trainer.train()
    assert counted[0] == 4


@pytest.mark.parametrize("backbone", ["idefics3", "lfm2_vl"])
def test_tokens_of_a_step_are_tokens_and_not_pixels(repos, tmp_path, backbone):
    model = BTokSentenceTransformer(repos[backbone], device="cpu")
    rows = Dataset.from_dict({"query": ["a", "b"], "positive": [{"image": image(300, 100, seed)} for seed in (0, 1)]})
    args = config(tmp_path, max_steps=1, per_device_train_batch_size=2, logging_steps=1, condense="none")
    trainer = CondensationTrainer(model=model, args=args, train_dataset=rows)
    counted = []
    trainer.log = lambda logs, start_time=None: counted.append(trainer._tokens)
    trainer.train()
    sides = [
        model.preprocess(rows[column], prompt)["attention_mask"].sum()
        for column, prompt in (("query", model.prompts["query"]), ("positive", None))
    ]
    assert counted[0] == sum(sides)


def test_several_evaluation_datasets_have_the_parts_of_their_losses(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")
    parts = {"a": text_pairs(4), "b": text_pairs(8).select(range(4, 8))}
    args = config(tmp_path, per_device_eval_batch_size=2, condense="positive")
    trainer = CondensationTrainer(model=model, args=args, train_dataset=text_pairs(4), eval_dataset=parts)
    trainer.evaluate()
    a, b = [log for log in trainer.state.log_history if any(key.endswith("_loss") for key in log)]
    for log, name in ((a, "a"), (b, "b")):
        total = log[f"eval_{name}_infonce"] + 5 * log[f"eval_{name}_condensation"]
        assert log[f"eval_{name}_loss"] == pytest.approx(total, rel=1e-3)
    assert a["eval_a_infonce"] != b["eval_b_infonce"]
    trainer.evaluate(parts["a"])  # of this one alone
    last = trainer.state.log_history[-1]
    assert last["eval_infonce"] == pytest.approx(a["eval_a_infonce"], abs=1e-3)
    columns = parts["a"].column_names
    trainer.evaluate(dict(parts))  # Sentence-Transformers alone takes a `DatasetDict` only
    again = trainer.state.log_history[-2:]
    assert [log[f"eval_{name}_loss"] for log, name in zip(again, parts)] == [a["eval_a_loss"], b["eval_b_loss"]]
    assert parts["a"].format["type"] is None and parts["a"].column_names == columns


def test_each_evaluation_dataset_has_its_own_side_to_generate(repo, tmp_path):
    """Also given by hand, and after Sentence-Transformers has put a transform on them, which tells their names."""
    parts = {"a": text_pairs(4), "b": text_pairs(4)}
    args = config(tmp_path, condense={"a": "positive", "b": "query"})
    model = BTokSentenceTransformer(repo, device="cpu")
    trainer = CondensationTrainer(model=model, args=args, train_dataset=parts, eval_dataset=parts)
    expected = trainer.evaluate()
    assert expected["eval_a_loss"] != expected["eval_b_loss"]
    for given in (parts, DatasetDict(parts), trainer.train_dataset, trainer.eval_dataset):
        found = trainer.evaluate(given)
        assert {name: found[name] for name in ("eval_a_loss", "eval_b_loss")} == {
            name: expected[name] for name in ("eval_a_loss", "eval_b_loss")
        }
    assert trainer.evaluate(trainer.train_dataset["b"])["eval_loss"] == expected["eval_b_loss"]


@pytest.mark.parametrize("rows", [8, 9, 12])
def test_parts_of_an_evaluation_are_averaged_over_rows(repo, tmp_path, rows):
    """As the Trainer averages the loss: a last batch of one row, whose InfoNCE is 0, does not count as eight."""
    pairs = concatenate_datasets([text_pairs()] * 2).select(range(rows))
    args = config(tmp_path, per_device_eval_batch_size=8, condensation_weight=1.0)
    model = BTokSentenceTransformer(repo, device="cpu")
    trainer = CondensationTrainer(model=model, args=args, train_dataset=pairs, eval_dataset=pairs)
    trainer.evaluate()
    (log,) = trainer.state.log_history
    assert log["eval_loss"] == pytest.approx(log["eval_infonce"] + log["eval_condensation"], abs=2e-4)
    assert log["eval_condensation_weight"] == 1


def test_an_evaluation_with_another_prefix_has_its_own_parts(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")
    args = config(tmp_path, per_device_eval_batch_size=4)
    dev = text_pairs(4)
    trainer = CondensationTrainer(model=model, args=args, train_dataset=dev, eval_dataset=dev)
    trainer.evaluate()
    trainer.evaluate(text_pairs(12).select(range(4, 12)), metric_key_prefix="test")
    trainer.evaluate()
    first, test, again = trainer.state.log_history
    assert test["test_loss"] == pytest.approx(test["test_infonce"] + 5 * test["test_condensation"], rel=1e-3)
    assert test["test_infonce"] != first["eval_infonce"]
    assert all(first[name] == again[name] for name in ("eval_loss", "eval_infonce", "eval_condensation"))


def test_an_evaluation_that_ended_early_leaves_nothing(repo, tmp_path, monkeypatch):
    model = BTokSentenceTransformer(repo, device="cpu")
    args = config(tmp_path, per_device_eval_batch_size=2)
    rows = text_pairs(8)
    trainer = CondensationTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)
    trainer.evaluate()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "log", refuse)
        with pytest.raises(KeyboardInterrupt):
            trainer.evaluate(rows.select([6, 7]))
    trainer.evaluate()
    first, again = trainer.state.log_history
    assert first["eval_infonce"] == again["eval_infonce"] and first["eval_condensation"] == again["eval_condensation"]


def refuse(*_):
    raise KeyboardInterrupt


def test_evaluation_keeps_the_weight_when_condensation_is_over(repo, tmp_path):
    """Otherwise the loss of the best checkpoint would be one of those after the switch, whatever the model."""
    args = config(tmp_path, max_steps=4, condensation_steps=2, logging_steps=1, eval_steps=1, eval_strategy="steps")
    model = BTokSentenceTransformer(repo, device="cpu")
    trainer = CondensationTrainer(model=model, args=args, train_dataset=text_pairs(8), eval_dataset=text_pairs(4))
    assert [log["condensation_weight"] for log in logs(trainer)] == [5.0, 5.0, 0.0, 0.0]
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 4
    for log in evaluations:
        total = log["eval_infonce"] + 5 * log["eval_condensation"]
        assert log["eval_loss"] == pytest.approx(total, rel=1e-3) and log["eval_condensation_weight"] == 5.0
    args.condensation_steps = 0
    trainer = CondensationTrainer(model=model, args=args, train_dataset=text_pairs(8), eval_dataset=text_pairs(4))
    trainer.evaluate()
    log = trainer.state.log_history[-1]
    assert log["eval_loss"] == pytest.approx(log["eval_infonce"], abs=1e-3) and log["eval_condensation_weight"] == 0


def test_evaluation_and_saving_do_not_count_in_the_speed(repo, tmp_path, monkeypatch):
    """By a clock on which a step takes a second, and the others a hundred."""
    now = 0

    class Timed(CondensationTrainer):
        def _count(self, *args):
            nonlocal now
            super()._count(*args)
            now += 1

        def _save_optimizer_and_scheduler(self, *args):
            nonlocal now
            now += 100
            super()._save_optimizer_and_scheduler(*args)

        def evaluation_loop(self, *args, **kwargs):
            nonlocal now
            now += 100
            return super().evaluation_loop(*args, **kwargs)

    monkeypatch.setattr("btok_hf.training.condensation_log.time", SimpleNamespace(perf_counter=lambda: now))
    args = config(
        tmp_path,
        **{"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 4, "condense": "none"},
        **{"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
    )
    model = BTokSentenceTransformer(repo, device="cpu")
    several = {"a": text_pairs(2), "b": text_pairs(2)}  # the second is evaluated within the first's evaluation
    trainer = Timed(model=model, args=args, train_dataset=text_pairs(8), eval_dataset=several)
    assert [log["samples_per_second"] for log in logs(trainer)] == [4.0] and now == 604


def test_condensation_is_averaged_over_the_steps_that_have_it(repo, tmp_path):
    """Other steps have none: it is over, or their dataset has no targets."""
    model = BTokSentenceTransformer(repo, device="cpu")
    parts = {"with": text_pairs(8), "without": text_pairs(8)}
    args = config(
        tmp_path,
        per_device_train_batch_size=4,
        max_steps=6,
        logging_steps=3,
        learning_rate=0.0,
        condense={"with": "positive", "without": "none"},
        dataset_weights={"with": 1.0, "without": 1.0},
        condensation_steps=3,
        seed=1,
    )
    trainer = CondensationTrainer(model=model, args=args, train_dataset=parts)
    seen = []
    track = trainer._track
    trainer._track = lambda: seen.append(trainer.loss.condensation) or track()
    first, second = logs(trainer)
    found = [float(value) for value in seen[:3] if value is not None]
    assert 0 < len(found) < 3 and seen[3:] == [None] * 3
    assert first["condensation"] == pytest.approx(sum(found) / len(found), abs=1e-4)
    assert "condensation" not in second and "condensed" not in first
