"""The Sentence-Transformers module: how long rows are cut, what is never cut, and that template and config agree."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from support import tiny
from support.inputs import TOLERANCE
from support.media import image
from transformers import AutoModel, AutoProcessor

from btok_hf import BTokSentenceTransformer


def test_long_text_is_cut_and_keeps_its_bottleneck_tokens(repo):
    wrapper, stock = (cls(repo, device="cpu") for cls in (BTokSentenceTransformer, SentenceTransformer))
    long = "beginning " * 50 + "the end of it"
    for model in (wrapper, stock):
        model.max_seq_length = 20
        ids = model.preprocess([long, "short"])["input_ids"]
        assert ids.shape[1] == 20 and ids[0, -4:].tolist() == [264, 265, 266, 267]
    embedding = wrapper.encode([long])
    np.testing.assert_allclose(stock.encode([long]), embedding, atol=TOLERANCE)
    np.testing.assert_allclose(wrapper.encode([long[-16:]]), embedding, atol=TOLERANCE)
    assert BTokSentenceTransformer(repo, device="cpu", max_seq_length=20).max_seq_length == 20


def test_max_pixels_is_the_memory_knob(repo):
    item = {"image": image(400, 400), "text": "large"}
    for loader in (BTokSentenceTransformer, SentenceTransformer):
        lengths = [
            loader(repo, device="cpu", processor_kwargs=kwargs).preprocess([item])["input_ids"].shape[1]
            for kwargs in ({}, {"max_pixels": 28 * 28 * 4})
        ]
        assert lengths[1] == lengths[0] - 16 + 4


def test_media_are_never_cut(repo):
    wrapper, stock = (cls(repo, device="cpu") for cls in (BTokSentenceTransformer, SentenceTransformer))
    item = {"image": image(100, 100), "text": "a rather long question about this picture"}
    wrapper.max_seq_length = stock.max_seq_length = 20
    with pytest.raises(ValueError, match=r"max_seq_length=20.*max_pixels"):
        wrapper.encode([item])
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):  # stock words, but never a wrong vector
        stock.encode([item])
    wrapper.tokenizer.model_max_length = 3  # past the check of max_seq_length
    with pytest.raises(ValueError, match="4 Bottleneck Tokens: max_seq_length=3"):
        wrapper.encode(["text"])


def test_what_auto_model_saved_alone_is_refused(repo, tmp_path):
    """Stock Sentence-Transformers averages all of its tokens."""
    AutoModel.from_pretrained(repo, trust_remote_code=True).save_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(repo).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"sentence_bert_config\.json is missing.*copy modules\.json"):
        BTokSentenceTransformer(tmp_path / "saved", device="cpu")


def test_changed_template_is_refused(repo, tmp_path):
    shutil.copytree(repo, tmp_path / "repo")
    template = Path(repo, "chat_template.jinja").read_text().replace("<|btok_3|>", "")
    Path(tmp_path, "repo", "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="disagree on K"):
        BTokSentenceTransformer(tmp_path / "repo", device="cpu")


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_one_token_too_many_is_refused_with_media(repos, backbone):
    """Truncation would remove only the token before the image's placeholders."""
    model = BTokSentenceTransformer(repos[backbone], device="cpu")
    item = {"image": image(64, 64), "text": "a b"}
    length = model.preprocess([item])["input_ids"].shape[1]
    model.max_seq_length = length
    model.preprocess([item])
    model.max_seq_length = length - 1
    with pytest.raises(ValueError, match="media are never truncated"):
        model.preprocess([item])


def test_a_compiled_model_embeds_the_same(repo):
    """`compile` is that of `torch.nn.Module`. What packs rows works on NumPy arrays and is not traced."""
    model = BTokSentenceTransformer(repo, device="cpu")
    items = ["a text", image(56, 84), {"image": image(84, 56), "text": "both"}]
    expected = model.encode(items)
    model.compile(backend="eager")
    np.testing.assert_allclose(model.encode(items), expected, atol=TOLERANCE)
    np.testing.assert_allclose(model.encode(items[:1]), expected[:1], atol=TOLERANCE)
