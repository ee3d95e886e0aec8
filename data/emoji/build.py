"""Build the emoji dataset: parquet splits of drawings with names and keywords in twelve languages.

    python data/emoji/build.py --source ../shared/data/emoji

The source folder holds `emoji.jsonl` (one concept per line) and one zip of PNG drawings per artist. The parquet
files are written next to this script and depend on nothing but the source, so a second run gives the same bytes.
"""

import argparse
import hashlib
import io
import json
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageOps

HERE = Path(__file__).resolve().parent
ARTISTS = ("noto", "blob")
LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "nl", "ru", "ja", "zh", "ar", "hi")
SPLITS = ("train", "unseen_drawings", "unseen_concepts")
FEATURES = Features(
    {
        "emoji": Value("string"),
        "artist": Value("string"),
        "image": Image(),
        "category": Value("string"),
        "names": {language: Value("string") for language in LANGUAGES},
        "keywords": {language: List(Value("string")) for language in LANGUAGES},
        "tags": List(Value("string")),
    }
)

# Thresholds on `distances`, chosen by looking at pairs. Two drawings of one family give the answer away when they
# share the artwork, even recoloured (below 40); two of different families only when they are nearly the same (25).
SAME_FAMILY_DISTANCE = 40.0
OTHER_DISTANCE = 25.0

# The clock faces (24) and the plain smileys (46) form groups that would outweigh the rest of `unseen_concepts`.
LARGEST_UNSEEN_GROUP = 12

JOINER = "\u200d"
GENDER_OR_DIRECTION = {"♀", "♂", "➡"}
NEUTRAL_PERSON = str.maketrans("👨👩👦👧👴👵", "🧑🧑🧒🧒🧓🧓")


def family(emoji: str) -> str:
    """The concept without gender and direction, because such variants share most of their drawing and name."""
    first, *rest = emoji.split(JOINER)
    return JOINER.join([first, *(part for part in rest if part not in GENDER_OR_DIRECTION)]).translate(NEUTRAL_PERSON)


def signature(image: PILImage.Image) -> np.ndarray:
    """A 32x32 RGBA-on-white thumbnail of the drawn part, so that a moved or rescaled copy looks the same.

    Alpha is kept as a fourth plane, because white artwork would otherwise vanish on the white background.
    """
    image = image.convert("RGBA")
    drawn = image.getchannel("A").point(lambda alpha: 255 if alpha > 16 else 0).getbbox()
    image = ImageOps.pad(image.crop(drawn), (32, 32), method=PILImage.Resampling.BOX)
    on_white = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image)
    on_white.putalpha(image.getchannel("A"))
    return np.asarray(on_white, dtype=np.float64)


def distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Root-mean-square difference (0 to 255) of every left and right signature, or of its mirror image if smaller.

    The sums are of whole numbers, which float64 holds exactly: every machine gives the same splits.
    """
    flat = left.reshape(len(left), -1)
    result = np.full((len(left), len(right)), np.inf)
    for oriented in (right, right[:, :, ::-1]):
        other = oriented.reshape(len(right), -1)
        squares = (flat**2).sum(1)[:, None] + (other**2).sum(1)[None] - 2 * flat @ other.T
        result = np.minimum(result, np.sqrt(np.maximum(squares, 0) / flat.shape[1]))
    return result


def near_duplicates(left: np.ndarray, left_emoji: list, right: np.ndarray, right_emoji: list) -> np.ndarray:
    """Which left drawing would give a right drawing away (boolean matrix); the criterion that the splits respect."""
    same = np.array([family(e) for e in left_emoji])[:, None] == np.array([family(e) for e in right_emoji])[None]
    return distances(left, right) < np.where(same, SAME_FAMILY_DISTANCE, OTHER_DISTANCE)


def read_rows(source: Path) -> list[dict]:
    """One row per drawing, in the order of `emoji.jsonl`, with the PNG bytes as they are in the zip."""
    archives = {artist: zipfile.ZipFile(source / (artist + ".zip")) for artist in ARTISTS}
    rows = []
    for line in (source / "emoji.jsonl").read_text(encoding="utf-8").splitlines():
        concept = json.loads(line)
        texts = {language: concept["names"].get(language) or {} for language in LANGUAGES}
        for artist in ARTISTS:
            if artist not in concept["images"]:
                continue
            file = concept["images"][artist].removeprefix(artist + ".zip/")
            rows.append(
                {
                    "emoji": concept["emoji"],
                    "artist": artist,
                    "image": {"bytes": archives[artist].read(file), "path": artist + "-" + file},
                    "category": concept["category"],
                    "names": {language: text.get("name") for language, text in texts.items()},
                    "keywords": {language: text.get("keywords") for language, text in texts.items()},
                    "tags": english_tags(concept),
                }
            )
    return rows


def english_tags(concept: dict) -> list[str]:
    """gemoji's and emojilib's English words, which are more colloquial than CLDR's, each once."""
    gemoji = concept["gemoji"] or {"aliases": [], "tags": []}
    words = [*gemoji["aliases"], *gemoji["tags"], *(concept["emojilib"] or [])]
    words = [word.replace("_", " ").strip() for word in words]
    return list({word.casefold(): word for word in reversed(words) if word}.values())[::-1]


def fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: choices made with it survive additions to the data."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def concept_groups(emoji: list[str], near: np.ndarray) -> dict[str, str]:
    """Map each concept to the first member of its group: concepts of one family or with near-identical artwork."""
    links = {e: set() for e in emoji}
    by_family = {}
    for e in links:
        first = by_family.setdefault(family(e), e)
        links[first].add(e)
        links[e].add(first)
    for i, j in np.argwhere(near):
        links[emoji[i]].add(emoji[j])

    group = {}
    for start in sorted(links):
        waiting = [start]
        while waiting:
            e = waiting.pop()
            if e not in group:
                group[e] = start
                waiting.extend(links[e])
    return group


def assign_splits(emoji: list[str], artists: list[str], near: np.ndarray) -> list[str]:
    """The split of each drawing.

    Whole groups of concepts go to `unseen_concepts`, a tenth of all but the largest groups. A third of the other
    concepts with two drawings give one of them to `unseen_drawings`; a drawing that is close to any other drawing of
    a seen concept is passed over.
    """
    group = concept_groups(emoji, near)
    size = Counter(group.values())
    unseen = {g for g in size if size[g] <= LARGEST_UNSEEN_GROUP and fraction("concept " + g) < 0.1}
    splits = ["unseen_concepts" if group[e] in unseen else "train" for e in emoji]
    seen = np.array([split == "train" for split in splits])
    given_away = (near & seen).any(1)
    index = {pair: i for i, pair in enumerate(zip(emoji, artists, strict=True)) if seen[i]}
    pairs = sorted(
        (e for e, count in Counter(e for e, _ in index).items() if count == 2), key=lambda e: fraction("drawing " + e)
    )
    held_out = [index[e, ARTISTS[fraction("artist " + e) < 0.5]] for e in pairs]
    for i in [i for i in held_out if not given_away[i]][: len(pairs) // 3]:
        splits[i] = "unseen_drawings"
    return splits


def print_counts(rows: list[dict], splits: list[str]) -> None:
    """Print the two tables of the dataset card, to be pasted there."""
    parts = {split: [row for row, s in zip(rows, splits, strict=True) if s == split] for split in SPLITS}
    print("| split | concepts | drawings | noto | blob |")
    for split, part in parts.items():
        artists = Counter(row["artist"] for row in part)
        print(f"| `{split}` | {count_concepts(part)} | {len(part)} | {artists['noto']} | {artists['blob']} |")
    print("| category | " + " | ".join(SPLITS) + " |")
    for category in sorted({row["category"] for row in rows}, key=str):
        chosen = [[row for row in part if row["category"] == category] for part in parts.values()]
        print(f"| {category} | " + " | ".join(f"{count_concepts(part)} / {len(part)}" for part in chosen) + " |")


def count_concepts(rows: list[dict]) -> int:
    """Number of different concepts among the drawings."""
    return len({row["emoji"] for row in rows})


def main() -> None:
    """Read the source, split it and write one parquet file per split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("../shared/data/emoji"))
    rows = read_rows(parser.parse_args().source)

    emoji = [row["emoji"] for row in rows]
    signatures = np.stack([signature(PILImage.open(io.BytesIO(row["image"]["bytes"]))) for row in rows])
    near = near_duplicates(signatures, emoji, signatures, emoji)
    np.fill_diagonal(near, False)
    print("drawings with a near-duplicate:", near.any(1).sum(), "of", len(rows))
    splits = assign_splits(emoji, [row["artist"] for row in rows], near)
    for split in SPLITS:
        part = [row for row, s in zip(rows, splits, strict=True) if s == split]
        Dataset.from_list(part, features=FEATURES).to_parquet(HERE / (split + ".parquet"))
    print_counts(rows, splits)


if __name__ == "__main__":
    main()
