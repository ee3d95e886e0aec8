"""Inputs: their sizes in tokens, their texts and hashes, and those that are refused."""

import numpy as np
import pytest
from PIL import Image as PILImage
from sentence_transformers import SentenceTransformer
from support.inputs import TOLERANCE
from support.media import image, video

from btok_hf import BTokSentenceTransformer
from btok_hf.inputs import content_hash, estimate_tokens, text_of


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


def test_bad_inputs_are_refused_and_shown(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG not really")
    nan = np.full((3, 60, 60), np.nan, np.float32)
    cases = [
        ({"image": str(tmp_path / "missing.png")}, FileNotFoundError, "missing.png' does not exist"),
        (str(tmp_path / "missing.png"), FileNotFoundError, "missing.png' does not exist"),
        ({"video": str(tmp_path / "missing.mp4")}, FileNotFoundError, "missing.mp4' does not exist"),
        ({"image": str(broken)}, ValueError, "cannot be decoded"),
        (str(broken), ValueError, "cannot be decoded"),
        (image(10, 60), ValueError, "10 x 60 pixels is smaller than one patch of 14"),
        ({"image": [image(60, 60), image(60, 5)], "text": "x"}, ValueError, "smaller than one patch"),
        ({"image": nan}, ValueError, "NaN"),
        ({"picture": image(60, 60)}, ValueError, r"unknown keys \['picture'\]"),
        ({"image": None, "text": "x"}, ValueError, "'image' is None"),
        ({"text": 3}, ValueError, "'text' must be a string"),
        ({}, ValueError, "unknown keys"),
    ]
    for item, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            model.encode(["fine", item])
        assert "Input " in str(caught.value)
    for empty in ("", "  ", {"text": ""}):
        for loader in (model, SentenceTransformer(repo, device="cpu")):
            with pytest.raises(Exception, match="An input is empty"):
                loader.encode(["fine", empty])
    broken_clip = tmp_path / "broken.mp4"
    broken_clip.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be decoded"):
        model.encode([{"video": str(broken_clip)}])


def test_a_sentence_that_ends_like_a_file_is_a_sentence(repo):
    model = BTokSentenceTransformer(repo, device="cpu")
    assert model.encode(["how do I open photo.png"]).shape == (1, 64)
    stock = SentenceTransformer(repo, device="cpu")
    np.testing.assert_allclose(model.encode("open a.png please"), stock.encode("open a.png please"), atol=TOLERANCE)


def test_pictures_that_differ_by_their_palette_are_not_copies():
    """Two images in palette mode can have equal bytes and different colours."""
    red = PILImage.new("P", (60, 40), 1)
    red.putpalette([0, 0, 0, 255, 0, 0])
    blue = red.copy()
    blue.putpalette([0, 0, 0, 0, 0, 255])
    assert red.tobytes() == blue.tobytes()
    assert content_hash(red) != content_hash(blue) and content_hash(red) == content_hash(red.copy())


def test_text_of_every_kind_of_side():
    assert text_of("plain ") == "plain"
    assert text_of({"image": 1, "text": ["a", "b"]}) == "a b"
    assert text_of({"role": "user", "content": [{"type": "image", "image": 1}, {"type": "text", "text": "m"}]}) == "m"
    for nothing in (image(30, 30), {"image": 1}, "", "photo.png", None):
        assert text_of(nothing) is None
