"""Read images and frames as RGB: upright, transparency on white, 8 bits per channel. Errors name the file.

Files of videos are read in `btok_hf/video.py`. What counts as an input, and checks of its parts, are in
`btok_hf/inputs.py`.
"""

import io
import math
import struct
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

# Suffixes by which a string is taken for a file. A `Path`, and the name of an existing file, may have any suffix.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".avif", ".jp2")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".avi", ".mov", ".wmv", ".flv", ".mkv", ".webm")
VIDEO_FRAMES = 8
FRAMES = (Image.Image, np.ndarray, torch.Tensor)
ORIENTATION = 0x0112  # EXIF tag; what it says that makes a picture upright, from 2 on
TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
SAY_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # TIFF tags
MIN_FPS, MAX_FPS = 1e-6, 1000  # processors turn frame numbers into seconds; a frame in eleven days is least
MAX_RATIO = 200  # of a longer to a shorter side; Qwen-VL's processors accept no more


class VideoMetadata(TypedDict):
    """Metadata of the frames of a `VideoInput`, as transformers' processors expect them."""

    fps: float
    total_num_frames: int
    duration: float
    frames_indices: list[int]


class VideoInput(TypedDict):
    """A video as every loader of a BTok model accepts it, e.g. in `{"video": …}`.

    `array` has dtype uint8 and shape `(frames, height, width, 3)`.
    """

    array: np.ndarray
    video_metadata: VideoMetadata


def read_image(path: str | Path | BinaryIO, max_pixels: int | None = None, page: int | None = None) -> Image.Image:
    """Read an image file as a person sees it (`as_rgb`).

    Args:
        path (`str`, `Path` or binary file): The file.
        max_pixels (`int`, *optional*): The size that the processor will reduce the image to. A JPEG is decoded at a
            half, a quarter or an eighth of its size (Pillow's `draft`) if at least four times as many pixels are left.
            The processor's reduction then gives nearly the same image. Default: decode the full size.
        page (`int`, *optional*): A page of a TIFF file, as `btok_hf.pages` numbers them. Default: the first image.

    Returns:
        `PIL.Image.Image`: In mode RGB.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a readable image, has more pixels than Pillow allows, or more than 8 bits whose
            range is unknown.
    """
    if isinstance(path, (str, Path)):
        path = Path(path)
        name = f"Image file {str(path)!r}"
        if path.is_dir():
            raise ValueError(f"{name} is a folder. Name a file; read_frames reads a folder of frames.")
        if not path.is_file():
            raise FileNotFoundError(
                f"{name} does not exist. Check the path; relative paths start at the current folder."
            )
        if path.suffix.lower() == ".pdf":
            raise ValueError(f"{name} is a PDF. Render its pages as images, e.g. with pypdfium2, and embed these.")
    else:
        name = "The image"
    try:
        with Image.open(path) as image:
            if page is not None:
                image.seek(page - 1)
            if max_pixels is not None:
                scale = min(1.0, (4 * max_pixels / (image.width * image.height)) ** 0.5)
                image.draft("RGB", (math.ceil(image.width * scale), math.ceil(image.height * scale)))
            return as_rgb(image)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} is larger than Pillow allows ({error}). Reduce it, or raise PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name} is not an image that Pillow can read. Convert it to PNG or JPEG (HEIC: install and register "
            "pillow-heif), or remove it."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise any type at damaged files
        raise ValueError(f"{name} cannot be decoded ({error}). Replace or remove it.") from error


def is_still(content: Any) -> bool:
    """Whether these bytes are an image without motion. (An MPO file of a camera has several images and no motion.)"""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.format not in ("GIF", "PNG", "WEBP") or not getattr(image, "is_animated", False)
    except Exception:  # decoders raise any type
        return False


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF tag turns it. (Pillow's `exif_transpose` writes all tags again, and fails at odd ones.)"""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except (SyntaxError, struct.error):  # Pillow passes over a damaged block in a JPEG file, but not in a copy of it
        return image
    if orientation not in range(2, 9):
        return image
    turned = image.transpose(Image.Transpose[TURNS[int(orientation) - 2]])
    for key in SAY_ORIENTATION:  # else the copy would be turned again
        turned.info.pop(key, None)
    return turned


def _load(image: Any) -> None:
    """Decode an image. By its name, Pillow would map a TIFF file that lies on its side, with its sides exchanged."""
    if image.format != "TIFF" or not (name := getattr(image, "filename", "")):
        image.load()
        return
    image.filename = ""
    try:
        image.load()
    finally:
        image.filename = name


def _scale_transparent(image: Image.Image) -> None:
    """Give a PNG file the colour that stands for transparent in 8 bits, as Pillow gives its pixels."""
    colour, tile = image.info.get("transparency"), getattr(image, "tile", None)  # empty once the image is loaded
    if image.format == "PNG" and tile and isinstance(colour, (int, tuple)):
        stored = str(tile[0][3])  # Pillow's name of the pixels in the file
        if isinstance(colour, int):
            image.info["transparency"] = colour * {"L;2": 85, "L;4": 17}.get(stored, 1)
        elif stored == "RGB;16B":
            image.info["transparency"] = tuple(value >> 8 for value in colour)


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture that a person sees: upright (EXIF), transparency on white, 8 bits per colour.

    Args:
        image (`PIL.Image.Image`): In any mode, open.

    Returns:
        `PIL.Image.Image`: In mode RGB.

    Raises:
        ValueError: The image is closed or truncated, or its mode has more than 8 bits and an unknown range.
    """
    try:
        tags = getattr(image, "tag_v2", {})  # of a TIFF file, before a copy loses them
        bits, inverted = tags.get(BITS_PER_SAMPLE, (16,))[0], tags.get(PHOTOMETRIC) == 0
        _scale_transparent(image)
        is_ppm = image.format == "PPM"  # whose numbers Pillow scales to 16 bits
        _load(image)
        image = _upright(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise any type at damaged files
        raise ValueError(f"the image cannot be decoded ({error}); is its file closed or truncated?") from error
    if image.mode.startswith(("I", "F")):
        array = np.asarray(image)
        # Pillow reads 16-bit files as 32-bit integers (mode I) too.
        is_16_bit = is_ppm or (255 < array.max() < 2**16 and array.min() >= 0)
        wide = image.mode.startswith("I;16") or (image.mode == "I" and is_16_bit)
        if not wide:
            return Image.fromarray(as_uint8(array)).convert("RGB")
        # Pillow gives the stored numbers of these, of TIFF files of 12 bits or with 0 for white too.
        top = 2**bits - 1 if image.mode.startswith("I;16") and bits < 16 else 2**16 - 1
        array = top - array if inverted and image.mode.startswith("I;16") else array
        if (clear := image.info.get("transparency")) is not None:
            array = np.where(array == clear, top, array)
        return Image.fromarray(np.rint(array / (top / 255)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def as_uint8(pixels: np.ndarray | torch.Tensor) -> np.ndarray:
    """Pixels with values from 0 to 255, by type and range where both are certain.

    uint8 stays. Booleans and floats from 0 to 1 are scaled by 255, uint16 by 255 / 65,535. Other integers and floats
    up to 255 are taken as they are, except for fractions up to 2.

    Args:
        pixels (`numpy.ndarray` or `torch.Tensor`): Of any shape and on any device.

    Returns:
        `numpy.ndarray`: uint8, of the same shape.

    Raises:
        ValueError: No pixels, values that are not finite or negative, or a range that could mean several things.
    """
    pixels = as_array(pixels)
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.size == 0:
        raise ValueError(f"an array of shape {pixels.shape} has no pixels")
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.kind not in "uif":
        raise ValueError(f"pixels have type {pixels.dtype}; convert them to uint8")
    if not np.isfinite(pixels).all():
        raise ValueError("pixels are NaN or infinite; replace them")
    low, high = float(pixels.min()), float(pixels.max())
    if pixels.dtype == np.uint16 and high > 255:
        return np.rint(pixels / 257).astype(np.uint8)
    if pixels.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.rint(pixels.astype(np.float64) * 255).astype(np.uint8)
    # Floats from 0 to 1 that were made brighter, or resized without clamping.
    over = 1 < high <= 2 and bool((pixels % 1 != 0).any())
    if low < 0 or high > 255 or over or pixels.dtype == np.uint16:
        raise ValueError(
            f"pixels of type {pixels.dtype} lie between {low:g} and {high:g}, which has no single meaning. Convert "
            "them to uint8 (0 to 255) or to floats from 0 to 1"
        )
    return np.rint(pixels).astype(np.uint8)


def as_array(pixels: np.ndarray | torch.Tensor) -> np.ndarray:
    """A plain array of the same values, in the byte order of this machine. Raises `ValueError` if it has no values."""
    if isinstance(pixels, np.ma.MaskedArray):
        raise ValueError("a masked array has pixels without a value; set them with .filled(…)")
    if isinstance(pixels, np.ndarray):
        return np.asarray(pixels, pixels.dtype.newbyteorder("="))
    try:
        pixels = pixels.detach().cpu()
        # numpy has no bfloat16 and no float8.
        return (pixels.float() if pixels.is_floating_point() and pixels.itemsize < 4 else pixels).numpy()
    except (TypeError, RuntimeError) as error:  # also NotImplementedError, of the meta device
        raise ValueError(
            f"a tensor of type {pixels.dtype} on device {pixels.device} has no pixels that can be read ({error}). Use "
            "a dense tensor of uint8 or float32"
        ) from error


def array_as_rgb(array: np.ndarray | torch.Tensor) -> Image.Image:
    """An array as the picture that a person sees (`as_rgb`).

    Args:
        array (`numpy.ndarray` or `torch.Tensor`): `(height, width)`, `(height, width, channels)` or
            `(channels, height, width)`, with 1, 3 or 4 channels and values as in `as_uint8`.

    Raises:
        ValueError: Another shape, or values that `as_uint8` refuses.
    """
    return Image.fromarray(_rgb_frames(as_uint8(array)[None])[0])


def _rgb_frames(frames: np.ndarray) -> np.ndarray:
    """uint8 frames of shape `(frames, height, width, 3)`, from ones with channels first or last, or without."""
    shape = frames.shape[1:]
    if len(shape) == 2:
        frames = frames[..., None]
    elif len(shape) != 3 or not {shape[0], shape[-1]} & {1, 3, 4}:
        raise ValueError(f"an array of shape {shape} is no image: use (height, width, 3) or (3, height, width)")
    elif shape[-1] not in (1, 3, 4):
        frames = np.moveaxis(frames, 1, -1)
    elif shape[0] in (1, 3, 4):
        raise ValueError(f"an array of shape {shape} may have its channels first or last; it is too small to embed")
    if frames.shape[-1] == 4:
        rgb = np.empty((*frames.shape[:-1], 3), np.uint8)
        for frame, target in zip(frames, rgb):  # one by one: floats take eight times the memory
            alpha = frame[..., 3:] / 255
            target[:] = np.rint(frame[..., :3] * alpha + 255 * (1 - alpha))
        return rgb
    # Writable, because torch warns of arrays that are not.
    return np.require(np.broadcast_to(frames, (*frames.shape[:-1], 3)), requirements=["C", "W"])


def frames_as_rgb(frames: Any) -> np.ndarray:
    """The frames of a video as one array.

    Args:
        frames (`numpy.ndarray`, `torch.Tensor` or `list`): An array with one more axis than `array_as_rgb` takes, or a
            list of images and arrays of one size.

    Returns:
        `numpy.ndarray`: uint8 of shape `(frames, height, width, 3)`. A single frame is there twice, because Qwen3-VL
        accepts no video of one frame.

    Raises:
        ValueError: No frames, frames of different sizes, or pixels that `as_uint8` refuses.
    """
    if isinstance(frames, (list, tuple)):
        if odd := {type(frame).__name__ for frame in frames if not isinstance(frame, FRAMES)}:
            raise ValueError(f"the frames of a video must be images or arrays, got {', '.join(sorted(odd))}")
        arrays: list[Any] = [
            np.asarray(as_rgb(frame)) if isinstance(frame, Image.Image) else frame for frame in frames
        ]
        if len({tuple(array.shape) for array in arrays}) > 1:
            sizes = sorted({str(tuple(array.shape)) for array in arrays})
            raise ValueError(f"the frames of a video differ in shape: {', '.join(sizes)}; resize them to one size")
        arrays = [as_array(array) for array in arrays]
        if len({array.dtype for array in arrays}) > 1:  # of one type, they would lose their ranges
            arrays = [as_uint8(array) for array in arrays]
        frames = np.stack(arrays) if arrays else np.empty((0, 0, 0, 3), np.uint8)
    elif not isinstance(frames, FRAMES[1:]) or frames.ndim == 0:
        raise ValueError(f"the frames of a video must be an array or a list, got {type(frames).__name__}")
    if len(frames) == 0:
        raise ValueError("the video has no frames")
    rgb = _rgb_frames(as_uint8(frames))
    return np.repeat(rgb, 2, 0) if len(rgb) == 1 else rgb


def video_input(frames: np.ndarray, fps: float) -> VideoInput:
    """Frames with their metadata, as every loader of a BTok model accepts them: `{"video": video_input(frames, fps)}`.

    The metadata describe only these frames. Processors that sample frames choose among them.

    Args:
        frames (`numpy.ndarray` of shape `(frames, height, width, 3)`): uint8.
        fps (`float`): Frames per second.

    Returns:
        `dict`: `array` and `video_metadata` (`fps`, `total_num_frames`, `duration` in seconds, `frames_indices`).
    """
    return {
        "array": frames,
        "video_metadata": {
            "fps": fps,
            "total_num_frames": len(frames),
            "duration": len(frames) / fps,
            "frames_indices": list(range(len(frames))),
        },
    }


def with_metadata(frames: np.ndarray, metadata: Any) -> VideoInput:
    """Frames with the metadata that a user gives for them.

    Args:
        frames (`numpy.ndarray` of shape `(frames, height, width, 3)`): uint8.
        metadata (`Mapping`): `fps`; `total_num_frames` and `frames_indices`, which default to all frames in order.

    Raises:
        ValueError: Metadata of other frames, or without a frame rate.
    """
    way_out = "Leave video_metadata out, or use btok_hf.media.video_input(frames, fps)"
    if not isinstance(metadata, Mapping):
        raise ValueError(f"'video_metadata' must be a dict, got {type(metadata).__name__}. {way_out}")
    fps = metadata.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, Real) or not MIN_FPS <= float(fps) <= MAX_FPS:
        raise ValueError(f"'fps' of a video must be a number from {MIN_FPS} to {MAX_FPS}, got {fps!r}. {way_out}")
    video = video_input(frames, float(fps))
    total, indices = metadata.get("total_num_frames"), metadata.get("frames_indices")
    if total is not None and not (isinstance(total, Real) and total == len(frames)):
        raise ValueError(f"'video_metadata' describes {total!r} frames, but the video has {len(frames)}. {way_out}")
    if indices is not None:
        indices = list(indices) if isinstance(indices, (Sequence, np.ndarray, range)) else [indices]
        right = all(isinstance(index, Integral) and int(index) >= 0 for index in indices)
        if not right or len(indices) != len(frames):
            raise ValueError(f"'frames_indices' must be one number per frame, from 0 on. {way_out}")
        video["video_metadata"]["frames_indices"] = list(map(int, indices))
    return video
