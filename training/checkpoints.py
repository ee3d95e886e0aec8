"""Checkpoints that are either whole or known not to be: each ends with a manifest of its files, their sizes, the time.

The Trainer writes a checkpoint file by file, and would resume from the newest folder even if it was killed in the
middle of writing it, with a fresh optimizer where that file is missing.
"""

import json
import os
import re
import shutil
import time
from pathlib import Path

MANIFEST = "manifest.json"


def mark_whole(folder):
    """Write the manifest of a checkpoint, the last of its files."""
    folder = Path(folder)
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    unfinished = folder / (MANIFEST + ".tmp")
    unfinished.write_text(json.dumps({"written": time.time(), "sizes": sizes}, indent=2) + "\n", "utf-8")
    os.replace(unfinished, folder / MANIFEST)


def fault(folder):
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


def newest_whole(output_dir):
    """The newest whole checkpoint of a run, a `Path`; `None` without any."""
    return next((path for path in checkpoints(output_dir) if fault(path) is None), None)


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
