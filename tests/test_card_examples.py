"""Examples of the card, measured on the evaluation data."""

import io
import json

import pytest
from PIL import Image as PILImage
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from support.cards import REPO_ID, assert_well_formed, blocks, execute, numbers
from support.media import image, video

from btok_hf import export_model
from btok_hf.hub_card.card import render_card
from btok_hf.hub_card.examples import measured_examples


def test_examples_of_every_kind(trained, tmp_path, monkeypatch):
    """Dicts, several images, files; videos, addresses and messages cannot be shown and are passed over."""
    monkeypatch.chdir(tmp_path)
    image(50, 50, 1).convert("RGBA").save("photo.png")
    queries = {
        "q1": {"video": video()},
        "q2": "https://example.org/cat.png",
        "q3": {"image": [PILImage.new("RGBA", (30, 30), "#f000"), image(40, 60)], "text": ["two", "x" * 500]},
        "q4": "with the same answer",
        "q5": "photo.png",
    }
    corpus = {
        "d1": [{"role": "user", "content": "m"}],
        "d2": "t " * 200,
        "d3": image(900, 20).convert("CMYK"),
        "d4": {"text": "name.png"},
        "d5": {"text": "only\ntext"},
    }
    relevant = {"q1": {"d2"}, "q2": {"d2"}, "q3": {"d2"}, "q4": {"d2"}, "q5": {"d3"}}
    files = {}
    evaluator = InformationRetrievalEvaluator(queries, corpus, relevant)
    examples = measured_examples(trained.trainer.model, evaluator, files)
    paths = [f"assets/example_{n}.png" for n in (1, 2, 3, 4)]
    assert examples["queries"] == [(paths[:2], "two " + "x" * 116), ([paths[2]], None)]
    assert examples["documents"] == [([], ("t " * 60)[:120]), ([paths[3]], None), ([], "only\ntext")]
    assert list(files) == paths and examples["similarities"]["source"] == "evaluation"
    assert PILImage.open(io.BytesIO(files[paths[3]])).size == (900, 20)  # reduced, it would be thinner than a patch
    assert PILImage.open(io.BytesIO(files[paths[0]])).getpixel((0, 0)) == (255, 255, 255)  # transparent, on white
    model = trained.trainer.model
    card = render_card(model.config, model.processor, model.prompts, repo_id=REPO_ID, examples=examples)
    assert_well_formed(card)
    export_model(model, tmp_path / "export", files={**files, "README.md": card})
    for block in blocks(card, "python")[:2]:
        printed, expected, _ = execute(block, (f'snapshot_download("{REPO_ID}")', repr(str(tmp_path / "export"))))
        assert numbers(printed) == pytest.approx(numbers(expected), abs=2e-4)

    evaluator = InformationRetrievalEvaluator({"q1": {"video": video()}}, corpus, {"q1": {"d2"}})
    examples = measured_examples(model, evaluator, {})
    assert examples["similarities"]["source"] is None and examples["queries"][0] == ([], "a cat with hearts for eyes")
    assert json.dumps(examples)
