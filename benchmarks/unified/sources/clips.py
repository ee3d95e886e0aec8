"""Config `clips`: four frames of each animated emoji. Similar clips form groups, which stay in one split."""

import io
import json
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from benchmarks.unified.sources.splits import SPLITS, fraction
from benchmarks.unified.sources.texts import clean

# RMS distance of the frames (0 to 255), chosen by looking at groups: above 25 they are unlike smileys.
CLIP_DISTANCE = 25.0
LARGEST_TEST_GROUP = 12
TEST_CLIPS = 110
SOURCE_FRAME, FRAME_SIZE, FRAMES, FRAME_COLOURS = 96, 64, (0, 3, 6, 9), 64

JOINER = "\u200d"
GENDER_OR_DIRECTION = {"♀", "♂", "➡", "⬅", "↔", "↕"}
SKIN_TONES = dict.fromkeys(range(0x1F3FB, 0x1F400))
NEUTRAL_PERSON = {**str.maketrans("👨👩👦👧👴👵", "🧑🧑🧒🧒🧓🧓"), **SKIN_TONES}
VARIANT_WORDS = re.compile(
    r"\b(left|right|up|down|leftwards|rightwards|upwards|downwards|first|last|1st|2nd|3rd|showing .*"
    r"|(light |dark )?(red|orange|yellow|green|blue|purple|brown|black|white|grey|pink)|(wo)?man|men|women)\b[- !]*"
)


def build(source: Path) -> tuple[list[dict], Counter]:
    """The rows, each with its `split`, and the number of clips of each group."""
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


def encode_frame(frame: PILImage.Image) -> bytes:
    """The frame as a palette PNG file, which is smaller than a JPEG file without artefacts."""
    frame = frame.resize((FRAME_SIZE, FRAME_SIZE), PILImage.Resampling.LANCZOS)
    file = io.BytesIO()
    frame.quantize(FRAME_COLOURS, dither=PILImage.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def clip_groups(rows: list[dict], near: np.ndarray) -> list[str]:
    """For each clip the first emoji of its group. A group holds clips of one family and near-identical clips."""
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


def family(emoji: str) -> str:
    """The concept without gender, direction and skin tone, because such variants share most of their drawing."""
    first, *rest = emoji.replace("\ufe0f", "").split(JOINER)
    return JOINER.join([first, *(part for part in rest if part not in GENDER_OR_DIRECTION)]).translate(NEUTRAL_PERSON)


def name_family(name: str) -> str:
    """The name without colour, direction and rank: coloured hearts, hands that point, medals, globes."""
    return " ".join(VARIANT_WORDS.sub("", name.casefold()).split()) or name


def clip_signature(frames: list[PILImage.Image]) -> np.ndarray:
    """The frames at 32 x 32 pixels."""
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
