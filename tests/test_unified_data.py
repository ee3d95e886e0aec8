"""The unified benchmark's data in benchmarks/unified/data: what its card promises, checked on the committed files."""

import re
from pathlib import Path

import datasets
import numpy as np
import pytest

from benchmarks.unified import build
from benchmarks.unified.sources import clips, figures, glossary, modules, questions, splits, texts

FOLDER = Path(__file__).parents[1] / "benchmarks" / "unified"
BOOK_CONFIGS = ("glossary", "modules", "questions", "figures")
CONFIGS = (*BOOK_CONFIGS, "clips")
SPLITS = ("train", "test")
# Decoders of other versions may differ in the last bit, so a pair at the threshold may cross it.
DECODER_MARGIN = 0.005


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Every config as a user loads it, through the card's `configs`."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return {config: datasets.load_dataset(str(FOLDER / "data"), config, cache_dir=cache) for config in CONFIGS}


def column(data, config, split, name):
    """One column as a list."""
    return data[config][split][name][:]


def both(data, config, name):
    """One column of train and of test."""
    return [column(data, config, split, name) for split in SPLITS]


def joined(parts):
    """The rows of train and test in one list."""
    return [row for part in parts for row in part]


def table(first_cell):
    """The rows of the card's table whose header starts with this cell."""
    text = (FOLDER / "data" / "README.md").read_text(encoding="utf-8")
    body = re.search(rf"^\| {first_cell} \| (?:train|split).*\n\|[ -|]*\n((?:\|.*\n)+)", text, re.MULTILINE).group(1)
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in body.splitlines()]


def test_splits_and_columns(data):
    for config in CONFIGS:
        assert tuple(data[config]) == SPLITS
        for split in SPLITS:
            assert data[config][split].features == build.FEATURES[config]


def test_card_counts(data):
    assert table("config") == [[c, *(str(len(data[c][split])) for split in SPLITS)] for c in CONFIGS]
    books = {config: joined(both(data, config, "book")) for config in BOOK_CONFIGS}
    expected = [
        [book, SPLITS[book in splits.TEST_BOOKS], *(str(books[config].count(book)) for config in BOOK_CONFIGS)]
        for book in sorted(set().union(*books.values()))
    ]
    assert table("book") == expected

    text = " ".join((FOLDER / "data" / "README.md").read_text(encoding="utf-8").split())
    answers, credits = joined(both(data, "questions", "answer")), joined(both(data, "figures", "credit"))
    assert f"{len(answers) - answers.count(None)} of the {len(answers)} questions have an answer" in text
    assert f"{len(credits) - credits.count(None)} of the {len(credits)} figures have a credit line" in text


def test_split_by_book(data):
    for config in BOOK_CONFIGS:
        train, test = (set(books) for books in both(data, config, "book"))
        assert test == set(splits.TEST_BOOKS)
        assert not train & test
        ids = joined(both(data, config, "id"))
        assert len(set(ids)) == len(ids)
        name = "id" if config == "modules" else "module"
        for split in SPLITS:
            pairs = zip(column(data, config, split, "book"), column(data, config, split, name))
            assert all(module.startswith(book + "/") for book, module in pairs)


def test_glossary(data):
    train, test = both(data, "glossary", "definition")
    assert all(len(text.split()) >= 3 for text in train + test)
    assert texts.jaccard(train, test).max() < glossary.DEFINITION_JACCARD
    train, test = ({texts.normalised(term) for term in terms} for terms in both(data, "glossary", "term"))
    assert "" not in train | test
    assert not train & test


def test_modules(data):
    train, test = both(data, "modules", "text")
    assert all(modules.LEAST_MODULE_CHARACTERS * 0.99 <= len(text) <= 1500 for text in train + test)
    assert texts.gram_share(train, test).max() < modules.MODULE_SHARE
    titles = both(data, "modules", "title")
    assert not any(modules.GENERIC_TITLE.fullmatch(title) for title in joined(titles))
    train, test = ({texts.normalised(title) for title in part} for part in titles)
    assert not train & test


def test_questions(data):
    train, test = both(data, "questions", "question")
    assert all(5 <= len(text.split()) <= 60 for text in train + test)
    assert texts.jaccard(train, test).max() < questions.QUESTION_JACCARD
    for split in SPLITS:
        assert set(column(data, "questions", split, "module")) <= set(column(data, "modules", split, "id"))
        answers = column(data, "questions", split, "answer")
        assert not any(answer is not None and questions.ONLY_A_LETTER.fullmatch(answer) for answer in answers)


def test_figures(data):
    thumbnails = []
    for split in SPLITS:
        images = column(data, "figures", split, "image")
        assert {(image.format, image.mode, max(image.size)) for image in images} == {("JPEG", "RGB", 112)}
        assert min(min(image.size) for image in images) >= figures.FIGURE_SHORT_SIDE
        thumbnails.append(np.stack([figures.thumbnail(image) for image in images]))
    assert figures.correlations(*thumbnails).max() < figures.FIGURE_CORRELATION + DECODER_MARGIN


def test_captions(data):
    train, test = both(data, "figures", "caption")
    assert all(5 <= len(text.split()) <= 60 for text in train + test)
    assert texts.jaccard(train, test).max() < figures.CAPTION_JACCARD
    train, test = ([text or "" for text in part] for part in both(data, "figures", "alt"))
    assert texts.jaccard(train, test).max() < figures.CAPTION_JACCARD
    credits = [text for text in joined(both(data, "figures", "credit")) if text]
    assert len(credits) > 1000
    assert not any(figures.CLOSED_LICENCE.search(text) for text in credits)


def test_clips(data):
    signatures = []
    for split in SPLITS:
        frames = column(data, "clips", split, "frames")
        assert {(len(clip), *((f.format, f.size) for f in clip)) for clip in frames} == {(4, *[("PNG", (64, 64))] * 4)}
        signatures.append(np.stack([clips.clip_signature(clip) for clip in frames]))
    assert clips.clip_distances(*signatures).min() >= clips.CLIP_DISTANCE
    emoji, names = both(data, "clips", "emoji"), both(data, "clips", "name")
    assert len(set(joined(emoji))) == len(joined(emoji))
    for parts, family in ((emoji, clips.family), (names, clips.name_family)):
        train, test = ({family(text) for text in part} for part in parts)
        assert not train & test


def test_criteria_see_copies(data):
    """Mirrored pictures and reordered words are near-duplicates; others are not."""
    images = [data["figures"]["test"][i]["image"] for i in (0, 1)]
    first, second = (figures.thumbnail(image)[None] for image in images)
    mirrored = first.reshape(1, 32, 32, 3)[:, :, ::-1].reshape(1, -1)
    assert figures.correlations(first, mirrored)[0, 0] == pytest.approx(1)
    assert figures.correlations(first, second)[0, 0] < 0.9
    assert texts.jaccard(["The red fox."], ["the fox, red", "a blue whale"]).tolist() == [[1, 0]]
    assert texts.gram_share(["a b c d e f g h"], ["x a b c d e f g h y", "h g f e d c b a"]).tolist() == [[1, 0]]
    assert clips.family("👍🏽") == clips.family("👍") != clips.family("👎")
    assert clips.name_family("blue heart") == clips.name_family("red heart") != clips.name_family("broken heart")


def test_credits_leave_the_caption():
    assert figures.split_credit("A star (or sun). (credit: A (B)/Flickr)") == (
        "A star (or sun).",
        "(credit: A (B)/Flickr)",
    )
    assert figures.split_credit("A chart. Source: NASA, 2020.") == ("A chart.", "Source: NASA, 2020.")
    assert figures.split_credit("A storm. (Ann Lee, U.S. Navy)") == ("A storm.", "(Ann Lee, U.S. Navy)")
    assert figures.split_credit("The source of a river.") == ("The source of a river.", "")


def test_folder_is_small():
    files = [path for path in (FOLDER / "data").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= build.MOST_BYTES == 17_000_000
