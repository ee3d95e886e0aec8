"""The table of families: complete, and the only place that tells families apart."""

import re
from pathlib import Path

import pytest
from support import layout, tiny
from transformers import AutoModelForImageTextToText, Qwen2Config

from btok_hf.backbones import FAMILIES, family_of
from btok_hf.modeling.modeling_btok import STOCK_CLASSES, stock_class

ROOT = Path(__file__).parents[1]


def test_every_stock_class_has_a_family_and_a_tiny_model():
    assert list(FAMILIES) == list(STOCK_CLASSES) == list(tiny.BACKBONES)


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


def test_an_unsupported_backbone_is_refused_by_name():
    with pytest.raises(ValueError, match=r"support the backbones \['qwen2_5_vl'.*got model_type 'qwen2'"):
        family_of(Qwen2Config())


def test_no_other_file_tells_families_apart():
    """A new family is a row here and a class in the remote code. vLLM's own classes are in its plugin."""
    names = "|".join(
        [*STOCK_CLASSES, *(name.removesuffix("ForConditionalGeneration") for name in STOCK_CLASSES.values())]
    )
    allowed = {"backbones", "modeling_btok", "vllm_models", "vllm_plugin"}
    for path in layout.modules(ROOT).values():
        found = re.findall(rf"\b(?:{names})\b|model_type\s*(?:==|!=|in)\s", path.read_text("utf-8"))
        assert path.stem in allowed or not found, (path.name, found)
