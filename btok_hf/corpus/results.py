"""Show hits: as lines, JSON, a contact sheet or an HTML page."""

import base64
import io
import json
import math
import textwrap
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from PIL import Image, ImageDraw, ImageFont

from btok_hf.corpus.index import Hit

# Pixels of a contact sheet.
TILE, MARGIN, LINE = 192, 8, 16
COLUMNS = 5


def excerpt(text: str | None, length: int) -> str:
    """A text in one line of at most `length` characters, without characters that control a terminal."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text or "").split())
    return line if len(line) <= length else line[: length - 1] + "…"


def as_lines(hits: Sequence[Hit]) -> str:
    """Score, kind, id and the beginning of the text, a line a hit."""
    width = min(max((len(excerpt(hit.id, 60)) for hit in hits), default=0), 60)
    lines = [
        f"{hit.score:6.3f}  {hit.kind:<5}  {excerpt(hit.id, 60):<{width}}  {excerpt(hit.text, 60)}".rstrip()
        for hit in hits
    ]
    return "\n".join(lines) if lines else "nothing was found"


def as_json(hits: Sequence[Hit]) -> str:
    """A JSON list of the hits without thumbnails and hashes. Values of other types become strings, and NaN null."""
    hidden = ("thumbnail", "content_hash")
    rows = [{name: value for name, value in vars(hit).items() if name not in hidden} for hit in hits]
    return json.dumps(_of_json(rows), ensure_ascii=False, indent=2, default=str)


def _of_json(value: Any) -> Any:
    """A value in which NaN and infinity, which JSON has not, are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _of_json(each) for key, each in value.items()}
    return [_of_json(each) for each in value] if isinstance(value, (list, tuple)) else value


def as_html(query: str, hits: Sequence[Hit]) -> str:
    """A page of the hits: one file without scripts that loads nothing, in which every text is escaped.

    Args:
        query (`str`): What was searched for, for people.
        hits (`Sequence[Hit]`): Best first.

    Returns:
        `str`
    """
    template = files("btok_hf").joinpath("templates/hits.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters["excerpt"] = excerpt
    return environment.from_string(template).render(query=query, hits=hits)


def as_sheet(hits: Sequence[Hit]) -> Image.Image:
    """A picture of the hits in rows of five: thumbnail or beginning of the text, rank, score and id.

    Args:
        hits (`Sequence[Hit]`): Best first, at least one.

    Returns:
        `PIL.Image.Image`
    """
    rows, width = -(-len(hits) // COLUMNS), TILE + 2 * MARGIN
    height = TILE + 2 * MARGIN + 2 * LINE
    sheet = Image.new("RGB", (min(len(hits), COLUMNS) * width, rows * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for rank, hit in enumerate(hits):
        left, top = rank % COLUMNS * width + MARGIN, rank // COLUMNS * height + MARGIN
        if hit.thumbnail:
            with Image.open(io.BytesIO(hit.thumbnail)) as picture:
                picture.thumbnail((TILE, TILE))
                sheet.paste(picture, (left + (TILE - picture.width) // 2, top + (TILE - picture.height) // 2))
        else:
            lines = textwrap.wrap(excerpt(hit.text, 280) or f"({hit.kind})", 28)[:12]
            draw.multiline_text((left, top), "\n".join(lines), "black", font)
        draw.rectangle((left - 1, top - 1, left + TILE, top + TILE), outline="lightgray")
        draw.text((left, top + TILE + 2), f"{rank + 1}.  {hit.score:.3f}  {hit.kind}", "black", font)
        draw.text((left, top + TILE + 2 + LINE), excerpt(hit.id, 28), "dimgray", font)
    return sheet
