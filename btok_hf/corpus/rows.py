"""A row of a corpus: its content is read, hashed and decoded, and becomes an input of the model."""

import io
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from fsspec import AbstractFileSystem
from PIL import Image

from btok_hf.download import REMOTE, download
from btok_hf.encoding import ROW_ERRORS
from btok_hf.input_kinds import as_list
from btok_hf.media import read_image
from btok_hf.pages import read_pages, tiff_pages
from btok_hf.video import read_video

CHUNK = 2**20
JPEG_QUALITY = 85
# Pages are drawn at this resolution, and large ones smaller.
PAGE_DPI, PAGE_PIXELS = 150, 4_000_000
EMPTY = "the file is empty"


class File(NamedTuple):
    """A file of any file system that fsspec knows.

    Args:
        fs (`fsspec.AbstractFileSystem`): The file system.
        path (`str`): Path in it.
    """

    fs: AbstractFileSystem
    path: str

    def open(self) -> BinaryIO:
        with file_errors(self.path):
            return self.fs.open(self.path, "rb")

    def read(self) -> bytes:
        with file_errors(self.path), closing(self.open()) as file:
            return file.read()

    def chunks(self) -> Iterator[bytes]:
        with file_errors(self.path), closing(self.open()) as file:
            while chunk := file.read(CHUNK):
                yield chunk


@contextmanager
def file_errors(path: str) -> Iterator[None]:
    """Raise errors that a file system has of its own, such as those of network libraries, as `OSError`."""
    try:
        yield
    except (*ROW_ERRORS, ImportError, MemoryError):
        raise
    except Exception as error:
        raise OSError(f"{path!r} cannot be read ({type(error).__name__}: {error})") from error


@dataclass(slots=True)
class Row:
    """A row of a unit. Sources fill the first fields, `prepare` reads `parts`, the model adds `embedding`.

    Args:
        id (`str`): Unique in the corpus.
        kind (`str`): One of `btok_hf.corpus.units.KINDS`.
        parts (`dict[str, Any]`): What to embed, by `image`, `video`, `text`: a text, the bytes of a file, a `File`, an
            address (`https://…`, `data:…`), a decoded image, or a list of these.
        source (`str`, *optional*): Path of the original, relative to the root of the input.
        page (`int`, *optional*): Page of a PDF or TIFF, from 1.
        text (`str`, *optional*): The row's own text.
        metadata (`dict[str, Any]`): Values of the columns that are taken from a table.
        error (`str`, *optional*): Why the row failed.
        content_hash (`str`, *optional*): Set by `prepare`. Rows with equal content have equal hashes.
        thumbnail (`bytes`, *optional*): Set by `prepare`: a JPEG.
        item (`dict[str, Any]`, *optional*): Set by `prepare`: the input of `encode`.
        size (`int`): Set by `prepare`: bytes of `item`, or of the file with pages, in memory.
        embedding (`numpy.ndarray` of shape `(dimensions,)`, *optional*): fp32, unit length.
    """

    id: str
    kind: str
    parts: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    page: int | None = None
    text: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    content_hash: str | None = None
    thumbnail: bytes | None = None
    item: dict[str, Any] | None = None
    size: int = 0
    embedding: np.ndarray | None = None


class Known(NamedTuple):
    """The results that rows with equal content share.

    Args:
        embedding (`numpy.ndarray` of shape `(dimensions,)`): fp32.
        thumbnail (`bytes`, *optional*): A JPEG.
    """

    embedding: np.ndarray
    thumbnail: bytes | None


@dataclass(frozen=True)
class Reading:
    """How content is read.

    Args:
        max_pixels (`int`): The model reduces larger images to this many pixels (`ImageLimits`).
        thumbnail_pixels (`int`): Longest side of a thumbnail; 0 makes none.
        known (`Callable`): From a hash to the results for content with this hash, if there are any; nothing is then
            decoded.
    """

    max_pixels: int
    thumbnail_pixels: int = 192
    known: Callable[[str], Known | None] = lambda content_hash: None


def prepare(row: Row, reading: Reading) -> Row:
    """Read, hash and decode a row's content. What cannot be read is noted in `row.error`.

    Args:
        row (`Row`): It is changed and returned.
        reading (`Reading`): How.

    Returns:
        `Row`: With `item` instead of `parts`, unless it failed or is known. A PDF, and a TIFF with several pages, has
        its bytes in `parts`, for `pages`.

    Raises:
        ImportError, MemoryError: Errors that no row causes.
    """
    parts, row.parts = row.parts, {}
    if row.error is not None:
        return row
    try:
        if "pdf" in parts:
            row.parts = {"pdf": parts["pdf"].read()}
            row.size = len(row.parts["pdf"])
            row.error = None if row.parts["pdf"] else EMPTY
            return row
        if "tiff" in parts:
            content = parts["tiff"].read()
            if tiff_pages(content) not in ([], [1]):
                row.parts, row.size = {"tiff": content}, len(content)
                return row
            parts = {"image": content}
        if isinstance(parts.get("text"), File):
            parts = {"text": _text(parts["text"].read())}
            row.text = parts["text"]
        contents = {key: [_open(key, part) for part in as_list(value)] for key, value in parts.items()}
        row.content_hash = hash_contents(contents)
        if known := reading.known(row.content_hash):
            row.embedding, row.thumbnail = known
            return row
        item = {key: [_decode(key, part, reading) for part in values] for key, values in contents.items()}
    except ROW_ERRORS as error:
        row.error = _reason(error)
        return row
    row.size = sum(_size(part) for values in item.values() for part in values)
    row.thumbnail = _thumbnail(item, reading.thumbnail_pixels)
    # A single part stays alone, as a user would give it.
    row.item = {key: values[0] if len(values) == 1 else values for key, values in item.items()}
    return row


def _reason(error: Exception) -> str:
    """An error in words, of an `OSError` with its file and without its number."""
    named = f": {error.filename!r}" if isinstance(error, OSError) and error.filename else ""
    return f"{getattr(error, 'strerror', None) or error or type(error).__name__}{named}"


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the text is not UTF-8 (byte {error.start}); convert it") from error


def _open(key: str, part: Any) -> Any:
    """A text or decoded image as it is, and a file as its bytes. A video stays a `File`, because it may be large."""
    if key == "text" or isinstance(part, (bytes, Image.Image)):
        return part
    if isinstance(part, File):
        return part if key == "video" else part.read()
    if isinstance(part, str) and part.startswith(REMOTE):
        return download(part)
    raise ValueError(f"'{key}' must be the content or the path of a file, got {type(part).__name__}")


def hash_contents(contents: dict[str, list[Any]]) -> str:
    """A hash of the kinds, order and bytes of parts: 128 bits, so that rows do not share one by chance.

    Args:
        contents (`dict[str, list]`): By `image`, `video` and `text`: texts, bytes, files or decoded images.

    Returns:
        `str`
    """
    digest = blake2b(digest_size=16)
    for key, parts in contents.items():
        for part in parts:
            of_part = blake2b(key.encode(), digest_size=16)
            if isinstance(part, Image.Image):
                of_part.update(f" {part.mode} {part.size} ".encode())
                of_part.update(part.tobytes())
            elif isinstance(part, File):
                for chunk in part.chunks():
                    of_part.update(chunk)
            else:
                of_part.update(part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass"))
            digest.update(of_part.digest())
    return digest.hexdigest()


def _decode(key: str, part: Any, reading: Reading) -> Any:
    """A part as `encode` takes it."""
    if key == "text" or isinstance(part, Image.Image):
        return part
    errors = file_errors(part.path) if isinstance(part, File) else nullcontext()
    with errors, closing(io.BytesIO(part) if isinstance(part, bytes) else part.open()) as file:
        if not file.read(1):
            raise ValueError(EMPTY)
        file.seek(0)
        return read_image(file, reading.max_pixels) if key == "image" else read_video(file)


def _size(part: Any) -> int:
    if isinstance(part, str):
        return len(part)
    return 3 * part.width * part.height if isinstance(part, Image.Image) else part["array"].nbytes


def _thumbnail(item: dict[str, Any], pixels: int) -> bytes | None:
    """A JPEG of the first image, or of the middle frame of the first video."""
    pictures = [*item.get("image", ()), *item.get("video", ())]
    if not pixels or not pictures:
        return None
    first = pictures[0]
    if not isinstance(first, Image.Image):
        first = Image.fromarray(first["array"][len(first["array"]) // 2])
    small = first.copy()
    small.thumbnail((pixels, pixels))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=JPEG_QUALITY)
    return content.getvalue()


def pages(row: Row) -> Generator[Row, None, None]:
    """The pages of a file that `prepare` has read, as rows that are not prepared.

    Args:
        row (`Row`): With the bytes of a PDF or TIFF in `parts`.

    Returns:
        Iterator of `Row`: As in `pdf_pages`, which one thread at a time may use. Pages of a TIFF have no text.
    """
    if "pdf" in row.parts:
        yield from pdf_pages(row.id, row.parts["pdf"])
        return
    for number, image in read_pages(row.parts["tiff"]):
        page = Row(f"{row.id}#page={number}", "page", source=row.id, page=number)
        if isinstance(image, ValueError):
            page.error = str(image)
        else:
            page.parts = {"image": image}
        yield page


def pdf_pages(path: str, content: bytes) -> Generator[Row, None, None]:
    """The pages of a PDF as rows, drawn one by one.

    PDFium is not thread-safe: only one thread of a process may use this at a time.

    Args:
        path (`str`): Path of the file, relative to the root of the input.
        content (`bytes`): The file.

    Returns:
        Iterator of `Row`: Each with a decoded image, its page and its text layer. One row with an error stands for a
        file that cannot be read.
    """
    import pypdfium2

    def failed(reason: str, page: int | None = None) -> Row:
        return Row(path if page is None else f"{path}#page={page}", "page", source=path, page=page, error=reason)

    try:
        document = pypdfium2.PdfDocument(content)
        document.init_forms()  # before pages are read: without it, what was filled in is not drawn
    except pypdfium2.PdfiumError as error:
        yield failed(f"the PDF cannot be read ({str(error).rstrip('.')}). Repair it, or remove its password")
        return
    with closing(document):
        if not len(document):
            yield failed("the PDF has no pages")
        for index in range(len(document)):
            number = index + 1
            try:
                with closing(document[index]) as page:
                    width, height = page.get_size()  # in points, of 1/72 inch
                    scale = min(PAGE_DPI / 72, (PAGE_PIXELS / max(width * height, 1)) ** 0.5)
                    image = page.render(scale=scale).to_pil().convert("RGB")
                    with closing(page.get_textpage()) as layer:
                        text = layer.get_text_bounded() or None
            except (pypdfium2.PdfiumError, ValueError, OSError) as error:
                yield failed(f"the page cannot be drawn ({error})", number)
                continue
            yield Row(f"{path}#page={number}", "page", {"image": image}, source=path, page=number, text=text)
