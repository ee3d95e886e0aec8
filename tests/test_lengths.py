"""Estimated tokens of inputs, and the ends of long texts."""

import io

import numpy as np
import pytest
from support import ROOT
from support.media import image, video
from transformers import AutoTokenizer

from btok_hf import BTokSentenceTransformer
from btok_hf.lengths import estimate_tokens, media_tokens, text_end


def test_estimated_tokens_of_media_are_those_of_the_processor(repo, tmp_path):
    processor = BTokSentenceTransformer(repo, device="cpu").processor
    image(300, 100).save(tmp_path / "wide.png")
    clip = video(6, 64)
    for item, size in (
        (image(10, 10), 1),
        (image(56, 84), 6),
        (str(tmp_path / "wide.png"), 16),
        ({"image": [image(56, 84), np.zeros((84, 56, 3))], "text": "nine letters"}, 16),
        ([{"role": "user", "content": [{"type": "image", "image": image(56, 84)}]}], 6),
        ({"video": clip}, 3 * (64 * 64 // 28**2)),
    ):
        assert estimate_tokens(item, processor) == size
    assert estimate_tokens("missing.png", processor) == estimate_tokens(image(1000, 1000), processor) == 16
    for wrong in (None, 3, "", {}):
        assert estimate_tokens(wrong, processor) == 0


def test_estimated_tokens_of_tiles_are_those_of_the_largest_image(repos):
    model, sizes = BTokSentenceTransformer(repos["idefics3"], device="cpu"), ((10, 10), (300, 300), (300, 100))
    rows = [model.preprocess([image(*size)])["input_ids"] for size in sizes]
    assert [int((row == model.config.image_token_id).sum()) for row in rows] == [20, 20, 12]
    assert [estimate_tokens(image(*size), model.processor) for size in sizes] == [20, 20, 20]


def test_estimated_tokens_of_tiles_are_those_of_the_processor(repos, tmp_path):
    """A tile of 56 x 56 pixels is 4 tokens, and so is a frame."""
    processor = BTokSentenceTransformer(repos["internvl"], device="cpu").processor
    for item, tiles in (
        (image(56, 56), 1),
        (image(56, 112), 3),
        ({"image": [np.zeros((56, 112, 3)), np.zeros((3, 112, 56))]}, 6),
        ({"video": video(6, 64)}, 6),
        ("missing.png", 5),
    ):
        assert estimate_tokens(item, processor) == 4 * tiles


def test_estimated_tokens_of_tiles_of_large_images_are_those_of_the_processor(repos):
    """But for the view of the whole, whose largest counts, and for rounding."""
    model = BTokSentenceTransformer(repos["lfm2_vl"], device="cpu")
    for size, tokens in (((14, 20), 2), ((56, 84), 6), ((90, 100), 6), ((120, 140), 22), ((300, 100), 18)):
        row = model.preprocess([image(*size)])["input_ids"]
        placeholders = int((row == model.config.image_token_id).sum())
        estimated = estimate_tokens(image(*size), model.processor)
        assert estimated == tokens and abs(estimated - placeholders) <= 3, (size, estimated, placeholders)
    assert estimate_tokens("missing.png", model.processor) == 22
    model.processor.image_processor.do_image_splitting = False
    assert estimate_tokens("missing.png", model.processor) == 6


def test_estimates_end_in_structures_without_end():
    circle: list = ["four words of text"]
    circle += [circle, circle]
    assert estimate_tokens(circle) > 0
    around: dict = {"text": "a"}
    around["image"] = around
    assert estimate_tokens([around]) >= 0


@pytest.mark.parametrize("prompt", [None, "Find the passage. " * 200])
def test_ends_of_long_texts_have_the_tokens_of_the_whole(loaded, prompt):
    """Of every family's tokenizer: words, numbers, punctuation, other scripts, a part without spaces."""
    model = loaded["wrapper"]
    words = "It's 1234 o'clock, naïve e\u0301tudes (see [3]).\n\n\tdef f(x):  return x**2 — Größe "
    words += "東京は、いい所。 नमस्ते 🙂 "
    texts = [words * 300, "x" * 5000 + " " + words * 20, words * 300 + "y" * 3000, words]
    model.max_seq_length, longest = 64, model.max_seq_length
    try:
        found = model.preprocess(texts, prompt=prompt)["input_ids"]
        messages = model.preprocess([[{"role": "user", "content": [{"type": "text", "text": texts[0]}]}]])["input_ids"]
        stock = loaded["stock"][0]
        stock.max_seq_length, before = 64, stock.max_seq_length
        try:
            expected = loaded["stock"].preprocess([{"text": text} for text in texts], prompt=prompt)["input_ids"]
        finally:
            stock.max_seq_length = before
    finally:
        model.max_seq_length = longest
    assert found.tolist() == expected.tolist()
    assert messages[0].tolist() == found[0].tolist()


def test_only_the_end_of_a_long_text_is_tokenized():
    asked = []

    def tokenize(text):
        asked.append(len(text))
        return text.split()

    text = "word " * 100_000 + "word"
    end = text_end(text, 100, tokenize)
    assert text.endswith(end) and 100 <= len(end.split()) < 400 and max(asked) < 2000
    assert text_end("short text", 100, tokenize) == "short text"
    whole = "x" * 10_000
    assert text_end(whole, 100, tokenize) == whole  # nowhere to cut


def test_tokens_of_media_leave_texts_out(model):
    """A text that looks like a file is none."""
    item, processor = {"image": [image(56, 84)] * 2, "text": "nine letters"}, model.processor
    assert media_tokens(item, processor) == 12
    content = [{"type": "text", "text": "a.png"}, {"type": "image", "image": image(56, 84)}]
    assert media_tokens([{"role": "user", "content": content}], processor) == 6


def test_a_text_is_cut_between_words_only():
    """Pairs of letters are counted from the start of a word, so a cut inside would shift them."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "benchmarks" / "unified" / "models" / "btok-small")

    def tokenize(text):
        return tokenizer.encode(text, add_special_tokens=False, verbose=False)

    text = "some words " * 500 + "l" * 1002
    end = text_end(text, 64, tokenize)
    assert len(end) < 3000
    assert tokenize(end)[-64:] == tokenize(text)[-64:] != tokenize(text[-512:])[-64:]


def test_estimated_tokens_of_files_in_memory(repo):
    processor, content = BTokSentenceTransformer(repo, device="cpu").processor, io.BytesIO()
    image(56, 84).save(content, "PNG")
    cell = {"bytes": content.getvalue(), "path": None}
    part = [{"role": "user", "content": [{"type": "image", "url": "data:image/png;base64,AAAA"}]}]
    for item in (cell, {"image": cell}, {"image": [content]}):
        assert estimate_tokens(item, processor) == 6
    assert estimate_tokens(part, processor) == estimate_tokens({"image": "words"}, processor) == 16  # the largest
    clip = estimate_tokens("missing.mp4", processor)
    assert clip == estimate_tokens({"video": {"bytes": b"no image", "path": None}}, processor) > 0
    assert estimate_tokens({"video": [cell] * 4}, processor) == 24  # frames
