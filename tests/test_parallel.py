"""Ways of training on several devices that are refused."""

import pytest
from support.training import config, text_pairs

from btok_hf import BTokSentenceTransformer
from btok_hf.training import CondensationConfig, CondensationTrainer


def make_trainer(repo, folder, *flags, **kwargs):
    """A trainer that believes in these flags: accelerate supports FSDP and DeepSpeed on accelerators only."""

    class Flagged(CondensationTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            for flag in flags:
                setattr(self, flag, True)

    rows = text_pairs(4)
    if negatives := kwargs.pop("negatives", 0):
        rows = rows.add_column("negatives", [["other"] * negatives] * 4)
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
    make_trainer(repo, tmp_path, "is_fsdp_enabled")


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"mini_batch_size": 3}, 4),
        ({"mini_batch_size": 4, "mini_batch_num_tokens": 100}, 4),
        ({"mini_batch_size": 7, "negatives": 2}, 8),
    ],
)
def test_deepspeed_takes_batches_of_one_mini_batch(repo, tmp_path, settings, rows):
    batch = {"per_device_train_batch_size": 4}
    with pytest.raises(ValueError, match=rf"DeepSpeed cannot run GradCache: {rows} rows must fit .*fsdp2\.yaml"):
        make_trainer(repo, tmp_path, "is_deepspeed_enabled", **batch, **settings)
    fits = {**settings, "mini_batch_size": rows, "mini_batch_num_tokens": None}
    make_trainer(repo, tmp_path, "is_deepspeed_enabled", **batch, **fits)
