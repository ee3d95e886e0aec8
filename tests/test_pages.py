"""The pages of TIFF files."""

import io

import pytest
from PIL import Image

from btok_hf.media import read_image
from btok_hf.pages import read_pages, tiff_pages


def test_reduced_copies_in_a_tiff_are_no_pages(tmp_path):
    kinds = (0, 1, 2, 4, 0)  # a picture, its reduced copy, a page, its mask, a picture
    images = [Image.new("L", (32, 32), 40 * index) for index in range(len(kinds))]
    for picture, kind in zip(images, kinds):
        picture.encoderinfo = {"tiffinfo": {254: kind}}
    images[0].save(tmp_path / "a.tif", save_all=True, append_images=images[1:], tiffinfo={254: 0})
    content = (tmp_path / "a.tif").read_bytes()
    assert tiff_pages(content) == [1, 3, 5]
    assert [read_image(tmp_path / "a.tif", page=page).getpixel((0, 0))[0] for page in (1, 3, 5)] == [0, 80, 160]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:])
    assert tiff_pages((tmp_path / "a.gif").read_bytes()) == tiff_pages(b"") == []


def test_no_page_of_a_cut_tiff_is_missing(tmp_path):
    """Wherever it is cut behind its first page: the page that cannot be read any more is named."""
    images = [Image.new("L", (40, 40), shade) for shade in (0, 80)]
    images[0].save(tmp_path / "a.tif", save_all=True, append_images=images[1:])
    content = (tmp_path / "a.tif").read_bytes()
    assert tiff_pages(content) == [1, 2]
    for cut in range(len(content) // 2, len(content) - 20, 7):
        assert tiff_pages(content[:cut]) == [1, 2]
        with pytest.raises(ValueError, match="cannot be decoded"):
            read_image(io.BytesIO(content[:cut]), page=2)


def test_a_mask_is_no_page_of_a_cut_tiff_either(tmp_path):
    images = [Image.new("L", (40, 40), shade) for shade in (0, 80, 160)]
    images[1].encoderinfo = {"tiffinfo": {254: 4}}
    images[0].save(tmp_path / "a.tif", save_all=True, append_images=images[1:], tiffinfo={254: 0})
    content = (tmp_path / "a.tif").read_bytes()
    assert [number for number, _ in read_pages(content)] == [1, 3]
    cut = [read_pages(content[:size]) for size in range(len(content) * 7 // 10, len(content) - 20, 7)]
    for (first, one), (last, other) in cut:
        assert (first, last) == (1, 3) and one.size == (40, 40) and "cannot be decoded" in str(other)
