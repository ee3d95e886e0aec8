"""Reading video files and folders of frames."""

import base64
import io
import itertools
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from support import tiny
from support.inputs import TOLERANCE
from support.media import image
from support.pictures import MEDIA

from btok_hf import BTokSentenceTransformer, read_video
from btok_hf.serving.origins import Origins
from btok_hf.video import read_frames


def test_an_mp4_path_is_read_through_pyav(loaded, mp4):
    model = loaded["wrapper"]
    if not model.transformer.image_limits.takes_video:
        pytest.skip("It takes no video")
    expected = model.encode([{"video": read_video(mp4)}])
    assert np.abs(model.encode([{"video": mp4}]) - expected).max() <= TOLERANCE
    assert np.abs(model.encode([mp4]) - expected).max() <= TOLERANCE
    clip = read_video(mp4, num_frames=5)
    assert clip["array"].shape == (5, 64, 64, 3)
    assert clip["video_metadata"]["duration"] == pytest.approx(2.0)
    left_edges = [np.argmax(frame[24].max(axis=1) > 128) for frame in clip["array"]]
    assert left_edges == sorted(left_edges) and left_edges[-1] > left_edges[0] + 20  # first to last frame


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
    assert np.array_equal(read_frames(tmp_path, 1)["array"], np.stack([colours[0]] * 2))
    for backbone in tiny.WITH_VIDEO:  # no processor samples them again
        features = BTokSentenceTransformer(repos[backbone], device="cpu").preprocess([{"video": video}])
        if "video_grid_thw" in features:
            assert features["video_grid_thw"][0, 0] == (len(video["array"]) + 1) // 2
        else:
            assert len(features["pixel_values"]) == len(video["array"])


def test_rotated_videos_are_upright():
    """A phone's video with a rotation flag, and the same pixels without it."""
    rotated, stored = (read_video(MEDIA / name) for name in ("rotated.mp4", "upright.mp4"))
    assert stored["array"].shape == (8, 112, 160, 3) and rotated["array"].shape == (8, 160, 112, 3)
    assert np.array_equal(
        rotated["array"], np.rot90(stored["array"], -1, axes=(1, 2))
    )  # clockwise, as players show it
    assert rotated["video_metadata"] == stored["video_metadata"]


def test_mirrored_videos_are_as_players_show_them():
    """All matrices of right angles, written into the header (ISO/IEC 14496-12, 6.2.2)."""
    content = (MEDIA / "rotated.mp4").read_bytes()
    start = content.index(b"tkhd") + 4 + 40
    stored = read_video(MEDIA / "upright.mp4")["array"]
    expected = {
        (1, 0, 0, 1): stored,
        (-1, 0, 0, 1): stored[:, :, ::-1],
        (1, 0, 0, -1): stored[:, ::-1],
        (-1, 0, 0, -1): stored[:, ::-1, ::-1],
        (0, 1, 1, 0): stored.swapaxes(1, 2),
        (0, 1, -1, 0): np.rot90(stored, -1, axes=(1, 2)),
        (0, -1, 1, 0): np.rot90(stored, 1, axes=(1, 2)),
        (0, -1, -1, 0): stored[:, ::-1, ::-1].swapaxes(1, 2),
    }
    for (a, b, c, d), frames in expected.items():
        matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        video = read_video(io.BytesIO(content[:start] + matrix + content[start + 36 :]))
        assert np.array_equal(video["array"], frames), (a, b, c, d)


def test_hidden_frames_of_vp8_are_no_frames(tmp_path):
    """Encoders store them to refer to them. Here some frames are stored once more, with the bit for shown cleared."""
    with av.open(str(tmp_path / "shown.webm"), "w") as container:
        stream = container.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for index in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(image(64, 64, index)))))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "shown.webm")) as source, av.open(str(tmp_path / "hidden.webm"), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            content = bytes(packet)
            if index % 4 == 3:
                hidden = av.Packet(bytes([content[0] & ~0x10]) + content[1:])
                hidden.pts, hidden.dts, hidden.time_base, hidden.stream = (
                    packet.pts - 9,
                    packet.dts - 9,
                    packet.time_base,
                    stream,
                )
                container.mux(hidden)
            packet.stream = stream
            container.mux(packet)
    shown, hidden = (read_video(tmp_path / f"{name}.webm", num_frames=20) for name in ("shown", "hidden"))
    assert len(hidden["array"]) == 20 and hidden["video_metadata"] == shown["video_metadata"]


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
    monkeypatch.setattr(av, "open", lambda path, mode, **options: Holed(opened(path, mode, **options)))
    with pytest.raises(ValueError, match=r"is damaged: \d+ frames are announced, but only \d of the 8 asked for"):
        read_video(mp4)


def test_a_video_in_memory_is_that_of_its_file():
    path = MEDIA / "rotated.mp4"
    np.testing.assert_array_equal(read_video(io.BytesIO(path.read_bytes()))["array"], read_video(path)["array"])
    with pytest.raises(ValueError, match="The video cannot be decoded"):
        read_video(io.BytesIO(b"nothing"))


def test_a_size_that_no_video_has_is_no_lack_of_memory(monkeypatch):
    """FFmpeg answers absurd sizes of a damaged file with a MemoryError of its own."""

    def open_(path, mode, **options):
        raise av.error.MemoryError(12, "Cannot allocate memory")

    monkeypatch.setattr(av, "open", open_)
    with pytest.raises(ValueError, match=r"upright.mp4' cannot be decoded"):
        read_video(MEDIA / "upright.mp4")


def test_a_video_that_names_other_files_opens_none(mp4, tmp_path, monkeypatch):
    """FFmpeg reads playlists, and would follow them: strangers could look into files beside the service."""
    playlist = tmp_path / "list.mp4"
    playlist.write_text("ffconcat version 1.0\nfile 'clip.mp4'\n")
    (tmp_path / "clip.mp4").symlink_to(mp4)
    monkeypatch.chdir(tmp_path)
    for source in (playlist, io.BytesIO(playlist.read_bytes())):
        with pytest.raises(ValueError, match="cannot be decoded"):
            read_video(source)


def test_bounds_of_a_video(mp4):
    assert len(read_video(mp4, most_pixels=8 * 64 * 64, most_seconds=60)["array"]) == 8
    with pytest.raises(ValueError, match="its 8 frames of 64 x 64 have more than 32767 pixels"):
        read_video(mp4, most_pixels=8 * 64 * 64 - 1)
    with pytest.raises(ValueError, match="decoding it takes more than 0 seconds"):
        read_video(mp4, most_seconds=0)


def test_large_frames_are_refused_before_they_take_memory():
    """A GIF of some bytes that announces 16,000 x 16,000 pixels, and whose frames cannot be decoded."""
    file = io.BytesIO()
    frames = [Image.new("P", (16, 16), colour) for colour in range(2)]
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:])
    content = bytearray(file.getvalue())
    content[6:10] = (16_000).to_bytes(2, "little") * 2
    for place in range(len(content)):
        if content[place : place + 1] == b"\x2c":  # a frame begins: its left edge lies outside
            content[place + 1 : place + 3] = b"\xff\xff"
    with pytest.raises(ValueError, match="frames of 16000 x 16000 have more than 1000000 pixels"):
        read_video(io.BytesIO(content), most_pixels=10**6)


def written(path, codec, pixels, frames, **options):
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        for name, value in options.items():
            setattr(stream.codec_context, name, value)
        for frame in frames:
            kind = "rgba" if frame.shape[2] == 4 else "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=kind).reformat(format=pixels)))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("codec, pixels", [("qtrle", "argb"), ("png", "rgba")])
def test_transparent_video_is_on_white(tmp_path, codec, pixels):
    frames = np.zeros((4, 32, 32, 4), np.uint8)
    frames[:, 8:24, 8:24] = (200, 0, 0, 255)
    read = read_video(written(str(tmp_path / "a.mov"), codec, pixels, frames))["array"]
    assert (read[:, 0, 0] == 255).all() and (read[:, 16, 16] == (200, 0, 0)).all()


@pytest.mark.parametrize(
    "ratio, shape", [(Fraction(2), (16, 64)), (Fraction(1, 2), (32, 32)), (Fraction(1), (32, 64))]
)
def test_pixels_become_square(tmp_path, ratio, shape):
    frames = [np.full((32, 64, 3), 60 * number, np.uint8) for number in range(4)]
    path = written(str(tmp_path / "a.mp4"), "mpeg4", "yuv420p", frames, sample_aspect_ratio=ratio)
    assert read_video(path)["array"].shape == (4, *shape, 3)


def test_an_opaque_gif_is_read_frame_by_frame(tmp_path):
    """FFmpeg gives every GIF with transparency."""
    frames = [Image.new("RGB", (40, 32), (50 * number, 0, 200)) for number in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    read = read_video(tmp_path / "a.gif")["array"]
    assert read.shape == (4, 32, 40, 3) and (read[3] == (150, 0, 200)).all()


def grey_clip(path, times, codec="ffv1", rate=30, size=64):
    """A clip whose frames are grey by their times in milliseconds: 255 is the last."""
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=rate, width=size, height=size, pix_fmt="yuv420p")
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for moment in times:
            shade = np.full((size, size, 3), round(moment / times[-1] * 255) if times[-1] else 9, np.uint8)
            frame = av.VideoFrame.from_ndarray(shade, format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_frames_of_a_variable_rate_are_those_of_evenly_spaced_times(tmp_path):
    """A recording of a screen on which all moves in the first second."""
    times = [*range(0, 1000, 33), 5000, 9000, 9500]
    grey_clip(tmp_path / "screen.mkv", times)
    clip = read_video(tmp_path / "screen.mkv")
    # At eight times: 0, three times 30, three times 31, and 33. The others are of 0, 4, 9, 14, 18, 23, 28 and 33.
    expected = np.array(times)[[0, 4, 9, 18, 28, 30, 31, 33]] / 9500 * 255
    assert np.abs(clip["array"][:, 32, 32, 0] - expected).max() <= 2
    assert clip["video_metadata"]["duration"] == pytest.approx(9.5, rel=0.05)
    few = read_video(tmp_path / "screen.mkv", 50)["array"][:, 32, 32, 0]  # all of them
    assert np.abs(few - np.array(times) / 9500 * 255).max() <= 2


@pytest.mark.parametrize("place", [1, 20, 63])
def test_a_jump_of_the_clock_costs_no_more_than_two_frames(tmp_path, place):
    """A recording that was paused, or parts that were joined."""
    grey_clip(tmp_path / "joined.mkv", [40 * number + (3_600_000 if number >= place else 0) for number in range(64)])
    with av.open(tmp_path / "joined.mkv") as container:
        stored = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    kept = read_video(tmp_path / "joined.mkv")["array"]
    assert len(kept) == 8 and all(any(np.array_equal(frame, each) for each in stored) for frame in kept)
    even = [stored[index] for index in np.linspace(0, 63, 8).astype(int)]
    assert sum(any(np.array_equal(frame, each) for frame in kept) for each in even) >= 6


def test_frames_of_a_rate_that_trembles_are_chosen_by_number(tmp_path):
    """Times in whole milliseconds, and those of phones, are not quite regular."""
    times = np.array([33 * number + 2 * (number % 2) for number in range(64)])
    grey_clip(tmp_path / "phone.mkv", times.tolist())
    expected = times[::9] / times[-1] * 255  # by time, the odd ones would come too late
    assert np.abs(read_video(tmp_path / "phone.mkv")["array"][:, 32, 32, 0] - expected).max() <= 2


@pytest.mark.parametrize("name, codec", [("a.flv", "flv1"), ("a.wmv", "wmv2"), ("a.mp4", "mpeg4"), ("a.ts", "mpeg4")])
def test_a_single_frame_needs_no_frame_rate(tmp_path, name, codec):
    grey_clip(tmp_path / name, [0], codec)
    clip = read_video(tmp_path / name)
    assert len(clip["array"]) == 2 and clip["video_metadata"]["fps"] > 0


def cover_first(path):
    """Move the cover of an mp4 file before its tracks (ISO/IEC 14496-12 allows any order); FFmpeg writes it last."""
    content = path.read_bytes()
    start = content.index(b"moov") - 4
    size = int.from_bytes(content[start : start + 4], "big")
    boxes, place = [], start + 8
    while place < start + size:
        length = int.from_bytes(content[place : place + 4], "big")
        boxes.append(content[place : place + length])
        place += length
    boxes.sort(key=lambda box: [b"mvhd", b"udta"].index(box[4:8]) if box[4:8] in (b"mvhd", b"udta") else 2)
    path.write_bytes(content[: start + 8] + b"".join(boxes) + content[start + size :])


def test_a_cover_is_no_video(tmp_path):
    """Of a file of music, or before the video in a film. It is smaller than the film, whose size a server bounds."""
    cover = io.BytesIO()
    image(32, 32).save(cover, "png")
    with av.open(tmp_path / "film.mkv", "w") as container:
        stream = container.add_stream("mpeg4", rate=10, width=64, height=64, pix_fmt="yuv420p")
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10 * number, np.uint8), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    expected = read_video(tmp_path / "film.mkv")["array"]
    for with_film in (True, False):
        with av.open(tmp_path / "film.mkv") as film, av.open(tmp_path / "covered.mp4", "w") as output:
            pictures = output.add_stream("png", rate=1, width=32, height=32, pix_fmt="rgb24")
            pictures.disposition = av.stream.Disposition.attached_pic
            copied = output.add_stream_from_template(film.streams.video[0]) if with_film else None
            packet = av.Packet(cover.getvalue())
            packet.stream, packet.pts, packet.dts = pictures, 0, 0
            output.mux(packet)
            for packet in film.demux() if with_film else ():
                if packet.dts is not None:
                    packet.stream = copied
                    output.mux(packet)
        if with_film:
            cover_first(tmp_path / "covered.mp4")
            with av.open(tmp_path / "covered.mp4") as container:
                assert container.streams.video[0].codec_context.name == "png"
            assert np.array_equal(read_video(tmp_path / "covered.mp4")["array"], expected)
            url = "data:video/mp4;base64," + base64.b64encode((tmp_path / "covered.mp4").read_bytes()).decode()
            served, pixels = Origins(10**6, 10**6, 60.0).video(url)
            assert np.array_equal(served["array"], expected) and pixels == expected.size // 3
        else:
            with pytest.raises(ValueError, match="it has no video stream"):
                read_video(tmp_path / "covered.mp4")


def test_an_open_file_may_be_read_twice():
    content = io.BytesIO((MEDIA / "upright.mp4").read_bytes())
    first, second = read_video(content), read_video(content)
    assert np.array_equal(first["array"], second["array"])
