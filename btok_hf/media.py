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
    return video_input(np.stack(frames), fps * len(frames) / total)


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
    return video_input(frames, fps=2.0)


def video_input(frames, fps):
    """Frames as a video that every loader of a BTok model takes: `{"video": video_input(frames, fps)}`.

    The metadata describe these frames and no others: processors that sample again do so among them.

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
