"""Hits for people: lines, JSON, a page, a contact sheet."""

import base64
import datetime
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from btok_hf.commands.corpus import SHEET_HITS, SHEETS
from btok_hf.corpus.index import Hit
from btok_hf.corpus.results import LINE, MARGIN, TILE, as_html, as_json, as_lines, as_sheet, excerpt

EVIL = "<script>alert('x')</script>\"><img src=https://evil.example/x onerror=a()>"


def jpeg(colour):
    content = io.BytesIO()
    Image.new("RGB", (100, 60), colour).save(content, "JPEG")
    return content.getvalue()


HITS = [
    Hit("red.png", 0.91, "image", "red.png", None, None, jpeg("red"), {"year": 2020, "empty": None}),
    Hit("doc.pdf#page=3", 0.5, "page", "doc.pdf", 3, "Text of\nthe page", jpeg("blue")),
    Hit(f"{EVIL}.txt", -0.125, "text", f"{EVIL}.txt", None, EVIL * 9, None, {EVIL: EVIL}),
]


def test_lines_hold_no_control_characters():
    text = as_lines([*HITS, Hit("a\x1b[31m\nb", 0.1, "text", None, None, "c\x07\x9b\u202ed", None)])
    lines = text.split("\n")
    assert len(lines) == 4 and all(line.isprintable() for line in lines)
    assert re.fullmatch(r" 0\.910  image  red\.png", lines[0]) and lines[1].endswith("Text of the page")
    assert lines[2].startswith("-0.125  text") and as_lines([]) == "nothing was found"


def test_an_excerpt_is_as_long_as_asked_for():
    assert excerpt("abcdef", 6) == "abcdef" and excerpt("abcdefg", 6) == "abcde…" and excerpt(None, 5) == ""


def test_json_holds_everything_but_the_pictures():
    day = Hit("a", 0.5, "text", None, None, "ä", None, {"day": datetime.date(2026, 11, 27), "raw": b"x"})
    rows = json.loads(as_json([*HITS, day]))
    assert rows[0] == {
        "id": "red.png",
        "score": 0.91,
        "kind": "image",
        "source": "red.png",
        "page": None,
        "text": None,
        "metadata": {"year": 2020, "empty": None},
    }
    assert rows[2]["text"] == EVIL * 9 and rows[3]["metadata"]["day"] == "2026-11-27" and json.loads(as_json([])) == []


def test_json_has_no_numbers_that_json_does_not_know():
    odd = Hit("a", 0.5, "text", None, None, None, None, {"x": math.nan, "deep": [{"y": math.inf, 1: 2.5}], "t": ()})
    (row,) = json.loads(as_json([odd]), parse_constant=pytest.fail)
    assert row["metadata"] == {"x": None, "deep": [{"y": None, "1": 2.5}], "t": []}


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_a_page_is_one_file_in_which_everything_is_escaped():
    page = Page(as_html(f"tiger {EVIL}", HITS))
    names = {tag for tag, _ in page.tags}
    assert "script" not in names and "link" not in names and "a" not in names
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [picture["alt"] for picture in pictures] == ["image: red.png", "page: doc.pdf#page=3"]
    for picture, hit in zip(pictures, HITS):
        kind, _, data = picture["src"].partition(",")
        assert kind == "data:image/jpeg;base64" and base64.b64decode(data) == hit.thumbnail and len(picture) == 2
    assert f"tiger {EVIL}" in page.text and EVIL in page.text and "page 3" in page.text and "2020" in page.text
    assert "empty" not in page.text and "-0.125" in page.text
    policy = next(values["content"] for tag, values in page.tags if values.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert "Nothing was found" in Page(as_html("x", [])).text


def test_every_format_holds_the_largest_sheet():
    sheet = as_sheet(HITS * (SHEET_HITS // 3))
    for suffix, kind in SHEETS.items():
        content = io.BytesIO()
        sheet.save(content, kind)
        assert Image.open(content).size == sheet.size, suffix


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (3, 3, 1), (7, 5, 2)])
def test_a_sheet_has_a_tile_a_hit(count, columns, rows):
    sheet = as_sheet((HITS * 3)[:count])
    width, height = TILE + 2 * MARGIN, TILE + 2 * MARGIN + 2 * LINE
    assert sheet.size == (columns * width, rows * height)
    red, _, blue = sheet.getpixel((width // 2, MARGIN + TILE // 2))
    assert red > 200 and blue < 50
    if count > 2:  # the tile of a text is written on
        text = sheet.crop((2 * width + MARGIN, MARGIN, 3 * width - MARGIN - 1, MARGIN + TILE - 1)).convert("L")
        assert min(text.getdata()) < 100
