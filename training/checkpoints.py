"""Checkpoints on disk: which are complete, which one to resume from, which to delete.

The Trainer writes a checkpoint file by file. If it is killed in between, it would resume from the half-written folder,
with a new optimizer where that file is missing. So a manifest is written last. It holds the time, the sizes of the
files, and what decides the order of the rows, because a run that resumes skips as many batches as it has seen.
When a checkpoint is saved is decided in `condensation_trainer.py`.
"""

import json
import math
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from btok_hf.adapters import adapter_config, has_adapters
from btok_hf.files import nearest_existing, replacing
from btok_hf.training.condensation_config import CondensationConfig

logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
# Settings of LoRA that change what its weights add to a layer.
OF_ADAPTERS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
# With `enable_jit_checkpoint`, every process makes this file in the folder before it saves, and removes it afterwards.
SENTINEL = "checkpoint-is-incomplete.txt"


def row_order(args: CondensationConfig, train_dataset: Any) -> dict[str, Any]:
    """What decides which rows a step sees, as values of JSON.

    Args:
        args (`CondensationConfig`): The arguments of the run.
        train_dataset (`Dataset` or `dict[str, Dataset]`): Its data.
    """
    parts = train_dataset if isinstance(train_dataset, dict) else {"train_dataset": train_dataset}
    weights: Any = args.dataset_weights or {}
    return {
        "processes": args.world_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "dataloader_drop_last": args.dataloader_drop_last,
        "batch_sampler": getattr(args.batch_sampler, "value", None),  # not of a class or function of the user
        "multi_dataset_batch_sampler": getattr(args.multi_dataset_batch_sampler, "value", None),
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "rows": {name: len(dataset) for name, dataset in parts.items()},
        "dataset_weights": {name: float(weights[name]) for name in parts if name in weights},
        "block_size": args.block_size,
    }


def mark_complete(
    folder: Path | str, order: Mapping[str, Any], only_model: bool = False, metric: str | None = None
) -> None:
    """Write the manifest of a checkpoint. Call it after all other files are written.

    Args:
        folder (`str` or `Path`): The checkpoint.
        order (`dict`): What `row_order` gives.
        only_model (`bool`): Whether it holds no optimizer, as with `save_only_model`.
        metric (`str`, *optional*): `metric_for_best_model` of the run.
    """
    folder = Path(folder)
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != SENTINEL]
    manifest = {
        "written": time.time(),
        "only_model": only_model,
        "row_order": order,
        "metric_for_best_model": metric,
        "sizes": {str(file.relative_to(folder)): file.stat().st_size for file in files},
    }
    with replacing(folder / MANIFEST) as file:
        file.write((json.dumps(manifest, indent=2) + "\n").encode())


def _manifest(folder: Path | str) -> dict[str, Any]:
    return json.loads(Path(folder, MANIFEST).read_text("utf-8"))


def incomplete_reason(folder: Path | str) -> str | None:
    """Why a checkpoint is not complete; `None` if it is."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}, so it was not written to its end"
    for name, size in _manifest(folder)["sizes"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def checkpoints(output_dir: Path | str) -> list[Path]:
    """Checkpoint folders: those with a manifest, newest first, then those without.

    The order is by time and not by step, because an earlier run in the same folder may have done more steps.
    """

    def order(path: Path) -> tuple[float, int]:
        written = _manifest(path)["written"] if (path / MANIFEST).is_file() else 0
        return written, int(path.name.removeprefix("checkpoint-"))

    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=order, reverse=True)


def newest_complete(output_dir: Path | str) -> Path | None:
    """The newest complete checkpoint of a run; `None` if there is none."""
    return next((path for path in checkpoints(output_dir) if incomplete_reason(path) is None), None)


def delete(folder: Path | str) -> None:
    """Delete a checkpoint. The manifest goes first, so that a half-deleted checkpoint counts as incomplete."""
    Path(folder, MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def rotate(output_dir: Path | str, limit: int, best: str | None = None) -> None:
    """Delete the oldest checkpoints until `limit` are left. The newest and `best` are never deleted."""
    kept = checkpoints(output_dir)
    protected = {kept[0]} | ({Path(best)} if best else set())
    for path in reversed(kept):
        if len(kept) <= limit:
            break
        if path not in protected:
            delete(path)
            kept.remove(path)


def checkpoints_to_write(args: CondensationConfig) -> int:
    """How many more checkpoints a run will have on disk at the same time.

    Without `save_total_limit` these are all that it saves. Where their number is not known before training, it is 1.
    """
    if args.save_strategy == "no":
        return 0
    most = math.inf
    if args.save_total_limit is not None and args.save_total_limit > 0:
        # The oldest one is deleted when the new one is complete. The best one is kept beside the newest.
        most = max(args.save_total_limit, 2 if args.load_best_model_at_end else 1) + 1
    if args.save_strategy == "steps" and args.max_steps > 0:
        interval = args.save_steps if args.save_steps >= 1 else math.ceil(args.max_steps * args.save_steps)
        most = min(most, math.ceil(args.max_steps / interval))
    elif args.save_strategy == "epoch" and args.max_steps <= 0:
        most = min(most, math.ceil(args.num_train_epochs))
    written = [path for path in checkpoints(args.output_dir) if incomplete_reason(path) is None]
    return 1 if most == math.inf else max(1, int(most) - len(written))


def check_disk_space(model: torch.nn.Module, args: CondensationConfig, only_trained: bool, export: bool) -> None:
    """Require space for the checkpoints and the export of a run.

    A checkpoint takes the weights, and AdamW's two fp32 moments of those that are trained.

    Args:
        model (`torch.nn.Module`): The model.
        args (`CondensationConfig`): The arguments of the run. Its output folder may not exist yet.
        only_trained (`bool`): A checkpoint holds only the weights that are trained, as with adapters.
        export (`bool`): Whether the run writes the merged model to the output folder.

    Raises:
        ValueError: There is too little.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    saved = sum(p.numel() * p.element_size() for p in trained) if only_trained else weights
    checkpoint = saved + (0 if args.save_only_model else sum(8 * p.numel() for p in trained))
    count = checkpoints_to_write(args)
    free = shutil.disk_usage(nearest_existing(args.output_dir)).free

    def message(count: int) -> str:
        return (
            f"{args.output_dir!r} has {free / 1e9:.2f} GB free, and this run needs about "
            f"{(count * checkpoint + export * weights) / 1e9:.2f} GB: {count} checkpoints of {checkpoint / 1e9:.2f} GB"
            f"{f' and an export of {weights / 1e9:.2f} GB' * export}. Free space, name another output_dir, or keep "
            "fewer checkpoints (save_total_limit)."
        )

    if free < min(count, 1) * checkpoint + export * weights:
        raise ValueError(message(min(count, 1)))
    if free < count * checkpoint + export * weights:  # an estimate: other optimizers keep less
        logger.warning(message(count))


def all_finite(model: torch.nn.Module) -> bool:
    """Whether no trained parameter has NaN or infinite values; of a shard (FSDP2), the part of this process."""
    trained = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters() if p.requires_grad)
    return all(bool(p.isfinite().all()) for p in trained)


@contextmanager
def full_parameters(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Replace the shards of a model (FSDP2) by full tensors inside the context, so that it can be saved.

    Args:
        model (`torch.nn.Module`): The sharded model.
        state_dict (`dict[str, torch.Tensor]`): Its full tensors, as `Accelerator.get_state_dict` gathers them.
    """
    shards = dict(model.named_parameters())
    for name in shards:
        owner, _, attribute = name.rpartition(".")
        full = torch.nn.Parameter(state_dict[name], requires_grad=False)
        model.get_submodule(owner)._parameters[attribute] = full
    try:
        yield
    finally:
        for name, shard in shards.items():
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner)._parameters[attribute] = shard


def _reason_not_to_resume(folder: Path | str) -> str | None:
    """Why a checkpoint cannot be resumed from; `None` if it can."""
    if reason := incomplete_reason(folder):
        return f"it is not complete: {reason}"
    if _manifest(folder).get("only_model"):
        return "it holds no optimizer (save_only_model), so that a new one would go on in the middle of the training"
    return None


def checkpoint_to_resume(chosen: bool | str | None, output_dir: Path | str, saves: bool) -> str | None:
    """The checkpoint to resume from; `None` to train from the start.

    Args:
        chosen (`bool` or `str`, *optional*): A checkpoint; `True` for the newest complete one in `output_dir`; or
            `"auto"` for the newest complete one if there is one, and otherwise the start. `"true"` and `"false"` are
            what a flag gives.
        output_dir (`str` or `Path`): Folder of the run.
        saves (`bool`): Whether the run will write checkpoints.

    Raises:
        ValueError: There is no checkpoint to resume from, or `chosen` is not one. Or a run would start anew, and save
            its checkpoints among those of an earlier one: `"auto"` could go on from the wrong run, and
            `save_total_limit` would delete across both.
    """
    word = str(chosen).lower()
    if word not in ("true", "false", "none", "auto", ""):
        if reason := _reason_not_to_resume(str(chosen)):
            raise ValueError(
                f"Checkpoint {str(chosen)!r} cannot be resumed from: {reason}. Resume from another one (the newest "
                f"complete one here is {newest_complete(Path(str(chosen)).parent)}), or start a new training."
            )
        return str(chosen)
    reasons = {path: _reason_not_to_resume(path) for path in checkpoints(output_dir)}
    if word in ("true", "auto"):
        if (newest := next((path for path, reason in reasons.items() if reason is None), None)) is not None:
            logger.warning(f"Resuming from {newest}")
            return str(newest)
        if word == "true":
            found = "; ".join(f"{path.name}: {reason}" for path, reason in reasons.items())
            raise ValueError(
                f"There is no checkpoint in {str(output_dir)!r} to resume from ({found or 'there is none at all'}). "
                "Train without resume_from_checkpoint, or set it to auto, which starts if there is nothing to resume."
            )
    earlier = newest_complete(output_dir) if saves else None
    if earlier is not None:
        why = reasons[earlier]
        other = f"it cannot be resumed from: {why}" if why else "or set resume_from_checkpoint to auto to continue it"
        raise ValueError(
            f"{str(output_dir)!r} holds checkpoints of an earlier run (the newest is {earlier.name}), and a training "
            f"that starts anew would mix its own with them. Name another output_dir, or remove them; {other}."
        )
    if word == "auto":
        logger.warning(f"{output_dir} holds no checkpoint to resume from: training starts from step 0")
    return None


def check_unfinished(checkpoint: Path | str, args: CondensationConfig) -> None:
    """Refuse to resume from the end of a training: without a further step, the export would be that of the old run.

    Args:
        checkpoint (`str` or `Path`): The checkpoint to resume from.
        args (`CondensationConfig`): The arguments of this run, which may be longer.

    Raises:
        ValueError: No step is left.
    """
    state = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text("utf-8"))
    by_steps = args.max_steps > 0
    if state["global_step"] >= args.max_steps if by_steps else state["epoch"] >= args.num_train_epochs:
        raise ValueError(
            f"{checkpoint} is the end of its training, so no step is left. Export it (btok export {checkpoint} "
            "FOLDER), train longer (max_steps or num_train_epochs), or train anew in another output_dir."
        )


def check_same_metric(checkpoint: Path | str, metric: str | None) -> None:
    """Refuse to resume with another metric for the best model: its values would be compared with the earlier best.

    Args:
        checkpoint (`str` or `Path`): The checkpoint to resume from.
        metric (`str`, *optional*): `metric_for_best_model` of this run.

    Raises:
        ValueError: It differs, and the earlier run had a best model.
    """
    best = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text("utf-8"))["best_metric"]
    then = _manifest(checkpoint).get("metric_for_best_model")
    if None not in (best, then, metric) and then != metric:
        raise ValueError(
            f"The best model before {checkpoint} was chosen by {then} ({best:.4g}), which {metric} cannot be compared "
            f"with. Set metric_for_best_model={then} again, or start a new training from an export of the checkpoint."
        )


def check_same_adapters(checkpoint: str, saved: Any, own: Any) -> None:
    """Refuse to resume with adapters that count otherwise: the same weights would be another model.

    Args:
        checkpoint (`str`): The checkpoint to resume from.
        saved, own (`PreTrainedModel`): Its backbone, and that of this training.

    Raises:
        ValueError: One of them has no adapters, or their settings differ.
    """
    if has_adapters(saved) != has_adapters(own):
        raise ValueError(
            f"{checkpoint} and this training differ in whether they have adapters. Resume with the same peft_config "
            "(of btok train: use_peft)."
        )
    if not has_adapters(own):
        return
    then, now = adapter_config(saved), adapter_config(own)
    changed = [name for name in OF_ADAPTERS if getattr(then, name) != getattr(now, name)]
    if changed:
        differences = "; ".join(f"{name} was {getattr(then, name)} and is {getattr(now, name)}" for name in changed)
        raise ValueError(
            f"{checkpoint} has adapters with other settings: {differences}. Its weights would be another model with "
            "these. Restore them (of btok train: the flags lora_…)."
        )


def check_same_rows(checkpoint: Path | str, order: Mapping[str, Any]) -> None:
    """Refuse to resume with other data or batches: the rows that are skipped would not be those that were seen.

    Args:
        checkpoint (`str` or `Path`): The checkpoint to resume from.
        order (`dict`): What `row_order` gives for this run.

    Raises:
        ValueError: A value differs.
    """
    then = _manifest(checkpoint).get("row_order")
    if then is None:
        logger.warning(f"{checkpoint} does not record its data and batches, so that they cannot be compared.")
        return
    # As texts: the order of the datasets counts.
    changed = [name for name, value in order.items() if json.dumps(value) != json.dumps(then.get(name))]
    if changed:
        differences = "; ".join(f"{name} was {then.get(name)} and is {order[name]}" for name in changed)
        raise ValueError(
            f"{checkpoint} was trained in another order of rows: {differences}. The rows that are skipped would not "
            "be those that were seen. Restore these values; or set ignore_data_skip, to begin the epoch's rows again."
        )
