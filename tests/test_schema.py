"""What a request may hold, and the inputs that are read from it."""

import numpy as np
import pytest
from pydantic import ValidationError
from support.media import image
from support.serving import message, png

from btok_hf.inputs import ImageLimits
from btok_hf.serving.origins import Origins
from btok_hf.serving.schema import EmbeddingRequest

LIMITS = ImageLimits(28 * 28 * 16, 14)


def rows(**body):
    return EmbeddingRequest.model_validate(body).rows(LIMITS, Origins(10**6, 10**6, 60), lambda pixels: None)


def test_texts_are_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image(28, 28).save("photo.png")
    assert rows(input=["photo.png", "https://example.org/a.png"]) == [
        {"text": "photo.png"},
        {"text": "https://example.org/a.png"},
    ]


def test_a_message_is_one_row_of_all_its_parts():
    """In the order of the request, which counts for models made with `order="as_given"`."""
    (((row),),) = rows(messages=[message("a", [image(28, 28), image(28, 28, 1)], image(28, 56), "b")])
    first, video, picture, last = (part[part["type"]] for part in row["content"])
    assert (first, last) == ("a", "b") and np.array_equal(picture, image(28, 56))
    assert np.array_equal(video["array"], [image(28, 28), image(28, 28, 1)]) and video["video_metadata"]["fps"] == 2


def test_instructions_are_system_messages():
    body = {"messages": [{"role": "system", "content": "Find it."}, message("a")]}
    assert EmbeddingRequest.model_validate(body).instruction() == "Find it."
    body["messages"][0]["role"] = "developer"  # OpenAI's newer name
    assert EmbeddingRequest.model_validate(body).instruction() == "Find it."
    assert EmbeddingRequest.model_validate({"input": "a"}).instruction() is None


@pytest.mark.parametrize(
    "body",
    [
        {"input": {"text": "a"}},
        {"input": "a", "dimensions": "64"},
        {"input": "a", "dimensions": True},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "data:"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": png(image(28, 28))}]}]},
    ],
)
def test_other_types_are_refused(body):
    with pytest.raises(ValidationError):
        EmbeddingRequest.model_validate(body)


def test_what_clients_of_vllm_write_is_taken_if_it_changes_nothing():
    """The defaults of its EmbeddingChatRequest, and of clients that fill in all fields."""
    same = {
        "add_generation_prompt": False,
        "continue_final_message": False,
        "add_special_tokens": True,
        "chat_template": None,
        "chat_template_kwargs": {},
        "mm_processor_kwargs": None,
        "media_io_kwargs": None,
        "truncate_prompt_tokens": -1,
        "truncation_side": "left",
        "padding": "do_not_pad",
        "use_activation": True,
        "embed_dtype": "float32",
        "endianness": "native",
        "priority": 0,
        "cache_salt": "x",
        "request_id": "y",
        "user": "z",
    }
    assert EmbeddingRequest.model_validate({"input": "a", **same})
    others = {
        "add_generation_prompt": True,
        "continue_final_message": True,
        "chat_template": "{{ messages }}",
        "chat_template_kwargs": {"enable_thinking": True},
        "mm_processor_kwargs": {"max_pixels": 1},
        "media_io_kwargs": {"video": {"num_frames": 1}},
        "truncate_prompt_tokens": 8,
        "truncation_side": "right",
        "padding": "max_length",
        "use_activation": False,
        "embed_dtype": "float16",
        "endianness": "big",
        "priority": 1,
    }
    for name, value in others.items():
        with pytest.raises(ValidationError, match=rf"^1 validation error for EmbeddingRequest\n{name}"):
            EmbeddingRequest.model_validate({"input": "a", **same, name: value})


def test_what_takes_long_is_known_before_it_is_read():
    for kind, url, expected in (
        ("image", "data:image/png;base64,", False),
        ("image", "https://example.org/a.png", True),
        ("video", "data:video/jpeg;base64,", False),  # frames
        ("video", "data:video/mp4;base64,", True),
        ("video", "https://example.org/a.mp4", True),
    ):
        content = [{"type": "text", "text": "https://"}, {"type": f"{kind}_url", f"{kind}_url": {"url": url}}]
        body = {"messages": [{"role": "user", "content": content}]}
        assert EmbeddingRequest.model_validate(body).reads_slowly() is expected
    assert not EmbeddingRequest.model_validate({"input": "https://example.org/a.png"}).reads_slowly()


def test_pixels_are_counted_part_by_part_before_they_are_decoded():
    """So that a request that is over, or does not fit, is not read to its end."""
    counted = []

    def more_pixels(pixels):
        counted.append(pixels)
        if len(counted) == 2:
            raise KeyError("full")

    parts = message(image(28, 28), [image(28, 28)] * 2, "text", image(28, 28))
    parts["content"][0]["image_url"]["url"] = "data:image/png;base64," + png(image(28, 28))[:80]  # only its header
    request = EmbeddingRequest.model_validate({"messages": [parts]})
    with pytest.raises(KeyError, match="full"):
        request.rows(LIMITS, Origins(10**6, 10**6, 60), more_pixels)
    assert counted == [28 * 28, 28 * 28]  # of the image, and of the first of two frames


def test_frames_of_a_message_are_bounded_before_the_first_is_opened():
    url = "data:video/jpeg;base64," + ",".join("x" * 3000)
    content = [{"type": "video_url", "video_url": {"url": url}}] * 2
    with pytest.raises(ValueError, match="have 6000 frames, more than 4096"):
        rows(messages=[{"role": "user", "content": content}])
