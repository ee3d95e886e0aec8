"""Run everything that needs a GPU: correctness first, then speed and memory at the size of Qwen2-VL-2B.

    python -m benchmarks.gpu                    # writes benchmarks/results/gpu.json and, on a GPU, *-gpu.json
    python -m benchmarks.gpu --steps correctness attention

Without a GPU the same steps run on the CPU at a small size. The output then lists the figures that need a GPU.

- correctness: embeddings, token losses and gradients of the packed forward on the GPU against the CPU, in fp32, with
  targets that see fewer queries than keys; and how far bf16 moves the vectors.
- attention: ways to compute the attention of a packed ragged batch.
- compile: encoding with the MLPs compiled. (Whole layers would be compiled anew for every packed layout.)
- batch: the largest batch of texts that trains on the GPU, doubled until memory runs out.
- encode, train_step, vision: those benchmarks.
"""

import importlib.util
import subprocess
import sys
from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.bench import (
    DEVICE,
    arguments,
    compare,
    free,
    matrix_rate,
    mixture,
    peak_of,
    record,
    repository,
    show,
    summary,
)
from benchmarks.train_step import batch, contender
from btok_hf import BTokSentenceTransformer
from btok_hf.condensation import condense
from btok_hf.packed_attention import PackedLayout

STEPS = ("correctness", "attention", "compile", "batch", "encode", "train_step", "vision")
WAITING = [
    "embeddings, token losses and gradients of the GPU against the CPU's",
    "tokens/s, share of the bf16 matrix rate and peak memory of encoding and training at the size of Qwen2-VL-2B",
    "the largest batch that trains on the card",
    "torch varlen_attn and flash-attn against grouped SDPA",
    "one call of vision attention against many",
    "torch.compile on it",
]
# Heads, key/value heads and their width in Qwen2-VL-2B.
HEADS, GROUPS, WIDTH = 12, 2, 128


def correctness(limit=1e-3):
    """The packed condensation forward and backward: this device against the CPU, and bf16 against fp32."""
    repo, found = repository("small", 4), {}
    for device in dict.fromkeys(("cpu", DEVICE)):
        model = BTokSentenceTransformer(repo, device=device)
        features = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch(model, "ragged", 8)[0].items()}
        targets, labels = features["target_ids"][:, 0], features["target_labels"][:, 0]
        output = condense(model[0].model, features, targets, labels)
        (output.embeddings.sum() + output.token_losses.sum()).backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).cpu()
        found[device] = output.embeddings.detach().cpu(), output.token_losses.detach().cpu(), gradients
    rows = []
    for name, ours, cpu in zip(("embeddings", "token losses", "gradients"), found[DEVICE], found["cpu"]):
        error = ((ours - cpu).abs().max() / cpu.abs().max()).item()
        rows.append(
            show({"table": "correctness", "what": f"{name}: {DEVICE} against CPU", "error": float(f"{error:.1e}")})
        )
        if not error <= limit:
            raise SystemExit(f"{name} on {DEVICE} differ from those on the CPU by {error:.1e}. Nothing was timed.")
    items = mixture("mixed", 48)
    exact = BTokSentenceTransformer(repo, device="cpu").encode(items, convert_to_tensor=True)
    half = BTokSentenceTransformer(repo, model_kwargs={"dtype": torch.bfloat16}).encode(items, convert_to_tensor=True)
    cosine = F.cosine_similarity(exact, half.float().cpu()).min().item()
    rows.append(
        show({"table": "correctness", "what": "smallest cosine of bf16 and fp32 vectors", "cosine": round(cosine, 6)})
    )
    return rows


def ways(lengths):
    """Callables that compute the causal attention of a packed batch, by name."""
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    layout = PackedLayout([(s, n, s, n) for s, n in zip(starts, lengths)], torch.device(DEVICE))
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    query = torch.randn(starts[-1], HEADS, WIDTH, device=DEVICE, dtype=dtype)
    key, value = (torch.randn(starts[-1], GROUPS, WIDTH, device=DEVICE, dtype=dtype) for _ in range(2))
    wide = [x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value)]
    longest = max(lengths)

    column = torch.arange(longest)
    places = torch.stack([start + column.clamp(max=n - 1) for start, n in zip(starts, lengths)]).to(DEVICE)

    def padded():
        return F.scaled_dot_product_attention(*(x[places].transpose(1, 2) for x in (query, *wide)), is_causal=True)

    def loop():
        return [
            F.scaled_dot_product_attention(
                *(x[None, start : start + n].transpose(1, 2) for x in (query, *wide)), is_causal=True
            )
            for start, n in zip(starts, lengths)
        ]

    found = {
        "grouped SDPA (this library)": lambda: layout.attend(query, *wide, WIDTH**-0.5),
        "SDPA, a call each": loop,
    }
    found["SDPA, padded"] = padded
    if DEVICE == "cuda":
        bounds = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
        if importlib.util.find_spec("torch.nn.attention.varlen"):
            from torch.nn.attention.varlen import varlen_attn

            options = {"window_size": (-1, 0)}
            try:
                varlen_attn(query, *wide, bounds, bounds, longest, longest, **options)
            except TypeError:  # torch 2.11
                options = {"is_causal": True}
            found["torch varlen_attn"] = lambda: varlen_attn(query, *wide, bounds, bounds, longest, longest, **options)
        if importlib.util.find_spec("flash_attn"):
            from flash_attn import flash_attn_varlen_func

            found["flash-attn"] = lambda: flash_attn_varlen_func(
                query, key, value, bounds, bounds, longest, longest, causal=True
            )
    return found


def attention(rounds):
    model = BTokSentenceTransformer(repository("small", 4))
    rows = []
    for kind in ("names", "texts"):
        items = mixture(kind, 256 if DEVICE == "cuda" else 32)
        found = ways(model.preprocess(items)["attention_mask"].sum(1).tolist())
        times = summary(compare(found, rounds), "SDPA, padded")
        rows += [show({"table": "attention", "inputs": kind, "way": way, **part}) for way, part in times.items()]
    return rows


def compiled(size, rounds):
    """Encoding with compiled MLPs; the first, untimed round compiles."""
    eager, other = (BTokSentenceTransformer(repository(size, 4)) for _ in range(2))
    for layer in other[0].model.language_model.layers:
        layer.mlp.compile(dynamic=True)
    items = mixture("texts", 512 if DEVICE == "cuda" else 96)
    times = summary(
        compare({"eager": partial(eager.encode, items), "compiled": partial(other.encode, items)}, rounds), "eager"
    )
    return [
        show({"table": "compile", "inputs": f"{len(items)} texts", "mlp": how, **part}) for how, part in times.items()
    ]


def largest_batch(size, seconds=120):
    """Rows of the largest batch that takes a step, doubled until memory or patience ends."""
    rows, count = [], 64
    while True:
        step = None  # frees the last model before the next one is built
        step = contender("packed", size, "ragged", count, 16)
        try:
            memory = peak_of(step)
            (taken,) = compare({"step": step}, rounds=1, warm_up=0)["step"]
        except torch.OutOfMemoryError:
            rows.append(show({"table": "batch", "rows": count, "result": "out of memory"}))
            return rows
        rows.append(show({"table": "batch", "rows": count, "seconds": round(taken, 2), "peak_gb": round(memory, 2)}))
        if 2 * taken > seconds or DEVICE == "cpu":
            return rows
        count *= 2


def main():
    options = arguments(__doc__, steps={"nargs": "+", "choices": STEPS, "default": STEPS})
    waiting = [] if DEVICE == "cuda" else WAITING
    rate = matrix_rate(torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    steps = {
        "correctness": correctness,
        "attention": partial(attention, options.rounds),
        "compile": partial(compiled, options.size, options.rounds),
        "batch": partial(largest_batch, options.size),
    }
    rows = []
    for name, step in steps.items():
        if name not in options.steps:
            continue
        rows += step()
        # Saved after each step, so that a later failure does not lose it.
        record("gpu", rows, size=options.size, matrix_gflop_per_s=round(rate, 1), waiting_for_a_gpu=waiting)
        free()
    for script in ("encode", "train_step", "vision"):
        if script in options.steps:
            command = [sys.executable, "-m", f"benchmarks.{script}", "--size", options.size]
            subprocess.run([*command, "--rounds", str(options.rounds)], check=True)
    if waiting:
        print("No GPU here. These figures wait for one:", "; ".join(waiting))


if __name__ == "__main__":
    main()
