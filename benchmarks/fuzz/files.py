"""Random files: pair files, recipes of `btok train`, and repositories with one damaged file."""

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import yaml

from benchmarks import ROOT
from benchmarks.fuzz import inputs, media
from benchmarks.fuzz.media import pick

REPOSITORY = ROOT / "benchmarks" / "unified" / "models" / "btok-small"
# Files that decide what is loaded; the weights are linked.
SETTINGS = ("config.json", "chat_template.jinja", "golden.json", "modules.json", "tokenizer_config.json",
            "config_sentence_transformers.json", "processor_config.json", "tokenizer.json",
            "sentence_bert_config.json")  # fmt: skip


def plain(rng, depth=0):
    """Any value that JSON and YAML can write."""
    values = (None, True, False, 0, 1, -1, 4, 1e-4, 1e308, float("nan"), 10**30, "", "none", "1e-4", "no", "query",
              "x.jsonl", "\u2603", "../..", "{", [], {}, [1, "a"], {"a": None}, "photo.png")  # fmt: skip
    kind = int(rng.integers(8))
    if depth < 2 and kind == 0:
        return [plain(rng, depth + 1) for _ in range(int(rng.integers(4)))]
    if depth < 2 and kind == 1:
        return {pick(rng, ("file", "weight", "text", "image", "a")): plain(rng, depth + 1) for _ in range(2)}
    return pick(rng, values)


def pairs(rng, folder):
    """A pair file: rows of right and wrong values, sometimes damaged."""
    columns = ["query", "positive"]
    columns += [name for name in ("negative", "negatives", "target", "group", "other") if rng.random() < 0.12]
    if rng.random() < 0.1:
        columns[int(rng.integers(2))] = pick(rng, ("Query", "", "query ", "positive"))
    rows = [{column: _cell(rng, column) for column in columns} for _ in range(int(pick(rng, (0, 1, 3, 8))))]
    suffix = pick(rng, (".jsonl", ".jsonl", ".json", ".csv", ".parquet", ".txt"))
    path = folder / f"pairs{suffix}"
    if suffix == ".csv":
        file = io.StringIO()
        writer = csv.writer(file)
        writer.writerows([columns, *([str(row[column]) for column in columns] for row in rows)])
        content = file.getvalue().encode("utf-8", "surrogatepass")
    elif suffix == ".parquet":
        content = b""
        # A table that Arrow refuses to write is no file of a user.
        with contextlib.suppress(Exception):
            file = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
            content = file.getvalue()
    elif suffix == ".json":
        content = json.dumps(rows).encode()
    else:
        content = "\n".join(json.dumps(row) for row in rows).encode()
    path.write_bytes(content if rng.random() < 0.75 else media.damaged(rng, content, b'{"query": 1}'))
    return path


def _cell(rng, column):
    if rng.random() < 0.1:
        return plain(rng)
    if column == "negatives":
        return ["a text", "b"]
    words = inputs.text(rng)
    words = words if isinstance(words, str) else "words"
    image = str(media.FILES / "scan.tif")
    return pick(rng, (words, words, "short", image, {"text": "x", "image": image}))


def recipe(rng, folder, fields):
    """A recipe of `btok train`: known and unknown keys with right and wrong values, sometimes damaged."""
    good = folder / "pairs.jsonl"
    good.write_text('{"query": "a", "positive": "b"}\n' * 4)
    content = {
        "model_name_or_path": str(REPOSITORY), "train_files": str(good), "output_dir": str(folder / "run"),
        "report_to": "none", "max_steps": 1, "use_cpu": True, "per_device_train_batch_size": 2, "mini_batch_size": 2,
    }  # fmt: skip
    for _ in range(int(rng.integers(1, 4))):
        content[pick(rng, fields) if rng.random() < 0.9 else pick(rng, ("epochs", "lr", 3, None))] = plain(rng)
    for key in list(content):
        if rng.random() < 0.05:
            del content[key]
    written = yaml.safe_dump(content, allow_unicode=True).encode()
    path = folder / "recipe.yaml"
    path.write_bytes(written if rng.random() < 0.8 else media.damaged(rng, written, b"a: [b\n"))
    return path


def repository(rng, folder):
    """A copy of the small model in which one file is damaged, or one value of it is replaced."""
    target = folder / "model"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for source in REPOSITORY.iterdir():
        if source.is_file() and source.suffix != ".safetensors":
            shutil.copy(source, target / source.name)
        elif source.name != "assets":
            (target / source.name).symlink_to(source)
    name = pick(rng, SETTINGS)
    path: Path = target / name
    content = path.read_bytes()
    if rng.random() < 0.1:
        path.unlink()
    elif path.suffix == ".json" and rng.random() < 0.6:
        value = json.loads(content)
        _replace(rng, value)
        path.write_text(json.dumps(value), "utf-8")
    else:
        path.write_bytes(media.damaged(rng, content, b"{}"))
    return target, name


def _replace(rng, value):
    """Put any value in place of one somewhere inside."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(min(len(value), 20)))
        if not keys:
            return
        key = pick(rng, keys)
        if isinstance(value[key], (dict, list)) and rng.random() < 0.7:
            value = value[key]
        elif isinstance(value, dict) and rng.random() < 0.2:
            del value[key]
            return
        else:
            value[key] = plain(rng)
            return
