"""Reading the frames of video files and of folders of images. Errors name the file."""

import math
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from btok_hf.media import IMAGE_SUFFIXES, VIDEO_FRAMES, VideoInput, as_rgb, frames_as_rgb, read_image, video_input

SINGLE = 2.0  # frames per second of a single frame


def read_video(
    path: str | Path | BinaryIO,
    num_frames: int = VIDEO_FRAMES,
    *,
    most_pixels: float = math.inf,
    most_seconds: float = math.inf,
) -> VideoInput:
    """Read evenly spaced frames of a video file with PyAV. No other file is opened, whatever this one names.

    Args:
        path (`str`, `Path` or binary file): A video file that FFmpeg can decode, e.g. mp4.
        num_frames (`int`): Number of frames, evenly spaced from first to last. Where the frame rate varies, those that
            are shown at evenly spaced times, and others where that is one frame several times. Shorter videos keep all
            frames.
        most_pixels (`float`): Most pixels of all kept frames together.
        most_seconds (`float`): Most seconds of decoding.

    Returns:
        `dict`: `array`, uint8 of shape `(frames, height, width, 3)`, and `video_metadata` (`fps` of the kept frames,
        `total_num_frames`, `duration` in seconds, `frames_indices`). Pass it as `{"video": …}`.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: PyAV is not installed.
        ValueError: The file holds no decodable video stream, or exceeds a bound.
    """
    name, end = "The video", time.monotonic() + most_seconds
    if isinstance(path, (str, Path)):
        name = f"Video file {str(path)!r}"
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"{name} does not exist. Check the path; relative paths start at the current folder."
            )
    try:
        import av
    except ImportError as error:
        raise ImportError("Reading video files needs PyAV: pip install av.") from error
    try:
        if not isinstance(path, (str, Path)):
            path.seek(0)  # it may have been read before, and Pillow goes back too
        # FFmpeg gets an open file and may open nothing itself: playlists name other files and addresses.
        with (
            open(path, "rb") if isinstance(path, (str, Path)) else nullcontext(path) as file,
            av.open(file, "r", options={"protocol_whitelist": "none"}) as container,
        ):
            stream = film(container)
            # Packets are counted without decoding, so that only the kept frames are in memory. A file that was cut
            # without encoding it again has packets that no player shows.
            shown = [packet.pts for packet in container.demux(stream) if _is_shown(packet, stream)]
            total = len(shown)
            container.seek(0)
            wanted = _chosen(shown, num_frames)
            frames = []
            _check_pixels(stream.codec_context, len(wanted), most_pixels)  # before the first frame takes memory
            for index, frame in enumerate(container.decode(stream)):
                _check_pixels(frame, len(wanted), most_pixels)  # a file may announce another size
                if time.monotonic() > end:
                    raise ValueError(f"decoding it takes more than {most_seconds:g} seconds")
                if index in wanted:
                    frames.append(_upright(_pixels(frame, stream), frame))
            fps = _frame_rate(shown, stream) or (SINGLE if total == 1 else 0.0)
    except Exception as error:  # PyAV has types of its own, and raises others too
        # FFmpeg's own MemoryError is a size that no file has.
        if isinstance(error, MemoryError) and not isinstance(error, av.error.FFmpegError):
            raise
        raise ValueError(f"{name} cannot be decoded ({error}). Replace or remove it.") from error
    if not frames or not fps:
        raise ValueError(f"{name} has no frames or no frame rate. Replace or remove it.")
    if len(frames) < len(wanted):
        raise ValueError(
            f"{name} is damaged: {total} frames are announced, but only {len(frames)} of the {len(wanted)} asked for "
            "can be decoded. Encode it again, or remove it."
        )
    return video_input(frames_as_rgb(frames), fps * len(frames) / total)


def _check_pixels(sized: Any, count: int, most: float) -> None:
    if sized.width * sized.height * count > most:
        raise ValueError(f"its {count} frames of {sized.width} x {sized.height} have more than {most} pixels")


def _is_shown(packet: Any, stream: Any) -> bool:
    """Whether a packet holds a frame that players show."""
    if not packet.size or packet.is_discard:
        return False
    # VP8 stores frames that are only referred to as packets of their own, without the bit for shown (RFC 6386, 9.1).
    return stream.codec_context.name != "vp8" or bool(bytes(packet)[0] & 0x10)


def _upright(pixels: np.ndarray, frame: Any) -> np.ndarray:
    """The pixels of a frame as players show them: phones store frames as the sensor lies, some mirrored."""
    matrix, turns = frame.side_data.get("DISPLAYMATRIX"), round(frame.rotation / 90)  # counter-clockwise
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(bytes(matrix), "<i4")[:5].astype(float)
        if a * d < b * c:  # mirrored, which FFmpeg's angle leaves out
            pixels, turns = pixels[:, ::-1], turns + 2
    return np.rot90(pixels, turns)


def _pixels(frame: Any, stream: Any) -> np.ndarray:
    """A frame of shape `(height, width, 3)` with square pixels, on white where it is transparent."""
    # The ratio of a pixel's width to its height. The longer side of a pixel is shortened, so that no frame grows.
    ratio = float(stream.sample_aspect_ratio or 1)
    size = {"width": max(1, round(frame.width * min(ratio, 1))), "height": max(1, round(frame.height / max(ratio, 1)))}
    kind = "rgba" if any(component.is_alpha for component in frame.format.components) else "rgb24"
    # Without a size, pixels are converted exactly as they are.
    pixels = frame.to_ndarray(format=kind, **({} if ratio == 1 else size))
    if kind == "rgba" and (pixels[..., 3] < 255).any():
        return np.asarray(as_rgb(Image.fromarray(pixels)))
    return pixels[..., :3]


def film(container: Any) -> Any:
    """The first video stream of a container of PyAV that is no cover. Raises `ValueError` if there is none."""
    for stream in container.streams.video:
        if not stream.disposition & stream.disposition.attached_pic:
            return stream
    raise ValueError("it has no video stream")


def _chosen(shown: Sequence[int | None], num_frames: int) -> set[int]:
    """The frames to keep, by number in the order in which they are shown."""
    total = len(shown)
    even = set(np.linspace(0, total - 1, min(num_frames, total)).astype(int).tolist())
    times = np.sort([time for time in shown if time is not None])
    if len(times) < max(total, 2):
        return even
    regular = np.linspace(times[0], times[-1], total)
    if np.abs(times - regular).max() <= regular[1] - regular[0]:  # within a frame: phones, times in milliseconds
        return even
    at = np.linspace(times[0], times[-1], len(even))
    timely = set((np.searchsorted(times, at, side="right") - 1).tolist())
    # Of a pause or a jump of the clock one frame is enough: what moves is in the others.
    others = sorted(even - timely)
    left = np.linspace(0, len(others) - 1, len(even) - len(timely)).astype(int)
    return timely | {others[index] for index in left}


def _frame_rate(shown: Sequence[int | None], stream: Any) -> float:
    """Frames per second of a stream: by the times of its shown frames, or else what the file announces."""
    times = sorted(time for time in shown if time is not None)
    if len(times) > 1 and len(times) == len(shown) and times[-1] > times[0]:
        return (len(times) - 1) / float((times[-1] - times[0]) * stream.time_base)
    return float(stream.average_rate or 0)


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
    wanted = np.linspace(0, len(names) - 1, kept).astype(int).tolist()
    wanted *= 2 if kept == 1 else 1
    frames = np.stack([np.asarray(read_image(folder / names[index])) for index in wanted])
    return video_input(frames, fps=2.0)
