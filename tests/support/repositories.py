"""Exported repositories: their files, changes to them, and their vectors."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from btok_hf import golden

TEXTS = ["a red car", "Находка"]


def contents(folder):
    """Every file of a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def edit(folder, name, change):
    """Change a JSON file."""
    content = json.loads((folder / name).read_text("utf-8"))
    change(content)
    (folder / name).write_text(json.dumps(content), "utf-8")


def add_noise(folder, size):
    """Change the weights, or adapters, by this part of each."""
    (path,) = folder.glob("*model.safetensors")
    noisy = {name: tensor * (1 + size * torch.randn_like(tensor)) for name, tensor in load_file(path).items()}
    save_file(noisy, path, metadata={"format": "pt"})


def differences(folder):
    """The check of `verify`, in this process."""
    results = golden.check(str(folder), str(folder / "golden.json"), None, "cpu")
    assert set(results) == {"SentenceTransformer", "AutoModel"}
    assert not any(isinstance(value, str) for value in results.values()), results
    return {(loader, name): max(pair) for loader, rows in results.items() for name, pair in rows.items()}
