"""Checkpoints on disk: which are complete, which one to resume from, which to delete.

The Trainer writes a checkpoint file by file. If it is killed in between, it would resume from the half-written folder,
with a fresh optimizer where that file is missing. So a manifest is written last: the files, their sizes and the time.
When a checkpoint is saved is decided in `condensation_trainer.py`.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from btok_hf.files import nearest_existing

MANIFEST = "manifest.json"


def mark_complete(folder: Path | str) -> None:
    """Write the manifest of a checkpoint. Call it after all other files are written."""
    folder = Path(folder)
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    unfinished = folder / (MANIFEST + ".tmp")
    unfinished.write_text(json.dumps({"written": time.time(), "sizes": sizes}, indent=2) + "\n", "utf-8")
    os.replace(unfinished, folder / MANIFEST)


def incomplete_reason(folder: Path | str) -> str | None:
    """Why a checkpoint cannot be resumed from; `None` if it is complete."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}, so it was not written to its end"
    for name, size in json.loads((folder / MANIFEST).read_text("utf-8"))["sizes"].items():
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
        manifest = path / MANIFEST
        written = json.loads(manifest.read_text("utf-8"))["written"] if manifest.is_file() else 0
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


def check_disk_space(model: torch.nn.Module, output_dir: Path | str, only_trained: bool) -> None:
    """Require space for one checkpoint: weights, and AdamW's two fp32 moments of those that are trained.

    Args:
        model (`torch.nn.Module`): The model.
        output_dir (`str` or `Path`): Folder of the run, which may not exist yet.
        only_trained (`bool`): A checkpoint holds only the weights that are trained, as with adapters.

    Raises:
        ValueError: There is too little.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = trained if only_trained else list(model.parameters())
    needed = sum(p.numel() * p.element_size() for p in saved) + sum(8 * p.numel() for p in trained)
    free = shutil.disk_usage(nearest_existing(output_dir)).free
    if free < needed:
        raise ValueError(
            f"A checkpoint needs about {needed / 1e9:.1f} GB, but {output_dir!r} has {free / 1e9:.1f} GB free. Free "
            "space, or name another output_dir."
        )


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


def checkpoint_to_resume(chosen: bool | str | None, output_dir: Path | str) -> str | None:
    """The checkpoint to resume from; `None` to train from the start.

    Args:
        chosen (`bool` or `str`, *optional*): A checkpoint, or `True` for the newest complete one in `output_dir`.
        output_dir (`str` or `Path`): Folder of the run.

    Raises:
        ValueError: There is no complete checkpoint, or `chosen` is not complete.
    """
    if chosen is True:
        newest = newest_complete(output_dir)
        if newest is None:
            found = [f"{path.name}: {incomplete_reason(path)}" for path in checkpoints(output_dir)]
            raise ValueError(
                f"There is no complete checkpoint in {output_dir!r} to resume from "
                f"({'; '.join(found) or 'there is none at all'}). Train without resume_from_checkpoint."
            )
        return str(newest)
    if not chosen or str(chosen).lower() == "false":  # the text is what a flag gives
        return None
    if reason := incomplete_reason(chosen):
        raise ValueError(
            f"Checkpoint {str(chosen)!r} is not complete: {reason}. Resume from another one: the newest complete one "
            f"here is {newest_complete(Path(chosen).parent)}."
        )
    return str(chosen)
