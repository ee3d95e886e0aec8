"""Checks of the setup of several devices. A setup that would fail or save no model is refused before training."""

from typing import Any

from btok_hf.training.checks import most_negatives
from btok_hf.training.condensation_config import CondensationConfig
from btok_hf.training.condensation_log import LoggingTrainer

SHARDED = "FSDP2 (accelerate launch --config_file training/accelerate/fsdp2.yaml …)"


def check_parallelism(trainer: LoggingTrainer, args: CondensationConfig) -> None:
    """Refuse setups of several devices that cannot train this model or cannot save it.

    Raises:
        ValueError: One process sees several GPUs (`DataParallel`). FSDP has version 1, whose flat shards could not be
            saved, or saves no full state dicts. ZeRO has stage 3. With DeepSpeed, a batch has several mini-batches,
            because its engine (0.19.8) refuses the backward passes of GradCache.
    """
    state: Any = trainer.accelerator.state
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs. DataParallel would separate rows from their images. Start one "
            "process per GPU with `accelerate launch`, or use a single GPU with CUDA_VISIBLE_DEVICES=0."
        )
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError(
            "FSDP of version 1 cannot be trained: what it saves would not be the whole model. Set fsdp_version: 2, as "
            f"in {SHARDED}."
        )
    if trainer.is_fsdp_enabled and (kind := state.fsdp_plugin.state_dict_type.name) != "FULL_STATE_DICT":
        raise ValueError(
            f"With fsdp_state_dict_type: {kind} a checkpoint holds shards and no model to load or export. Set "
            f"fsdp_state_dict_type: FULL_STATE_DICT, as in {SHARDED}."
        )
    if trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
        raise ValueError(
            f"ZeRO-3 cannot be trained: what is saved would be empty. Use {SHARDED}, or ZeRO-2 "
            "(training/accelerate/zero2.yaml)."
        )
    if trainer.is_deepspeed_enabled:
        rows = args.per_device_train_batch_size * most_negatives(trainer.train_dataset)
        if trainer.loss.mini_batch_num_tokens or trainer.loss.mini_batch_size < rows:
            raise ValueError(
                f"DeepSpeed cannot run GradCache: {rows} rows must fit one mini-batch, but mini_batch_size is "
                f"{trainer.loss.mini_batch_size}. Set mini_batch_size={rows} and no mini_batch_num_tokens, or use "
                f"{SHARDED} or DDP."
            )
