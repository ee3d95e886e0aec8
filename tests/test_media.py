"""Reading images, videos and folders of frames."""

import io
import itertools

import av
import numpy as np
import pytest
import transformers
from packaging.version import Version
from PIL import Image
from support.inputs import TOLERANCE
from support.media import image, video
from support.pictures import MEDIA

from btok_hf import BTokSentenceTransformer, read_video
from btok_hf.inputs import ImageLimits, check_input
from btok_hf.media import array_as_rgb, read_frames, with_metadata


def test_an_mp4_path_is_read_through_pyav(loaded, mp4):
    model = loaded["wrapper"]
    expected = model.encode([{"video": read_video(mp4)}])
    assert np.abs(model.encode([{"video": mp4}]) - expected).max() <= TOLERANCE
    assert np.abs(model.encode([mp4]) - expected).max() <= TOLERANCE
    clip = read_video(mp4, num_frames=5)
    assert clip["array"].shape == (5, 64, 64, 3)
    assert clip["video_metadata"]["duration"] == pytest.approx(2.0)
    left_edges = [np.argmax(frame[24].max(axis=1) > 128) for frame in clip["array"]]
    assert left_edges == sorted(left_edges) and left_edges[-1] > left_edges[0] + 20  # first to last frame


def test_large_jpegs_are_decoded_at_a_reduced_size(loaded, tmp_path):
    """They keep four times the pixels that the model takes or more, and the vector hardly changes."""
    model = loaded["wrapper"]
    limit = model[0].processor.image_processor.size["longest_edge"]
    page = image(20, 15).resize((1600, 1200), Image.Resampling.BICUBIC)
    page.save(tmp_path / "large.jpg", quality=95)
    page.save(tmp_path / "large.png")
    page.resize((170, 128)).save(tmp_path / "small.jpg")
    image_processor = model.processor.image_processor
    limits = ImageLimits(image_processor.size["longest_edge"], image_processor.patch_size)
    sizes = {
        name: check_input(str(tmp_path / name), limits)["image"].size
        for name in ("large.jpg", "large.png", "small.jpg")
    }
    assert sizes == {"large.jpg": (400, 300), "large.png": (1600, 1200), "small.jpg": (170, 128)}
    assert 400 * 300 >= 4 * limit > 200 * 150
    assert check_input({"image": tmp_path / "large.jpg"}, limits)["image"].size == (400, 300)
    reduced, whole = model.encode([str(tmp_path / "large.jpg"), Image.open(tmp_path / "large.jpg")])
    assert reduced @ whole > 0.999


def test_photographs_are_upright(loaded, tmp_path):
    """Images are turned by their EXIF tag, as in transformers and datasets."""
    picture = image(112, 56)
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for name in ("photo.jpg", "photo.png"):
        picture.save(tmp_path / name, exif=exif)
        upright = loaded["wrapper"].encode([{"image": str(tmp_path / name)}])
        if Version(transformers.__version__) >= Version("5.23"):  # transformers 5.17 does not turn them
            stock = loaded["stock"].encode([{"image": str(tmp_path / name)}])
            assert np.abs(stock - upright).max() <= TOLERANCE
    turned = picture.transpose(Image.Transpose.ROTATE_270)
    assert np.abs(loaded["wrapper"].encode([turned]) - upright).max() <= TOLERANCE


@pytest.mark.parametrize(
    "count, kept", [(20, [0, 2, 5, 8, 10, 13, 16, 19]), (8, range(8)), (3, range(3)), (1, [0, 0])]
)
def test_frames(tmp_path, repos, count, kept):
    # The numbers have no leading zeros, so only natural order is right.
    colours = [image(56, 40, number) for number in range(count)]
    for number, colour in enumerate(colours):
        colour.save(tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").touch()
    video = read_frames(tmp_path)
    np.testing.assert_array_equal(video["array"], np.stack([np.asarray(colours[number]) for number in kept]))
    assert len(read_frames(tmp_path, None)["array"]) == max(2, count)
    for path in repos.values():  # no processor samples them again
        grid = BTokSentenceTransformer(path, device="cpu").preprocess([{"video": video}])["video_grid_thw"]
        assert grid[0, 0] == (len(video["array"]) + 1) // 2


def test_rotated_videos_are_upright():
    """A phone's video with a rotation flag, and the same pixels without it."""
    rotated, stored = (read_video(MEDIA / name) for name in ("rotated.mp4", "upright.mp4"))
    assert stored["array"].shape == (8, 112, 160, 3) and rotated["array"].shape == (8, 160, 112, 3)
    assert np.array_equal(
        rotated["array"], np.rot90(stored["array"], -1, axes=(1, 2))
    )  # clockwise, as players show it
    assert rotated["video_metadata"] == stored["video_metadata"]


def test_frames_that_no_player_shows_are_not_sampled():
    """A video of 24 frames, cut out of one of 300 without encoding it again."""
    video = read_video(MEDIA / "cut.mp4")
    metadata = video["video_metadata"]
    assert len(video["array"]) == metadata["total_num_frames"] == 8
    assert metadata["duration"] == pytest.approx(2.4) and metadata["fps"] == pytest.approx(8 / 2.4)
    with av.open(str(MEDIA / "cut.mp4")) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(shown) == 24
    wanted = np.linspace(0, 23, 8).astype(int)
    assert np.array_equal(video["array"], np.stack([shown[index] for index in wanted]))


def test_a_video_of_one_frame_is_that_frame_twice():
    video = read_video(MEDIA / "n1.mp4")
    assert len(video["array"]) == 2 and np.array_equal(*video["array"])
    assert video["video_metadata"]["total_num_frames"] == 2


def test_a_hole_in_a_video_is_said(mp4, tmp_path, monkeypatch):
    """Packets that the decoder drops without an error."""
    decode = av.container.InputContainer.decode

    class Holed:
        def __init__(self, container):
            self.container = container

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.container.close()

        def __getattr__(self, name):
            return getattr(self.container, name)

        def decode(self, stream):
            return itertools.islice(decode(self.container, stream), 3)

    opened = av.open
    monkeypatch.setattr(av, "open", lambda path, mode: Holed(opened(path, mode)))
    with pytest.raises(ValueError, match=r"has a hole: \d+ frames are announced, but only \d of the 8 asked for"):
        read_video(mp4)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_may_stand_first_or_last(channels):
    last = np.random.default_rng(0).integers(0, 255, (40, 50, channels), dtype=np.uint8)
    first, second = array_as_rgb(last), array_as_rgb(np.moveaxis(last, -1, 0))
    assert first.size == (50, 40) and np.array_equal(first, second)
    if channels == 3:
        assert np.array_equal(first, last)


@pytest.mark.parametrize(
    "metadata, message",
    [
        ([], "must be a dict, got list"),
        ({}, "'fps' of a video must be a number from 0.001 to 1000, got None"),
        ({"fps": True}, "got True"),
        ({"fps": float("nan")}, "got nan"),
        ({"fps": 1e300}, "got 1e"),
        ({"fps": 2, "total_num_frames": 300}, "describes 300 frames, but the video has 4"),
        ({"fps": 2, "frames_indices": [0, 1]}, "one number per frame"),
        ({"fps": 2, "frames_indices": [0, 1, 2, -3]}, "one number per frame"),
        ({"fps": 2, "frames_indices": 3}, "one number per frame"),
    ],
)
def test_metadata_of_other_frames_are_refused(metadata, message):
    with pytest.raises(ValueError, match=message + ".*Leave video_metadata out"):
        with_metadata(video()["array"], metadata)


def test_metadata_may_leave_out_what_follows():
    clip = video()
    assert with_metadata(clip["array"], {"fps": 2}) == clip
    indices = with_metadata(clip["array"], {"fps": 2, "frames_indices": np.arange(4) * 3})["video_metadata"]
    assert indices["frames_indices"] == [0, 3, 6, 9]


def test_a_video_in_memory_is_that_of_its_file():
    path = MEDIA / "rotated.mp4"
    np.testing.assert_array_equal(read_video(io.BytesIO(path.read_bytes()))["array"], read_video(path)["array"])
    with pytest.raises(ValueError, match="The video cannot be decoded"):
        read_video(io.BytesIO(b"nothing"))


def test_a_size_that_no_video_has_is_no_lack_of_memory(monkeypatch):
    """FFmpeg answers absurd sizes of a damaged file with a MemoryError of its own."""

    def open_(path, mode):
        raise av.error.MemoryError(12, "Cannot allocate memory")

    monkeypatch.setattr(av, "open", open_)
    with pytest.raises(ValueError, match=r"upright.mp4' cannot be decoded"):
        read_video(MEDIA / "upright.mp4")
