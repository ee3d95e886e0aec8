"""Random pictures, videos and arrays: valid files of many kinds, and what remains of them after damage."""

import base64
import io
import json
from functools import cache
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, PngImagePlugin

from benchmarks import ROOT

FILES = ROOT / "tests" / "data" / "media"
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P", "L", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I", "F"),
    "BMP": ("1", "L", "P", "RGB"),
    "AVIF": ("RGB", "RGBA"),
    "JPEG2000": ("L", "RGB", "RGBA"),
    "ICO": ("RGBA",),
    "PPM": ("1", "L", "RGB", "I;16", "F"),
    "TGA": ("L", "LA", "P", "RGB", "RGBA"),
}
SUFFIXES = (".png", ".jpg", ".webp", ".gif", ".tif", ".bmp", ".avif", ".jp2", ".heic", ".bin", "")
DTYPES = "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 float32 float64 longdouble complex64 object"
DTYPES = (*DTYPES.split(), "datetime64[s]", "S3", "U3", "V4")
TORCH_DTYPES = (torch.uint8, torch.bool, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float32)
TORCH_DTYPES += (torch.float64, torch.complex64, torch.uint16, torch.float8_e4m3fn)


def pick(rng, choices):
    """One of a sequence, as it is (numpy would make an array of it)."""
    return choices[int(rng.integers(len(choices)))]


def picture(rng, mode=None):
    """A random PIL image of any mode and of any size that is cheap."""
    width, height = (int(pick(rng, (1, 5, 16, 28, 40, 57, 64, 100, 300))) for _ in "wh")
    mode = mode or pick(rng, ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB",
                              "HSV", "I", "F", "I;16", "I;16B", "I;16L"))  # fmt: skip
    if mode.startswith("I;16"):
        return Image.frombytes(mode, (width, height), rng.bytes(2 * width * height))
    if mode in ("I", "F"):
        top = pick(rng, (1, 255, 4095, 65535, 2**31 - 1))
        values = rng.uniform(0 if rng.random() < 0.8 else -top, top, (height, width))
        return Image.fromarray(values.astype(np.int32 if mode == "I" else np.float32))
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if mode in ("P", "PA"):
        image = image.quantize(int(rng.integers(2, 257)))
        image = image.convert("PA") if mode == "PA" else image
        if rng.random() < 0.5:
            image.info["transparency"] = int(rng.integers(256)) if rng.random() < 0.5 else rng.bytes(16)
        return image
    if mode in ("LA", "La", "RGBA", "RGBa"):
        alpha = Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8))
        image = image.convert("LA" if mode in ("LA", "La") else "RGBA")
        image.putalpha(alpha)
    if mode == "LAB":  # Pillow converts only from files
        return Image.frombytes("LAB", image.size, rng.bytes(3 * width * height))
    return image.convert(mode)


def encoded(rng):
    """The bytes of a valid image file."""
    if rng.random() < 0.2:
        return pick(rng, [path for path in sorted(FILES.iterdir()) if path.suffix not in (".mp4", ".md")]).read_bytes()
    form = pick(rng, tuple(MODES))
    image, options = picture(rng, pick(rng, MODES[form])), {}
    if form in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF") and rng.random() < 0.4:
        exif = image.getexif()
        exif[0x0112] = pick(rng, (1, 2, 3, 5, 6, 8, 0, 9, 77))
        options["exif"] = exif.tobytes() if rng.random() < 0.8 else b"Exif\x00\x00" + rng.bytes(40)
    if form == "PNG" and rng.random() < 0.3:
        text = PngImagePlugin.PngInfo()
        text.add_text("note", "x" * int(pick(rng, (10, 5000, 2_000_000))), zip=True)
        options["pnginfo"] = text
    if form == "JPEG":
        options["progressive"] = bool(rng.random() < 0.3)
        options["quality"] = int(rng.integers(1, 101))
    if form in ("PNG", "GIF", "WEBP", "TIFF") and rng.random() < 0.2:
        options |= {"save_all": True, "append_images": [picture(rng, image.mode) for _ in range(2)]}
    file = io.BytesIO()
    try:
        image.save(file, form, **options)
    except Exception:  # a writer that does not know the mode or the size
        picture(rng, "RGB").save(file, "PNG")
    return file.getvalue()


def damaged(rng, content, other):
    """A file after an accident: cut, flipped bits, lost or doubled pieces, wrong numbers, another file's head."""
    content = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        if not content:
            break
        start = int(rng.integers(len(content)))
        # Headers are where most decisions are made.
        start = min(start, int(rng.integers(200))) if rng.random() < 0.5 else start
        kind = int(rng.integers(7))
        if kind == 0:
            del content[start:]
        elif kind == 1:
            for place in rng.integers(start, len(content), int(pick(rng, (1, 1, 4, 50)))):
                content[place] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            del content[start : start + int(rng.integers(1, 64))]
        elif kind == 3:
            content[start:start] = content[start : start + int(rng.integers(1, 64))]
        elif kind == 4:
            number = pick(rng, (0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 100_000, 20_000))
            content[start : start + 4] = number.to_bytes(4, pick(rng, ("big", "little")))
        elif kind == 5:
            content[:start] = other[:start]
        else:
            content[start : start + 16] = rng.bytes(16)
    return bytes(content)


def image_bytes(rng):
    """The bytes of an image file, in two of three cases damaged."""
    content = encoded(rng)
    return content if rng.random() < 0.33 else damaged(rng, content, encoded(rng))


def image_forms(rng, content, folder):
    """The bytes of an image in one of the forms in which users hand it over."""
    kind = int(rng.integers(7))
    if kind < 3:
        path = folder / f"a{pick(rng, SUFFIXES)}"
        path.write_bytes(content)
        return (path, str(path), {"image": str(path)})[kind]
    if kind == 3:
        try:
            return Image.open(io.BytesIO(content))
        except Exception:  # Pillow's own errors at opening are not the library's
            return {"bytes": content, "path": None}
    if kind == 4:
        return {"bytes": content, "path": "a.png"}
    address = "data:image/png;base64," + base64.b64encode(content).decode()
    if kind == 5:
        return address
    return [{"role": "user", "content": [{"type": "image", "base64": base64.b64encode(content).decode()}]}]


def array(rng):
    """An array or tensor of any type, shape, range and layout."""
    axes = int(pick(rng, (0, 1, 2, 2, 3, 3, 3, 3, 4, 4, 5)))
    shape = [int(pick(rng, (0, 1, 2, 3, 4, 5, 16, 30, 40, 56))) for _ in range(axes)]
    if axes >= 2 and rng.random() < 0.8:
        shape = [max(size, 30) for size in shape]
    if axes >= 3 and rng.random() < 0.85:
        shape[pick(rng, (-1, -3))] = int(pick(rng, (1, 3, 3, 4)))
    low, high = pick(
        rng, ((0, 1), (0, 1), (0, 255), (0, 255), (0, 255), (-1, 1), (0, 65535), (-300, 1e9), (0, 1e-9), (127, 127))
    )
    values = rng.uniform(low, high, shape)
    if values.size and rng.random() < 0.1:
        values.flat[0] = pick(rng, (np.nan, np.inf, -np.inf))
    if rng.random() < 0.4:
        return _tensor(rng, values)
    with np.errstate(all="ignore"):
        if rng.random() < 0.75:
            values = values.astype(pick(rng, ("uint8", "float32", "float64", "uint16", "bool")))
        else:
            values = _typed(values, pick(rng, DTYPES))
    layout = int(rng.integers(6))
    if layout == 0 and values.ndim:
        values = values[:: -1 if rng.random() < 0.5 else 2]
    elif layout == 1:
        values = np.asfortranarray(values)
    elif layout == 2:
        values.setflags(write=False)
    elif layout == 3:
        values = np.ma.masked_array(values, mask=rng.random(values.shape) < 0.3)
    elif layout == 4 and values.dtype.kind in "iuf":
        values = values.astype(values.dtype.newbyteorder(">"))
    return values


def _typed(values, dtype):
    if dtype == "V4":
        return np.zeros(values.shape, dtype)
    if dtype.startswith("datetime"):
        return np.nan_to_num(values).astype("int64").astype(dtype)
    return values.astype(dtype)


def _tensor(rng, values):
    tensor = torch.from_numpy(np.array(values))
    dtype = pick(rng, TORCH_DTYPES)
    tensor = tensor.to(dtype)
    kind = int(rng.integers(6))
    if kind == 0 and (dtype.is_floating_point or dtype.is_complex) and dtype != torch.float8_e4m3fn:
        return tensor.requires_grad_()
    if kind == 1:
        return tensor.to("meta")
    if kind == 2 and tensor.ndim > 1:
        return tensor.transpose(0, -1)
    if kind == 3 and tensor.ndim and tensor.element_size() < 16 and rng.random() < 0.3:
        return tensor.to_sparse() if dtype == torch.float32 else tensor
    return tensor


@cache
def _videos():
    files = [path.read_bytes() for path in sorted(FILES.glob("*.mp4"))]
    rng = np.random.default_rng(0)
    for form, codec in (("mp4", "mpeg4"), ("webm", "libvpx-vp9"), ("avi", "mjpeg"), ("mkv", "ffv1")):
        file = io.BytesIO()
        with av.open(file, "w", format={"mkv": "matroska"}.get(form, form)) as container:
            stream = container.add_stream(codec, rate=8)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for _ in range(6):
                pixels = np.kron(rng.integers(0, 255, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
        files.append(file.getvalue())
    return files


def video_bytes(rng):
    """The bytes of a video file, mostly damaged."""
    content, other = pick(rng, _videos()), pick(rng, _videos())
    return content if rng.random() < 0.15 else damaged(rng, content, other)


def video(rng, folder):
    """A video file, mostly damaged, in one of its forms."""
    content = video_bytes(rng)
    kind = int(rng.integers(5))
    path = folder / f"v{pick(rng, ('.mp4', '.webm', '.avi', '.mkv', '.MOV'))}"
    path.write_bytes(content)
    if kind == 3:
        return {"video": {"bytes": content, "path": None}}
    if kind == 4:
        return {"video": "data:video/mp4;base64," + base64.b64encode(content).decode()}
    message = [{"role": "user", "content": [{"type": "video", "video": str(path)}]}]
    return (path, {"video": str(path), "text": "what happens"}, message)[kind]


def pixels(rng):
    """A valid picture as uint8 of shape (height, width, 3)."""
    height, width = (int(rng.integers(30, 90)) for _ in "hw")
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def same_picture(rng, folder):
    """One picture in many forms, each of which must give the same checked input."""
    array = pixels(rng)
    image, file = Image.fromarray(array), io.BytesIO()
    image.save(file, "PNG")
    content = file.getvalue()
    path: Path = folder / "same.png"
    path.write_bytes(content)
    encoded = base64.b64encode(content).decode()
    first = torch.from_numpy(array).permute(2, 0, 1)
    return [
        {"image": image}, image, image.convert("RGBA"), array, array[..., ::-1][..., ::-1], np.asfortranarray(array),
        array.astype(np.float32), array / 255, first, first.float() / 255, first.double(), first.to(torch.int32),
        path, str(path), {"image": [path]}, {"bytes": content, "path": None}, {"bytes": None, "path": str(path)},
        "data:image/png;base64," + encoded, Image.open(path), Image.open(io.BytesIO(content)),
        np.dstack([array, np.full(array.shape[:2], 255, np.uint8)]),
        {"role": "user", "content": [{"type": "image", "image": image}]},
        [{"role": "user", "content": [{"type": "image", "path": str(path)}]}],
        [{"role": "user", "content": [{"type": "image", "base64": encoded}]}],
    ]  # fmt: skip


def same_video(rng, folder):
    """Frames of one video in many forms."""
    frames = np.stack([np.roll(pixels(np.random.default_rng(7)), int(step), 1) for step in rng.integers(0, 9, 3)])
    tensor, metadata = torch.from_numpy(frames), {"fps": 2.0, "total_num_frames": 3}
    message = {"role": "user", "content": [{"type": "video", "video": frames}]}
    return [
        {"video": frames}, frames, tensor, tensor.permute(0, 3, 1, 2), tensor.float() / 255, {"array": frames},
        {"array": list(frames), "video_metadata": None}, {"video": list(frames)}, {"video": [frames]},
        {"video": [Image.fromarray(frame) for frame in frames]}, {"video": list(tensor)}, [message],
        {"video": {"array": frames, "video_metadata": metadata}},
        {"video": {"array": frames, "video_metadata": {**metadata, "frames_indices": np.arange(3)}}},
        [json.loads('{"role": "user"}') | {"content": [{"type": "video", "video": {"array": frames}}]}],
    ]  # fmt: skip
