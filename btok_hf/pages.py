"""The pages of a TIFF file."""

import io
import itertools
from collections.abc import Iterator
from contextlib import closing

from PIL import Image, TiffImagePlugin

from btok_hf.media import as_rgb

SUBFILE_TYPE, REDUCED_OR_MASK = 0x00FE, 0b101  # TIFF tag, and its bits for what is no page


def tiff_pages(content: bytes) -> list[int]:
    """The images of a TIFF file that are pages, by number from 1. Reduced copies and masks of pages are none.

    Args:
        content (`bytes`): The file.

    Returns:
        `list[int]`: With the number of a page that is damaged, and none behind it. Empty if it is no TIFF file.
    """
    pages, number = [], 0
    try:
        with closing(TiffImagePlugin.TiffImageFile(io.BytesIO(content))) as image:
            for number in itertools.count(1):
                image.seek(number - 1)
                if not image.tag_v2.get(SUBFILE_TYPE, 0) & REDUCED_OR_MASK:
                    pages.append(number)
    except EOFError:
        pass  # there are no more
    except MemoryError:
        raise
    except Exception:  # decoders raise any type at damaged files; reading that page tells what it is
        return [*pages, number] if pages else []
    return pages


def read_pages(content: bytes) -> Iterator[tuple[int, Image.Image | ValueError]]:
    """The pages of a TIFF file, decoded one by one (`as_rgb`), with their numbers; an error in place of a damaged one.

    Args:
        content (`bytes`): The file.
    """
    image: Image.Image | None = None  # opened once: each page is found from the one before
    for number in tiff_pages(content):
        try:
            image = image or Image.open(io.BytesIO(content), formats=["TIFF"])
            image.seek(number - 1)
            page: Image.Image | ValueError = as_rgb(image)
        except MemoryError:
            raise
        except Exception as error:  # also of opening, which Pillow refuses if the first page is too large
            page = ValueError(f"The page cannot be decoded ({error}). Replace or remove the file.")
        yield number, page
