"""Speed of encoding: what Bottleneck Tokens cost, and this library against stock Sentence-Transformers.

    python -m benchmarks.encode    # three quarters of an hour on two CPU cores

It writes benchmarks/results/encode.json.

Three tables:

- overhead: the cost of K = 4 tokens against last-token pooling on the same path.
- throughput: `BTokSentenceTransformer.encode` against `SentenceTransformer.encode` on uniform and ragged inputs.
- profile: where the time of `BTokSentenceTransformer.encode` goes.
"""

from functools import partial

import torch
from sentence_transformers import SentenceTransformer
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench import (
    DEVICE,
    arguments,
    compare,
    exact_texts,
    images,
    matrix_rate,
    mixture,
    record,
    repository,
    show,
    summary,
)
from btok_hf import BTokSentenceTransformer

TABLES = ("overhead", "throughput", "profile")
# Stock Sentence-Transformers sorts inputs by length before it pads them: the more there are, the less it pads.
COUNTS = {
    "uniform": (64,),
    "names": (384,),
    "texts": (96, 384),
    "images": (42,),
    "mixed": (98, 392),
    "files": (98, 392),
}
if DEVICE == "cuda":  # enough to keep it busy for a second
    COUNTS = {"long": (128,), "texts": (768,), "names": (3072,), "images": (336,), "mixed": (784,)}
LARGE = 512  # rows of a batch, on a GPU
# The operations that a profile is summed up by.
PARTS = {
    "matrix products": ("aten::addmm", "aten::mm", "aten::bmm", "aten::_addmm_activation", "aten::mkldnn"),
    "attention": ("aten::_scaled_dot", "aten::_flash", "aten::_efficient", "torch_attn::"),
    "gathering": ("aten::index", "aten::cat", "aten::copy_", "aten::gather", "aten::_to_copy"),
}


LENGTHS, TOKENS = (16, 128, 1024), 4096 if DEVICE == "cpu" else 65_536  # tokens of all texts of a length


def overhead(models, rounds):
    """K = 4 against K = 0 on equal inputs, by both paths."""
    tokenizer = models["packed"][0].tokenizer
    inputs = {f"text of {n} tokens": exact_texts(tokenizer, n, TOKENS // n) for n in LENGTHS}
    inputs["drawing, 4 tokens"], inputs["figure"], inputs["page, 224 tokens"] = (
        part[:n] for part, n in zip(images(), (64, 24, 12))
    )
    inputs["text of 16 tokens, alone"] = inputs["text of 16 tokens"][:32]
    rows = []
    for kind, items in inputs.items():
        alone = kind.endswith("alone")
        # Rows end in one end token without Bottleneck Tokens, and in four Bottleneck Tokens with them.
        lengths = [model.preprocess(items)["attention_mask"].sum().item() / len(items) for model in models["packed"]]
        for path, (without, with_tokens) in models.items():
            calls = {
                name: partial(_one_by_one, model, items) if alone else partial(model.encode, items)
                for name, model in (("K = 0", without), ("K = 4", with_tokens))
            }
            found = summary(compare(calls, rounds), "K = 4")
            rows.append(
                show(
                    {
                        "table": "overhead",
                        "inputs": kind,
                        "row_length": round(lengths[0], 1),
                        "path": path,
                        "cost_of_tokens": found["K = 0"]["speed_ratio"],
                        "quartiles": found["K = 0"]["ratio_quartiles"],
                        "more_tokens": round(lengths[1] / lengths[0], 3),
                    }
                )
            )
    return rows


def _one_by_one(model, items):
    for item in items:
        model.encode(item)


def padding(model, items):
    """Computed tokens for each real token in a padded pipeline: the largest possible gain of packing."""
    forward, computed, real = model.forward, 0, 0

    def count(features, **kwargs):
        nonlocal computed, real
        computed += features["attention_mask"].numel()
        real += int(features["attention_mask"].sum())
        return forward(features, **kwargs)

    model.forward = count
    model.encode(items)
    del model.forward
    return computed / real


def throughput(ours, stock, rounds, limit):
    """`BTokSentenceTransformer` with K = 4 against a stock pipeline that pools the last token."""
    rows = []
    for kind, count in [(kind, count) for kind, counts in COUNTS.items() for count in counts]:
        items = inputs_of(kind, count, ours)
        tokens = sum(int(ours.preprocess(items[i : i + 32])["attention_mask"].sum()) for i in range(0, len(items), 32))
        calls = {
            "stock": partial(stock.encode, items),
            "btok": partial(ours.encode, items),
        }
        if DEVICE == "cuda":  # its default of 32 rows leaves a GPU idle
            calls["stock, large batches"] = partial(stock.encode, items, batch_size=LARGE)
        found = summary(compare(calls, rounds), "stock")
        large = {}
        if DEVICE == "cuda":
            large["large_batches"] = found["stock, large batches"]["speed_ratio"]
        with FlopCounterMode(display=False) as counter:
            calls["btok"]()
        rate = counter.get_total_flops() / found["btok"]["median_s"] / 1e9
        rows.append(
            show(
                {
                    "table": "throughput",
                    "inputs": kind,
                    "count": count,
                    "tokens": tokens,
                    "stock_padding": round(padding(stock, items), 2),
                    "stock_tokens_per_s": round(tokens / found["stock"]["median_s"]),
                    "btok_tokens_per_s": round(tokens / found["btok"]["median_s"]),
                    "speed_ratio": found["btok"]["speed_ratio"],
                    **large,
                    "quartiles": found["btok"]["ratio_quartiles"],
                    "gflop_per_s": round(rate, 1),
                    "share_of_limit": round(rate / limit, 2),
                }
            )
        )
    return rows


def inputs_of(kind, count, model):
    """A mixture, or texts of 1,024 tokens."""
    return exact_texts(model[0].tokenizer, 1024, count) if kind == "long" else mixture(kind, count)


def parts(ours):
    """Where the time of encoding a mixture goes, in percent; on a GPU, also how much of the time it computes."""
    rows = []
    for kind in ("names", "mixed") + ("texts", "long") * (DEVICE == "cuda"):
        items = inputs_of(kind, COUNTS[kind][0], ours)
        (seconds,) = compare({kind: partial(ours.encode, items)}, rounds=1)[kind]
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
        with profile(activities=activities) as found:
            ours.encode(items, show_progress_bar=False)
        key = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
        # Operations, which have the time of their kernels, and not these once more.
        operations = [event for event in found.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]
        times = {event.key: getattr(event, key) for event in operations}
        total = sum(times.values())
        shares = {
            part: sum(time for name, time in times.items() if name.startswith(starts))
            for part, starts in PARTS.items()
        }
        shares["other operations"] = total - sum(shares.values())
        shares = {part: round(100 * time / total, 1) for part, time in shares.items()}
        busy = {"busy": round(total / 1e4 / seconds, 1)} if DEVICE == "cuda" else {}
        rows.append(show({"table": "profile", "inputs": kind, **shares, **busy}))
    return rows


def measure(size, rounds, tables=TABLES):
    """Rows of the tables, and the rate of large matrices in GFLOP/s."""
    none, four = repository(size, 0), repository(size, 4)
    ours = [BTokSentenceTransformer(path) for path in (none, four)]
    stock = [SentenceTransformer(path) for path in (none, four)]
    limit = matrix_rate(ours[0].dtype)
    rows = []
    if "overhead" in tables:
        rows += overhead({"packed": ours, "stock": stock}, rounds)
    if "throughput" in tables:
        rows += throughput(ours[1], stock[0], rounds, limit)
    if "profile" in tables:
        rows += parts(ours[1])
    return rows, limit


def main():
    options = arguments(__doc__, tables={"nargs": "+", "default": TABLES})
    rows, limit = measure(options.size, options.rounds, options.tables)
    record("encode", rows, size=options.size, matrix_gflop_per_s=round(limit, 1))


if __name__ == "__main__":
    main()
