"""A row: reading, hashing and decoding its content; pages of PDFs."""

import base64
import ftplib
import io
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from PIL import Image
from support.corpus import form, pdf, picture

from btok_hf.corpus import rows
from btok_hf.corpus.rows import File, Known, Reading, Row, pages, pdf_pages, prepare

LOCAL = fsspec.filesystem("file")
READING = Reading(max_pixels=28 * 28 * 16)


def png(image):
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def prepared(parts, reading=READING, **fields):
    return prepare(Row("a", "image", parts, **fields), reading)


def test_an_image_in_every_form(tmp_path):
    content = png(picture(0))
    (tmp_path / "a.png").write_bytes(content)
    address = "data:image/png;base64," + base64.b64encode(content).decode()
    forms = [content, File(LOCAL, str(tmp_path / "a.png")), address]
    done = [prepared({"image": form}) for form in forms]
    assert len({row.content_hash for row in done}) == 1 and all(row.error is None for row in done)
    assert all(np.array_equal(row.item["image"], picture(0)) for row in done)
    assert done[0].size == 3 * 56 * 56 and done[0].parts == {}
    assert prepared({"image": png(picture(1))}).content_hash != done[0].content_hash


def test_thumbnails():
    thumbnail = Image.open(io.BytesIO(prepared({"image": png(picture(0, (300, 600)))}).thumbnail))
    assert thumbnail.format == "JPEG" and thumbnail.size == (192, 96)
    small = prepared({"image": png(picture(0))}, Reading(10**6, thumbnail_pixels=20))
    assert Image.open(io.BytesIO(small.thumbnail)).size == (20, 20)
    assert prepared({"image": png(picture(0))}, Reading(10**6, thumbnail_pixels=0)).thumbnail is None
    assert prepared({"text": "a text"}).thumbnail is None


def test_a_video(mp4):
    row = prepared({"video": File(LOCAL, mp4)})
    assert row.item["video"]["array"].shape == (8, 64, 64, 3) and row.size == 8 * 64 * 64 * 3
    middle = np.asarray(Image.open(io.BytesIO(row.thumbnail)), np.int16)
    assert np.abs(middle - row.item["video"]["array"][4]).mean() < 5
    with open(mp4, "rb") as file:
        of_bytes = prepared({"video": file.read()})
    assert of_bytes.content_hash == row.content_hash
    assert np.array_equal(of_bytes.item["video"]["array"], row.item["video"]["array"])


def test_parts_and_lists_keep_their_order():
    first, second = png(picture(0)), png(picture(1))
    row = prepared({"image": [first, second], "text": "a text"})
    assert list(row.item) == ["image", "text"] and len(row.item["image"]) == 2 and row.item["text"] == "a text"
    assert prepared({"image": [second, first], "text": "a text"}).content_hash != row.content_hash
    assert prepared({"image": first, "text": "other"}).content_hash != row.content_hash
    assert prepared({"text": "ab"}).content_hash != prepared({"text": ["a", "b"]}).content_hash
    kinds = [prepared(part).content_hash for part in ({"text": "x"}, {"image": b"x"}, {"video": b"x"})]
    assert len(set(kinds)) == 3  # the same bytes as something else


def test_a_text_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    row = prepared({"text": File(LOCAL, str(tmp_path / "a.txt"))})
    assert row.text == row.item["text"] == "one\r\ntwo"
    assert row.content_hash == prepared({"text": "one\r\ntwo"}).content_hash


@pytest.mark.parametrize(
    "parts, reason",
    [
        ({"image": b""}, "the file is empty"),
        ({"video": b""}, "the file is empty"),
        ({"image": b"no picture"}, "not an image that Pillow can read"),
        ({"video": b"no video"}, "cannot be decoded"),
        ({"image": File(LOCAL, "/nothing/a.png")}, "No such file"),
        ({"pdf": File(LOCAL, "/nothing/a.pdf")}, "No such file"),
        ({"image": 7}, "'image' must be the content or the path of a file, got int"),
        ({"image": "data:image/png"}, "cannot be downloaded"),
    ],
)
def test_what_cannot_be_read_is_noted(parts, reason):
    row = prepared(parts)
    assert reason in row.error and row.item is None and row.parts == {} and not row.error.startswith("[Errno")


@pytest.mark.parametrize("kind", ["text", "image", "video"])
def test_errors_of_network_libraries_are_of_their_row(kind):
    """Those of httpx and ftplib are no `OSError`."""

    class Broken(io.BytesIO):
        def read(self, size=-1):
            raise ftplib.error_perm("550 gone")

    fs = SimpleNamespace(open=lambda path, mode: Broken())
    row = prepare(Row("a", kind, {kind: File(fs, "far/a")}), Reading(10_000))
    assert row.error == "'far/a' cannot be read (error_perm: 550 gone)"


def test_an_empty_pdf(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"")
    assert prepared({"pdf": File(LOCAL, str(tmp_path / "a.pdf"))}).error == "the file is empty"


def test_known_content_is_not_decoded(monkeypatch):
    known = Known(np.ones(4, np.float32), b"jpeg")
    content_hash = prepared({"image": png(picture(0))}).content_hash
    monkeypatch.setattr(rows, "read_image", None)
    row = prepared({"image": png(picture(0))}, Reading(1, known={content_hash: known}.get))
    assert row.embedding is known.embedding and row.thumbnail == b"jpeg" and row.item is None


def test_failed_rows_pass_through():
    assert prepared({"image": b""}, error="before").error == "before"


def test_a_missing_package_is_no_fault_of_the_row(monkeypatch):
    def missing(file):
        raise ImportError("PyAV")

    monkeypatch.setattr(rows, "read_video", missing)
    with pytest.raises(ImportError):
        prepared({"video": b"x"})


def test_pages_of_a_pdf():
    first, second = pdf_pages("book.pdf", pdf("one", "two"))
    assert (first.id, first.kind, first.source, first.page) == ("book.pdf#page=1", "page", "book.pdf", 1)
    assert second.text.strip() == "two" and second.page == 2
    image = first.parts["image"]
    assert image.mode == "RGB" and image.size == (417, 209)  # 200 x 100 points at 150 dpi
    assert np.asarray(image).min() < 50 and np.asarray(image).max() == 255  # black on white
    done = [prepare(page, READING) for page in (first, second)]
    assert done[0].content_hash != done[1].content_hash and done[0].item["image"] is image


def test_large_pages_are_drawn_smaller(monkeypatch):
    monkeypatch.setattr(rows, "PAGE_PIXELS", 20_000)
    (page,) = pdf_pages("book.pdf", pdf("one"))
    assert page.parts["image"].size == (200, 100)


@pytest.mark.parametrize("content", [b"", b"%PDF-1.4 nothing", b"no pdf"])
def test_a_pdf_that_cannot_be_read_is_one_failed_row(content):
    (row,) = pdf_pages("book.pdf", content)
    assert (row.id, row.page, row.parts) == ("book.pdf", None, {}) and "the PDF cannot be read" in row.error


def test_a_pdf_without_pages():
    (row,) = pdf_pages("book.pdf", pdf())
    assert "no pages" in row.error or "cannot be read" in row.error


def tiff(folder, *pages, **options):
    """A TIFF file of these images, as a row of a folder."""
    pages[0].save(folder / "scan.tif", save_all=True, append_images=pages[1:], **options)
    file = File(LOCAL, str(folder / "scan.tif"))
    return prepare(Row("scan.tif", "image", {"tiff": file}, source="scan.tif"), READING)


def test_pages_of_a_tiff(tmp_path):
    first, second = picture(0), picture(1).resize((40, 30))
    drawn = [prepare(page, READING) for page in pages(tiff(tmp_path, first.convert("CMYK"), second))]
    facts = [(row.id, row.kind, row.source, row.page, row.error) for row in drawn]
    assert facts == [(f"scan.tif#page={n}", "page", "scan.tif", n, None) for n in (1, 2)]
    assert drawn[0].item["image"].size == first.size
    np.testing.assert_array_equal(np.asarray(drawn[1].item["image"]), np.asarray(second))
    assert drawn[0].content_hash != drawn[1].content_hash and drawn[1].thumbnail


def test_a_tiff_with_one_page_is_an_image(tmp_path):
    row = tiff(tmp_path, picture(0))
    assert (row.id, row.kind, row.page, row.parts, row.error) == ("scan.tif", "image", None, {}, None)
    assert row.content_hash == prepared({"image": (tmp_path / "scan.tif").read_bytes()}).content_hash


def test_pages_that_are_too_large_are_failed_rows(tmp_path, monkeypatch):
    row = tiff(tmp_path, picture(0), picture(1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    drawn = list(pages(row))
    assert [page.page for page in drawn] == [1, 2]
    assert all("cannot be decoded" in page.error and "decompression bomb" in page.error for page in drawn)


def test_a_damaged_page_of_a_tiff_is_a_failed_row(tmp_path):
    tiff(tmp_path, picture(0), picture(1))
    content = (tmp_path / "scan.tif").read_bytes()
    (tmp_path / "scan.tif").write_bytes(content[: len(content) * 3 // 4])
    file = File(LOCAL, str(tmp_path / "scan.tif"))
    drawn = list(pages(prepare(Row("scan.tif", "image", {"tiff": file}), READING)))
    assert drawn[0].error is None and "cannot be decoded" in drawn[-1].error and drawn[-1].page == 2


def test_what_was_filled_into_a_form_is_drawn():
    (filled,), (empty,) = pdf_pages("a.pdf", form("JOHN SMITH")), pdf_pages("b.pdf", form(""))
    ink = [(np.asarray(row.parts["image"]) < 128).sum() for row in (filled, empty)]
    assert ink[0] > ink[1] + 500
