"""Packed mixers: layouts are shared, kernels get the same sequences, and ordinary calls stay as they were."""

import copy
import pickle
from itertools import pairwise
from unittest.mock import Mock, patch

import pytest
import torch
from support.inputs import process, rows
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoProcessor

from btok_hf.condensation import condense
from btok_hf.packed_attention import PackedLayout, pack_mixers


def test_layers_of_the_vision_tower_share_their_layouts(repos):
    """There is one layout for the language model, and one for all tower layers with the same bounds."""
    for backbone, kinds in (("qwen2_vl", 1), ("qwen2_5_vl", 2), ("qwen3_vl", 1), ("qwen3_5", 1)):
        processor, model = AutoProcessor.from_pretrained(repos[backbone]), AutoModel.from_pretrained(repos[backbone])
        inputs = process(processor, rows("image"))
        with (
            torch.no_grad(),
            patch("btok_hf.condensation.PackedLayout", wraps=PackedLayout) as language,
            patch("btok_hf.packed_attention.PackedLayout", wraps=PackedLayout) as vision,
        ):
            condense(model, inputs)
        assert (language.call_count, vision.call_count) == (1, kinds), backbone


def test_ordinary_calls_are_unchanged_after_condense(either):
    processor = AutoProcessor.from_pretrained(either)
    model = AutoModel.from_pretrained(either).eval()
    inputs = process(processor, rows("image"), "left")
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        condense(model, inputs)
        after = model(**inputs).last_hidden_state
    assert model.config.get_text_config()._attn_implementation == "btok_packed"
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(after[real], before[real], atol=0, rtol=0)


def test_sliding_windows_are_refused(repo):
    """Packed attention would leave them out without a word."""
    config = AutoConfig.from_pretrained(repo)
    config.text_config.sliding_window, layers = 4, config.text_config.num_hidden_layers
    config.text_config.layer_types = ["sliding_attention"] * layers
    model = AutoModel.from_pretrained(repo, config=config)
    inputs = process(AutoProcessor.from_pretrained(repo), rows("text"))
    with pytest.raises(ValueError, match=r"sliding windows: set config\.use_sliding_window=False"):
        condense(model, inputs)


# Query length and key length of segments; a packed row has its segments in any order.
SHAPES = [(5, 5), (2, 6), (40, 40), (9, 13), (130, 130), (1, 5), (5, 5)]


def layout_of(shapes):
    segments, start = [], 0
    for queries, keys in shapes:
        # The keys of a segment begin before its queries: with the Bottleneck Tokens.
        segments.append((start, queries, start - (keys - queries), keys))
        start += queries
    return PackedLayout([segments[0], *segments[:0:-1]], torch.device("cpu")), segments, start


def running_sum(states, cu_seq_lens_q=None, seq_idx=None):
    """A mixer whose state carries everything on: the sum of all states so far, of each sequence."""
    if cu_seq_lens_q is None:
        return states.cumsum(1)
    assert len(states) == 1 and seq_idx.shape == states.shape[:2] and seq_idx.dtype == cu_seq_lens_q.dtype
    bounds = cu_seq_lens_q.tolist()
    for number, (start, end) in enumerate(pairwise(bounds)):
        assert (seq_idx[0, start:end] == number).all()
    assert bounds[-1] == states.shape[1]
    return torch.cat([states[:, start:end].cumsum(1) for start, end in pairwise(bounds)], 1)


def test_a_mixer_sees_the_keys_of_a_segment_and_nothing_before_them():
    """Grouped by shape, or all sequences behind each other as kernels take them."""
    for kernels in (False, True):
        with patch("btok_hf.packed_attention._has_linear_kernels", lambda device, kernels=kernels: kernels):
            layout, segments, length = layout_of(SHAPES)
            hidden = torch.randn(length, 3, dtype=torch.double)
            mixer = Mock(wraps=running_sum)
            mixed = layout.mix(mixer, hidden)
            for start, queries, first, keys in segments:
                expected = hidden[first : first + keys].cumsum(0)[-queries:]
                torch.testing.assert_close(mixed[start : start + queries], expected)
            assert mixer.call_count == (1 if kernels else len(layout.groups.shapes))
    assert len(layout.groups.shapes) < len(segments)  # segments of similar shape share a call


def varlen_attn(query, key, value, queries, keys, longest_query, longest_key, scale, window_size):
    """What torch's kernel computes, a sequence at a time. It has none for the CPU."""
    assert queries.dtype == keys.dtype == torch.int32 and key.shape[1] == query.shape[1]
    assert query.dtype == key.dtype == value.dtype and key.is_contiguous() and value.is_contiguous()
    outputs, lengths = [], []
    for (start, end), (first, last) in zip(pairwise(queries.tolist()), pairwise(keys.tolist())):
        rows, columns = end - start, last - first
        mask = torch.ones(rows, columns, dtype=torch.bool)
        if window_size == (-1, 0):
            mask = mask.tril(columns - rows)
        else:  # all is visible, and torch does not think of another kernel
            assert min(window_size) >= columns
        parts = (x[None].transpose(1, 2) for x in (query[start:end], key[first:last], value[first:last]))
        outputs.append(F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale)[0].transpose(0, 1))
        lengths.append((rows, columns))
    assert (longest_query, longest_key) == tuple(map(max, zip(*lengths)))
    return torch.cat(outputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shapes", [SHAPES, [(5, 5), (40, 40), (3, 3)]])
def test_flash_attention_gets_the_same_segments(monkeypatch, causal, shapes):
    """With keys that two segments see and heads that share keys, outputs and gradients are those of grouped calls."""
    shapes = shapes if causal else [(keys, keys) for _, keys in shapes]
    _, segments, length = layout_of(shapes)
    tensors = [torch.randn(length, heads, 8, dtype=torch.double, requires_grad=True) for heads in (4, 2, 2)]
    found = []
    for flash in (False, True):
        monkeypatch.setattr("btok_hf.packed_attention._has_flash", lambda device, dtype, flash=flash: flash)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
        layout = PackedLayout([segments[0], *segments[:0:-1]], torch.device("cpu"), causal)
        assert ("sequences" in vars(layout)) == flash and ("groups" in vars(layout)) != flash
        output = layout.attend(*tensors, 0.3)
        found.append([output, *torch.autograd.grad(output.sin().sum(), tensors)])
    for ours, expected in zip(*found):
        torch.testing.assert_close(ours, expected)


def test_flash_attention_gets_the_dtype_of_autocast(monkeypatch):
    """Rotary positions give fp32 queries beside values in half precision."""
    monkeypatch.setattr("btok_hf.packed_attention._has_flash", lambda device, dtype: dtype == torch.bfloat16)
    kernel = Mock(wraps=varlen_attn)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    layout, _, length = layout_of(SHAPES)
    tensors = [torch.randn(length, heads, 8) for heads in (4, 2, 2)]
    expected = layout.attend(*tensors, None)
    with torch.autocast("cpu", torch.bfloat16):
        found = layout.attend(*tensors[:2], tensors[2].bfloat16(), None)
    assert kernel.call_count == 1 and found.dtype == torch.bfloat16 and expected.dtype == torch.float32
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


def test_heads_that_flash_attention_does_not_take_are_grouped(monkeypatch):
    monkeypatch.setattr("btok_hf.packed_attention._has_flash", lambda device, dtype: True)
    layout, _, length = layout_of(SHAPES)
    for width in (12, 264):
        tensors = [torch.randn(length, 2, width) for _ in range(3)]
        assert layout.attend(*tensors, None).shape == (length, 2, width)
    assert "groups" in vars(layout)


def test_packed_mixers_survive_copies_and_pickles(repos):
    """`encode` with several processes pickles the model, and an export copies layers."""
    model = AutoModel.from_pretrained(repos["qwen3_5"]).eval()
    inputs = process(AutoProcessor.from_pretrained(repos["qwen3_5"]), rows("text"))
    with torch.no_grad():
        expected = condense(model, inputs).embeddings
        pack_mixers(model.language_model, ["linear_attn"])  # again: nothing is packed twice
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for parameter in other.parameters():
                parameter.add_(1)
            assert (condense(other, inputs).embeddings - expected).abs().max() > 1e-2  # its own weights are read
            torch.testing.assert_close(condense(model, inputs).embeddings, expected, atol=0, rtol=0)
