"""Checkpoints that are either whole or known not to be: each ends with a manifest of its files, their sizes, the time.

The Trainer writes a checkpoint file by file, and would resume from the newest folder even if it was killed in the
middle of writing it, with a fresh optimizer where that file is missing.
"""

import json
import os
import re
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import torch

MANIFEST = "manifest.json"


def mark_complete(folder):
    """Write the manifest of a checkpoint, the last of its files."""
    folder = Path(folder)
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    unfinished = folder / (MANIFEST + ".tmp")
    unfinished.write_text(json.dumps({"written": time.time(), "sizes": sizes}, indent=2) + "\n", "utf-8")
    os.replace(unfinished, folder / MANIFEST)


def incomplete_reason(folder):
    """What keeps a checkpoint from being resumed from; `None` if it is whole."""
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


def checkpoints(output_dir):
    """Checkpoint folders, the last written first, then those that are not whole.

    By time and not by step: an earlier run may have gone further in the same folder.
    """

    def order(path):
        manifest = path / MANIFEST
        written = json.loads(manifest.read_text("utf-8"))["written"] if manifest.is_file() else 0
        return written, int(path.name.removeprefix("checkpoint-"))

    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=order, reverse=True)


def newest_complete(output_dir):
    """The newest whole checkpoint of a run, a `Path`; `None` without any."""
    return next((path for path in checkpoints(output_dir) if incomplete_reason(path) is None), None)


def delete(folder):
    """Delete a checkpoint, the manifest first: half-deleted it is no longer whole."""
    Path(folder, MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def rotate(output_dir, limit, best=None):
    """Delete the oldest checkpoints until `limit` are left, never the newest nor `best`."""
    kept = checkpoints(output_dir)
    protected = {kept[0], best and Path(best)}
    for path in reversed(kept):
        if len(kept) <= limit:
            break
        if path not in protected:
            delete(path)
            kept.remove(path)


@contextmanager
def full_parameters(model, state_dict):
    """A model sharded by FSDP2 with whole tensors in place of its shards, so that it can be saved.

    Args:
        model (`torch.nn.Module`): The sharded model.
        state_dict (`dict[str, torch.Tensor]`): Its whole tensors, as `Accelerator.get_state_dict` gathers them.
    """
    shards = dict(model.named_parameters())
    for name in shards:
        owner, _, attribute = name.rpartition(".")
        whole = torch.nn.Parameter(state_dict[name], requires_grad=False)
        model.get_submodule(owner)._parameters[attribute] = whole
    try:
        yield
    finally:
        for name, shard in shards.items():
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner)._parameters[attribute] = shard


def checkpoint_to_resume(chosen, output_dir):
    """The checkpoint that training goes on from, as a `str`; `None` to start anew.

    Args:
        chosen (`bool` or `str`, *optional*): A checkpoint, or `True` for the newest complete one in `output_dir`.
        output_dir (`str`): Folder of the run.

    Raises:
        ValueError: No complete checkpoint to go on from.
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
    if chosen and (reason := incomplete_reason(chosen)):
        raise ValueError(
            f"Checkpoint {str(chosen)!r} is not complete: {reason}. Resume from another one: the newest complete one "
            f"here is {newest_complete(Path(chosen).parent)}."
        )
    return str(chosen) if chosen else None
