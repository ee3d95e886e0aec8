"""A row: reading, hashing and decoding its content; pages of PDFs."""

import base64
import io

import fsspec
import numpy as np
import pytest
from PIL import Image
from support.corpus import pdf, picture

from btok_hf.corpus import rows
from btok_hf.corpus.rows import File, Known, Reading, Row, pdf_pages, prepare

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


def form(value):
    """A PDF with a text field that was filled in."""
    objects = [
        "<</Type/Catalog/Pages 2 0 R/AcroForm<</Fields[4 0 R]/DA(/F 24 Tf 0 g)/NeedAppearances true"
        "/DR<</Font<</F 5 0 R>>>>>>>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 400 300]/Annots[4 0 R]/Resources<</Font<</F 5 0 R>>>>>>",
        f"<</Type/Annot/Subtype/Widget/FT/Tx/T(name)/V({value})/DA(/F 24 Tf 0 g)/F 4/Rect[20 150 380 200]/P 3 0 R>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    content, places = "%PDF-1.7\n", []
    for number, each in enumerate(objects, 1):
        places.append(len(content))
        content += f"{number} 0 obj\n{each}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    end = f"xref\n0 6\n0000000000 65535 f \n{table}trailer<</Size 6/Root 1 0 R>>\nstartxref\n{len(content)}\n%%EOF"
    return (content + end).encode()


def test_what_was_filled_into_a_form_is_drawn():
    (filled,), (empty,) = pdf_pages("a.pdf", form("JOHN SMITH")), pdf_pages("b.pdf", form(""))
    ink = [(np.asarray(row.parts["image"]) < 128).sum() for row in (filled, empty)]
    assert ink[0] > ink[1] + 500
