"""Build the unified benchmark's data: texts and figures of open textbooks, and clips of animated emoji.

    python benchmarks/unified/build.py --source ../shared/data

The source folder holds `openstax` and `animated_emoji`. Everything goes to the folder `data` next to this script (the
card and the licences too) and depends on nothing but the source: a second run gives the same bytes.
"""

import argparse
import gzip
import hashlib
import io
import json
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageOps

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
SPLITS = ("train", "test")
TEST_BOOKS = ("physics", "introduction-sociology", "american-government")
MOST_BYTES = 17_000_000

STRING = Value("string")
FEATURES = {
    "glossary": Features(dict.fromkeys(("id", "book", "module", "term", "definition"), STRING)),
    "modules": Features({"id": STRING, "book": STRING, "title": STRING, "objectives": List(STRING), "text": STRING}),
    "questions": Features(dict.fromkeys(("id", "book", "module", "question", "answer"), STRING)),
    "figures": Features(
        {
            **dict.fromkeys(("id", "book", "module"), STRING),
            "image": Image(),
            **dict.fromkeys(("caption", "alt", "credit"), STRING),
        }
    ),
    "clips": Features(
        {"emoji": STRING, "name": STRING, "keywords": List(STRING), "category": STRING, "frames": List(Image())}
    ),
}

# Near-duplicates, from train to test. Words are sets; a share is of the smaller set.
DEFINITION_JACCARD = 0.6
QUESTION_JACCARD = 0.7
CAPTION_JACCARD = 0.6
MODULE_SHARE, GRAM = 0.1, 8
# Correlation of thumbnails, chosen by looking at pairs: above 0.85 nearly all are the same artwork, relettered or
# recoloured; between 0.75 and 0.8 most are different landscapes, but some are still the same diagram.
FIGURE_CORRELATION = 0.75
# RMS distance of the frames (0 to 255), chosen by looking at groups: above 25 they are unlike smileys.
CLIP_DISTANCE = 25.0
LARGEST_TEST_GROUP = 12

LEAST_MODULE_CHARACTERS, MOST_MODULE_CHARACTERS = 600, 1500
QUESTION_WORDS = (5, 60)
LEAST_CAPTION_WORDS, MOST_CAPTION_WORDS = 5, 60
TRAIN_QUESTIONS, TRAIN_FIGURES, TEST_FIGURES, TEST_CLIPS = 6000, 4400, 600, 110
FIGURE_SIZE, FIGURE_QUALITY, FIGURE_SHORT_SIDE = 112, 80, 16
SOURCE_FRAME, FRAME_SIZE, FRAMES, FRAME_COLOURS = 96, 64, (0, 3, 6, 9), 64

GENERIC_TITLE = re.compile(
    r"|introduction|preface|(chapter )?summary|connection for ap® courses|glossary.*|key terms|answer key|index|units"
    r"|useful information|reference tables|references|recommended resources.*|.*to come",
    re.IGNORECASE,
)
# Notes to teachers within the text of "physics", marked with the level of the students.
TEACHERS_NOTE = re.compile(r"\[(BL|OL|AL|EL|TEKS)\]|Physics learning objectives come from")
ONLY_A_LETTER = re.compile(r"\W*[A-Za-z]\W*")

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

JOINER = "\u200d"
GENDER_OR_DIRECTION = {"♀", "♂", "➡", "⬅", "↔", "↕"}
SKIN_TONES = dict.fromkeys(range(0x1F3FB, 0x1F400))
NEUTRAL_PERSON = {**str.maketrans("👨👩👦👧👴👵", "🧑🧑🧒🧒🧓🧓"), **SKIN_TONES}
VARIANT_WORDS = re.compile(
    r"\b(left|right|up|down|leftwards|rightwards|upwards|downwards|first|last|1st|2nd|3rd|showing .*"
    r"|(light |dark )?(red|orange|yellow|green|blue|purple|brown|black|white|grey|pink)|(wo)?man|men|women)\b[- !]*"
)


def clean(text: str | None) -> str:
    """One line with single spaces, without the empty brackets that removed cross-references left."""
    return re.sub(r"\s*\(\s*\)", "", " ".join((text or "").split()))


def words(text: str) -> set[str]:
    """The different words, in any case."""
    return set(re.findall(r"\w+", text.casefold()))


def grams(text: str) -> set[str]:
    """The different runs of eight words."""
    sequence = re.findall(r"\w+", text.casefold())
    return {" ".join(sequence[i : i + GRAM]) for i in range(len(sequence) - GRAM + 1)}


def normalised(text: str) -> str:
    """Letters and digits only, in any case."""
    return re.sub(r"[\W_]+", "", text.casefold())


def cut_words(text: str, most: int) -> str:
    """The first words."""
    return " ".join(text.split()[:most])


def cut_characters(text: str, most: int) -> str:
    """The first characters, up to the end of a word."""
    return text if len(text) <= most else text[: most + 1].rsplit(maxsplit=1)[0]


def fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: choices made with it survive additions to the data."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def shared(left: list[set], right: list[set]) -> np.ndarray:
    """How many elements each left and each right set have in common."""
    holders = {}
    for j, elements in enumerate(right):
        for element in elements:
            holders.setdefault(element, []).append(j)
    result = np.zeros((len(left), len(right)), dtype=np.int32)
    for i, elements in enumerate(left):
        found = [j for element in elements for j in holders.get(element, ())]
        result[i] = np.bincount(found, minlength=len(right)) if found else 0
    return result


def sizes(sets: list[set]) -> np.ndarray:
    """How many elements each set has, at least one."""
    return np.array([max(len(elements), 1) for elements in sets])


def jaccard(left: list[str], right: list[str]) -> np.ndarray:
    """Similarity (0 to 1) of every left and right text by their words."""
    left, right = [words(text) for text in left], [words(text) for text in right]
    common = shared(left, right)
    return common / (sizes(left)[:, None] + sizes(right)[None] - common)


def gram_share(left: list[str], right: list[str]) -> np.ndarray:
    """Which share (0 to 1) of the smaller text's runs of eight words is in the other text, for every pair."""
    left, right = [grams(text) for text in left], [grams(text) for text in right]
    return shared(left, right) / np.minimum(sizes(left)[:, None], sizes(right)[None])


def thumbnail(image: PILImage.Image) -> np.ndarray:
    """32 x 32 pixels of the part that is not white, stretched, as a vector of mean 0 per colour and of length 1.

    Plain differences, as in `data/emoji/build.py`, would find all line drawings alike, which are white for the most.
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


def clip_signature(frames: list[PILImage.Image]) -> np.ndarray:
    """The frames at 32 x 32."""
    frames = [frame.convert("RGB").resize((32, 32), PILImage.Resampling.BOX) for frame in frames]
    return np.stack([np.asarray(frame, dtype=np.float64) for frame in frames])


def clip_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Root-mean-square difference (0 to 255) of every left and right clip, or of its mirror image if smaller.

    The sums are of whole numbers, which float64 holds exactly: every machine gives the same splits.
    """
    flat = left.reshape(len(left), -1)
    result = np.full((len(left), len(right)), np.inf)
    for oriented in (right, right[:, :, :, ::-1]):
        other = oriented.reshape(len(right), -1)
        squares = (flat**2).sum(1)[:, None] + (other**2).sum(1)[None] - 2 * flat @ other.T
        result = np.minimum(result, np.sqrt(np.maximum(squares, 0) / flat.shape[1]))
    return result


def family(emoji: str) -> str:
    """The concept without gender, direction and skin tone, because such variants share most of their drawing."""
    first, *rest = emoji.replace("\ufe0f", "").split(JOINER)
    return JOINER.join([first, *(part for part in rest if part not in GENDER_OR_DIRECTION)]).translate(NEUTRAL_PERSON)


def name_family(name: str) -> str:
    """The name without colour, direction and rank: coloured hearts, hands that point, medals, globes."""
    return " ".join(VARIANT_WORDS.sub("", name.casefold()).split()) or name


def is_test(row: dict) -> bool:
    """Whether the row comes from a book of the test split."""
    return row["book"] in TEST_BOOKS


def keep(rows: list[dict], flags, dropped: Counter, rule: str) -> list[dict]:
    """The rows with a true flag; the others are counted."""
    flags = list(flags)
    dropped[rule] += len(flags) - sum(map(bool, flags))
    return [row for row, flag in zip(rows, flags, strict=True) if flag]


def keep_once(rows: list[dict], key, dropped: Counter, rule: str) -> list[dict]:
    """The first row of every key; rows of the test books come first, so that theirs are kept."""
    seen = {}
    for row in sorted(rows, key=is_test, reverse=True):
        seen.setdefault(key(row), row["id"])
    first = set(seen.values())
    return keep(rows, [row["id"] in first for row in rows], dropped, rule)


def keep_far(rows: list[dict], near, dropped: Counter, rule: str) -> list[dict]:
    """All rows of test and those rows of train that `near(train, test)`, a boolean matrix, does not connect to any."""
    train, test = [row for row in rows if not is_test(row)], [row for row in rows if is_test(row)]
    far = {row["id"] for row, given_away in zip(train, near(train, test).any(1), strict=True) if not given_away}
    return keep(rows, [is_test(row) or row["id"] in far for row in rows], dropped, rule)


def keep_most(rows: list[dict], most: int, test: bool, dropped: Counter, rule: str) -> list[dict]:
    """At most so many rows of the split, chosen by a hash of the id."""
    chosen = sorted((fraction(row["id"]), row["id"]) for row in rows if is_test(row) == test)[:most]
    chosen = {identifier for _, identifier in chosen}
    return keep(rows, [is_test(row) != test or row["id"] in chosen for row in rows], dropped, rule)


def column(rows: list[dict], name: str) -> list:
    """One column; nulls become empty texts."""
    return [row[name] or "" for row in rows]


def read_lines(path: Path) -> list[dict]:
    """The rows of a compressed JSON Lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def numbered(rows: list[dict], letter: str) -> list[dict]:
    """The rows with an `id`, made of the module and the number within it, and with a `book`."""
    count = Counter()
    result = []
    for row in rows:
        count[row["module"]] += 1
        identifier = f"{row['module']}/{letter}{count[row['module']]}"
        result.append({**row, "id": identifier, "book": row["module"].split("/")[0]})
    return result


def glossary(source: Path, dropped: Counter) -> list[dict]:
    """Terms and their definitions."""
    rows = numbered(read_lines(source / "glossary.jsonl.gz"), "g")
    rows = [{**row, "term": clean(row["term"]), "definition": clean(row["meaning"])} for row in rows]
    complete = [normalised(row["term"]) and len(row["definition"].split()) >= 3 for row in rows]
    rows = keep(rows, complete, dropped, "no term, or a definition of fewer than 3 words")
    rows = keep_once(rows, lambda row: (row["term"], row["definition"]), dropped, "exact duplicate")
    terms = {normalised(row["term"]) for row in rows if is_test(row)}
    known = [is_test(row) or normalised(row["term"]) not in terms for row in rows]
    rows = keep(rows, known, dropped, "train: the term is in test")
    rule = f"train: Jaccard of the definition's words >= {DEFINITION_JACCARD} with test"
    return keep_far(
        rows,
        lambda a, b: jaccard(column(a, "definition"), column(b, "definition")) >= DEFINITION_JACCARD,
        dropped,
        rule,
    )


def modules(source: Path, dropped: Counter) -> list[dict]:
    """Sections: title, learning objectives and the beginning of the text."""
    rows = []
    for row in read_lines(source / "modules.jsonl.gz"):
        paragraphs = [clean(block[1]) for block in row["blocks"] if block[0] == "p"]
        full = "\n".join(text for text in paragraphs if text and not TEACHERS_NOTE.match(text))
        objectives = [text for text in map(clean, row["objectives"]) if text]
        text = cut_characters(full, MOST_MODULE_CHARACTERS)
        rows.append({**row, "title": clean(row["title"]), "objectives": objectives, "full": full, "text": text})
    rows = keep(rows, [not GENERIC_TITLE.fullmatch(row["title"]) for row in rows], dropped, "generic title")
    rule = f"fewer than {LEAST_MODULE_CHARACTERS} characters of text"
    rows = keep(rows, [len(row["full"]) >= LEAST_MODULE_CHARACTERS for row in rows], dropped, rule)
    rows = keep_once(rows, lambda row: row["text"], dropped, "exact duplicate of the text")
    titles = {normalised(row["title"]) for row in rows if is_test(row)}
    known = [is_test(row) or normalised(row["title"]) not in titles for row in rows]
    rows = keep(rows, known, dropped, "train: the title is in test")
    rule = f"train: shares >= {MODULE_SHARE:.0%} of the smaller text's word {GRAM}-grams with test"
    return keep_far(
        rows,
        lambda a, b: (
            np.maximum(*(gram_share(column(a, key), column(b, key)) for key in ("full", "text"))) >= MODULE_SHARE
        ),
        dropped,
        rule,
    )


def questions(source: Path, kept_modules: set[str], dropped: Counter) -> list[dict]:
    """Exercises and review questions with their answers, where the book gives more than a letter."""
    rows = []
    for row in numbered(read_lines(source / "questions.jsonl.gz"), "q"):
        answer = clean(row["answer"])
        answer = None if not answer or ONLY_A_LETTER.fullmatch(answer) else answer
        rows.append({**row, "question": clean(row["question"]), "answer": answer})
    rows = keep(rows, [row["module"] in kept_modules for row in rows], dropped, "module not in `modules`")
    least, most = QUESTION_WORDS
    fitting = [least <= len(row["question"].split()) <= most for row in rows]
    rows = keep(rows, fitting, dropped, f"fewer than {least} or more than {most} words")
    rows = keep_once(rows, lambda row: normalised(row["question"]), dropped, "exact duplicate")
    rule = f"train: Jaccard of the words >= {QUESTION_JACCARD} with test"
    rows = keep_far(
        rows, lambda a, b: jaccard(column(a, "question"), column(b, "question")) >= QUESTION_JACCARD, dropped, rule
    )
    return keep_most(rows, TRAIN_QUESTIONS, False, dropped, f"train: over the limit of {TRAIN_QUESTIONS} rows")


def split_credit(caption: str) -> tuple[str, str]:
    """The caption without credit lines, and these: bracketed groups and a last sentence that names the source."""
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


def figures(source: Path, dropped: Counter) -> list[dict]:
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


def near_figures(train: list[dict], test: list[dict]) -> np.ndarray:
    """Which figures of train show the artwork of one of test."""
    left, right = (np.stack([row["thumbnail"] for row in rows]) for rows in (train, test))
    return correlations(left, right) >= FIGURE_CORRELATION


def encode_figure(picture: bytes) -> bytes:
    """The picture as a small JPEG file."""
    image = PILImage.open(io.BytesIO(picture)).convert("RGBA")
    image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image).convert("RGB")
    image = ImageOps.contain(image, (FIGURE_SIZE, FIGURE_SIZE), PILImage.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=FIGURE_QUALITY, optimize=True)
    return file.getvalue()


def encode_frame(frame: PILImage.Image) -> bytes:
    """The frame as a small palette PNG file, which is smaller than a JPEG file without artefacts."""
    frame = frame.resize((FRAME_SIZE, FRAME_SIZE), PILImage.Resampling.LANCZOS)
    file = io.BytesIO()
    frame.quantize(FRAME_COLOURS, dither=PILImage.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def clips(source: Path) -> tuple[list[dict], Counter]:
    """Four frames of each animated emoji, and the number of concepts by the size of their group."""
    archive = zipfile.ZipFile(source / "frames.zip")
    rows, signatures = [], []
    for line in (source / "animations.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        strip = PILImage.open(io.BytesIO(archive.read(row["strip"].removeprefix("frames.zip/")))).convert("RGB")
        boxes = [(k * SOURCE_FRAME, 0, (k + 1) * SOURCE_FRAME, SOURCE_FRAME) for k in FRAMES]
        files = [encode_frame(strip.crop(box)) for box in boxes]
        signatures.append(clip_signature([PILImage.open(io.BytesIO(file)) for file in files]))
        frames = [{"bytes": file, "path": f"{row['id']}-{k}.png"} for k, file in zip(FRAMES, files, strict=True)]
        rows.append({**row, "name": clean(row["name"]), "frames": frames})
    signatures = np.stack(signatures)
    groups = clip_groups(rows, clip_distances(signatures, signatures) < CLIP_DISTANCE)
    size = Counter(groups)
    test, count = set(), 0
    for group in sorted(size, key=fraction):
        if size[group] <= LARGEST_TEST_GROUP and count + size[group] <= TEST_CLIPS:
            test.add(group)
            count += size[group]
    for row, group in zip(rows, groups, strict=True):
        row["split"] = SPLITS[group in test]
    return rows, size


def clip_groups(rows: list[dict], near: np.ndarray) -> list[str]:
    """For each clip the first emoji of its group: clips of one family, by emoji or name, or near-identical ones."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    def link(i: int, j: int) -> None:
        i, j = sorted((root(i), root(j)))
        parent[j] = i

    first = {}
    for i, row in enumerate(rows):
        link(i, first.setdefault(("emoji", family(row["emoji"])), i))
        link(i, first.setdefault(("name", name_family(row["name"])), i))
    for i, j in np.argwhere(near):
        link(i, j)
    return [rows[root(i)]["emoji"] for i in range(len(rows))]


def write(config: str, split: str, rows: list[dict]) -> None:
    """One parquet file with the config's columns."""
    path = DATA / config / (split + ".parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    features = FEATURES[config]
    rows = [{name: row[name] for name in features} for row in rows]
    columns = Dataset.from_list(rows, features=features).data.table.combine_chunks()
    columns = columns.replace_schema_metadata(features.arrow_schema.metadata)
    pyarrow.parquet.write_table(columns, path, compression="zstd", compression_level=19, row_group_size=1000)


def main() -> None:
    """Read the sources, clean and split them, and write the parquet files, the card and the licences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("../shared/data"))
    source = parser.parse_args().source

    dropped = {config: Counter() for config in FEATURES if config != "clips"}
    books = source / "openstax"
    rows = {"glossary": glossary(books, dropped["glossary"]), "modules": modules(books, dropped["modules"])}
    rows["questions"] = questions(books, {row["id"] for row in rows["modules"]}, dropped["questions"])
    rows["figures"] = figures(books, dropped["figures"])
    animations, groups = clips(source / "animated_emoji")

    parts = {
        (config, split): [row for row in rows[config] if SPLITS[is_test(row)] == split]
        for config in rows
        for split in SPLITS
    }
    parts |= {("clips", split): [row for row in animations if row["split"] == split] for split in SPLITS}
    for (config, split), part in parts.items():
        write(config, split, part)
    commits = re.findall(r"^github\.com/(\S+) @ ([0-9a-f]{40})", (books / "SOURCE.txt").read_text(), re.MULTILINE)
    animated = re.search(r"github\.com/(\S+) @ ([0-9a-f]{40})", (source / "animated_emoji" / "SOURCE.txt").read_text())
    write_texts(parts, dropped, groups, commits, animated.groups())
    total = sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file())
    for path in sorted(DATA.rglob("*.*")):
        print(path.relative_to(DATA), path.stat().st_size)
    print("total", total)
    if total > MOST_BYTES:
        raise SystemExit(f"The data must not exceed {MOST_BYTES} bytes.")


def table(header: tuple, rows: list) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write_texts(parts: dict, dropped: dict, groups: Counter, commits: list, animated: tuple) -> None:
    """The dataset card and the licences, from the templates at the end of this script."""
    configs = "\n".join(
        f"- config_name: {config}\n  data_files:\n"
        + "\n".join(f"  - split: {split}\n    path: {config}/{split}.parquet" for split in SPLITS)
        for config in FEATURES
    )
    counts = [(f"`{config}`", *(len(parts[config, split]) for split in SPLITS)) for config in FEATURES]
    books = sorted({row["book"] for part in parts.values() for row in part if "book" in row})
    by_book = [
        (
            book,
            SPLITS[book in TEST_BOOKS],
            *(sum(row["book"] == book for split in SPLITS for row in parts[config, split]) for config in dropped),
        )
        for book in books
    ]
    rules = [(f"`{config}`", rule, n) for config, counter in dropped.items() for rule, n in counter.items()]
    questions = [row for split in SPLITS for row in parts["questions", split]]
    figures = [row for split in SPLITS for row in parts["figures", split]]
    values = {
        "configs": configs,
        "counts": table(("config", *SPLITS), counts),
        "by_book": table(("book", "split", *dropped), by_book),
        "rules": table(("config", "rule", "rows dropped"), rules),
        "answers": sum(row["answer"] is not None for row in questions),
        "questions": len(questions),
        "credits": sum(row["credit"] is not None for row in figures),
        "figures": len(figures),
        "clips": sum(groups.values()),
        "groups": len(groups),
        "grouped": sum(size for size in groups.values() if size > 1),
        "largest": max(groups.values()),
        "commits": table(
            ("source", "commit"), [(f"[{name}](https://github.com/{name})", f"`{commit}`") for name, commit in commits]
        ),
        "animated_name": animated[0],
        "animated_commit": animated[1],
    }
    for name, template in (("README.md", CARD), ("LICENSES.md", LICENCES)):
        text = re.sub(r"<<(\w+)>>", lambda match: str(values[match[1]]), template)
        (DATA / name).write_text(text.lstrip("\n"), encoding="utf-8")


CARD = """
---
pretty_name: Unified retrieval benchmark of open textbooks and animated emoji
license: cc-by-4.0
language:
- en
task_categories:
- feature-extraction
- image-feature-extraction
size_categories:
- 10K<n<100K
tags:
- multimodal-retrieval
- embeddings
- textbooks
- emoji
configs:
<<configs>>
---

# Unified retrieval benchmark: open textbooks and animated emoji

Small real data for one embedding model on texts, images and clips: terms and definitions, sections of textbooks and
the questions at their end, figures and captions, animated emoji and their names. All of it is English and under
CC BY 4.0.

```python
from datasets import load_dataset

figures = load_dataset("benchmarks/unified/data", "figures")  # from the root of the repository
figures["test"][0]["image"]  # a PIL image
```

## Rows

<<counts>>

The four configs from textbooks are split by book: `physics`, `introduction-sociology` and `american-government` are
`test`, the ten others `train`. `clips` has 110 clips in `test`, chosen by a hash of the emoji. What of the other split
would give an answer away is dropped from `train` (see below).

<<by_book>>

## Columns

`id` is unique within a config, `book` is the name of OpenStax' repository without `osbooks-`, and `module` is the
section (`book/number`), the `id` of `modules`. A section need not be in `modules` for `glossary` and `figures`.

| config | column | type | content |
| --- | --- | --- | --- |
| `glossary` | `id`, `book`, `module` | string | see above |
| `glossary` | `term` | string | a term of the section's glossary |
| `glossary` | `definition` | string | its definition, 3 words or more |
| `modules` | `id`, `book` | string | see above |
| `modules` | `title` | string | title of the section |
| `modules` | `objectives` | list of strings | learning objectives; often empty |
| `modules` | `text` | string | beginning of the text, at most 1,500 characters; paragraphs end with a newline |
| `questions` | `id`, `book`, `module` | string | see above; `module` is in `modules`, in the same split |
| `questions` | `question` | string | 5 to 60 words; the choices of a multiple-choice question follow it |
| `questions` | `answer` | string or null | the answer, if the book gives more than a letter |
| `figures` | `id`, `book`, `module` | string | see above |
| `figures` | `image` | image | JPEG, long side 112 px, on white, in the parquet file |
| `figures` | `caption` | string | 5 to 60 words, without credit lines |
| `figures` | `alt` | string or null | description for readers who cannot see it, cut to 60 words |
| `figures` | `credit` | string or null | the credit lines of the caption; keep them with the image |
| `clips` | `emoji`, `name` | string | the emoji and CLDR's name |
| `clips` | `keywords` | list of strings | CLDR's keywords |
| `clips` | `category` | string or null | one of gemoji's nine categories |
| `clips` | `frames` | list of images | frames 0, 3, 6 and 9 of 12, PNG, 64 x 64, on white |

<<answers>> of the <<questions>> questions have an answer; <<credits>> of the <<figures>> figures have a credit line.

## How it was made

```bash
python benchmarks/unified/build.py --source ../shared/data
```

The source folder is not part of the repository. With the same library versions, a second run writes the same bytes.
Rules apply in the order of the table. "Train" rules drop rows of the training books that are near to a row of `test`.

<<rules>>

- **Texts.** White space is cleaned, and empty brackets, left by cross-references, are removed. In `modules`,
  paragraphs of `physics` that start with a teacher's mark ([BL], [OL], [AL]) are left out.
- **Jaccard**: words in common divided by the words of both, each counted once, in any case.
- **Same title, same term**: equal in any case, letters and digits only.
- **Word 8-grams**: runs of eight words; both the whole texts and the cut ones are compared. `physics` was derived from
  `college-physics-bundle`, hence the many sections that are dropped.
- **Thumbnails**: the part that is not white is stretched to 32 x 32 pixels, and the pixels (mean 0 for each colour)
  are correlated, mirrored too. The plain distance of `data/emoji` finds all line drawings alike. The threshold comes
  from looking at pairs: above 0.85 nearly all are the same artwork, often with other lettering; below 0.75 hardly any.
- **Credits.** Bracketed credit lines, and a last sentence with a source, were moved from the caption to `credit`. If
  60 words are too few for a caption with a credit elsewhere, what was cut is in `credit`.
- **Limits**: rows of a split beyond the limit are chosen by a hash of the `id`.

### Clips

The <<clips>> clips form <<groups>> groups; <<grouped>> clips are in a group of two or more (the largest has
<<largest>>). A group stays in one split, one of more than 12 in `train`.

Two clips belong together if their emoji differ only by gender, direction or skin tone, if their names differ only by
colour, direction, rank, region or gender (coloured hearts, pointing hands, medals, globes), or if the four frames, at
32 x 32 and perhaps mirrored, differ by less than 25 (root of the mean squared difference, 0 to 255). No clip was
dropped.

## Licence

CC BY 4.0; `LICENSES.md` has the attributions, the commits and the changes. Keep it with any copy. **Figures may carry
credit lines of third parties** (photographers, archives; some are in the public domain, some under an earlier CC BY).
They are in `credit`; keep them with the image.

## Limits

- Pictures are small: lettering in diagrams can rarely be read.
- The books are public; a pretrained model has probably seen them.
- A question may refer to a figure, a table or another question that is not there.
- `test` can hold the same term in two books, and `train` holds similar sections, questions and figures of books on the
  same subject (the two college and university physics bundles, the two versions of chemistry).
- `glossary` has no rows of `microbiology` and `introduction-python-programming`; only some books give objectives.
- Some texts of `physics` start with unmarked advice to teachers.
"""

LICENCES = """
# Licences of the unified benchmark's data

This folder redistributes material from two sources, both under the Creative Commons Attribution 4.0 International
licence (CC BY 4.0), <https://creativecommons.org/licenses/by/4.0/>. It is provided as is, without warranties.

## Textbooks: `glossary`, `modules`, `questions`, `figures`

© Rice University, OpenStax, under CC BY 4.0. Access for free at <https://openstax.org>. The authors of each book are
named on its page there. The commits are the last ones under CC BY 4.0; later versions of most of these books have
another licence.

<<commits>>

Individual figures are by third parties; `credit` of `figures` holds their credit lines, with the name of the author
and often the licence. Figures whose credit line names no licence but a copyright holder, or a licence with more
conditions than attribution, were left out.

Changes: the markup was removed; white space was cleaned; texts and captions were cut; credit lines were moved from the
captions to a column of their own; answers of one letter were removed; figures were scaled to 112 pixels on white and
stored as JPEG; rows were left out, as `README.md` says. OpenStax does not endorse this dataset. OpenStax' name and
logo are not under the licence.

## Animated emoji: `clips`

Noto Emoji Animation by Google, <https://googlefonts.github.io/noto-emoji-animation/>, under CC BY 4.0, taken from the
copies in [<<animated_name>>](https://github.com/<<animated_name>>) at commit `<<animated_commit>>`.

Changes: the Lottie animations were rendered on white, and four frames of each were scaled to 64 pixels and stored as
PNG with 64 colours. Names and keywords are those of Unicode CLDR (Unicode License V3) and categories those of
gemoji (MIT), as in `data/emoji`, whose `LICENSES.md` has the notices.
"""


if __name__ == "__main__":
    main()
