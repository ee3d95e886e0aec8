"""Inputs: their sizes in tokens, their texts and hashes, and those that are refused."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from sentence_transformers import SentenceTransformer
from support import pictures, tiny
from support.inputs import TOLERANCE
from support.media import image, video

from btok_hf import BTokSentenceTransformer, read_video
from btok_hf.content import content_hash
from btok_hf.input_kinds import text_of
from btok_hf.lengths import estimate_tokens
from btok_hf.media import video_input


def test_bad_inputs_are_refused_and_shown(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG not really")
    nan = np.full((3, 60, 60), np.nan, np.float32)
    cases = [
        ({"image": str(tmp_path / "missing.png")}, FileNotFoundError, "missing.png' does not exist"),
        (str(tmp_path / "missing.png"), FileNotFoundError, "missing.png' does not exist"),
        ({"video": str(tmp_path / "missing.mp4")}, FileNotFoundError, "missing.mp4' does not exist"),
        ({"image": str(broken)}, ValueError, "is not an image that Pillow can read"),
        (str(broken), ValueError, "is not an image that Pillow can read"),
        (image(10, 60), ValueError, "10 x 60 pixels is smaller than one patch of 14"),
        ({"image": [image(60, 60), image(60, 5)], "text": "x"}, ValueError, "smaller than one patch"),
        ({"image": nan}, ValueError, "NaN"),
        ({"picture": image(60, 60)}, ValueError, r"unknown keys \['picture'\]"),
        ({"image": None, "text": "x"}, ValueError, "'image' is None"),
        ({"text": 3}, ValueError, "'text' must be a string"),
        ({}, ValueError, "unknown keys"),
    ]
    for item, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            model.encode(["fine", item])
        assert "Input 1 " in str(caught.value)
    for empty in ("", "  ", {"text": ""}):
        for loader in (model, SentenceTransformer(repo, device="cpu")):
            with pytest.raises(Exception, match="An input is empty"):
                loader.encode(["fine", empty])
    broken_clip = tmp_path / "broken.mp4"
    broken_clip.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be decoded"):
        model.encode([{"video": str(broken_clip)}])


def test_a_sentence_that_ends_like_a_file_is_a_sentence(repo):
    model = BTokSentenceTransformer(repo, device="cpu")
    assert model.encode(["how do I open photo.png"]).shape == (1, 64)
    stock = SentenceTransformer(repo, device="cpu")
    np.testing.assert_allclose(model.encode("open a.png please"), stock.encode("open a.png please"), atol=TOLERANCE)


# ---------------------------------------------------------------- one vector, whatever the form


@pytest.fixture(scope="module")
def both(repos):
    """The wrapper, and stock Sentence-Transformers, which gets the picture that a person sees."""
    return BTokSentenceTransformer(repos["qwen2_vl"], device="cpu"), SentenceTransformer(
        repos["qwen2_vl"], device="cpu"
    )


def assert_seen_as(both, item, picture):
    wrapper, stock = both
    (expected,) = stock.encode([{"image": picture}])
    (actual,) = wrapper.encode([item])
    assert np.abs(actual - expected).max() <= TOLERANCE


# bf16 and half hold the values of a picture only roughly, so their picture is what they hold.
EXACT = [name for name in pictures.forms() if name not in ("bfloat16 to 255", "half")]


@pytest.mark.parametrize("form", EXACT)
def test_a_picture_has_one_vector_in_every_form(both, form):
    assert_seen_as(both, pictures.forms()[form], PILImage.fromarray(pictures.colours()))


@pytest.mark.parametrize("form", ["bfloat16 to 255", "half"])
def test_rounded_tensors(both, form):
    tensor = pictures.forms()[form]
    values = tensor.float().permute(1, 2, 0).numpy() * (255 if form == "half" else 1)
    assert_seen_as(both, tensor, PILImage.fromarray(np.rint(values).astype(np.uint8)))


def test_truth_values_are_black_and_white(both):
    mask = pictures.colours()[..., 0] > 100
    grey = np.repeat(mask[..., None].astype(np.uint8) * 255, 3, 2)
    assert_seen_as(both, mask, PILImage.fromarray(grey))
    assert_seen_as(both, torch.from_numpy(mask)[None], PILImage.fromarray(grey))


@pytest.mark.parametrize("name", ["rgba_magenta.png", "la.png", "rgba.webp"])
def test_transparency_is_white(both, name):
    with PILImage.open(pictures.MEDIA / name) as image:
        pixels = np.asarray(image.convert("RGBA"))
    seen = pictures.on_white(pixels[..., :3], pixels[..., 3])
    for item in (str(pictures.MEDIA / name), pictures.MEDIA / name, PILImage.open(pictures.MEDIA / name), pixels):
        assert_seen_as(both, item, seen)
        assert_seen_as(both, {"image": item}, seen)


def test_transparent_palettes_are_white(both, tmp_path):
    palette = PILImage.fromarray(pictures.colours()).quantize(16)
    palette.info["transparency"] = 3
    palette.save(tmp_path / "palette.png")
    indices, colours = np.asarray(palette), np.array(palette.getpalette()[: 3 * 16]).reshape(-1, 3)
    seen = pictures.on_white(colours[indices], np.where(indices == 3, 0, 255).astype(np.uint8))
    for item in (palette, tmp_path / "palette.png"):
        assert_seen_as(both, item, seen)


def test_open_photographs_are_upright(both):
    path = pictures.MEDIA / "exif.jpg"
    with PILImage.open(path) as image:
        orientation = image.getexif()[0x0112]
        turned = {6: PILImage.Transpose.ROTATE_270, 8: PILImage.Transpose.ROTATE_90, 3: PILImage.Transpose.ROTATE_180}
        seen = PILImage.fromarray(np.asarray(image.convert("RGB"))).transpose(turned[orientation])
    message = [{"role": "user", "content": [{"type": "image", "image": PILImage.open(path)}]}]
    for item in (PILImage.open(path), str(path), {"image": PILImage.open(path)}, message):
        assert_seen_as(both, item, seen)


@pytest.mark.parametrize("name", ["g16.png", "g12.png"])
def test_16_bit_grey_is_scaled(both, name):
    values = np.asarray(PILImage.open(pictures.MEDIA / name)).astype(np.float64)
    grey = np.rint(values / 257).astype(np.uint8)
    seen = PILImage.fromarray(np.repeat(grey[..., None], 3, 2))
    integers = PILImage.fromarray(np.asarray(PILImage.open(pictures.MEDIA / name)).astype(np.int32))
    for item in (pictures.MEDIA / name, PILImage.open(pictures.MEDIA / name), integers):
        assert_seen_as(both, item, seen)


@pytest.mark.parametrize("name", ["scan.tif", "scan.jfif", "scan.avif", "scan.jp2"])
def test_files_are_files_whatever_their_suffix(both, name, tmp_path):
    with PILImage.open(pictures.MEDIA / name) as image:
        seen = image.convert("RGB")
    odd = tmp_path / "scan.of.today"
    odd.write_bytes((pictures.MEDIA / name).read_bytes())
    for item in (str(pictures.MEDIA / name), pictures.MEDIA / name, str(odd), odd, {"image": odd}):
        assert_seen_as(both, item, seen)


def test_cells_of_datasets_and_data_addresses(both, tmp_path):
    seen = PILImage.fromarray(pictures.colours())
    seen.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    cell = {"bytes": content, "path": "a.png"}
    address = "data:image/png;base64," + base64.b64encode(content).decode()
    cells = (cell, {"image": cell}, {"image": {"bytes": None, "path": str(tmp_path / "a.png")}})
    for item in (*cells, address, {"image": address}):
        assert_seen_as(both, item, seen)


@pytest.mark.parametrize("backbone", tiny.WITH_VIDEO)
def test_a_video_has_one_vector_in_every_form(repos, backbone):
    wrapper, stock = BTokSentenceTransformer(repos[backbone], device="cpu"), SentenceTransformer(repos[backbone])
    frames = np.stack([np.roll(pictures.colours(), 14 * index, 1) for index in range(4)])
    (expected,) = stock.encode([{"video": video_input(frames, 2.0)}])
    for form in (
        frames,
        np.moveaxis(frames, -1, 1),
        torch.from_numpy(frames / 255),
        {"video": list(frames)},
        {"video": [PILImage.fromarray(frame) for frame in frames]},
        {"video": [torch.from_numpy(frame).permute(2, 0, 1) for frame in frames]},
        {"video": {"array": frames / 255, "video_metadata": video_input(frames, 2.0)["video_metadata"]}},
        {"array": frames},
    ):
        (actual,) = wrapper.encode([form])
        assert np.abs(actual - expected).max() <= TOLERANCE


def test_a_video_of_one_frame_is_embedded_by_every_backbone(repos):
    frame = pictures.colours()
    for backbone in tiny.WITH_VIDEO:
        model = BTokSentenceTransformer(repos[backbone], device="cpu")
        twice = model.encode([{"video": np.stack([frame, frame])}])
        with_metadata = {"video": video_input(frame[None], 2.0)}
        for one in ({"video": [frame]}, frame[None], with_metadata, {"video": pictures.MEDIA / "n1.mp4"}):
            vector = model.encode([one])
            assert np.isfinite(vector).all() and vector.any()
        for one in (frame[None], with_metadata):
            assert np.abs(model.encode([one]) - twice).max() <= TOLERANCE


# ---------------------------------------------------------------- refused by name


def part(**content):
    """A chat message with one part."""
    return [{"role": "user", "content": [content]}]


@pytest.mark.parametrize("backbone", [name for name in tiny.BACKBONES if name not in tiny.WITH_VIDEO])
def test_a_backbone_without_video_refuses_it(repos, backbone):
    wrapper, stock = BTokSentenceTransformer(repos[backbone], device="cpu"), SentenceTransformer(repos[backbone])
    frames = np.stack([pictures.colours()] * 2)
    messages = part(type="video", video=frames)
    for item in (frames, {"video": pictures.MEDIA / "n1.mp4"}, {"video": frames, "text": "a"}, messages):
        with pytest.raises(ValueError, match=r"^Input 0 .*this model takes no video; give some of its frames as"):
            wrapper.encode([item])
    with pytest.raises(ValueError, match="Modality 'video' is not supported"):
        stock.encode([{"video": frames}])
    with pytest.raises(Exception, match="This model takes no video"):  # Jinja's
        stock.encode([messages])


WRONG = [
    (pictures.colours() / 127.5 - 1, ValueError, r"float64 lie between -1 and .* no single meaning"),
    (pictures.colours().astype(np.int32) * 9, ValueError, "int32 lie between 0 and"),
    (pictures.colours().astype(np.uint16), ValueError, "uint16 lie between"),
    (np.zeros((0, 56, 3)), ValueError, "has no pixels"),
    (np.zeros((56, 56, 3), complex), ValueError, "type complex128"),
    (np.zeros((56, 56, 2), np.uint8), ValueError, r"shape \(56, 56, 2\) is no image"),
    (np.zeros((3, 56, 3), np.uint8), ValueError, "channels first or last"),
    (np.zeros((10, 56, 3), np.uint8), ValueError, "56 x 10 pixels is smaller than one patch of 14"),
    (np.zeros((1, 1, 1, 56, 3), np.uint8), ValueError, "is no image"),
    (np.full((56, 56, 3), np.inf), ValueError, "NaN or infinite"),
    ({"image": PILImage.new("RGB", (6000, 28))}, ValueError, "more than 200 times as long"),
    ({"video": []}, ValueError, "'video' is an empty list"),
    ({"video": np.zeros((0, 56, 56, 3), np.uint8)}, ValueError, "the video has no frames"),
    ({"video": [np.zeros((56, 56, 3), np.uint8), np.zeros((28, 56, 3), np.uint8)]}, ValueError, "differ in shape"),
    ({"video": np.zeros((4, 8, 8, 3), np.uint8)}, ValueError, "8 x 8 pixels is smaller"),
    ({"image": [], "text": "a"}, ValueError, "'image' is an empty list"),
    ({"text": ""}, ValueError, "An input is empty"),
    ({"text": [" ", "\n"]}, ValueError, "An input is empty"),
    ("broken \ud83d here", ValueError, "lone surrogate"),
    ({"text": "\udcff"}, ValueError, "lone surrogate"),
    ([{"role": "user", "content": "half \ud800"}], ValueError, "lone surrogate"),
    ([{"role": "user", "content": [{"type": "text", "text": "\t"}]}], ValueError, "An input is empty"),
    ([{"role": "system", "content": "Find it."}, {"role": "user", "content": " "}], ValueError, "An input is empty"),
    (
        [{"role": "user", "content": [{"type": "image", "image": np.zeros((8, 8, 3), np.uint8)}]}],
        ValueError,
        "smaller than one patch",
    ),
    ([{"role": "user", "content": 3}], ValueError, "must be a text or a list of parts"),
    ("IMG_0012.jpg", FileNotFoundError, r'does not exist. If it is a text, give it as \{"text": …\}'),
    ("example.com/a.png", FileNotFoundError, r'\{"text": …\}'),
    (Path("nothing.tif"), FileNotFoundError, "nothing.tif' does not exist"),
    (Path("no suffix"), FileNotFoundError, "does not exist"),
    (b"bytes", ValueError, r"type bytes. Decode an image with PIL.Image.open"),
    (None, ValueError, "cannot be of type NoneType"),
    (3.5, ValueError, "cannot be of type float"),
    (["two", "texts"], ValueError, r'cannot be of type list.*\{"text": \[…\]\}'),
    ({"image": 5}, ValueError, "got int"),
    ({"video": 5}, ValueError, "got int"),
    ("http://127.0.0.1:9/a.png", ValueError, "cannot be downloaded"),
    (torch.empty(56, 56, 3, device="meta"), ValueError, "on device meta has no pixels that can be read"),
    (torch.zeros(56, 56, 3).to_sparse(), ValueError, "Use a dense tensor"),
    (np.ma.masked_array(np.zeros((56, 56, 3), np.uint8)), ValueError, "masked array"),
    ({"video": ["a.png", 3]}, FileNotFoundError, "does not exist"),
    ({"video": {"array": "frames"}}, ValueError, "must be an array or a list, got str"),
    ({"video": {"array": [3, 4]}}, ValueError, "must be images or arrays, got int"),
    ([{"role": "user", "content": "a"}, 3], ValueError, "a chat message must be a dict"),
    ([{"role": 3, "content": "a"}], ValueError, "a chat message must be a dict"),
    (part(type="audio", audio="a.wav"), ValueError, "part of type 'audio'; use text, image, video"),
    (part(type="image"), ValueError, r"one of the keys image, url, path, base64, got \[\]"),
    (part(type="image", image="a.png", url="b.png"), ValueError, r"got \['image', 'url'\]"),
    (part(type="video", video="missing.mp4"), FileNotFoundError, "missing.mp4' does not exist"),
    (part(type="video", url="http://127.0.0.1:9/v.mp4"), ValueError, "cannot be downloaded"),
    (part(type="image", base64="AAAA"), ValueError, "is not an image that Pillow can read"),
    ({"image": b"bytes"}, ValueError, "got bytes"),
    ({"bytes": {}, "path": None}, ValueError, "'bytes' must be the content of a file, got dict"),
    ({"video": {"bytes": None, "path": None}}, ValueError, "'video' must be frames"),
    ({"image": "data:image/png;base64,AAAA"}, ValueError, "is not an image that Pillow can read"),
]


@pytest.mark.parametrize("item, error, message", WRONG, ids=[message for *_, message in WRONG])
def test_what_cannot_be_read_is_refused_by_place_and_reason(both, item, error, message):
    with pytest.raises(error, match=message) as caught:
        both[0].encode(["a long first text, which encode runs before the others", "fine", item, "x"])
    assert str(caught.value).startswith("Input 2 ")


def test_files_that_are_no_images(both, tmp_path):
    (tmp_path / "report.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / "notes").write_text("words")
    (tmp_path / "cut.png").write_bytes((pictures.MEDIA / "rgba_magenta.png").read_bytes()[:300])
    closed = PILImage.open(pictures.MEDIA / "scan.tif")
    closed.close()
    for item, message in (
        (tmp_path / "report.pdf", "is a PDF. Render its pages"),
        (str(tmp_path / "report.pdf"), "is a PDF. Render its pages"),
        (tmp_path / "notes", "is not an image that Pillow can read"),
        (tmp_path, "is a folder"),
        (tmp_path / "cut.png", "cannot be decoded"),
        (PILImage.open(tmp_path / "cut.png"), "closed or truncated"),
        (closed, "closed or truncated"),
    ):
        with pytest.raises(ValueError, match=message):
            both[0].encode([item])


def test_scans_beyond_pillows_limit_are_named(both, tmp_path, monkeypatch):
    PILImage.new("RGB", (200, 100)).save(tmp_path / "scan.png")
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 5000)
    with pytest.raises(ValueError, match=r"scan.png' is larger than Pillow allows .*raise PIL.Image.MAX_IMAGE_PIXELS"):
        both[0].encode([tmp_path / "scan.png"])


def test_texts_that_look_like_something_else_are_texts(both, tmp_path, monkeypatch):
    """Addresses of pages, strings in {"text": …}, and names of folders."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "LICENSE").write_text("words")
    wrapper, stock = both
    texts = ["https://example.com/page", "https://youtu.be/xyz", "data: the new oil", "https://[[x", "data", "a.b"]
    texts += ["read photo.png now"]
    expected = stock.encode([[{"role": "user", "content": text}] for text in texts])
    assert np.abs(wrapper.encode(texts) - expected).max() <= TOLERANCE
    named = ["IMG_0012.jpg", "LICENSE", "https://example.com/a.png"]
    expected = stock.encode([[{"role": "user", "content": text}] for text in named])
    assert np.abs(wrapper.encode([{"text": text} for text in named]) - expected).max() <= TOLERANCE
    with pytest.raises(ValueError, match="not an image that Pillow can read"):
        wrapper.encode(["LICENSE"])


# ---------------------------------------------------------------- found by `make fuzz`


@pytest.mark.parametrize("text", ["https://127.0.0.1:9/a.png", "{folder}/seen.png", "<|btok_0|>"])
def test_a_text_among_texts_is_never_read(both, tmp_path, text):
    """Two texts of a dict are no pair of Sentence-Transformers, which would read files and addresses in them."""
    image(60, 60).save(tmp_path / "seen.png")
    text = text.format(folder=tmp_path)
    features = both[0].preprocess([{"text": [text, "more"]}])
    assert "pixel_values" not in features
    expected = both[0].preprocess([[{"role": "user", "content": [{"type": "text", "text": f"{text} more"}]}]])
    assert torch.equal(features["input_ids"], expected["input_ids"])


def test_a_list_of_videos_may_hold_one_array(both):
    frames = np.stack([pictures.colours()] * 2)
    expected = both[0].encode([{"video": frames}])
    np.testing.assert_array_equal(both[0].encode([{"video": [frames]}]), expected)


def test_any_error_of_a_decoder_is_that_of_its_file(both, tmp_path, monkeypatch):
    """Pillow answers a damaged AVIF with a RuntimeError."""
    content = bytearray((pictures.MEDIA / "scan.avif").read_bytes())
    content[content.index(b"pitm")] ^= 0xFF
    with pytest.raises(RuntimeError):
        PILImage.open(io.BytesIO(content))
    (tmp_path / "broken.avif").write_bytes(content)
    with pytest.raises(ValueError, match=r"^Input 0 .*broken.avif"):
        both[0].encode([tmp_path / "broken.avif"])


@pytest.mark.parametrize("backbone", tiny.WITH_VIDEO)
@pytest.mark.parametrize("name", ["rotated.mp4", "cut.mp4", "n1.mp4"])
def test_a_video_file_is_the_same_in_messages(repos, backbone, name):
    wrapper = BTokSentenceTransformer(repos[backbone], device="cpu")
    path = pictures.MEDIA / name
    (expected,) = wrapper.encode([{"video": path, "text": "hi"}])
    text = {"type": "text", "text": "hi"}
    for video_part in (
        {"type": "video", "video": str(path)},
        {"type": "video", "path": path},
        {"type": "video", "video": read_video(path)},
        {"type": "video", "video": {"bytes": path.read_bytes(), "path": None}},
    ):
        messages = [{"role": "user", "content": [video_part, text]}]
        for batch in ([messages], [{"video": video(3)}, messages, "a text", [{"role": "user", "content": "x"}]]):
            actual = wrapper.encode(batch)[min(1, len(batch) - 1)]
            assert np.abs(actual - expected).max() <= TOLERANCE


def test_a_file_is_one_for_all_parts_of_the_library(both, tmp_path, monkeypatch):
    """Also if its name has a space or no suffix: `encode` reads it, so nothing else may take it for a text."""
    monkeypatch.chdir(tmp_path)
    processor, expected = both[0].processor, both[0].encode([image(56, 84)])
    size = estimate_tokens(image(56, 84), processor)
    for name in ("a.png", "my picture.png", "picture"):
        image(56, 84).save(name, "PNG")
        Path("copy of " + name).write_bytes(Path(name).read_bytes())
        np.testing.assert_allclose(both[0].encode([name]), expected, atol=TOLERANCE)
        assert text_of(name) is None and estimate_tokens(name, processor) == size
        assert content_hash(name) == content_hash("copy of " + name) == content_hash({"image": name})


def test_frames_may_be_files(both, tmp_path):
    frames = [image(56, 56, seed) for seed in range(4)]
    for number, frame in enumerate(frames):
        frame.save(tmp_path / f"{number}.png")
    names = [str(tmp_path / f"{number}.png") for number in range(4)]
    cells = [{"bytes": Path(name).read_bytes(), "path": None} for name in names]
    expected = both[0].encode([{"video": frames}])
    for given in (names, [Path(name) for name in names], cells):
        message = [{"role": "user", "content": [{"type": "video", "video": given}]}]
        for item in ({"video": given}, message):
            np.testing.assert_allclose(both[0].encode([item]), expected, atol=TOLERANCE)


@pytest.mark.parametrize("seen", [{"array": np.zeros((4, 56, 56, 3), np.uint8)}])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"text": "invoice"}, r"a video has the keys \['text'\], which are not read"),
        ({"fps": 2.0}, r"a video has the keys \['fps'\], which are not read"),
    ],
)
def test_what_stands_beside_frames_is_not_lost(both, seen, more, message):
    for item in ({**seen, **more}, {"video": {**seen, **more}}):
        with pytest.raises(ValueError, match=message):
            both[0].encode([item])


def test_what_stands_beside_a_message_is_not_lost(both):
    picture = image(56, 56)
    with pytest.raises(ValueError, match=r"a chat message has the keys \['image'\], which are not read"):
        both[0].encode([[{"role": "user", "content": "hi", "image": picture}]])
    with pytest.raises(ValueError, match=r"a part of type image has the keys \['text'\], which are not read"):
        both[0].encode([[{"role": "user", "content": [{"type": "image", "image": picture, "text": "x"}]}]])
    filled = {"role": "user", "content": [{"type": "text", "text": "hi", "image": None, "url": ""}], "tool_calls": []}
    np.testing.assert_allclose(both[0].encode([[filled]])[0], both[0].encode("hi"), atol=TOLERANCE)


def test_base64_may_have_its_address_already(both):
    content = io.BytesIO()
    image(56, 56).save(content, "PNG")
    coded = base64.b64encode(content.getvalue()).decode()
    for value in (coded, "data:image/png;base64," + coded):
        item = [{"role": "user", "content": [{"type": "image", "base64": value}]}]
        np.testing.assert_allclose(both[0].encode([item]), both[0].encode([image(56, 56)]), atol=TOLERANCE)


def test_frames_are_known_by_their_content(both, tmp_path):
    """A frame that is stored with the name of its clip, frames of several formats, and a clip in bytes."""
    large = image(600, 400)
    large.save(tmp_path / "a.jpg", quality=95)
    large.save(tmp_path / "a.png")
    clip = both[0].transformer.preprocess([{"video": [tmp_path / "a.jpg", tmp_path / "a.png"]}])
    assert len(clip["video_grid_thw"]) == 1 and clip["video_grid_thw"][0, 0] == 1
    cell = {"bytes": (tmp_path / "a.png").read_bytes(), "path": "clip.mp4"}
    assert "image_grid_thw" in both[0].transformer.preprocess([cell])  # as a video of one frame it has the same vector
    content = io.BytesIO()
    image(56, 56).save(content, "GIF", save_all=True, append_images=[image(56, 56, 1)], duration=100)
    gif = {"bytes": content.getvalue(), "path": None}
    (tmp_path / "a.gif").write_bytes(content.getvalue())
    for clips in ([gif, gif], [tmp_path / "a.gif", str(tmp_path / "a.gif")]):
        assert len(both[0].transformer.preprocess([{"video": clips}])["video_grid_thw"]) == 2


def test_the_longest_shape_that_qwen_takes_is_embedded(both):
    longest = PILImage.new("RGB", (28 * 200, 28))
    assert both[0].encode([longest]).shape == (1, 64)
    with pytest.raises(ValueError, match="more than 200 times as long"):
        both[0].encode([PILImage.new("RGB", (28 * 200 + 1, 28))])
