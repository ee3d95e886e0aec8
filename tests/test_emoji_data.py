"""The emoji dataset in data/emoji: what its card promises, checked on the committed files."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")

FOLDER = Path(__file__).parents[1] / "data" / "emoji"
SPLITS = ("train", "unseen_drawings", "unseen_concepts")


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """The folder as a user loads it, through the card's `configs`."""
    return datasets.load_dataset(str(FOLDER), cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def build():
    """The build script as a module, for its near-duplicate criterion."""
    spec = importlib.util.spec_from_file_location("emoji_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawings(emoji, *splits):
    """The (emoji, artist) pairs of the splits."""
    return [pair for split in splits for pair in zip(emoji[split]["emoji"], emoji[split]["artist"], strict=True)]


def counts(emoji, split, category):
    """Concepts and drawings of one category, as the card writes them."""
    columns = zip(emoji[split]["emoji"], emoji[split]["category"], strict=True)
    chosen = [e for e, c in columns if str(c) == category]
    return f"{len(set(chosen))} / {len(chosen)}"


def table(first_cell):
    """The rows of the card's table whose header starts with this cell."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    body = re.search(rf"^\| {first_cell} \|.*\n\|[ -|]*\n((?:\|.*\n)+)", text, re.MULTILINE).group(1)
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in body.splitlines()]


def test_splits_and_columns(emoji, build):
    assert tuple(emoji) == SPLITS
    for split in SPLITS:
        assert emoji[split].features == build.FEATURES
        assert set(emoji[split]["artist"]) == {"noto", "blob"}


def test_card_counts(emoji):
    expected = []
    for split in SPLITS:
        artists = emoji[split]["artist"][:]
        row = [len(set(emoji[split]["emoji"])), len(artists), artists.count("noto"), artists.count("blob")]
        expected.append([split, *map(str, row)])
    assert table("split") == expected

    rows = table("category")
    assert [row[0] for row in rows] == sorted({str(c) for split in SPLITS for c in emoji[split]["category"]})
    assert rows == [[row[0], *(counts(emoji, split, row[0]) for split in SPLITS)] for row in rows]


def test_no_leak_by_name(emoji):
    everything = drawings(emoji, *SPLITS)
    assert len(set(everything)) == len(everything)
    train = set(drawings(emoji, "train"))
    assert not {e for e, _ in train} & set(emoji["unseen_concepts"]["emoji"])
    other = {"noto": "blob", "blob": "noto"}
    assert all((e, other[artist]) in train for e, artist in drawings(emoji, "unseen_drawings"))


def test_images_and_no_leak_by_artwork(emoji, build):
    signatures = {}
    for split in SPLITS:
        images = emoji[split]["image"][:]
        assert {(image.format, image.size) for image in images} == {("PNG", (96, 96))}
        signatures[split] = np.stack([build.signature(image) for image in images])
    train = emoji["train"]["emoji"][:]
    for split in SPLITS[1:]:
        held_out = emoji[split]["emoji"][:]
        assert not build.near_duplicates(signatures[split], held_out, signatures["train"], train).any()


def test_criterion_sees_copies(emoji, build):
    """A mirrored copy is at distance zero; a different drawing of another concept is far."""
    first, second = (build.signature(emoji["unseen_drawings"][i]["image"])[None] for i in (0, 1))
    assert build.distances(first, first[:, :, ::-1])[0, 0] == 0
    assert build.distances(first, second)[0, 0] > build.OTHER_DISTANCE
    assert build.family("👩‍🚒") == build.family("👨‍🚒") != build.family("👨‍🍳")


def test_every_row_has_names(emoji, build):
    for split in SPLITS:
        for names, keywords in zip(emoji[split]["names"], emoji[split]["keywords"], strict=True):
            assert names["en"]
            assert all(names[language] and keywords[language] for language in build.LANGUAGES)


def test_folder_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) <= 15 * 2**20
