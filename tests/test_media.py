"""Images, frames and their metadata."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from support.inputs import TOLERANCE
from support.media import image, video

from btok_hf.inputs import check_input
from btok_hf.media import (
    array_as_rgb,
    as_rgb,
    as_uint8,
    frames_as_rgb,
    read_image,
    with_metadata,
)


def test_large_jpegs_are_decoded_at_a_reduced_size(loaded, tmp_path):
    """They keep four times the pixels that the model takes or more, and the vector hardly changes."""
    model = loaded["wrapper"]
    limits = model[0].image_limits
    page = image(20, 15).resize((1600, 1200), Image.Resampling.BICUBIC)
    page.save(tmp_path / "large.jpg", quality=95)
    page.save(tmp_path / "large.png")
    page.resize((170, 128)).save(tmp_path / "small.jpg")
    sizes = {
        name: check_input(str(tmp_path / name), limits)["image"].size
        for name in ("large.jpg", "large.png", "small.jpg")
    }
    # JPEG is decoded at an eighth, a quarter or a half.
    kept = next(side for side in ((200, 150), (400, 300)) if side[0] * side[1] >= 4 * limits.max_pixels)
    assert sizes == {"large.jpg": kept, "large.png": (1600, 1200), "small.jpg": (170, 128)}
    assert check_input({"image": tmp_path / "large.jpg"}, limits)["image"].size == kept
    reduced, whole = model.encode([str(tmp_path / "large.jpg"), Image.open(tmp_path / "large.jpg")])
    assert reduced @ whole > 0.998  # the random LFM2-VL moves most, with any way of reducing: 0.9988


def test_a_damaged_exif_block_says_nothing(tmp_path):
    """Neither in the file nor in a copy of the image, which keeps the block."""
    image(112, 56).save(tmp_path / "photo.jpg", exif=b"Exif\0\0nonsense")
    file = Image.open(tmp_path / "photo.jpg")
    upright = np.asarray(as_rgb(file))
    assert upright.shape == (56, 112, 3)
    for copy in (file.copy(), as_rgb(file)):
        assert copy.info["exif"]
        assert np.array_equal(as_rgb(copy), upright)


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16", "RGB"])
@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
def test_scans_that_lie_on_their_side_are_read_by_name_as_from_memory(tmp_path, mode, orientation):
    """Pillow maps uncompressed files into memory, with the width that the picture has when it is turned."""
    scan = image(90, 60).convert(mode if mode != "I;16" else "L")
    scan = Image.fromarray(np.asarray(scan).astype(np.uint16) * 257) if mode == "I;16" else scan
    exif = Image.Exif()
    exif[0x0112] = orientation
    scan.save(tmp_path / "scan.tif", exif=exif)
    plain = as_rgb(scan)
    turned = {5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}.get(orientation)
    expected = plain.transpose(getattr(Image.Transpose, turned)) if turned else plain
    for file in (tmp_path / "scan.tif", str(tmp_path / "scan.tif"), io.BytesIO((tmp_path / "scan.tif").read_bytes())):
        assert np.array_equal(read_image(file), expected)
    opened = Image.open(tmp_path / "scan.tif")
    assert np.array_equal(as_rgb(opened), expected) and opened.filename == str(tmp_path / "scan.tif")


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize("tag", [{0x011A: "72"}, {0x0100: "640"}, {}], ids=["XResolution", "ImageWidth", "none"])
def test_photographs_are_turned_whatever_else_their_tags_say(tmp_path, orientation, tag):
    """Pillow's own way writes all tags again, and fails at those of an odd type."""
    exif = Image.Exif()
    for key, value in ({0x0112: orientation} | tag).items():
        exif[key] = value
    photo = image(90, 60)
    photo.save(tmp_path / "photo.png", exif=_odd(exif, tag))
    names = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
    turned = {number: getattr(Image.Transpose, name) for number, name in enumerate(names, 2)}
    expected = photo.transpose(turned[orientation]) if orientation in turned else photo
    found = read_image(tmp_path / "photo.png")
    assert np.array_equal(found, expected) and np.array_equal(as_rgb(found), expected)  # and not turned again


def test_a_picture_that_says_it_was_a_tiff_needs_no_name():
    """As programs copy the format to what they have resized."""
    small = image(90, 60).resize((30, 20))
    small.format = "TIFF"
    assert np.array_equal(as_rgb(small), small)


def _odd(exif, tag):
    """A block whose entries of these tags are texts."""
    entries = [(0x0112, 3, struct.pack("<HH", exif[0x0112], 0))]
    entries += [(key, 2, value.encode().ljust(4, b"\0")) for key, value in tag.items()]
    block = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for key, kind, value in sorted(entries):
        block += struct.pack("<HHI", key, kind, 1 if kind == 3 else 4) + value
    return b"Exif\0\0" + block + bytes(4)


def test_a_dark_pgm_of_16_bits_is_scaled_as_a_png(tmp_path):
    """Pillow scales it to 65,535 whatever its largest number is."""
    for top, value, expected in ((65_535, 200, 1), (65_535, 51_400, 200), (4095, 10, 1), (4095, 4095, 255)):
        pixels = np.full((4, 4), value, ">u2").tobytes()
        (tmp_path / "a.pgm").write_bytes(b"P5 4 4 %d\n" % top + pixels)
        assert set(np.asarray(read_image(tmp_path / "a.pgm")).flat) == {expected}


def test_the_order_of_bytes_does_not_matter():
    bright, dark = np.array([[12, 65_532]]), np.array([[12, 99]])
    assert np.array_equal(as_uint8(bright.astype(">u2")), as_uint8(bright.astype("<u2")))
    for order in "<>":
        with pytest.raises(ValueError, match="uint16 lie between 12 and 99"):
            as_uint8(dark.astype(f"{order}u2"))


def test_premultiplied_grey_is_read():
    grey = Image.merge("LA", [Image.new("L", (4, 4), 100), Image.new("L", (4, 4), 255)])
    assert as_rgb(grey.convert("La")).getpixel((0, 0)) == (100, 100, 100)


def test_a_dark_image_of_16_bits_is_scaled_as_a_bright_one(tmp_path):
    for name, value in (("dark", 200), ("bright", 51_400)):
        Image.fromarray(np.full((4, 4), value, np.uint16)).save(tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert as_rgb(picture).getpixel((0, 0)) == (round(value / 257),) * 3


def test_photographs_are_upright(loaded, tmp_path):
    """Images are turned by their EXIF tag, as in transformers and datasets."""
    picture = image(112, 56)
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for name in ("photo.jpg", "photo.png"):
        picture.save(tmp_path / name, exif=exif)
        upright = loaded["wrapper"].encode([{"image": str(tmp_path / name)}])
        if Version(transformers.__version__) >= Version("5.20"):  # older releases do not turn them
            stock = loaded["stock"].encode([{"image": str(tmp_path / name)}])
            # Of LFM2-VL 1.7e-6 on an Intel Xeon. A picture that is not turned differs by far more.
            assert np.abs(stock - upright).max() <= 5 * TOLERANCE
    turned = picture.transpose(Image.Transpose.ROTATE_270)
    assert np.abs(loaded["wrapper"].encode([turned]) - upright).max() <= TOLERANCE


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
        ({}, "'fps' of a video must be a number from 1e-06 to 1000, got None"),
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


@pytest.mark.parametrize("factor", [1.01, 1.5])
def test_floats_a_little_over_one_have_no_single_meaning(factor):
    """Brightened without clamping: as 0 to 255 they would be black."""
    pixels = np.random.default_rng(0).random((8, 8, 3)).astype(np.float32)
    pixels[0, 0, 0] = 1
    assert as_uint8(pixels).max() == 255
    with pytest.raises(ValueError, match="no single meaning"):
        as_uint8(pixels * factor)
    assert as_uint8(np.float32([[0, 1], [2, 0]])).max() == 2  # whole numbers
    assert as_uint8(pixels * 200).max() == 200


def test_frames_of_several_types_keep_their_ranges():
    frame = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    others = [frame / 255, (frame.astype(np.uint16) * 257), torch.tensor(frame), Image.fromarray(frame)]
    for other in others:
        assert (frames_as_rgb([frame, other]) == frame).all()


def png(bits, colour, row, transparent):
    """A PNG file of 32 x 32 pixels. Pillow writes none of 2 bits, and none of 16 with a transparent colour."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 32, 32, bits, colour, 0, 0, 0)),
        (b"tRNS", transparent),
        (b"IDAT", zlib.compress((b"\0" + row) * 32)),
        (b"IEND", b""),
    ]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("bits", "colour", "row", "clear", "other"),
    [
        (1, 0, b"\0" * 4, 0, 1),
        (2, 0, b"\x55" * 8, 1, 2),
        (4, 0, b"\x77" * 16, 7, 8),
        (8, 0, b"\x64" * 32, 100, 101),
        (16, 0, struct.pack(">H", 30_000) * 32, 30_000, 30_001),
        (16, 2, struct.pack(">HHH", 30_000, 9, 9) * 32, (30_000, 9, 9), (40_000, 9, 9)),
    ],
)
def test_a_transparent_colour_is_white_in_every_depth(bits, colour, row, clear, other):
    """Also the second time that an opened image is read."""
    for transparent, white in ((clear, True), (other, False)):
        values = transparent if isinstance(transparent, tuple) else (transparent,)
        opened = Image.open(io.BytesIO(png(bits, colour, row, struct.pack(f">{len(values)}H", *values))))
        for _ in range(2):
            assert (np.asarray(as_rgb(opened)) == 255).all() == white


def tiff(bits, photometric, content):
    """A TIFF file of 16 x 16 pixels of grey."""
    tags = [(256, 16), (257, 16), (258, bits), (259, 1), (262, photometric), (273, 122), (277, 1), (278, 16)]
    tags.append((279, len(content)))
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + content


def test_grey_of_12_bits_and_grey_whose_zero_is_white():
    values = np.arange(256).reshape(16, 16)
    high, low = values // 16, values % 16
    pairs = [high[:, ::2] * 16 + low[:, ::2], high[:, ::2] * 16 + high[:, 1::2], low[:, 1::2] * 16 + high[:, 1::2]]
    twelve = np.stack(pairs, -1).astype(np.uint8).tobytes()  # 4,095 / 255 times each value, so that the ends are exact
    files = {
        "12 bits": tiff(12, 1, twelve),
        "16 bits": tiff(16, 1, (values * 257).astype("<u2").tobytes()),
        "16 bits, zero is white": tiff(16, 0, (65_535 - values * 257).astype("<u2").tobytes()),
        "8 bits, zero is white": tiff(8, 0, (255 - values).astype(np.uint8).tobytes()),
    }
    for name, content in files.items():
        read = np.asarray(read_image(io.BytesIO(content)))[..., 0].astype(int)
        assert np.abs(read - values).max() <= (1 if name == "12 bits" else 0), name
        assert (read[0, 0], read[-1, -1]) == (0, 255), name
