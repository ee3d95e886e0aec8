"""The kind of an input, by its form alone."""

import io

import numpy as np
import pytest
from support.media import image, video

from btok_hf.input_kinds import as_list, is_frame, is_media_path, is_message, is_messages, names_media, text_of


def test_text_of_every_kind_of_side():
    assert text_of("plain ") == "plain"
    assert text_of({"image": 1, "text": ["a", "b"]}) == "a b"
    assert text_of({"role": "user", "content": [{"type": "image", "image": 1}, {"type": "text", "text": "m"}]}) == "m"
    for nothing in (image(30, 30), {"image": 1}, "", "photo.png", None):
        assert text_of(nothing) is None


def test_texts_that_look_like_files():
    messages = [{"role": "user", "content": "a.png"}]
    assert text_of({"text": ["a.png", "b"]}) == "a.png b" and text_of(messages) == "a.png"
    assert text_of("no picture.png") == "no picture.png" and text_of({"text": "a.png"}) == "a.png"
    assert text_of("data:image/png;base64,AAAA") is None and text_of("data: none") == "data: none"


@pytest.mark.parametrize(
    ("name", "is_media"),
    [
        ("photo.PNG", True),
        ("clips/a.mp4", True),
        ("https://example.com/a.jpg?size=2", True),
        (" photo.png\n", True),  # a line of a file, which is no name of one
        ("my photo.png", False),
        ("notes.txt", False),
        ("https://[", False),  # begins like an address and is none
    ],
)
def test_names_of_media(name, is_media):
    assert is_media_path(name) == names_media(name) == is_media


def test_a_file_that_exists_is_named_whatever_its_suffix(tmp_path):
    (tmp_path / "picture").write_bytes(b"x")
    assert names_media(str(tmp_path / "picture")) and not names_media(str(tmp_path / "nothing"))


def test_frames_are_images_and_not_videos():
    still, moving = io.BytesIO(), io.BytesIO()
    image(30, 30).save(still, "PNG")
    image(30, 30).save(moving, "GIF", save_all=True, append_images=[image(30, 30, 1)])
    for frame in (image(30, 30), np.zeros((30, 30, 3)), "a.png", {"bytes": still.getvalue(), "path": None}):
        assert is_frame(frame)
    for other in (video(3)["array"], "a.gif", "a.mp4", {"bytes": moving.getvalue(), "path": None}, "words"):
        assert not is_frame(other)


def test_messages_have_a_role():
    message = {"role": "user", "content": "a"}
    assert is_message(message) and is_messages(message) and is_messages([message])
    assert not is_message({"text": "a"}) and not is_messages([]) and not is_messages("user")
    assert as_list(message) == [message] and as_list([1, 2]) == [1, 2]
