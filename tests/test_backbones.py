"""The table of families: complete, and the only place that tells families apart."""

import re
from pathlib import Path

import pytest
from support import layout, tiny
from support.media import image
from transformers import AutoModelForImageTextToText, Idefics3Config, Qwen2Config

from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens
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


def test_a_bound_of_pixels_counts_tiles(bases, repos, tmp_path):
    """Every image of a SmolVLM is resized to one longest side."""
    repo = repos["idefics3"]

    def tokens(repo, **options):
        model = BTokSentenceTransformer(repo, device="cpu", processor_kwargs=options)
        return int((model.preprocess([image(90, 90)])["input_ids"] == model.config.image_token_id).sum())

    bounded = add_bottleneck_tokens(bases["idefics3"], tmp_path / "bounded", max_pixels=28 * 28)
    assert tokens(bounded) == tokens(repo, max_pixels=55 * 55) == 4  # one tile is the whole
    assert tokens(repo) == tokens(repo, size={"longest_edge": 56}) == 4 * (2 * 2 + 1)
    for wrong, message in (
        ({"max_pixels": 27 * 28}, "Set max_pixels to 784"),
        ({"min_pixels": 1}, "Leave min_pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            add_bottleneck_tokens(bases["idefics3"], tmp_path / "refused", **wrong)
        with pytest.raises(ValueError, match=message):
            tokens(repo, **wrong)


def test_an_unsupported_backbone_is_refused_by_name():
    with pytest.raises(ValueError, match=r"SmolVLM is supported with the language models llama, got 'mistral'"):
        family_of(Idefics3Config(text_config={"model_type": "mistral"}))
    with pytest.raises(ValueError, match=r"support the backbones \[.*'qwen2_5_vl'.*got model_type 'qwen2'"):
        family_of(Qwen2Config())


def test_no_other_file_tells_families_apart():
    """A new family is a row here and a class in the remote code. vLLM's own classes are in its plugin."""
    classes = {name.removesuffix("ForConditionalGeneration") for name in STOCK_CLASSES.values()}
    # What its makers call a family may be in texts for people.
    names = "|".join([*STOCK_CLASSES, *classes - {family.name for family in FAMILIES.values()}])
    allowed = {"backbones", "modeling_btok", "vllm_models", "vllm_plugin"}
    for path in layout.modules(ROOT).values():
        found = re.findall(rf"\b(?:{names})\b|model_type\s*(?:==|!=|in)\s", path.read_text("utf-8"))
        assert path.stem in allowed or not found, (path.name, found)
