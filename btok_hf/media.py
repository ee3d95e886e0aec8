"""Reading images and videos. Errors name the file, before a processor fails or silently accepts it.

What counts as an input, and checks of its parts, are in `btok_hf/inputs.py`.
"""

import math
import re
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tiff", ".webp")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".wmv", ".flv", ".mkv", ".webm")
VIDEO_FRAMES = 8


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


def read_image(path: str | Path, max_pixels: int | None = None) -> Image.Image:
    """Read an image file as RGB `PIL.Image.Image` with its EXIF rotation applied, like datasets and transformers 5.23.

    Args:
        path (`str` or `Path`): The file.
        max_pixels (`int`, *optional*): The size that the processor will reduce the image to. A JPEG is decoded at a
            half, a quarter or an eighth of its size (Pillow's `draft`) if at least four times as many pixels are left.
            The processor's reduction then gives nearly the same image. Default: decode the full size.

    Returns:
        `PIL.Image.Image`

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a readable image.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Image file {str(path)!r} does not exist. Check the path; relative paths start at the current folder."
        )
    try:
        with Image.open(path) as image:
            if max_pixels is not None:
                scale = min(1.0, (4 * max_pixels / (image.width * image.height)) ** 0.5)
                image.draft("RGB", (math.ceil(image.width * scale), math.ceil(image.height * scale)))
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"Image file {str(path)!r} cannot be decoded ({error}). Replace or remove it.") from error


def read_video(path: str | Path, num_frames: int = VIDEO_FRAMES) -> VideoInput:
    """Read evenly spaced frames of a video file with PyAV.

    Args:
        path (`str` or `Path`): A video file that FFmpeg can decode, e.g. mp4.
        num_frames (`int`): Number of frames, evenly spaced from first to last. Shorter videos keep all frames.

    Returns:
        `dict`: `array`, uint8 of shape `(frames, height, width, 3)`, and `video_metadata` (`fps` of the kept frames,
        `total_num_frames`, `duration` in seconds, `frames_indices`). Pass it as `{"video": …}`.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: PyAV is not installed.
        ValueError: The file holds no decodable video stream.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Video file {str(path)!r} does not exist. Check the path; relative paths start at the current folder."
        )
    try:
        import av
    except ImportError as error:
        raise ImportError("Reading video files needs PyAV: pip install av.") from error
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            fps = float(stream.average_rate or 0)
            # Packets are counted without decoding, so that only the kept frames are in memory.
            total = sum(1 for packet in container.demux(stream) if packet.size)
            container.seek(0)
            wanted = set(np.linspace(0, total - 1, min(num_frames, total)).astype(int).tolist())
            decoded = enumerate(container.decode(stream))
            frames = [frame.to_ndarray(format="rgb24") for index, frame in decoded if index in wanted]
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"Video file {str(path)!r} cannot be decoded ({error}). Replace or remove it.") from error
    if not frames or not fps:
        raise ValueError(f"Video file {str(path)!r} has no frames or no frame rate. Replace or remove it.")
    return video_input(np.stack(frames), fps * len(frames) / total)


def read_frames(folder: str | Path, num_frames: int | None = VIDEO_FRAMES) -> VideoInput:
    """Read evenly spaced frames of a video that is stored as a folder of numbered images.

    Args:
        folder (`str` or `Path`): Folder of image files of the same size.
        num_frames (`int`, *optional*): Number of frames, evenly spaced from first to last. Shorter videos keep all
            frames, as with `None`. A single frame is used twice, because Qwen3-VL refuses videos of one frame.

    Returns:
        `dict`: `array`, uint8 of shape `(frames, height, width, 3)`, and `video_metadata`. The frame rate is set to 2
        per second, at which processors sample, so that they keep every frame. (Without metadata, Qwen3-VL drops 4 of
        8 frames.)

    Raises:
        FileNotFoundError: No such folder, or no images in it.
        ValueError: Images of different sizes, or an image that cannot be decoded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"Folder of frames {str(folder)!r} does not exist. Unpack its archive.")
    names = [path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    if not names:
        raise FileNotFoundError(f"Folder of frames {str(folder)!r} has no images. Unpack its archive again.")
    names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    kept = len(names) if num_frames is None else min(num_frames, len(names))
    wanted = np.linspace(0, len(names) - 1, max(2, kept)).astype(int)
    frames = np.stack([np.asarray(read_image(folder / names[index])) for index in wanted])
    return video_input(frames, fps=2.0)


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
