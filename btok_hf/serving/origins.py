"""Opens the images and videos of a request: data URLs, and, if the server allows them, named hosts and one folder."""

import base64
import binascii
import io
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL import Image

from btok_hf.download import download
from btok_hf.media import VIDEO_FRAMES
from btok_hf.video import film, read_video

# Pillow reads more formats. Some of them start other programs, e.g. EPS.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
WEB = ("http://", "https://")
FRAMES = "data:video/jpeg;base64,"
Reserve = Callable[[int], None]


@dataclass(frozen=True)
class Origins:
    """Which images and videos a request may refer to, and how large they may be.

    Args:
        most_pixels (`int`): Largest number of pixels of all images and frames of a request.
        most_bytes (`int`): Largest size of a file or a download.
        most_seconds (`float`): Longest time of a download, and of decoding a video.
        hosts (`Collection[str]`): Hosts whose addresses may be opened, as `name` or `name:port`. Default: none.
        folder (`Path`, *optional*): Folder whose files may be opened. Default: none.

    Raises:
        ValueError: An entry of `hosts` that is no host name, or a folder that does not exist.
    """

    most_pixels: int
    most_bytes: int
    most_seconds: float
    hosts: Collection[str] = ()
    folder: Path | None = None

    def __post_init__(self) -> None:
        for host in self.hosts:
            if not host or not _is_host(host):
                raise ValueError(f"--allow-urls takes names of hosts, such as example.org:8080, got {host!r}.")
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"--allow-files takes a folder, and {str(self.folder)!r} is none.")

    def image(self, url: str, taken: int = 0, reserve: Reserve = lambda pixels: None) -> tuple[bytes, int]:
        """The file of an image, whose pixels are not decoded yet, and their number.

        Args:
            url (`str`): `data:image/…;base64,…`, `http(s)://…` or `file:///…`.
            taken (`int`): Pixels of the rest of the request.
            reserve (`Callable`, *optional*): Called with the number of pixels. An error of it ends the reading.

        Raises:
            ValueError: It may not be opened, is too large, or is no image.
        """
        content = self._content(url, "image")
        image = self._opened(content, taken)
        reserve(image.width * image.height)
        return content, image.width * image.height

    def video(self, url: str, taken: int = 0, reserve: Reserve = lambda pixels: None) -> tuple[Any, int]:
        """The frames of a video, as `check_input` takes them, and the number of their pixels.

        Args:
            url (`str`): As of an image, or `data:video/jpeg;base64,FRAME,FRAME,…`: images, two a second.
            taken (`int`): Pixels of the rest of the request.
            reserve (`Callable`, *optional*): Called with the number of pixels before they are decoded, for images of
                each. For a file it is called once more afterwards, with the difference to what was decoded. It is
                above 0 only for a file of one frame, which is doubled. An error of it ends the reading.

        Raises:
            ValueError: It may not be opened, is too large, or is no video.
        """
        if not url.startswith(FRAMES):
            return self._video_file(self._content(url, "video"), self.most_pixels - taken, reserve)
        frames, pixels = [], 0
        for frame in url.removeprefix(FRAMES).split(","):
            frames.append(self._opened(_decoded(frame), taken + pixels))
            reserve(size := frames[-1].width * frames[-1].height)  # each, so that the end of a request ends it
            pixels += size
        return frames, pixels

    def _video_file(self, content: bytes, left: int, reserve: Reserve) -> tuple[Any, int]:
        try:
            announced = _announced_pixels(content)
            most = min(left, announced) if announced else left
            reserve(most)
            # Not more than was reserved, also if the frames are larger than the file announces.
            video = read_video(io.BytesIO(content), most_pixels=most, most_seconds=self.most_seconds)
        except ImportError as error:
            raise ValueError(
                "this server cannot read video files: PyAV is missing (pip install 'btok-hf[video]'); send frames "
                f"as {FRAMES}…"
            ) from error
        pixels = video["array"].size // 3
        reserve(pixels - most)
        return video, pixels

    def _content(self, url: str, kind: str) -> bytes:
        head, comma, payload = url.partition(",")
        if head.startswith(f"data:{kind}/") and head.endswith(";base64") and comma:
            return _decoded(payload)
        if url.startswith(WEB) and self.hosts:
            return download(url, hosts=self.hosts, most_bytes=self.most_bytes, most_seconds=self.most_seconds)
        if url.startswith("file://") and self.folder is not None:
            return self._file(url, self.folder.resolve())
        allowed = [f"addresses at {', '.join(self.hosts)}"] if self.hosts else []
        allowed += ["file:///… below its folder"] if self.folder is not None else []
        raise ValueError(
            f"an address must be data:{kind}/…;base64,…, got {url[:40]!r}: this server opens "
            f"{' and '.join(allowed) or 'no files and no other addresses'}. Send the content itself"
        )

    def _file(self, url: str, folder: Path) -> bytes:
        """A file below the folder, after links are followed."""
        # The same message in all cases, so that clients cannot find out which files exist elsewhere.
        refusal = ValueError(f"{url[:200]!r} is no file below the folder of --allow-files. Send the content itself")
        try:
            path = Path(url2pathname(urlsplit(url).path)).resolve()
            if urlsplit(url).netloc or not path.is_relative_to(folder) or not path.is_file():
                raise refusal
            with open(path, "rb") as file:
                content = file.read(self.most_bytes + 1)
        except (OSError, ValueError) as error:  # a name that is too long or holds a null byte, an unreadable file
            raise refusal from error
        if len(content) > self.most_bytes:
            raise ValueError(f"{url[:200]!r} is larger than {self.most_bytes} bytes (--max-body)")
        return content

    def _opened(self, content: bytes, taken: int) -> Image.Image:
        """An image that is not decoded yet."""
        try:
            image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
            # `read_image` chooses the format without a list. One file can be valid in two formats, with other sizes.
            decoded = Image.open(io.BytesIO(content))
        except Image.DecompressionBombError as error:
            raise ValueError(f"an image has more than {self.most_pixels} pixels (--max-image-pixels)") from error
        except MemoryError:
            raise
        except Exception as error:  # decoders raise any type at damaged files
            raise ValueError(f"an image is not one of {', '.join(FORMATS)} in base64, or damaged") from error
        if (image.format, image.size) != (decoded.format, decoded.size):
            raise ValueError(
                f"an image is two files at once: {image.format} of {image.width} x {image.height}, and "
                f"{decoded.format} of {decoded.width} x {decoded.height}. Save it anew as one of {', '.join(FORMATS)}"
            )
        if taken + image.width * image.height > self.most_pixels:
            raise ValueError(
                f"the images and videos of a request have more than {self.most_pixels} pixels in all "
                f"(--max-image-pixels); one has {image.width} x {image.height}. Reduce them, or send fewer"
            )
        return image


def _announced_pixels(content: bytes) -> int:
    """The pixels of the frames that are kept of a video file, at the size that it announces; 0 if it announces none.

    Raises:
        ImportError: PyAV is not installed.
    """
    import av

    try:
        # FFmpeg may open no other file.
        with av.open(io.BytesIO(content), "r", options={"protocol_whitelist": "none"}) as container:
            stream = film(container).codec_context
            return int(stream.width * stream.height * VIDEO_FRAMES)
    except Exception:  # `read_video` says what is wrong with the file
        return 0


def _is_host(text: str) -> bool:
    """Whether this is the name of a host, with or without a port."""
    try:
        port = urlsplit(f"//{text}").port
    except ValueError:
        return False
    plain = urlsplit(f"//{text}").netloc == text and not ({"@", "*"} & set(text) or any(map(str.isspace, text)))
    return plain and (port is not None or not text.endswith(":"))


def _decoded(payload: str) -> bytes:
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("the content after 'base64,' is not base64, or not complete") from error
