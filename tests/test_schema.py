"""What a request may hold, and the inputs that are read from it."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from support.media import image
from support.serving import message, png

from btok_hf.inputs import ImageLimits
from btok_hf.serving.schema import EmbeddingRequest

LIMITS = ImageLimits(28 * 28 * 16, 14)


def rows(most_pixels=10**6, **body):
    return EmbeddingRequest.model_validate(body).rows(LIMITS, most_pixels)


def test_texts_are_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image(28, 28).save("photo.png")
    assert rows(input=["photo.png", "https://example.org/a.png"]) == [
        {"text": "photo.png"},
        {"text": "https://example.org/a.png"},
    ]


def test_a_message_is_one_row_of_all_its_parts():
    ((row),) = rows(messages=[message("a", image(28, 56), "b", [image(28, 28), image(28, 28, 1)])])
    assert row["text"] == ["a", "b"] and np.array_equal(row["image"][0], image(28, 56))
    (video,) = row["video"]
    assert np.array_equal(video["array"], [image(28, 28), image(28, 28, 1)]) and video["video_metadata"]["fps"] == 2


def test_instructions_are_system_messages():
    body = {"messages": [{"role": "system", "content": "Find it."}, message("a")]}
    assert EmbeddingRequest.model_validate(body).instruction() == "Find it."
    assert EmbeddingRequest.model_validate({"input": "a"}).instruction() is None


def test_pixels_are_bounded_before_they_are_decoded():
    header = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(header, "png")
    url = "data:image/png;base64," + base64.b64encode(header.getvalue()[:60]).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    with pytest.raises(ValueError, match="more than 1000000 pixels"):
        rows(messages=[{"role": "user", "content": [part]}])
    with pytest.raises(ValueError, match="a video has more than 1500 pixels"):
        rows(1500, messages=[message([image(28, 28), image(28, 28)])])
    assert rows(1600, messages=[message([image(28, 28), image(28, 28)])])


@pytest.mark.parametrize("kind", ["EPS", "PPM", "PCX"])
def test_formats_that_nobody_sends_are_refused(kind):
    file = io.BytesIO()
    image(28, 28).save(file, kind)
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    with pytest.raises(ValueError, match="not one of PNG"):
        rows(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])


@pytest.mark.parametrize(
    "body",
    [
        {"input": {"text": "a"}},
        {"input": "a", "dimensions": "64"},
        {"input": "a", "dimensions": True},
        {"input": "a", "add_generation_prompt": True},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "data:"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": png(image(28, 28))}]}]},
    ],
)
def test_other_types_are_refused(body):
    with pytest.raises(ValidationError):
        EmbeddingRequest.model_validate(body)
