"""Whether two inputs are the same."""

import os

import numpy as np
import torch
from PIL import Image as PILImage

from btok_hf.content import content_hash


def test_pictures_that_differ_by_their_palette_are_not_copies():
    """Two images in palette mode can have equal bytes and different colours."""
    red = PILImage.new("P", (60, 40), 1)
    red.putpalette([0, 0, 0, 255, 0, 0])
    blue = red.copy()
    blue.putpalette([0, 0, 0, 0, 0, 255])
    assert red.tobytes() == blue.tobytes()
    assert content_hash(red) != content_hash(blue) and content_hash(red) == content_hash(red.copy())


def test_files_have_the_hash_of_their_content_and_texts_of_their_words(tmp_path):
    path, copy, other = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    for place, colour in ((path, "red"), (copy, "red"), (other, "blue")):
        PILImage.new("RGB", (8, 8), colour).save(place)
    assert len({content_hash(x) for x in (str(path), path, {"image": path}, {"image": str(copy)}, copy)}) == 1
    assert content_hash(path) != content_hash(other)
    assert content_hash({"text": str(path)}) not in (content_hash(path), content_hash({"text": str(copy)}))
    pairs = [{"image": str(place), "text": "a"} for place in (path, copy)]
    assert content_hash(pairs[0]) == content_hash(pairs[1]) != content_hash({"image": other, "text": "a"})
    assert content_hash({"text": "a", "image": path}) == content_hash(pairs[0])
    assert content_hash([path, other]) == content_hash([copy, other]) != content_hash([other, path])


def test_files_in_cells_and_changed_files(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"a video")
    cells = [{"bytes": b"a video", "path": name} for name in ("a.mp4", "b.mp4", None)]
    cells.append({"bytes": None, "path": str(path)})
    assert len({content_hash(x) for x in (path, *cells, *({"video": cell} for cell in cells))}) == 1
    before = content_hash(path)
    path.write_bytes(b"b video")
    os.utime(path, ns=(0, 1))
    assert content_hash(path) != before
    other = tmp_path / "b.mp4"
    other.write_bytes(b"b video")
    assert content_hash({"text": [str(path)]}) != content_hash({"text": [str(other)]})
    assert content_hash({"text": "a", "label": 3}) == content_hash({"label": 3, "text": "a"})
    content_hash("长" * 200 + ".png")  # longer than a name may be


def test_arrays_and_messages():
    array = np.zeros((2, 2, 3), np.uint8)
    assert content_hash(array) == content_hash({"image": array.copy()}) != content_hash(array.reshape(2, 6))
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert content_hash(messages) == content_hash([dict(messages[0])]) != content_hash(["a"])


def test_pictures_are_what_they_show():
    """As a model sees them: upright, and in RGB, whatever they are stored as."""
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    upright = PILImage.fromarray(pixels)
    lying = upright.copy()
    lying.getexif()[0x0112] = 6
    assert upright.tobytes() == lying.tobytes() and content_hash(upright) != content_hash(lying)
    grey = PILImage.new("L", (4, 4), 9)
    assert content_hash(grey) == content_hash(grey.convert("RGB"))


def test_tensors_of_every_type_that_is_embedded():
    tensor = torch.rand(4, 4, 3)
    kinds = (tensor, tensor.bfloat16(), tensor.clone().requires_grad_())
    assert len({content_hash(each) for each in kinds}) == 2
    assert content_hash(tensor) == content_hash(tensor.numpy())


def test_what_cannot_be_embedded_is_refused_where_it_is_read():
    """With its place in the list, which a hash does not know."""
    closed = PILImage.new("RGB", (4, 4))
    closed.close()
    wide = PILImage.fromarray(np.linspace(0, 1000, 16, dtype=np.float32).reshape(4, 4))
    masked = np.ma.masked_array(np.zeros((4, 4), np.uint8), mask=True)
    for value in (closed, wide, masked, torch.zeros(4, 4).to_sparse(), torch.zeros(4, 4, device="meta")):
        assert content_hash(value) >= 0
