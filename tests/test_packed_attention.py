"""Packed attention: layouts are shared, and ordinary calls stay as they were."""

from unittest.mock import patch

import torch
from support.inputs import process, rows
from transformers import AutoModel, AutoProcessor

from btok_hf.condensation import condense
from btok_hf.packed_attention import PackedLayout


def test_layers_of_the_vision_tower_share_their_layouts(repos):
    """There is one layout for the language model, and one for all tower layers with the same bounds."""
    for backbone, kinds in (("qwen2_vl", 1), ("qwen2_5_vl", 2), ("qwen3_vl", 1)):
        processor, model = AutoProcessor.from_pretrained(repos[backbone]), AutoModel.from_pretrained(repos[backbone])
        inputs = process(processor, rows("image"))
        with (
            torch.no_grad(),
            patch("btok_hf.condensation.PackedLayout", wraps=PackedLayout) as language,
            patch("btok_hf.packed_attention.PackedLayout", wraps=PackedLayout) as vision,
        ):
            condense(model, inputs)
        assert (language.call_count, vision.call_count) == (1, kinds), backbone


def test_ordinary_calls_are_unchanged_after_condense(repo):
    processor = AutoProcessor.from_pretrained(repo)
    model = AutoModel.from_pretrained(repo).eval()
    inputs = process(processor, rows("image"), "left")
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        condense(model, inputs)
        after = model(**inputs).last_hidden_state
    assert model.language_model.config._attn_implementation == "btok_packed"
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(after[real], before[real], atol=0, rtol=0)
