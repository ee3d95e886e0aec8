"""Ways to compute the attention of a packed batch: rows, and target segments, which see fewer queries than keys.

    python -m benchmarks.attention    # a minute on two CPU cores

It writes benchmarks/results/attention.json.

Every way and its gradients are compared with the library's before it is timed. Segments are those of `names` and of
`texts`, with the heads of Qwen2-VL-2B. With `targets`, every row has a target segment of a quarter of its length: its
queries see the four Bottleneck Tokens and the target itself.
"""

import importlib.util

import torch
from torch.nn import functional as F

from benchmarks.bench import DEVICE, arguments, compare, free, mixture, record, repository, show, summary
from btok_hf import BTokSentenceTransformer
from btok_hf.packed_attention import PackedLayout

HEADS, GROUPS, WIDTH = 12, 2, 128  # heads, key/value heads and their width in Qwen2-VL-2B
TOKENS = 4
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# In half precision on a GPU, the library calls torch's varlen_attn.
OURS = "grouped SDPA (this library)" if DEVICE == "cpu" else "this library"


def segments(lengths, targets):
    """`(query start, queries, key start, keys)` of every segment, as `PackedLayout` takes them."""
    found, place = [], 0
    for length in lengths:
        found.append((place, length, place, length))
        place += length
        if targets:
            target = max(1, length // 4)
            found.append((place, target, place - TOKENS, target + TOKENS))
            place += target
    return found


def ways(parts):
    """Queries, keys and values, and callables that compute the causal attention of the segments, by name."""
    total = parts[-1][0] + parts[-1][1]
    layout = PackedLayout(parts, torch.device(DEVICE), dtype=DTYPE)
    made = {"device": DEVICE, "dtype": DTYPE, "requires_grad": True}
    query, key, value = (torch.randn(total, heads, WIDTH, **made) for heads in (HEADS, GROUPS, GROUPS))
    wide = [x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value)]

    def each():
        found = []
        for start, count, first, keys in parts:
            mask = torch.ones(count, keys, dtype=torch.bool, device=DEVICE).tril(keys - count)
            rows = query[None, start : start + count].transpose(1, 2)
            seen = [x[None, first : first + keys].transpose(1, 2) for x in wide]
            kind = {"is_causal": True} if count == keys else {"attn_mask": mask}
            found.append(F.scaled_dot_product_attention(rows, *seen, **kind)[0].transpose(0, 1))
        return torch.cat(found)

    found = {OURS: lambda: layout.attend(query, key, value, WIDTH**-0.5), "SDPA, a call each": each}
    found |= padded(parts, query, wide) | flex(parts, query, key, value)
    if DEVICE == "cuda":
        found["grouped SDPA"] = lambda: layout.groups.attend(query, *wide, WIDTH**-0.5)
        found |= variable(parts, query, key, value)
    return (query, key, value), found


def padded(parts, query, wide):
    """Rows of equal length, without target segments."""
    if any(count != keys for _, count, _, keys in parts):
        return {}
    column = torch.arange(max(count for _, count, _, _ in parts))
    places = torch.stack([start + column.clamp(max=count - 1) for start, count, _, _ in parts]).to(DEVICE)

    def call():
        out = F.scaled_dot_product_attention(*(x[places].transpose(1, 2) for x in (query, *wide)), is_causal=True)
        return torch.cat([row[:, :count].transpose(0, 1) for row, (_, count, _, _) in zip(out, parts)])

    return {"SDPA, padded": call}


def flex(parts, query, key, value):
    """FlexAttention with a block mask, compiled. On the CPU it needs a C++ compiler and is left out."""
    if DEVICE == "cpu":
        return {}
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    total = len(query)
    # Of a query: the first key of its segment, and its own key. Keys before the first, or after its own, are hidden.
    first, own = (torch.empty(total, dtype=torch.int32, device=DEVICE) for _ in range(2))
    for start, count, begin, keys in parts:
        first[start : start + count] = begin
        own[start : start + count] = torch.arange(begin + keys - count, begin + keys, device=DEVICE)

    def visible(batch, head, row, column):
        return (column >= first[row]) & (column <= own[row])

    compiled, masked = torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True)

    def call():  # the mask belongs to the batch, and is shared by the layers: it is timed apart
        return compiled(*rows, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    mask = masked(visible, None, None, total, total, device=DEVICE)
    rows = [x[None].transpose(1, 2) for x in (query, key, value)]
    return {
        "FlexAttention": call,
        "FlexAttention's block mask": lambda: masked(visible, None, None, total, total, device=DEVICE),
    }


def variable(parts, query, key, value):
    """Kernels for sequences of different lengths that repeat no heads. Keys that two segments see are copied."""
    queries = torch.tensor([0, *(count for _, count, _, _ in parts)], device=DEVICE).cumsum(0).int()
    keys = torch.tensor([0, *(count for _, _, _, count in parts)], device=DEVICE).cumsum(0).int()
    longest = max(count for _, count, _, _ in parts), max(count for _, _, _, count in parts)
    places = torch.cat([torch.arange(first, first + count) for _, _, first, count in parts]).to(DEVICE)
    plain = len(places) == len(query)

    def seen(tensors):
        return tensors if plain else [x[places] for x in tensors]

    def torch_variable():
        from torch.nn.attention.varlen import varlen_attn  # not on a CPU, where it costs a start of torch's compiler

        given = query, *seen([key, value]), queries, keys, *longest
        try:
            return varlen_attn(*given, window_size=(-1, 0), enable_gqa=True)
        except TypeError:  # torch 2.11 has no such argument, and takes fewer heads of keys without it
            return varlen_attn(*given, window_size=(-1, 0))

    found = {"varlen_attn, heads not repeated": torch_variable}
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func

        found["flash-attn"] = lambda: flash_attn_varlen_func(
            query, *seen([key, value]), queries, keys, *longest, causal=True
        )
    return found


def with_gradients(call, tensors):
    """The output of a way, and the gradients of the tensors."""
    output = call()
    return output.reshape(-1, HEADS, WIDTH).detach(), *torch.autograd.grad(output.float().sin().sum(), tensors)


def measure(size, rounds):
    """Rows of the table: seconds of each way, and its largest difference to the library's."""
    model, rows = BTokSentenceTransformer(repository("small", 4)), []
    for kind in ("names", "texts"):
        lengths = model.preprocess(mixture(kind, 256 if DEVICE == "cuda" else 32))["attention_mask"].sum(1).tolist()
        for targets in (False, True):
            (tensors, calls), errors = ways(segments(lengths, targets)), {}
            right = with_gradients(calls[OURS], tensors)
            for name in list(calls):
                if "mask" in name:
                    continue
                try:
                    found = with_gradients(calls[name], tensors)
                except TimeoutError:  # of gpu.py
                    raise
                except Exception as error:  # a way that this version or card does not have is named, not hidden
                    rows.append(show({"table": "attention", "inputs": kind, "way": name, "failed": str(error)[:200]}))
                    del calls[name]
                    continue
                errors[name] = max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(found, right))
            wrong = {name: error for name, error in errors.items() if not error < 0.05}
            if wrong:
                raise RuntimeError(f"Ways of attention disagree with this library's: {wrong}. Nothing was timed.")
            with torch.no_grad():
                times = summary(compare(calls, rounds), OURS)
            for name, part in times.items():
                row = {"table": "attention", "inputs": kind + ", targets" * targets, "way": name, **part}
                rows.append(show(row | {"differs_by": errors.get(name)}))
            free()
    return rows


def main():
    options = arguments(__doc__)
    record("attention", measure(options.size, options.rounds))


if __name__ == "__main__":
    main()
