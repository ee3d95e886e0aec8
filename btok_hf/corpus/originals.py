"""The files that hits came from: where they are, whether they are still the same, and how they look."""

import os
import threading
from pathlib import Path

import pypdfium2
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from btok_hf.corpus.index import Hit, Index
from btok_hf.corpus.rows import File, hash_contents
from btok_hf.corpus.units import locate
from btok_hf.media import VIDEO_SUFFIXES, read_image

LARGE = 1400  # pixels of the longer side of a page; of pictures, about as many are decoded
PDF = threading.Lock()  # pdfium works in one thread at a time


def find(index: Index, row: Hit) -> Path | None:
    """The file of a row, if it is there and, without links, below the folder of the corpus."""
    if row.source is None:
        return None
    root = Path(index.settings["root"]).resolve()
    path = Path(locate(index.settings, row.source)).resolve()  # a link may lead elsewhere
    return path if path.is_file() and path.is_relative_to(root) else None


def is_video(row: Hit, path: Path) -> bool:
    """Whether the file of a row is a clip."""
    return row.kind == "video" or (row.kind == "mixed" and path.suffix.lower() in VIDEO_SUFFIXES)


def change(index: Index, row: Hit, path: Path) -> str | None:
    """In words, why a row's file may not be what was found.

    A picture or clip is compared by its hash. A page or one part of a row has none of its own: there, the file's time
    is compared with the last change of the database.

    Raises:
        OSError: The file cannot be read.
    """
    if row.kind in ("image", "video") and row.content_hash:
        if hash_contents({row.kind: [File(LocalFileSystem(), str(path))]}) != row.content_hash:
            return "The file has changed since it was indexed, so this is not what was found."
    elif row.kind != "text" and os.path.getmtime(path) > index.written:
        return "The file was modified after the database last changed, so this may not be what was found."
    return None


def as_picture(path: Path, page: int | None) -> Image.Image:
    """A picture's file, or a page of a PDF or TIFF, as it was embedded.

    Args:
        path (`Path`): The file.
        page (`int`, *optional*): The page, from 1.

    Returns:
        `PIL.Image.Image`

    Raises:
        OSError, ValueError: The file cannot be read, or has no such page.
    """
    if page is None or path.suffix.lower() != ".pdf":
        return read_image(path, max_pixels=LARGE * LARGE, page=page)
    try:
        with PDF, pypdfium2.PdfDocument(path) as pdf:
            pdf.init_forms()  # as `pdf_pages` does: what was filled in is drawn
            if page > len(pdf):
                raise ValueError(f"{path.name!r} has no page {page} any more, but {len(pdf)}.")
            leaf = pdf[page - 1]
            return leaf.render(scale=LARGE / max(leaf.get_size())).to_pil()
    except pypdfium2.PdfiumError as error:
        raise ValueError(f"{path.name!r} cannot be read ({str(error).rstrip('.')}).") from error
