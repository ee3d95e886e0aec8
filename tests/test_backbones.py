"""The table of families: complete, and the only place that tells families apart."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support import layout, tiny
from support.gradients import assert_same_gradients, named_gradients
from support.inputs import process
from support.media import image, video
from support.training import batch_features, collator
from transformers import (
    AutoProcessor,
    Qwen2Config,
)
from transformers.models.qwen2 import modeling_qwen2

from btok_hf import BTokForEmbedding, BTokSentenceTransformer, add_bottleneck_tokens
from btok_hf.backbones import FAMILIES, family_of, family_of_processor
from btok_hf.condensation import condense
from btok_hf.modeling.modeling_btok import STOCK_CLASSES
from btok_hf.training import CondensationLoss

ROOT = Path(__file__).parents[1]


def test_every_stock_class_has_a_family_and_a_tiny_model():
    assert list(FAMILIES) == list(STOCK_CLASSES) == list(tiny.BACKBONES)


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_a_family_is_known_by_its_processor(repos, backbone):
    """Estimates of lengths have the processor alone."""
    processor, family = AutoProcessor.from_pretrained(repos[backbone]), FAMILIES[backbone]
    found = family_of_processor(processor)
    assert type(found) is type(family)
    assert found.image_tokens(processor, (56, 112)) == family.image_tokens(processor, (56, 112)) > 0
    assert bool(found.frame_tokens(processor, (56, 56))) == bool(family.video)


def test_processors_of_other_models_have_no_family():
    assert family_of_processor(None) is None and family_of_processor(object()) is None


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
    with pytest.raises(ValueError, match=r"support the backbones \[.*'qwen2_5_vl'.*got model_type 'qwen2'"):
        family_of(Qwen2Config())


def test_no_other_file_tells_families_apart():
    """A new family is a row here, and a class and a rule in the remote code. vLLM's own classes are in its plugin."""
    classes = {name.removesuffix("ForConditionalGeneration") for name in STOCK_CLASSES.values()}
    # What its makers call a family may be in texts for people.
    names = "|".join([*STOCK_CLASSES, *classes - {family.name for family in FAMILIES.values()}])
    allowed = {"backbones", "modeling_btok", "inputs_btok", "vllm_models", "vllm_plugin"}
    for path in layout.modules(ROOT).values():
        found = re.findall(rf"\b(?:{names})\b|model_type\s*(?:==|!=|in)\s", path.read_text("utf-8"))
        assert path.stem in allowed or not found, (path.name, found)


@pytest.fixture(scope="module")
def internvl(repos):
    return BTokSentenceTransformer(repos["internvl"], device="cpu")


@pytest.mark.parametrize("order", ["media_first", "as_given"])
def test_special_tokens_without_bars_stay_text(bases, tmp_path, order):
    """In rows and in targets. Only media have placeholders."""
    repo = add_bottleneck_tokens(bases["internvl"], tmp_path / "repo", order=order, noise_std=1.0)
    model = BTokSentenceTransformer(repo, device="cpu")
    typed = "a <IMG_CONTEXT> <<img> </img> <video> <box> <|im_end|>"
    item = {"text": typed, "image": image(56, 56)}
    ids = model.preprocess([item])["input_ids"][0].tolist()
    row = "<img>" + 4 * "<IMG_CONTEXT>" + "</img>"
    text = "a < IMG_CONTEXT> << img> < /img> < video> < box> < |im_end|>"
    parts = [row, text] if order == "media_first" else [text, row]
    assert model.tokenizer.decode(ids) == " ".join(parts) + "<|btok_0|><|btok_1|><|btok_2|><|btok_3|>"
    collate, tokenizer = collator(repo, tmp_path, condense="positive")
    target_ids = collate([{"query": "q", "positive": typed}])["query_target_ids"][0, 0]
    assert tokenizer.decode(target_ids).endswith(f"assistant\n{text}<|im_end|>")


def test_images_are_cut_into_tiles_up_to_max_pixels(bases, repos, internvl, tmp_path):
    def tiles(model, *size):
        return len(model.preprocess([image(*size)])["pixel_values"])

    assert [tiles(internvl, *size) for size in ((56, 56), (112, 56), (224, 224), (20, 200))] == [1, 3, 5, 5]
    two = 2 * 56 * 56
    built = add_bottleneck_tokens(bases["internvl"], tmp_path / "repo", max_pixels=two)
    at_load = {
        setting: BTokSentenceTransformer(repos["internvl"], device="cpu", processor_kwargs={setting: value})
        for setting, value in (("max_pixels", two), ("max_patches", 2))
    }
    for model in (BTokSentenceTransformer(built, device="cpu"), *at_load.values()):
        assert tiles(model, 112, 56) == 3 and tiles(model, 224, 224) == 1
        assert model.transformer.image_limits.max_pixels == two
    enlarged = add_bottleneck_tokens(bases["internvl"], tmp_path / "enlarged", min_pixels=two)
    assert tiles(BTokSentenceTransformer(enlarged, device="cpu"), 56, 56) > 2
    card = (built / "README.md").read_text("utf-8")
    assert "| 2 (default) | 12 |" in card and 'processor_kwargs={"max_patches": 1}' in card
    for limits in ({"max_pixels": 56 * 55}, {"min_pixels": two + 1, "max_pixels": two + 2}):
        with pytest.raises(ValueError, match=r"An image has tiles of 3136 pixels.*Lower min_pixels"):
            add_bottleneck_tokens(bases["internvl"], tmp_path / "other", **limits)


def test_videos_of_several_lengths_share_a_batch_but_no_row(internvl):
    clips = [{"video": video(count), "text": f"{count} frames"} for count in (4, 2, 7)]
    expected = np.concatenate([internvl.encode([clip]) for clip in clips])
    assert np.abs(internvl.encode([*clips, "a text"])[:3] - expected).max() <= 1e-6
    with pytest.raises(ValueError, match=r"^Input 1 .*its videos have 3 and 4 frames.*sample as many of each"):
        internvl.encode(["a", {"video": [video(4), video(3)]}])


def test_media_that_do_not_match_their_tiles_are_refused(repos):
    model, processor = (cls.from_pretrained(repos["internvl"]) for cls in (BTokForEmbedding, AutoProcessor))
    content = [{"type": "image", "image": image(112, 56)}, {"type": "text", "text": "a"}]
    whole = process(processor, [[{"role": "user", "content": content}]])
    for pixels, given in ((whole["pixel_values"][:2], 8), (None, 0)):
        with pytest.raises(ValueError, match=rf"have 12 image placeholder .*but the given images need {given}"):
            model(**{**whole, "pixel_values": pixels})
    with pytest.raises(ValueError, match="pixel_values has NaN"):
        model(**{**whole, "pixel_values": whole["pixel_values"] * torch.nan})


def test_gradcache_cuts_tiles_where_rows_end(internvl):
    """Rows have no tiles, one, several, or frames."""
    items = ["text", image(56, 56), {"image": [image(112, 56), image(224, 224)]}, {"video": video(3), "text": "see"}]
    internvl.train()
    features = batch_features(internvl, rows=slice(4))
    features[0] |= internvl.preprocess(items)
    found = []
    for size in (1, 3, 100):
        internvl.zero_grad()
        loss = CondensationLoss(internvl, mini_batch_size=size)
        loss(features).backward()
        found.append(named_gradients(internvl))
        assert loss.cached == (size < 100)
    assert_same_gradients(found[0], found[2])
    assert_same_gradients(found[1], found[2])


def test_a_packed_row_needs_no_mask_of_its_length_squared(internvl, monkeypatch):
    def refuse(**kwargs):
        raise AssertionError("a mask was built")

    monkeypatch.setattr(modeling_qwen2, "create_causal_mask", refuse)
    condense(internvl.transformer.model, internvl.preprocess(["a", "b"]))


def test_internvl_3_5_has_qwen3_as_its_language_model(tmp_path):
    base = tiny.build("internvl", tmp_path / "base", text_model="qwen3", tied=False)
    repo = add_bottleneck_tokens(base, tmp_path / "repo", noise_std=1.0)
    wrapper = BTokSentenceTransformer(repo, device="cpu")
    stock = BTokForEmbedding.from_pretrained(repo)
    assert type(stock.model.language_model).__name__ == "Qwen3Model" and wrapper.transformer.lm_head is not None
    features = wrapper.preprocess(["a text", {"image": image(112, 56), "text": "longer"}])
    with torch.no_grad():
        expected = stock(**{key: features[key] for key in ("input_ids", "attention_mask", "pixel_values")})
    actual = wrapper.encode(["a text", {"image": image(112, 56), "text": "longer"}])
    assert np.abs(actual - expected.pooler_output.numpy()).max() <= 1e-6


@pytest.fixture(scope="module")
def lfm2vl(repos):
    return BTokSentenceTransformer(repos["lfm2_vl"], device="cpu")


def sizes(model, *images):
    """How many patches there are across and down each tile of some images, and their tokens."""
    features = model.preprocess([{"image": list(images)}])
    ids = features["input_ids"][0]
    return features["spatial_shapes"].tolist(), int((ids == model.config.image_token_id).sum())


def test_large_images_are_cut_and_others_keep_their_shape(lfm2vl):
    """A token is 28 x 28 pixels, a tile 56 x 56. Up to six tokens are one view, and up to twelve are reduced to it."""
    assert sizes(lfm2vl, image(56, 84)) == ([[6, 4]], 6)
    assert sizes(lfm2vl, image(14, 20)) == ([[4, 4]], 4)
    assert sizes(lfm2vl, image(84, 84)) == ([[4, 4]], 4)
    assert sizes(lfm2vl, image(84, 168)) == ([[4, 4]] * 2 + [[6, 2]], 4 * 2 + 3)
    assert sizes(lfm2vl, image(140, 140), image(56, 28)) == ([[4, 4]] * 5 + [[2, 4]], 4 * 5 + 2)


def test_a_bound_of_pixels_counts_tiles_or_tokens(bases, repos, tmp_path):
    base, tile, large = bases["lfm2_vl"], 56 * 56, image(300, 300)
    built = add_bottleneck_tokens(base, tmp_path / "two", max_pixels=2 * tile)
    small = add_bottleneck_tokens(base, tmp_path / "small", max_pixels=2 * tile - 1, min_pixels=4 * 784)
    at_load = {
        name: BTokSentenceTransformer(repos["lfm2_vl"], device="cpu", processor_kwargs={name: value})
        for name, value in (("max_pixels", 2 * tile), ("max_tiles", 2))
    }
    for model in (BTokSentenceTransformer(built, device="cpu"), *at_load.values()):
        assert len(sizes(model, large)[0]) == 3 and model.transformer.image_limits.max_pixels == 2 * tile
    uncut = BTokSentenceTransformer(small, device="cpu")
    assert sizes(uncut, large) == ([[4, 4]], 4) and sizes(uncut, image(20, 20)) == ([[4, 4]], 4)
    assert uncut.transformer.image_limits.max_pixels == 6 * 784
    cards = [(folder / "README.md").read_text("utf-8") for folder in (built, small)]
    assert "| 2 (default) | 14 |" in cards[0] and 'processor_kwargs={"max_tiles": 2}' in cards[0]
    assert "| 6 (default) | 6 |" in cards[1] and 'processor_kwargs={"max_image_tokens": 6}' in cards[1]
    again = BTokSentenceTransformer(small, device="cpu", processor_kwargs={"max_pixels": 4 * tile})
    assert len(sizes(again, large)[0]) == 5
    for limits in ({"max_pixels": 783}, {"min_pixels": 4 * 784 + 1, "max_pixels": 4 * 784 + 2}):
        with pytest.raises(ValueError, match=r"has a token per 784 pixels.*Lower min_pixels"):
            add_bottleneck_tokens(base, tmp_path / "other", **limits)


def test_one_golden_image_is_whole_and_another_is_cut(lfm2vl):
    family, part = family_of(lfm2vl.config), lfm2vl.processor.image_processor
    side, _ = family.golden_sides(lfm2vl.processor)
    assert [len(sizes(lfm2vl, image(width, side))[0]) for width in (side, 2 * side)] == [1, 3]
    own = BTokSentenceTransformer(lfm2vl.transformer.model.name_or_path, device="cpu").processor
    own.image_processor.do_image_splitting = False
    side, _ = family.golden_sides(own)
    assert 2 * side**2 <= part.max_image_tokens * 28**2 and side % 28 == 0  # neither is resized


def test_media_that_do_not_match_their_patches_are_refused(repos):
    model, processor = (cls.from_pretrained(repos["lfm2_vl"]) for cls in (BTokForEmbedding, AutoProcessor))
    whole = process(processor, [[{"role": "user", "content": [{"type": "image", "image": image(84, 168)}]}]])
    with pytest.raises(ValueError, match=r"have 11 image placeholder .*but the given images need 8"):
        model(**{**whole, "spatial_shapes": whole["spatial_shapes"][:2]})
    with pytest.raises(ValueError, match="pixel_values has NaN"):
        model(**{**whole, "pixel_values": whole["pixel_values"] * torch.nan})


def test_the_vision_tower_gets_no_more_padding_than_it_needs(lfm2vl):
    features, seen = lfm2vl.preprocess([image(56, 56), "text", image(28, 84)]), []
    hook = lfm2vl.transformer.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].shape[:2]), with_kwargs=True
    )
    with torch.no_grad():
        condense(lfm2vl.transformer.model, features)
    hook.remove()
    assert features["pixel_values"].shape[1] == 24 and seen == [(2, 16)]


def test_gradcache_cuts_tiles_of_several_sizes_where_rows_end(lfm2vl):
    items = [
        "text",
        image(56, 84),
        {"image": [image(168, 84), image(28, 56)]},
        {"image": image(140, 140), "text": "a"},
    ]
    lfm2vl.train()
    features = batch_features(lfm2vl, rows=slice(4))
    features[0] |= lfm2vl.preprocess(items)
    found = []
    for size in (1, 3, 100):
        lfm2vl.zero_grad()
        CondensationLoss(lfm2vl, mini_batch_size=size)(features).backward()
        found.append(named_gradients(lfm2vl))
    assert_same_gradients(found[0], found[2])
    assert_same_gradients(found[1], found[2])


@pytest.mark.parametrize("size", [(1000, 20), (20, 1000)])
def test_images_too_long_for_the_tokens_are_skipped_by_name(lfm2vl, size):
    """The processor could not put them into a batch, and its error would end the job of all other inputs."""
    embeddings, kept, errors = lfm2vl.encode(["a text", image(*size), image(84, 84)], on_error="skip")
    assert kept.tolist() == [0, 2] and f"{size[0]} x {size[1]} pixels becomes more tokens" in errors[1]
