"""What a family says of its backbones."""

import re

import pytest
from support import tiny
from transformers import (
    AutoModelForImageTextToText,
    Idefics3Config,
    InternVLConfig,
    Lfm2MoeConfig,
    Lfm2VlConfig,
    LlamaConfig,
)

from btok_hf import BTokSentenceTransformer
from btok_hf.backbones import family_of
from btok_hf.modeling.modeling_btok import stock_class


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_a_row_describes_its_backbone(bases, backbone):
    model = AutoModelForImageTextToText.from_pretrained(bases[backbone])
    family = family_of(model.config)
    assert type(model) is stock_class(model.config)
    parts = [family.language_model(model.model), family.vision_tower(model.model)]
    assert {id(p) for part in parts for p in part.parameters()} == {id(p) for p in model.model.parameters()}
    # LoRA adapts every linear layer of the language model but the gates of recurrent layers.
    names = [name for name, module in model.model.named_modules() if type(module).__name__ == "Linear"]
    adapted = {name for name in names if re.fullmatch(family.lora_targets, name)}
    left_out = {name for name in names if name.startswith(family.language)} - adapted
    assert adapted and {name.rpartition(".")[2] for name in left_out} == (
        {"in_proj_a", "in_proj_b"} if backbone == "qwen3_5" else set()
    )


def test_only_checked_language_models_are_supported():
    family_of(InternVLConfig())
    with pytest.raises(ValueError, match=r"InternVL3 \(-hf\) is supported with .* qwen2, qwen3, got 'llama'"):
        family_of(InternVLConfig(text_config=LlamaConfig()))
    with pytest.raises(ValueError, match=r"SmolVLM is supported with the language models llama, got 'mistral'"):
        family_of(Idefics3Config(text_config={"model_type": "mistral"}))
    with pytest.raises(ValueError, match=r"LFM2-VL is supported with the language models lfm2, got 'lfm2_moe'"):
        family_of(Lfm2VlConfig(text_config=Lfm2MoeConfig()))


def test_pixels_of_one_size(repos):
    """No multiple of a token's pixels; the card says what an image of it costs."""
    model = BTokSentenceTransformer(
        repos["qwen2_vl"], device="cpu", processor_kwargs={"min_pixels": 5000, "max_pixels": 5000}
    )
    assert family_of(model.config).image_costs(model.processor).tokens == {6 * 28 * 28: 6}


def test_convolutions_with_biases_are_refused():
    family_of(Lfm2VlConfig())
    with pytest.raises(ValueError, match=r"LFM2-VL is supported without biases of the convolutions.*on the left"):
        family_of(Lfm2VlConfig(text_config={"model_type": "lfm2", "conv_bias": True}))
