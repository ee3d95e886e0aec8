"""Rows of the remote code: the tokens that they get, and what is refused because it would give another embedding."""

import pytest
import torch
from support import tiny
from support.inputs import process, rows, text_inputs
from transformers import AutoModel, AutoProcessor

from btok_hf import BTokForEmbedding, add_bottleneck_tokens
from btok_hf.condensation import condense


@pytest.fixture(params=tiny.BACKBONES)
def loaded(request, repos):
    """A model of each family, its processor, and the name of the family."""
    repo = repos[request.param]
    return BTokForEmbedding.from_pretrained(repo), AutoProcessor.from_pretrained(repo), request.param


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
@pytest.mark.parametrize("side", ["left", "right", "mixed"])
def test_bottleneck_tokens_are_appended_where_absent(repos, backbone, side):
    """Rows with and without the tokens, padded on the left, the right, or both, embed the same."""
    processor = AutoProcessor.from_pretrained(repos[backbone])
    model = BTokForEmbedding.from_pretrained(repos[backbone])
    whole = process(processor, rows("image"), "right" if side == "mixed" else side)
    expected = model(**whole).pooler_output
    ids, mask, types = whole["input_ids"], whole["attention_mask"].clone(), whole.get("mm_token_type_ids")
    is_token = torch.isin(ids, torch.tensor(model.config.btok_token_ids))
    is_token[1] = False  # the second row keeps its tokens
    mask[is_token] = 0
    inputs = {**whole, "attention_mask": mask}
    if side == "mixed":  # shift every other row to the right edge
        for tensor in (ids, mask) if types is None else (ids, mask, types):
            for row in (0, 2):
                shift = int((mask[row] == 0).sum()) if tensor is not mask else None
                if shift:
                    tensor[row] = tensor[row].roll(shift)
        for row in (0, 2):
            mask[row] = mask[row].roll(int((mask[row] == 0).sum()))
        inputs.update(input_ids=ids, attention_mask=mask)  # the types were changed in place
    torch.testing.assert_close(model(**inputs).pooler_output, expected, atol=2e-6, rtol=0)


def test_bad_rows_are_refused(repo):
    model = BTokForEmbedding.from_pretrained(repo)
    processor = AutoProcessor.from_pretrained(repo)
    raw = processor(text=["typed <|btok_0|> literally"], return_tensors="pt")
    with pytest.raises(ValueError, match=r"Row 0 has 1 Bottleneck Token\(s\) but must have 4, all at its end"):
        model(**raw)
    moved = text_inputs(repo, ["hello"])["input_ids"].roll(1, 1)
    with pytest.raises(ValueError, match=r"has 4 Bottleneck Token\(s\), not all at its end, but must have 4"):
        model(input_ids=moved)
    with pytest.raises(ValueError, match=r"have 1 image placeholder token\(s\), but the given images need 0"):
        model(**processor.tokenizer("<|vision_start|><|image_pad|><|vision_end|>", return_tensors="pt"))
    with pytest.raises(ValueError, match="empty"):
        model(input_ids=torch.tensor([[5, 6]]), attention_mask=torch.tensor([[0, 0]]))
    with pytest.raises(ValueError, match="Pass input_ids instead of inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 2, 64))
    inputs = process(processor, rows("image"))
    inputs["pixel_values"][3, 3] = float("nan")
    with pytest.raises(ValueError, match="pixel_values has NaN"):
        model(**inputs)
    inputs = process(processor, rows("image"))
    inputs["pixel_values"], inputs["image_grid_thw"] = inputs["pixel_values"][:16], inputs["image_grid_thw"][:1]
    with pytest.raises(ValueError, match="but the given images need"):  # more placeholders than media
        model(**inputs)


def test_a_suffix_is_never_left_out(bases, tmp_path):
    repo = add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "repo", suffix="in one word:")
    model = AutoModel.from_pretrained(repo, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repo)
    with pytest.raises(ValueError, match=r"ends without 'in one word:'.*apply_chat_template"):
        model(**processor.tokenizer(["hello"], return_tensors="pt"))
    row = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert model(**process(processor, [row])).pooler_output.shape == (1, 64)


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_the_turns_of_a_chat_are_refused(repos, backbone):
    """Bottleneck Tokens after `assistant` would give another vector, and no other loader does it."""
    processor, model = (
        AutoProcessor.from_pretrained(repos[backbone]),
        BTokForEmbedding.from_pretrained(repos[backbone]),
    )
    chat = [[{"role": "user", "content": [{"type": "text", "text": "hello"}]}]]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    turns = processor.apply_chat_template(chat, add_generation_prompt=True, **options)
    with pytest.raises(ValueError, match="Leave add_generation_prompt out"):
        model(**turns)
    with pytest.raises(ValueError, match="Leave add_generation_prompt out"):
        condense(model.model, turns)
    row = model(**processor.apply_chat_template(chat, **options)).pooler_output
    alone = processor.tokenizer(["hello"], add_special_tokens=False, return_tensors="pt")  # LFM2 would begin a text
    torch.testing.assert_close(model(**alone).pooler_output, row)


def test_media_are_given_whole(loaded):
    """A grid without its pixels would be placeholders that nothing is put in."""
    model, processor, backbone = loaded
    for kind in ("image", "video") if backbone in tiny.WITH_VIDEO else ("image",):
        inputs = process(processor, rows(kind))
        if kind == "video" and "pixel_values_videos" in inputs:  # of these rows one has a picture
            kinds = ["pixel_values_videos", "video_grid_thw"]
        else:
            names = ("pixel_values", "image_grid_thw", "spatial_shapes", "pixel_attention_mask")
            kinds = [key for key in inputs if key in names]
        for name in kinds:
            message = rf"given without {name}\. Pass everything"
            if backbone == "internvl":  # pixels alone say how many placeholders there are
                message = r"the given \w+s need 0\. Process"
            rest = {key: value for key, value in inputs.items() if key != name}
            for given in (rest, {**rest, name: None}):
                with pytest.raises(ValueError, match=message):
                    model(**given)
                with pytest.raises(ValueError, match=message):
                    condense(model.model, given)


@pytest.mark.parametrize("backbone", [name for name in tiny.BACKBONES if name.startswith("qwen")])
def test_positions_of_media_need_their_types(repos, backbone):
    model, processor = (
        BTokForEmbedding.from_pretrained(repos[backbone]),
        AutoProcessor.from_pretrained(repos[backbone]),
    )
    for kind, grids in (("image", "image_grid_thw"), ("video", "image_grid_thw and video_grid_thw")):
        inputs = process(processor, rows(kind))
        needed = {"mm_token_type_ids": grids, "second_per_grid_ts": "video_grid_thw"}
        needed = {name: given for name, given in needed.items() if name in inputs}
        assert ("second_per_grid_ts" in needed) == (backbone == "qwen2_5_vl" and kind == "video")
        for name, given in needed.items():
            with pytest.raises(ValueError, match=rf"{given} was given without {name}\. Pass everything"):
                model(**{key: value for key, value in inputs.items() if key != name})


def test_shapes_that_do_not_fit_are_named(repo):
    """A mask of one row for two gave one embedding."""
    model = BTokForEmbedding.from_pretrained(repo)
    ids = text_inputs(repo, ["hello"])["input_ids"].repeat(2, 1)
    for mask in (
        torch.ones(1, ids.shape[1]),
        torch.ones(2, ids.shape[1] - 1),
        torch.ones(2, 1, *ids.shape),
        [[1], [1]],
    ):
        with pytest.raises(ValueError, match=r"attention_mask must have the shape of input_ids, \(2, \d+\), got \("):
            model(input_ids=ids, attention_mask=mask)
    with pytest.raises(ValueError, match="mm_token_type_ids must have the shape of input_ids"):
        model(input_ids=ids, mm_token_type_ids=torch.zeros(1, ids.shape[1]))
    for wrong, got in (
        (ids[0], r"shape \(\d+,\)"),
        (ids[:0], r"shape \(0, \d+\)"),
        (ids[:, :0], r"shape \(2, 0\)"),
        (ids.tolist(), "list"),
    ):
        with pytest.raises(ValueError, match=rf"tensor of shape \(batch, length\), neither of them 0, got {got}"):
            model(input_ids=wrong)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("whole", [True, False])
def test_padding_without_a_mask_is_refused(loaded, side, whole):
    model, processor, _ = loaded
    if whole:
        inputs = process(processor, rows("text"), side)
    else:
        inputs = processor.tokenizer(
            ["hello", "a longer one"], padding=True, padding_side=side, add_special_tokens=False, return_tensors="pt"
        )
    assert not inputs["attention_mask"].all()
    text = model.config.get_text_config()
    for pad in (text.pad_token_id, None):  # published configurations of Qwen2-VL have none
        text.pad_token_id = pad
        with pytest.raises(ValueError, match=r"ends with the padding token \d+, but attention_mask is missing"):
            model(input_ids=inputs["input_ids"])
    model(input_ids=inputs["input_ids"][1:2], attention_mask=inputs["attention_mask"][1:2])


def test_whole_rows_only(repo):
    """With keys and values of earlier tokens, or positions of rows that change, vectors would be others."""
    model = BTokForEmbedding.from_pretrained(repo)
    ids = text_inputs(repo, ["hello"])["input_ids"]
    cache = model.model(input_ids=ids[:, :3], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="Pass them without past_key_values"):
        model(input_ids=ids[:, 3:], past_key_values=cache)
    positions = torch.arange(ids.shape[1])[None]
    given = model(input_ids=ids, position_ids=positions).pooler_output
    torch.testing.assert_close(given, model(input_ids=ids).pooler_output)
    with pytest.raises(ValueError, match=r"no position_ids\. Leave those out"):
        model(input_ids=ids[:, :-4], position_ids=positions[:, :-4])


def test_texts_as_the_tokenizer_alone_begins_them_are_refused(repos):
    """LFM2's begins them with a token that its processor leaves out."""
    model, processor = (
        BTokForEmbedding.from_pretrained(repos["lfm2_vl"]),
        AutoProcessor.from_pretrained(repos["lfm2_vl"]),
    )
    with pytest.raises(ValueError, match="Use the processor, which does not"):
        model(**processor.tokenizer(["hello"], return_tensors="pt"))
    row = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    whole = process(processor, [row])
    with pytest.raises(ValueError, match="Use the processor, which does not"):
        model(**processor.tokenizer(processor.apply_chat_template(row, tokenize=False), return_tensors="pt"))
    alone = processor(text=["hello"], return_tensors="pt")
    torch.testing.assert_close(model(**alone).pooler_output, model(**whole).pooler_output)
