"""What the speed benchmarks share: models, inputs from real data, timing and recording.

Models have random weights, because time and memory do not depend on their values. Contenders are timed in turns. A
slow minute of the machine then affects all of them, and the ratios within a round are compared.
"""

import argparse
import gc
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks import RESULTS, ROOT
from benchmarks.unified.inputs import books, emoji, page
from btok_hf import add_bottleneck_tokens
from examples.prepare_emoji import build_base, draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Qwen2-VL-2B, and a model of a sixth of its width and less than half of its depth, which two CPU cores can run.
SIZES = {
    "small": {
        "hidden_size": 256,
        "num_layers": 12,
        "vision_size": 192,
        "vision_config": {"depth": 12},
    },
    "2b": {
        "hidden_size": 1536,
        "num_layers": 28,
        "vision_size": 1280,
        "dtype": torch.bfloat16,
        "text_config": {
            "vocab_size": 151_936,
            "intermediate_size": 8960,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        },
        "vision_config": {"depth": 32, "num_heads": 16, "mlp_ratio": 4},
    },
}
PATCH, TOKEN = 14, 28  # pixels a side of a patch, and of a token of the language model
PIXELS = (56 * 56, 784 * 784)  # of an image, from 4 tokens to 784


def folder(size):
    return ROOT / "runs" / "bench" / size


def repository(size, num_tokens):
    """A model of one of the `SIZES` with `num_tokens` Bottleneck Tokens; 0 is last-token pooling. Made once."""
    base, path = folder(size) / "base", folder(size) / f"k{num_tokens}"
    if not (base / "chat_template.jinja").exists():
        with torch.device(DEVICE):  # random weights are made faster where they are used
            build_base(
                base, corpus(), vocab_size=8192, patch_size=PATCH, pixels=PIXELS, max_length=8192, **SIZES[size]
            )
    if not (path / "chat_template.jinja").exists():
        add_bottleneck_tokens(base, path, num_tokens=num_tokens)
    return str(path)


@cache
def corpus():
    """Textbook modules (of up to 1,500 characters) and names of emoji."""
    return [row["text"] for row in books("modules", "train")] + names()


@cache
def names():
    """Names and keywords of emoji in four languages: one to a dozen words each."""
    return [
        text
        for row in emoji()["train"]
        for language in ("en", "de", "fr", "es")
        for text in (row["names"][language], ", ".join(row["keywords"][language]))
        if text
    ]


@cache
def texts():
    """Names, definitions, captions and textbook modules: 3 to 1,500 characters."""
    definitions = [row["definition"] for row in books("glossary", "test")]
    captions = [row["caption"] for row in books("figures", "test").remove_columns("image")]
    modules = [row["text"] for row in books("modules", "test")]
    return [random.Random(0).sample(kind, 200) for kind in (names(), definitions, captions, modules)]


@cache
def images():
    """Drawings (4 tokens), figures in their proportions (up to 144) and typeset pages (224)."""
    drawings = [draw(row["image"], size=56) for row in list(emoji()["train"])[:200]]
    figures = [row["image"].convert("RGB") for row in books("figures", "test").select(range(200))]
    pages = [page(row["title"] or "", row["text"]) for row in books("modules", "test").select(range(200))]
    figures = [image.resize((3 * image.width, 3 * image.height)) for image in figures]
    return [drawings, figures, [image.resize((392, 448)) for image in pages]]


def files(pictures):
    """The images as files."""
    target = ROOT / "runs" / "bench" / "files"
    target.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures):
        if not (path := target / f"{index}.png").exists():
            picture.save(path)
    return [str(target / f"{index}.png") for index in range(len(pictures))]


def mixture(kind, count):
    """`count` inputs, shuffled, equally many of each sort.

    `uniform` texts, `names`, `texts`, `images`, `mixed` (texts and images), `files` (the same, images as file names).
    """
    rng = random.Random(1)
    kinds = {"uniform": [[" ".join(corpus()[i].split()[:64]) for i in range(count)]], "names": [names()]}
    pools = kinds.get(kind) or {"texts": texts, "images": images}.get(kind, lambda: texts() + images())()
    found = [pools[i % len(pools)][i // len(pools) % len(pools[i % len(pools)])] for i in range(count)]
    rng.shuffle(found)
    if kind == "files":
        paths = iter(files([item for item in found if not isinstance(item, str)]))
        found = [item if isinstance(item, str) else next(paths) for item in found]
    return found


def exact_texts(tokenizer, tokens, count):
    """Texts of `tokens` tokens each, cut from textbook modules."""
    parts = tokenizer([row["text"] for row in books("modules", "test")], add_special_tokens=False)["input_ids"]
    ids, found = [token for part in parts for token in part], []
    for index in range(count):
        start, length = index * 37, tokens
        text = tokenizer.decode(ids[start : start + length])
        # The cut may tokenize into one or two tokens more or less.
        while (n := len(tokenizer(text, add_special_tokens=False)["input_ids"])) != tokens:
            length += 1 if n < tokens else -1
            text = tokenizer.decode(ids[start : start + length])
        found.append(text)
    return found


def arguments(doc, rounds=5, **more):
    """The command line that the benchmarks share; `more` are further options by name."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="2b" if DEVICE == "cuda" else "small")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed turns of every contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def synchronise():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def free():
    """Free the memory of unused models. They are in reference cycles, so the garbage collector must run."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def compare(contenders, rounds=7, warm_up=1):
    """Seconds of each contender (a callable) in each round, alternating; `{name: [seconds, …]}`."""
    seconds = {name: [] for name in contenders}
    for turn in range(warm_up + rounds):
        # Every other round runs backwards, so that no contender always runs after the same other one.
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            synchronise()
            start = time.perf_counter()
            contenders[name]()
            synchronise()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds, reference):
    """Per contender: median, quartiles, and the ratio to `reference` within rounds (median, quartiles)."""
    found = {}
    for name, values in seconds.items():
        ratios = np.array(seconds[reference]) / np.array(values)
        found[name] = {
            "median_s": float(f"{np.median(values):.4g}"),
            "quartiles_s": [float(f"{x:.4g}") for x in np.percentile(values, [25, 75])],
            "speed_ratio": round(float(np.median(ratios)), 3),
            "ratio_quartiles": [round(float(x), 3) for x in np.percentile(ratios, [25, 75])],
        }
    return found


def peak_of(call):
    """Peak memory of a call in GB, above what was held before it."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    # Linux: writing 5 resets the process's peak.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1e9


def _status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def matrix_rate(dtype=torch.float32, seconds=2.0):
    """Measured rate of multiplying large matrices, in GFLOP/s: the limit for a forward."""
    n = 8192 if DEVICE == "cuda" else 1536
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    a @ b
    rates, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronise()
        start = time.perf_counter()
        a @ b
        synchronise()
        rates.append(2 * n**3 / (time.perf_counter() - start) / 1e9)
    return float(np.median(rates))


def machine():
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    name = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    return f"{name or platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()}"


SHOWN = []  # rows of the current step of `gpu.py`, which are kept when its time ends


def show(row):
    """Print a row as soon as it is measured, and return it."""
    SHOWN.append(row)
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def result_file(name):
    return RESULTS / (f"{name}.json" if DEVICE == "cpu" else f"{name}-gpu.json")


def record(name, rows, **more):
    """Write `benchmarks/results/{name}.json`, on a GPU `{name}-gpu.json`."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    commit = ""
    if shutil.which("git"):
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    result = {
        "command": " ".join([f"python -m benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": machine(),
        "versions": versions,
        **more,
        "rows": rows,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    result_file(name).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", "utf-8")
