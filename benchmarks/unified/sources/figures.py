"""Config `figures`: pictures of textbooks with captions and credit lines."""

import io
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps

from benchmarks.unified.sources.splits import column, keep, keep_far, keep_most, keep_once, read_lines
from benchmarks.unified.sources.texts import clean, cut_words, jaccard, normalised

# Near-duplicates, from train to test, are dropped: Jaccard similarity of the words of two captions, and
# correlation of thumbnails. Its limit was chosen by looking at pairs: above 0.85 nearly all are the same artwork,
# relettered or recoloured; between 0.75 and 0.8 most are different landscapes, but some are still the same diagram.
CAPTION_JACCARD = 0.6
FIGURE_CORRELATION = 0.75
LEAST_CAPTION_WORDS, MOST_CAPTION_WORDS = 5, 60
TRAIN_FIGURES, TEST_FIGURES = 4400, 600
FIGURE_SIZE, FIGURE_QUALITY, FIGURE_SHORT_SIDE = 112, 80, 16

CREDIT_GROUP = re.compile(
    r"\(\s*(\w+ )?(credits?|attributions?|sources?|courtesy|copyright|modification)\b|©|flickr|wikimedia|wikipedia"
    r"|public domain|creative commons|CC[- ]BY|CC0|(micrograph|photo(graph)?|image|picture)s? (provided )?by",
    re.IGNORECASE,
)
CREDIT_TAIL = re.compile(
    r"(?:(?<=[.?!] )|(?<=[.?!”\")])|^)(?:(?:(?:photo |image )?credits?(?: [a-z])?|attribution|sources?): ?.*"
    r"|[^.]*(?:flickr|wikimedia|public domain|CC[- ]BY).*)$",
    re.IGNORECASE,
)
# "(Petty Officer Candice Villarreal, U.S. Navy)" at the end of a caption.
NAME_AT_END = re.compile(r"\((?![^()]*\b(?:is|are|stands)\b)(?:[A-Z][^(),]*, )+(?:[A-Z]|the )[^()]*\)\.?$")
OPEN_LICENCE = re.compile(r"CC[- ]BY|CC0|public domain|Rice University", re.IGNORECASE)
CLOSED_LICENCE = re.compile(r"BY[- ](SA|NC|ND)\b|all rights reserved|(with|by) permission|fair use", re.IGNORECASE)


def build(source: Path, dropped: Counter) -> list[dict]:
    """Pictures with their captions, descriptions and credit lines."""
    archive = zipfile.ZipFile(source / "figures.zip")
    rows = []
    for row in read_lines(source / "figures.jsonl.gz"):
        whole = clean(row["caption"])
        caption, credit = split_credit(whole)
        rest = " ".join(caption.split()[MOST_CAPTION_WORDS:])
        if re.search(CREDIT_GROUP.pattern + r"|credit", rest, re.IGNORECASE):
            credit = f"{credit} {rest}".strip()
        rows.append(
            {
                "id": row["image"].rsplit(".", 1)[0],
                "book": row["book"],
                "module": f"{row['book']}/{row['module']}",
                "file": row["image"],
                "caption": cut_words(caption, MOST_CAPTION_WORDS),
                "alt": cut_words(clean(row["alt"]), MOST_CAPTION_WORDS) or None,
                "credit": credit or None,
                "licence": whole + " " + clean(row["credit"]),
            }
        )
    rows = [{**row, "id": f"{row['id']}#{i}"} for i, row in enumerate(rows)]
    free = [not CLOSED_LICENCE.search(row["licence"]) for row in rows]
    free = [f and ("©" not in row["licence"] or OPEN_LICENCE.search(row["licence"])) for f, row in zip(free, rows)]
    rows = keep(rows, free, dropped, "credit line with © but no licence, or with BY-SA, BY-NC, BY-ND or a permission")
    long = [len(row["caption"].split()) >= LEAST_CAPTION_WORDS for row in rows]
    rows = keep(rows, long, dropped, f"caption of fewer than {LEAST_CAPTION_WORDS} words without its credit")
    for row in rows:
        row["image"] = {"bytes": encode_figure(archive.read(row["file"])), "path": row["file"].replace("/", "-")}
        image = PILImage.open(io.BytesIO(row["image"]["bytes"]))
        row["thumbnail"], row["short_side"] = thumbnail(image), min(image.size)
    broad = [row["short_side"] >= FIGURE_SHORT_SIDE for row in rows]
    rows = keep(rows, broad, dropped, f"short side below {FIGURE_SHORT_SIDE} px")
    rows = keep_once(rows, lambda row: row["image"]["bytes"], dropped, "exact duplicate of the image")
    rows = [{**row, "id": row["id"].rsplit("#", 1)[0]} for row in rows]
    rows = keep_once(rows, lambda row: normalised(row["caption"]), dropped, "exact duplicate of the caption")
    rows = keep_most(rows, TEST_FIGURES, True, dropped, f"test: over the limit of {TEST_FIGURES} rows")
    rule = f"train: correlation of thumbnails >= {FIGURE_CORRELATION} with test"
    rows = keep_far(rows, near_figures, dropped, rule)
    for name in ("caption", "alt"):
        rule = f"train: Jaccard of the {name}'s words >= {CAPTION_JACCARD} with test"
        rows = keep_far(
            rows,
            lambda a, b, name=name: jaccard(column(a, name), column(b, name)) >= CAPTION_JACCARD,
            dropped,
            rule,
        )
    return keep_most(rows, TRAIN_FIGURES, False, dropped, f"train: over the limit of {TRAIN_FIGURES} rows")


def split_credit(caption: str) -> tuple[str, str]:
    """The caption without its credit lines, and the credit lines.

    Credit lines are groups in brackets, and a last sentence that names the source.
    """
    kept, credits, start = "", [], 0
    for opening in re.finditer(r"\(", caption):
        if opening.start() < start:
            continue
        depth, end = 0, opening.start()
        while end < len(caption):
            depth += {"(": 1, ")": -1}.get(caption[end], 0)
            end += 1
            if depth == 0:
                break
        group = caption[opening.start() : end]
        if CREDIT_GROUP.search(group):
            kept += caption[start : opening.start()]
            credits.append(group)
            start = end
    kept += caption[start:]
    for pattern in (CREDIT_TAIL, NAME_AT_END):
        tail = pattern.search(kept.rstrip())
        if tail:
            kept = kept[: tail.start()]
            credits.append(tail.group())
    kept = re.sub(r"\s+([.,;])", r"\1", " ".join(kept.split()))
    return re.sub(r"\.\.$", ".", kept), " ".join(credits)


def encode_figure(picture: bytes) -> bytes:
    """The picture as a small JPEG file."""
    image = PILImage.open(io.BytesIO(picture)).convert("RGBA")
    image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image).convert("RGB")
    image = ImageOps.contain(image, (FIGURE_SIZE, FIGURE_SIZE), PILImage.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=FIGURE_QUALITY, optimize=True)
    return file.getvalue()


def near_figures(train: list[dict], test: list[dict]) -> np.ndarray:
    """Which train figures show the artwork of which test figure, a boolean matrix."""
    left, right = (np.stack([row["thumbnail"] for row in rows]) for rows in (train, test))
    return correlations(left, right) >= FIGURE_CORRELATION


def thumbnail(image: PILImage.Image) -> np.ndarray:
    """The part that is not white, stretched to 32 x 32 pixels, as a vector of mean 0 per colour and of length 1.

    By plain differences, as in `data/emoji/build.py`, all line drawings look alike, because most pixels are white.
    """
    image = image.convert("RGB")
    drawn = image.convert("L").point(lambda grey: 255 if grey < 240 else 0).getbbox()
    pixels = np.asarray(image.crop(drawn).resize((32, 32), PILImage.Resampling.BOX), dtype=np.float64)
    pixels = (pixels - pixels.mean((0, 1))).reshape(-1)
    return pixels / max(np.sqrt((pixels**2).sum()), 1.0)


def correlations(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Correlation of every left and right thumbnail, or of its mirror image if higher."""
    mirrored = right.reshape(-1, 32, 32, 3)[:, :, ::-1].reshape(len(right), -1)
    return np.maximum(left @ right.T, left @ mirrored.T)
