"""Ways of training on several devices that are refused."""

from types import SimpleNamespace

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from support.training import config, text_pairs

from btok_hf import BTokSentenceTransformer
from btok_hf.training import CondensationConfig, CondensationTrainer


def make_trainer(repo, folder, *flags, plugin=lambda: None, **kwargs):
    """A trainer that believes in these flags: accelerate supports FSDP and DeepSpeed on accelerators only."""

    class Flagged(CondensationTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            plugin()
            for flag in flags:
                setattr(self, flag, True)

    rows = text_pairs(4)
    if negatives := kwargs.pop("negatives", 0):
        # The first row has none: a batch may hold any rows.
        rows = rows.add_column("negatives", [None, ["other"], ["other"] * negatives, []])
    model = BTokSentenceTransformer(repo, device="cpu")
    return Flagged(model=model, args=config(folder, **kwargs), train_dataset=rows)


def test_several_gpus_in_one_process_are_refused(repo, tmp_path, monkeypatch):
    monkeypatch.setattr(CondensationConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"One process sees 2 GPUs.*accelerate launch"):
        make_trainer(repo, tmp_path)


def test_only_fsdp_of_version_2_is_trained(repo, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"FSDP of version 1 .* Set fsdp_version: 2"):
        make_trainer(repo, tmp_path, "is_fsdp_enabled")
    monkeypatch.setattr("accelerate.Accelerator.is_fsdp2", True)
    for kind in (None, "FULL_STATE_DICT"):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
        monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)
        if kind is not None:
            make_trainer(repo, tmp_path, "is_fsdp_enabled")
            continue
        with pytest.raises(ValueError, match=r"SHARDED_STATE_DICT a checkpoint holds shards .* FULL_STATE_DICT, as"):
            make_trainer(repo, tmp_path, "is_fsdp_enabled")


def at_stage(stage, monkeypatch):
    """What makes accelerate believe that there is a plugin of DeepSpeed, after it made its own state."""
    plugin = SimpleNamespace(zero_stage=stage)
    return lambda: monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", plugin)


def test_zero_3_is_refused(repo, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"ZeRO-3 cannot be trained: .*fsdp2\.yaml.*ZeRO-2"):
        make_trainer(repo, tmp_path, "is_deepspeed_enabled", plugin=at_stage(3, monkeypatch))


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"mini_batch_size": 3}, 4),
        ({"mini_batch_size": 4, "mini_batch_num_tokens": 100}, 4),
        ({"mini_batch_size": 7, "negatives": 2}, 8),
    ],
)
def test_deepspeed_takes_batches_of_one_mini_batch(repo, tmp_path, monkeypatch, settings, rows):
    batch = {"per_device_train_batch_size": 4, "plugin": at_stage(2, monkeypatch)}
    with pytest.raises(ValueError, match=rf"DeepSpeed cannot run GradCache: {rows} rows must fit .*fsdp2\.yaml"):
        make_trainer(repo, tmp_path, "is_deepspeed_enabled", **batch, **settings)
    monkeypatch.undo()  # the next state is accelerate's own again, at first
    fits = {**settings, "mini_batch_size": rows, "mini_batch_num_tokens": None}
    make_trainer(repo, tmp_path, "is_deepspeed_enabled", **batch, **fits)
