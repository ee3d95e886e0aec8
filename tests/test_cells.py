"""Cells of datasets: as they are stored, and as inputs."""

import io
import zipfile

import numpy as np
import pytest
from datasets import Array3D, Dataset, Features, Image, List, Value, Video
from support.media import image
from torch.utils.data import ConcatDataset

from btok_hf import BTokSentenceTransformer
from btok_hf.media import frames_as_rgb
from btok_hf.training.cells import NumberedRows, as_input, as_stored, decode_cell


def test_files_are_read_as_they_are_stored():
    clip = {"bytes": b"clip", "path": "a.mp4"}
    row = {"query": {"images": [image(40, 40)], "text": "x"}, "positive": image(40, 40), "negative": clip}
    nested = {"images": List(Image()), "text": Value("string")}
    plain = {"bytes": Value("binary"), "path": Value("string")}  # to encode a video, torchcodec would be needed
    dataset = Dataset.from_list(
        [row] * 2, features=Features({"query": nested, "positive": Image(), "negative": plain})
    )
    dataset = dataset.cast_column("negative", Video())
    features = dataset.features
    dataset.set_format("numpy", columns=["query", "positive"])
    before = dataset.format
    stored = as_stored(dataset.select([1]))[0]
    assert set(stored) == {"query", "positive"} and stored["positive"] == stored["query"]["images"][0]
    assert stored["positive"]["bytes"].startswith(b"\x89PNG") and stored["query"]["text"] == "x"
    dataset.reset_format()
    assert as_stored(dataset)[0]["negative"] == clip
    assert dataset.features == features and before["type"] == "numpy"  # the given one is not changed
    made = dataset.remove_columns("negative").with_transform(lambda rows: {"query": ["made"] * len(rows["query"])})
    assert as_stored(made)[0] == {"query": "made"}


def test_rows_have_their_number_in_their_own_dataset():
    parts = [Dataset.from_dict({"query": list(part)}).shuffle(seed=0) for part in ("abc", "de")]
    rows = NumberedRows(ConcatDataset(parts))
    assert len(rows) == 5 and rows[3] == {"query": parts[1][0]["query"], "row": 0}
    expected = [(1, 1), (0, 0), (0, 2)]  # dataset and row
    expected = [{"query": parts[part][number]["query"], "row": number} for part, number in expected]
    assert rows.__getitems__([4, 0, 2]) == expected
    assert NumberedRows(parts[0])[2] == {"query": parts[0][2]["query"], "row": 2}


def test_files_in_archives_are_read(tmp_path):
    content = io.BytesIO()
    image(40, 40).save(content, "PNG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", content.getvalue())
    cell = as_input({"image": {"bytes": None, "path": f"zip://a.png::{tmp_path / 'a.zip'}"}})
    assert cell["image"]["bytes"] == content.getvalue()
    assert decode_cell(cell)["image"].tobytes() == image(40, 40).tobytes()


def test_a_file_of_a_video_in_a_dict_stays_one():
    stored = {"bytes": b"a video", "path": None}
    assert decode_cell({"video": stored, "text": "x", "image": None}) == {"video": stored, "text": "x"}


def test_arrays_are_images():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    dataset = Dataset.from_dict({"query": [pixels]}, features=Features({"query": Array3D((4, 4, 3), "uint8")}))
    for part in (dataset, dataset.with_format("numpy"), dataset.with_format("torch")):
        cell = as_input(as_stored(part)[0]["query"])
        assert cell.dtype == np.uint8 and np.array_equal(cell, pixels)


def test_columns_beside_those_of_a_format_are_kept():
    dataset = Dataset.from_dict({"query": ["a"], "group": [1]})
    assert as_stored(dataset.with_format("torch", columns=["group"])).column_names == ["group"]
    both = dataset.with_format("torch", columns=["group"], output_all_columns=True)
    assert as_stored(both)[0] == {"query": "a", "group": 1}


def test_frames_of_floats_are_scaled_like_those_of_encode():
    frames = np.random.default_rng(0).random((2, 8, 8, 3)).astype(np.float32)
    cell = Dataset.from_list([{"query": {"video": {"array": frames.tolist()}}}])[0]["query"]
    decoded = as_input(cell)["video"]["array"]
    np.testing.assert_array_equal(frames_as_rgb(decoded), frames_as_rgb(frames))
    whole = decode_cell({"array": frames_as_rgb(frames).tolist(), "video_metadata": None})
    assert whole.keys() == {"array"} and whole["array"].dtype == np.uint8


def test_cells_that_cannot_be_decoded_are_left_to_the_check_of_inputs(repo):
    damaged, clip = {"bytes": b"no picture", "path": None}, {"bytes": b"no clip", "path": "a.mp4"}
    assert decode_cell({"image": [damaged], "text": "x", "video": []}) == {"image": [damaged], "text": "x"}
    assert decode_cell({"video": [clip, clip]}) == {"video": [clip, clip]}
    model = BTokSentenceTransformer(repo, device="cpu")
    for cell, kind in ((damaged, "The image is not an image"), (clip, "The video cannot be decoded")):
        with pytest.raises(ValueError, match=f"Input 1 .*{kind}"):
            model.encode(["a", decode_cell(cell)])
