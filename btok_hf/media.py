"""Reading media, with errors that name the file, instead of failing (or not failing) deep inside a processor."""

import math
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tiff", ".webp")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".wmv", ".flv", ".mkv", ".webm")
VIDEO_FRAMES = 8


def read_image(path, max_pixels=None):
    """Read an image file as RGB `PIL.Image.Image`, upright, as datasets and transformers (5.23) do.

    Args:
        path (`str` or `Path`): The file.
        max_pixels (`int`, *optional*): What the image is reduced to afterwards. A JPEG is decoded at a half, a quarter
            or an eighth of its size (libjpeg's scaling, Pillow's `draft`) as long as four times as many pixels are
            left, so that the reduction that follows still has the last word. Default: the whole image.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a readable image.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Image file {str(path)!r} does not exist. Check the path (relative to the cwd?).")
    try:
        with Image.open(path) as image:
            if max_pixels is not None:
                scale = min(1.0, (4 * max_pixels / (image.width * image.height)) ** 0.5)
                image.draft("RGB", (math.ceil(image.width * scale), math.ceil(image.height * scale)))
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"Image file {str(path)!r} cannot be decoded ({error}). Replace or remove it.") from error


def read_video(path, num_frames=VIDEO_FRAMES):
    """Read evenly spaced frames of a video file through PyAV, in the form that every loader of a BTok model takes.

    Args:
        path (`str` or `Path`): A video file that FFmpeg can decode, e.g. mp4.
        num_frames (`int`): Frames to keep, evenly spaced from first to last; a shorter video keeps all of its frames.

    Returns:
        `dict`: `array`, uint8 of shape `(frames, height, width, 3)`, and `video_metadata` (`fps` of the kept frames,
        `total_num_frames`, `duration` in seconds, `frames_indices`), to be passed as `{"video": …}`.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: PyAV is not installed.
        ValueError: The file holds no decodable video stream.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Video file {str(path)!r} does not exist. Check the path (relative to the cwd?).")
    try:
        import av
    except ImportError as error:
        raise ImportError("Reading video files needs PyAV: pip install av.") from error
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            fps = float(stream.average_rate or 0)
            # Packets are counted without decoding, so that memory holds only the frames that are kept.
            total = sum(1 for packet in container.demux(stream) if packet.size)
            container.seek(0)
            wanted = set(np.linspace(0, total - 1, min(num_frames, total)).astype(int).tolist())
            decoded = enumerate(container.decode(stream))
            frames = [frame.to_ndarray(format="rgb24") for index, frame in decoded if index in wanted]
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"Video file {str(path)!r} cannot be decoded ({error}). Replace or remove it.") from error
    if not frames or not fps:
        raise ValueError(f"Video file {str(path)!r} holds no frames or no frame rate. Replace or remove it.")
    # The metadata describe the kept frames: processors that sample again do so among these.
    return {
        "array": np.stack(frames),
        "video_metadata": {
            "fps": fps * len(frames) / total,
            "total_num_frames": len(frames),
            "duration": total / fps,
            "frames_indices": list(range(len(frames))),
        },
    }


def read_frames(folder, num_frames=VIDEO_FRAMES):
    """Read evenly spaced frames of a video that is stored as a folder of images, in the order of their numbers.

    Args:
        folder (`str` or `Path`): Folder of image files of one size.
        num_frames (`int`, *optional*): Frames to read, evenly spaced from first to last; of a shorter video, and with
            `None`, all are read, and a single one twice, because Qwen3-VL takes no video of one frame.

    Returns:
        `dict`: `array`, uint8 of shape `(frames, height, width, 3)`, and `video_metadata`. The stored frames have no
        rate; 2 per second is the one that processors sample at, so that they keep every frame (a bare list of 8
        frames loses 4 of them on Qwen3-VL).

    Raises:
        FileNotFoundError, ValueError: No such folder, no images in it, or of different sizes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"Folder of frames {str(folder)!r} does not exist. Unpack its archive.")
    names = [path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    if not names:
        raise FileNotFoundError(f"Folder of frames {str(folder)!r} holds no images.")
    names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    kept = len(names) if num_frames is None else min(num_frames, len(names))
    wanted = np.linspace(0, len(names) - 1, max(2, kept)).astype(int)
    frames = np.stack([np.asarray(read_image(folder / names[index])) for index in wanted])
    return {
        "array": frames,
        "video_metadata": {
            "fps": 2.0,
            "total_num_frames": len(frames),
            "duration": len(frames) / 2,
            "frames_indices": list(range(len(frames))),
        },
    }


def is_media_path(text):
    """Whether a text looks like the name of an image or video file: one word with such a suffix."""
    return Path(text).suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES and not any(map(str.isspace, text))


def estimate_tokens(item, processor=None, tokenize=None):
    """About how many tokens an input takes, judged by its size: files are looked into but not decoded.

    Args:
        item: What `encode` takes. Anything else counts nothing.
        processor (*optional*): With the `image_processor` and `video_processor` of a Qwen-VL model; for others, images
            count as in Qwen2-VL.
        tokenize (`Callable`, *optional*): From a text to its tokens. Default: three bytes are one, which is seldom too
            little.
    """
    if isinstance(item, (str, Path)):
        text = str(item)
        if not is_media_path(text):
            return len(tokenize(text)) if tokenize else len(text.encode("utf-8", "replace")) // 3
        if Path(text).suffix.lower() in VIDEO_SUFFIXES:
            return VIDEO_FRAMES // 2 * _pixel_tokens(math.inf, processor, "video_processor")
        try:
            with Image.open(text) as image:
                return _pixel_tokens(image.width * image.height, processor)
        except (UnidentifiedImageError, OSError, ValueError):
            return _pixel_tokens(math.inf, processor)  # remote, or not an image
    if isinstance(item, Image.Image):
        return _pixel_tokens(item.width * item.height, processor)
    if hasattr(item, "ndim"):  # an array: an image has three axes, a video four
        if item.ndim < 4:
            return _pixel_tokens(math.prod(item.shape) // 3, processor)
        pixels = math.prod(item.shape[1:]) // 3
        return -(-item.shape[0] // 2) * _pixel_tokens(pixels, processor, "video_processor")
    if isinstance(item, dict):
        item = [value for key, value in item.items() if key not in ("role", "type", "video_metadata")]
    return sum(estimate_tokens(part, processor, tokenize) for part in item) if isinstance(item, (list, tuple)) else 0


def _pixel_tokens(pixels, processor, kind="image_processor"):
    """Tokens of an image, or of two frames of a video, of this many pixels, within the processor's bounds."""
    processor = getattr(processor, kind, None)
    least, most, side = 56**2, 28**2 * 1280, 28
    if hasattr(processor, "merge_size"):
        least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
        side = processor.patch_size * processor.merge_size
    return min(max(pixels, least), most) // side**2
