"""Checkpoints: killed while one is written, rotated, damaged."""

import pytest
import torch
from peft import LoraConfig
from support.processes import run_script
from support.training import checkpointed_trainer, config, losses, text_pairs

from btok_hf import BTokSentenceTransformer
from btok_hf.training import CondensationTrainer
from btok_hf.training.checkpoints import checkpoint_to_resume, checkpoints, incomplete_reason, newest_complete


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


def test_false_of_a_flag_starts_anew(tmp_path):
    assert checkpoint_to_resume("false", tmp_path) is None and checkpoint_to_resume("False", tmp_path) is None


def test_adapters_do_not_resume_a_training_of_all_weights(repo, tmp_path):
    def trainer(**options):
        model = BTokSentenceTransformer(repo, device="cpu")
        args = config(tmp_path, max_steps=1, per_device_train_batch_size=4, save_strategy="steps", save_steps=1)
        return CondensationTrainer(model=model, args=args, train_dataset=text_pairs(4), **options)

    trainer().train()
    with pytest.raises(ValueError, match=r"differ in whether they have adapters.*use_peft"):
        trainer(peft_config=LoraConfig(r=2, lora_dropout=0.0)).train(resume_from_checkpoint=True)


def test_an_earlier_run_that_went_further_leaves_the_new_checkpoints(repo, tmp_path):
    """The newest checkpoint is the last one written, not the one with the most steps."""
    checkpointed_trainer(repo, tmp_path, max_steps=8, save_total_limit=2).train()
    checkpointed_trainer(repo, tmp_path, max_steps=4, save_total_limit=2).train()
    run = tmp_path / "out"
    assert [path.name for path in checkpoints(run)] == ["checkpoint-4", "checkpoint-2"]
    assert newest_complete(run) == run / "checkpoint-4"
