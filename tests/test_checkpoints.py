"""Checkpoints: killed while one is written, rotated, damaged."""

import pytest
import torch
from peft import LoraConfig
from support.processes import run_script
from support.training import checkpointed_trainer, config, losses, text_pairs

from btok_hf import BTokSentenceTransformer
from btok_hf.training import CondensationTrainer
from btok_hf.training.checkpoints import (
    checkpoint_to_resume,
    checkpoints,
    checkpoints_to_write,
    incomplete_reason,
    mark_complete,
    newest_complete,
)
from btok_hf.training.evaluator import retrieval_evaluator


def test_a_killed_run_resumes_from_its_last_whole_checkpoint(repo, tmp_path):
    whole = checkpointed_trainer(repo, tmp_path / "whole")
    whole.train()
    killed = run_script("killed.py", repo, tmp_path / "killed")
    assert killed.returncode == -9
    run = tmp_path / "killed" / "out"
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    assert (
        "not written to its end" in incomplete_reason(run / "checkpoint-4")
        and incomplete_reason(run / "checkpoint-2") is None
    )
    resumed = checkpointed_trainer(repo, tmp_path / "killed")
    with pytest.raises(
        ValueError, match=r"checkpoint-4' cannot .* not written to its end.*newest complete one here is .*checkpoint-2"
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
        ValueError, match=r"no checkpoint in .*to resume .*scheduler.pt has 5 bytes instead.*optimizer.pt is"
    ):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="there is none at all"):
        checkpointed_trainer(repo, tmp_path / "new").train(resume_from_checkpoint=True)


def test_auto_is_for_a_job_that_may_be_started_again(repo, tmp_path):
    """It starts where there is nothing to resume from; a start that was not meant to resume is refused."""
    run = tmp_path / "out"
    assert checkpoint_to_resume("auto", run, True) is None and checkpoint_to_resume("False", run, True) is None
    checkpointed_trainer(repo, tmp_path).train("auto")
    assert (
        checkpoint_to_resume("auto", run, True) == checkpoint_to_resume("true", run, True) == str(run / "checkpoint-6")
    )
    for start in (None, False, "false"):
        with pytest.raises(
            ValueError, match=r"holds checkpoints of an earlier run .* is checkpoint-6\).*Name another .* to auto to"
        ):
            checkpointed_trainer(repo, tmp_path).train(start)
    assert checkpoint_to_resume(None, run, saves=False) is None


def test_the_end_of_a_training_is_not_resumed(repo, tmp_path):
    """Without a further step, the old weights would be exported as those of a training with the new settings."""
    epochs = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch"}
    for name, options in (("steps", {}), ("epochs", epochs)):
        trainer = checkpointed_trainer(repo, tmp_path / name, **options)
        trainer.train()
        trainer.train()  # checkpoints of a trainer's own may be mixed, as in transformers
        with pytest.raises(ValueError, match=r"is the end of its training.*Export it \(btok export .*train longer"):
            checkpointed_trainer(repo, tmp_path / name, learning_rate=0.1, **options).train("auto")
    longer = checkpointed_trainer(repo, tmp_path / "steps", max_steps=8)
    longer.train("auto")
    assert longer.state.global_step == 8
    longer = checkpointed_trainer(repo, tmp_path / "epochs", **epochs | {"num_train_epochs": 2})
    longer.train("auto")
    assert longer.state.epoch == 2
    shorter = checkpointed_trainer(repo, tmp_path / "epochs", **epochs)
    with pytest.raises(ValueError, match="checkpoint-6 is the end of its training"):
        shorter.train("auto")


def test_a_checkpoint_without_an_optimizer_is_not_resumed(repo, tmp_path):
    checkpointed_trainer(repo, tmp_path, save_only_model=True).train()
    run = tmp_path / "out"
    assert incomplete_reason(run / "checkpoint-6") is None  # a new training may start from it as its model
    for chosen, says in (
        (True, r"checkpoint-6: it holds no optimizer \(save_only_model\)"),
        (str(run / "checkpoint-6"), r"cannot be resumed from: it holds no optimizer"),
        ("auto", r"earlier run .*Name another .*; it cannot be resumed from: it holds no optimizer"),
    ):
        with pytest.raises(ValueError, match=says):
            checkpointed_trainer(repo, tmp_path).train(chosen)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size was 4 and is 2"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1 and is 2"),
        ({"data_seed": 1}, "seed was 42 and is 1"),
        ({"multi_dataset_batch_sampler": "round_robin"}, "batch_sampler was proportional and is round_robin"),
        ({"block_size": 8}, "block_size was None and is 8"),
        (
            {"dataset_weights": {"a": 1, "b": 3}},
            r"dataset_weights was {'a': 1.0, 'b': 1.0} and is {'a': 1.0, 'b': 3.0}",
        ),
        ({"pairs": {"a": text_pairs(6), "b": text_pairs()}}, r"rows was {'a': 12, 'b': 6} and is {'a': 6, 'b': 12}"),
        ({"pairs": {"b": text_pairs(6), "a": text_pairs()}}, "rows was .*; dataset_weights was"),
    ],
)
def test_other_rows_are_not_resumed(repo, tmp_path, change, says):
    """The batches that are skipped would not be those that were seen."""
    pairs = {"a": text_pairs(), "b": text_pairs(6)}
    options = {"pairs": pairs, "dataset_weights": {"b": 1.0, "a": 1}, "max_steps": 2}
    checkpointed_trainer(repo, tmp_path, **options).train()
    changed = checkpointed_trainer(repo, tmp_path, **options | {"max_steps": 4} | change)
    with pytest.raises(ValueError, match=rf"checkpoint-2 was trained .*{says}.* Restore these .*ignore_data_skip"):
        changed.train("auto")
    changed.args.ignore_data_skip = True
    changed.train("auto")
    assert changed.state.global_step == 4


def test_files_of_other_processes_are_not_missed(tmp_path):
    """With `enable_jit_checkpoint` each process makes and removes a sentinel, one after the other."""
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    sentinel = folder / "checkpoint-is-incomplete.txt"
    for name in (sentinel.name, "model.safetensors"):
        (folder / name).write_text("content")
    mark_complete(folder, {})
    sentinel.unlink()
    assert incomplete_reason(folder) is None


def test_adapters_do_not_resume_a_training_of_all_weights(repo, tmp_path):
    def trainer(max_steps=1, **options):
        model = BTokSentenceTransformer(repo, device="cpu")
        args = config(
            tmp_path, max_steps=max_steps, per_device_train_batch_size=4, save_strategy="steps", save_steps=1
        )
        return CondensationTrainer(model=model, args=args, train_dataset=text_pairs(4), **options)

    trainer().train()
    with pytest.raises(ValueError, match=r"differ in whether they have adapters.*use_peft"):
        trainer(2, peft_config=LoraConfig(r=2, lora_dropout=0.0)).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("option", [{"lora_alpha": 64}, {"use_rslora": True}, {"r": 4}])
def test_adapters_that_count_otherwise_are_not_resumed(repo, tmp_path, option):
    """The same weights, times another factor, are another model."""

    def trainer(max_steps, **options):
        model = BTokSentenceTransformer(repo, device="cpu")
        args = config(tmp_path, max_steps=max_steps, save_strategy="steps", save_steps=1)
        lora = LoraConfig(**{"r": 2, "lora_alpha": 8, "lora_dropout": 0.0, **options})
        return CondensationTrainer(model=model, args=args, train_dataset=text_pairs(4), peft_config=lora)

    trainer(1).train()
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"has adapters with other settings: {name} was .* and is {value}. Its"):
        trainer(2, **option).train(resume_from_checkpoint=True)
    trainer(2).train(resume_from_checkpoint=True)


def test_the_best_model_by_another_metric_is_not_resumed(repo, tmp_path):
    pairs = text_pairs(8)

    def trainer(metric, max_steps=4):
        best = {"load_best_model_at_end": True, "metric_for_best_model": metric, "save_total_limit": 1}
        every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        model = BTokSentenceTransformer(repo, device="cpu")
        args = config(tmp_path, max_steps=max_steps, **best, **every)
        evaluator = retrieval_evaluator(pairs, name="r")
        data = {"train_dataset": pairs, "eval_dataset": pairs, "evaluator": evaluator}
        return CondensationTrainer(model=model, args=args, **data)

    # Losses that grow: the first checkpoint is the best, and the newest is kept beside it.
    first = trainer("eval_loss")
    first.log = lambda logs, start=None: None
    evaluate = first.evaluate
    first.evaluate = lambda *args, **kwargs: evaluate(*args, **kwargs) | {"eval_loss": first.state.global_step}
    first.train()
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-4", "checkpoint-1"]
    with pytest.raises(ValueError, match="is the end of its training"):
        trainer("eval_loss").train("auto")
    with pytest.raises(ValueError, match=r"was chosen by eval_loss \(1\), which eval_r_cosine_ndcg@10 cannot be comp"):
        trainer("eval_r_cosine_ndcg@10", max_steps=6).train("auto")


def test_a_run_that_went_back_keeps_its_new_checkpoints(repo, tmp_path):
    """The newest checkpoint is the last one written, not the one with the most steps."""
    checkpointed_trainer(repo, tmp_path, max_steps=8).train()
    run = tmp_path / "out"
    checkpointed_trainer(repo, tmp_path, max_steps=6, save_total_limit=2).train(str(run / "checkpoint-2"))
    assert [path.name for path in checkpoints(run)] == ["checkpoint-6", "checkpoint-4"]
    assert newest_complete(run) == run / "checkpoint-6"


def test_space_is_counted_for_all_checkpoints_of_a_run(tmp_path):
    def count(**options):
        return checkpoints_to_write(config(tmp_path, **{"save_strategy": "steps", **options}))

    assert count(save_strategy="no") == 0 and count() == 1  # the number of steps depends on the data
    assert count(max_steps=1000, save_steps=300) == 4 and count(max_steps=1000, save_steps=0.25) == 4
    assert count(max_steps=1000, save_steps=100, save_total_limit=3) == 4
    assert count(max_steps=200, save_steps=100, save_total_limit=3) == 2
    assert count(save_strategy="epoch", num_train_epochs=5) == 5
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_total_limit": 1}
    assert count(max_steps=1000, save_steps=100, eval_steps=100, **best) == 3
    for step in (100, 200):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        mark_complete(folder, {})
    assert count(max_steps=1000, save_steps=100, save_total_limit=3) == 2
