"""Attention over packed rows: which keys each query may see, and the attention functions that transformers calls."""

from itertools import pairwise

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "btok_packed"
# transformers gives the vision tower's whole batch to an attention function whose name holds "flash", in one call with
# the bounds of the images; any other it calls once per image, in a Python loop.
VISION_ATTENTION = "btok_flash_packed"


class PackedLayout:
    """Which keys each query of a packed row may see: segments, grouped by shape.

    A group is one call of scaled-dot-product attention. Short causal segments are padded to the lengths of `_padded`,
    so that a ragged batch of texts takes a handful of calls and not one for every pair of lengths; what is padded is
    masked and dropped. Long ones, and images, are grouped by their exact shape: few differ, and each is worth a call.

    Args:
        segments (`list[tuple[int, int, int, int]]`):
            `(query_start, query_length, key_start, key_length)` per segment. Causal attention is aligned at the end:
            the last query sees the last key. Together the queries cover every position once.
        device (`torch.device`): Where the indices live.
        causal (`bool`): `False`: every query of a segment sees all of its keys.
    """

    def __init__(self, segments, device, causal=True):
        groups = {}
        for segment in segments:
            shape = segment[1], segment[3]
            groups.setdefault(tuple(map(_padded, shape)) if causal else shape, []).append(segment)
        self.shapes, self.masks, self.causal = [], [], []  # (segments, queries, keys) of each group, …
        queries, keys, real = [], [], []
        for (rows, columns), members in groups.items():
            query_start, query_length, key_start, key_length = torch.tensor(members).T[..., None]
            row, column = torch.arange(rows), torch.arange(columns)
            queries.append((query_start + row.minimum(query_length - 1)).flatten())
            keys.append((key_start + column.minimum(key_length - 1)).flatten())
            real.append((row < query_length).flatten())
            exact = bool((query_length == rows).all() and (key_length == columns).all())
            self.shapes.append((len(members), rows, columns))
            self.causal.append(causal and exact and rows == columns)
            mask = None
            if causal and not self.causal[-1]:
                # Real queries see no padded key: those stand behind the last key.
                mask = (column <= row[:, None] + (key_length - query_length)[..., None])[:, None].to(device)
            self.masks.append(mask)
        queries, real = torch.cat(queries), torch.cat(real)
        kept = real.nonzero()[:, 0]
        # Where in the outputs of all groups each packed position stands.
        self.order = kept[queries[kept].argsort()].to(device)
        self.queries, self.keys = queries.to(device), torch.cat(keys).to(device)

    def attend(self, query, key, value, scale):
        """Attention of `(length, heads, head_dim)` tensors; returns the same shape."""
        # One gather for all groups: in the backward pass each would fill a gradient of the whole row.
        queries = query.index_select(0, self.queries).split([n * rows for n, rows, _ in self.shapes])
        keys, values = (
            x.index_select(0, self.keys).split([n * columns for n, _, columns in self.shapes]) for x in (key, value)
        )
        outputs = []
        for (n, rows, columns), mask, is_causal, q, k, v in zip(
            self.shapes, self.masks, self.causal, queries, keys, values
        ):
            q, k, v = (
                x.view(n, length, *x.shape[1:]).transpose(1, 2)
                for x, length in zip((q, k, v), (rows, columns, columns))
            )
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.order)


def _padded(length):
    """The length that segments of a similar length share; beyond 128 their own."""
    step = 8 if length <= 32 else 16 if length <= 64 else 32 if length <= 128 else 1
    return -(-length // step) * step


def _packed_attention(module, query, key, value, attention_mask, scaling=None, packed_layout=None, **kwargs):
    """Attention function of the language model: packed where a layout is given, transformers' SDPA elsewhere."""
    if packed_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("sliding_window"):
        raise ValueError("Packed attention does not support sliding windows: set config.use_sliding_window=False.")
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return packed_layout.attend(*(x[0].transpose(0, 1) for x in (query, key, value)), scaling)[None], None


def _vision_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, vision_layouts=None, **kwargs
):
    """Attention function of the vision tower: images (or windows) of the same size in one call.

    `vision_layouts` is a dict in which the layers of a forward share the layouts of their bounds. It holds the bounds
    too, so that no other tensor can take their id.
    """
    layouts = {} if vision_layouts is None else vision_layouts
    if id(cu_seq_lens_q) not in layouts:
        bounds = pairwise(cu_seq_lens_q.tolist())
        segments = [(start, end - start, start, end - start) for start, end in bounds if end > start]
        layouts[id(cu_seq_lens_q)] = cu_seq_lens_q, PackedLayout(segments, query.device, causal=False)
    _, layout = layouts[id(cu_seq_lens_q)]
    return layout.attend(*(x[0].transpose(0, 1) for x in (query, key, value)), scaling)[None], None


AttentionInterface.register(VISION_ATTENTION, _vision_attention)
AttentionInterface.register(ATTENTION, _packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # calls without a layout keep their padding mask
