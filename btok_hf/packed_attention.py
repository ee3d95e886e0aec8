"""Token mixers over packed rows: the layout of queries and keys, and what runs attention and other mixers over it.

One rule holds for every mixer: the queries of a segment see the sequence of the segment's keys and nothing else. A
recurrent state is zero before it. `btok_hf/condensation.py` packs the rows and chooses the keys. Importing this module
registers the attention functions.
"""

from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_causal_conv1d_available, is_flash_linear_attention_available

from btok_hf.features import to_device

ATTENTION = "btok_packed"
# If the name of an attention function contains "flash", transformers calls it once for all images of a batch, with
# their bounds. It calls any other attention function once per image, in a Python loop.
VISION_ATTENTION = "btok_flash_packed"


# (query_start, query_length, key_start, key_length): these queries attend to these keys.
Segment = tuple[int, int, int, int]


class PackedLayout:
    """The segments of a packed row, as the mixers take them.

    On a GPU, in half precision, attention is one call of flash attention for sequences of many lengths
    (`torch.nn.attention.varlen`). Elsewhere, and for mixers without such a kernel, segments of similar shape share a
    call.

    Args:
        segments (`Sequence[tuple[int, int, int, int]]`):
            `(query_start, query_length, key_start, key_length)` of each segment. Causal attention is aligned at the
            end: the last query attends to the last key. Together the queries cover every position once.
        device (`torch.device`): Device of the indices and masks.
        causal (`bool`): `False`: every query of a segment attends to all keys of the segment.
        dtype (`torch.dtype`): That of the queries, as far as known. What it needs is prepared at once, before kernels
            are queued, and anything else at its first use.
        mixes (`bool`): Whether `mix` will be called.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        device: torch.device,
        causal: bool = True,
        dtype: torch.dtype = torch.float32,
        mixes: bool = False,
    ) -> None:
        self.segments, self.device, self.causal = sorted(segments), device, causal
        needed = {"sequences" if _has_flash(device, dtype) else "groups"}
        if mixes:
            needed.add("sequences" if _has_linear_kernels(device) else "groups")
        for name in needed:
            getattr(self, name)

    @cached_property
    def groups(self) -> "_Groups":
        return _Groups(self.segments, self.device, self.causal)

    @cached_property
    def sequences(self) -> "_Sequences":
        return _sequences(self.segments, self.device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention over the segments.

        Args:
            query (`torch.Tensor` of shape `(length, heads, head_dim)`): Projections of the packed row.
            key, value (`torch.Tensor` of shape `(length, key_heads, head_dim)`): The same. `heads / key_heads`
                consecutive heads of the queries share a head of the keys.
            scale (`float` or `None`): As in `torch.nn.functional.scaled_dot_product_attention`.

        Returns:
            `torch.Tensor` of shape `(length, heads, head_dim)`
        """
        kind = query.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
        if _has_flash(query.device, dtype) and query.shape[2] % 8 == 0 and query.shape[2] <= 256:
            if not self.sequences.plain:
                key, value = (x.index_select(0, self.sequences.keys) for x in (key, value))
            key, value = (_for_each_query(query, x).to(dtype).contiguous() for x in (key, value))
            return self.sequences.attend(query.to(dtype), key, value, scale, self.causal)
        return self.groups.attend(query, _for_each_query(query, key), _for_each_query(query, value), scale)

    def mix(self, mixer: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        """A causal token mixer over the segments: it runs over the keys of each, and gives the outputs of the queries.

        Args:
            mixer (`Callable`): From hidden states of shape `(batch, length, hidden)` to as many outputs. With kernels
                for sequences of many lengths, it is called once, with `cu_seq_lens_q` and `seq_idx`.
            hidden (`torch.Tensor` of shape `(length, hidden)`): Hidden states of the packed row.

        Returns:
            `torch.Tensor` of shape `(length, hidden)`
        """
        if _has_linear_kernels(self.device):
            mixed = mixer(
                hidden.index_select(0, self.sequences.keys)[None],
                cu_seq_lens_q=self.sequences.key_bounds,
                seq_idx=self.sequences.numbers,
            )
            return mixed[0].index_select(0, self.sequences.ends)
        return self.groups.mix(mixer, hidden)


class _Groups:
    """Segments grouped by shape. Each group is one call of scaled-dot-product attention, or of another token mixer.

    Short causal segments are padded to the lengths of `_padded`, so that a batch of texts of many lengths needs few
    calls. Padding comes last, no real position sees it, and its outputs are dropped. Long segments and images are
    grouped by their exact shape, because fewer shapes occur and each call does more work.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device, causal: bool) -> None:
        groups: dict[tuple[int, int], list[Segment]] = {}
        for segment in segments:
            shape = segment[1], segment[3]
            groups.setdefault((_padded(shape[0]), _padded(shape[1])) if causal else shape, []).append(segment)
        # Of each group: (segments, queries, keys), mask, and whether it is causal without a mask.
        self.shapes: list[tuple[int, int, int]] = []
        self.masks: list[Tensor | None] = []
        self.causal: list[bool] = []
        group_queries, group_keys, group_real, group_ends = [], [], [], []
        length = 0
        for (rows, columns), members in groups.items():
            query_start, query_length, key_start, key_length = torch.tensor(members).T[..., None]
            row, column = torch.arange(rows), torch.arange(columns)
            group_queries.append((query_start + row.minimum(query_length - 1)).flatten())
            group_keys.append((key_start + column.minimum(key_length - 1)).flatten())
            group_real.append((row < query_length).flatten())
            # The queries are the last of their keys.
            first = length + columns * torch.arange(len(members))[:, None] + key_length - query_length
            group_ends.append((first + row).flatten())
            length += len(members) * columns
            exact = bool((query_length == rows).all() and (key_length == columns).all())
            self.shapes.append((len(members), rows, columns))
            self.causal.append(causal and exact and rows == columns)
            mask = None
            if causal and not self.causal[-1]:
                # Also hides padded keys from real queries: they come after the last key.
                mask = to_device((column <= row[:, None] + (key_length - query_length)[..., None])[:, None], device)
            self.masks.append(mask)
        queries, kept = torch.cat(group_queries), torch.cat(group_real).nonzero()[:, 0]
        # The index of each packed position in the concatenated outputs of all groups.
        order = kept[queries[kept].argsort()]
        self.order = to_device(order, device)
        self.queries, self.keys = to_device(queries, device), to_device(torch.cat(group_keys), device)
        # The same in the concatenated keys of all groups.
        self.ends = to_device(torch.cat(group_ends)[order], device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        # One gather for all groups: in the backward pass, each gather allocates a gradient for the full packed row.
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

    def mix(self, mixer: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        groups = hidden.index_select(0, self.keys).split([n * columns for n, _, columns in self.shapes])
        outputs = [
            mixer(states.view(n, columns, -1)).flatten(0, 1) for (n, _, columns), states in zip(self.shapes, groups)
        ]
        return torch.cat(outputs).index_select(0, self.ends)


class _Sequences(NamedTuple):
    """The keys of all segments, concatenated, as kernels for sequences of many lengths take them."""

    keys: Tensor  # (keys,): places in the packed row
    plain: bool  # the keys are the packed row
    key_bounds: Tensor  # (segments + 1,), int32
    query_bounds: Tensor
    longest: tuple[int, int]  # queries and keys of a segment
    numbers: Tensor  # (1, keys), int32: the segment of each key
    ends: Tensor  # (length,): the place of each query among the keys

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool) -> Tensor:
        """Attention of all queries to the gathered keys."""
        # Imported here: it brings torch's compiler with it, which a CPU does not need.
        from torch.nn.attention.varlen import varlen_attn

        # The longest sequence on both sides hides nothing. With (-1, -1), later releases of torch take cuDNN's kernel
        # on some GPUs, which was not compared with this one.
        window = (-1, 0) if causal else (max(self.longest), max(self.longest))
        bounds = self.query_bounds, self.key_bounds, *self.longest
        return cast(Tensor, varlen_attn(query, key, value, *bounds, scale=scale, window_size=window))


def _sequences(segments: Sequence[Segment], device: torch.device) -> _Sequences:
    query_start, query_length, key_start, key_length = torch.tensor(segments).T
    bounds, query_bounds = (F.pad(lengths.cumsum(0), (1, 0)) for lengths in (key_length, query_length))
    number = torch.arange(len(segments)).repeat_interleave(key_length)
    place = torch.arange(len(number)) - bounds[number]  # of a key in its sequence
    keys, back = key_start[number] + place, key_length[number] - place
    is_query = (back <= query_length[number]).nonzero()[:, 0]
    position = (query_start + query_length)[number] - back  # of a query in the packed row
    ends = is_query[position[is_query].argsort()]
    return _Sequences(
        to_device(keys, device),
        torch.equal(keys, torch.arange(len(ends))),
        to_device(bounds.int(), device),
        to_device(query_bounds.int(), device),
        (int(query_length.max()), int(key_length.max())),
        to_device(number.int()[None], device),
        to_device(ends, device),
    )


def _for_each_query(query: Tensor, heads: Tensor) -> Tensor:
    """Keys or values with as many heads as the queries."""
    repeats = query.shape[1] // heads.shape[1]
    return heads if repeats == 1 else heads.repeat_interleave(repeats, dim=1)


def _has_linear_kernels(device: torch.device) -> bool:
    """Whether transformers runs linear attention and its convolution with kernels that keep sequences apart."""
    return device.type == "cuda" and is_flash_linear_attention_available() and is_causal_conv1d_available()


def _has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has flash attention for sequences of many lengths in this dtype on this device."""
    if device.type != "cuda" or torch.version.hip or dtype not in (torch.float16, torch.bfloat16):
        return False
    flash = torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled()
    return flash and torch.cuda.get_device_capability(device) >= (8, 0)


def _padded(length: int) -> int:
    """The length that a segment is padded to. Lengths above 128 are not padded."""
    step = 8 if length <= 32 else 16 if length <= 64 else 32 if length <= 128 else 1
    return -(-length // step) * step


def _packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed_layout: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of the language model: packed if a layout is given, otherwise transformers' SDPA."""
    if packed_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("sliding_window"):
        raise ValueError("Packed attention does not support sliding windows: set config.use_sliding_window=False.")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return packed_layout.attend(query, key, value, scaling)[None], None


def _vision_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    vision_layouts: dict[int, tuple[Tensor, PackedLayout]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of the vision tower: one call for all images (or windows), or for those of the same size.

    All layers of a forward share the dict `vision_layouts`. It maps the id of a tensor of bounds to the bounds and
    their layout. Keeping the bounds in the dict makes sure that no other tensor gets the same id.
    """
    assert cu_seq_lens_q is not None  # transformers passes it to attention functions named "flash"
    layouts = {} if vision_layouts is None else vision_layouts
    if id(cu_seq_lens_q) not in layouts:
        bounds = pairwise(cu_seq_lens_q.tolist())
        segments = [(start, end - start, start, end - start) for start, end in bounds if end > start]
        layouts[id(cu_seq_lens_q)] = cu_seq_lens_q, PackedLayout(segments, query.device, False, query.dtype)
    _, layout = layouts[id(cu_seq_lens_q)]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return layout.attend(query, key, value, scaling)[None], None


class _PackedMixer:
    """The forward of a token mixer other than attention: packed if a layout is given, otherwise as it was.

    The layout comes as `seq_idx`, the name by which transformers keeps packed sequences apart. Before 5.22, layers
    hand their convolution nothing else.
    """

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self.forward = forward

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layout = kwargs.get("seq_idx")
        if layout is None or isinstance(layout, Tensor):
            return self.forward(hidden_states, *args, **kwargs)
        return layout.mix(self.forward, hidden_states[0])[None]


def pack_mixers(language_model: torch.nn.Module, names: Collection[str]) -> None:
    """Make the token mixers with these names run over the layout of a packed row. Other calls stay as they were.

    Not undone after a forward, because activation checkpointing calls them again in the backward pass.

    Args:
        language_model (`torch.nn.Module`): Changed in place. May be called again.
        names (`Collection[str]`): Names of the mixers in their layers.
    """
    for layer in cast(Any, language_model).layers if names else ():
        for name in names:
            mixer = getattr(layer, name, None)  # a layer may have attention in its place
            if mixer is not None and not isinstance(mixer.forward, _PackedMixer):
                mixer.forward = _PackedMixer(mixer.forward)


AttentionInterface.register(VISION_ATTENTION, _vision_attention)
AttentionInterface.register(ATTENTION, _packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # the padding mask for calls without a packed layout
