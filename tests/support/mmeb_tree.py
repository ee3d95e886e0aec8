"""Small trees of MMEB-V2, in the formats and folders in which its files are published."""

import hashlib
import json
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from btok_hf.evaluation.tasks import TASKS
from support.media import image


def looks(inputs):
    """A stand-in for a model: texts by their characters, media by their mean colour, in 300 dimensions."""
    vectors = np.zeros((len(inputs), 300), np.float32)
    for vector, item in zip(vectors, inputs):
        for place, character in enumerate(item.get("text") or ""):
            vector[place % 100 + 100 * (ord(character) % 2)] += ord(character)
        for kind in ("image", "video"):
            if kind in item:
                pixels = item[kind]["array"][0] if kind == "video" else np.asarray(item[kind])
                vector[200 : 200 + 3] = pixels.mean((0, 1))
                vector[210 : 210 + 40] = pixels[:5, :8, 0].flatten()
    return vectors


def picture(path, size=(40, 40)):
    """Write an image that differs for each path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image(*size, zlib.crc32(path.name.encode())).save(path)


def frames(folder, count=2):
    for number in range(count):
        picture(folder / f"frame_{number:04d}.jpg")


def parquet(path, rows, schema=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def image_rows(root, name, rows, rows_in="image-query", images_in="image-tasks/MMEB"):
    """A dataset of images: rows of `(qry_inst, qry_text, qry_img_path, tgt_inst, tgt_text, tgt_img_path)`."""
    names = ("qry_inst", "qry_text", "qry_img_path", "tgt_inst", "tgt_text", "tgt_img_path")
    rows = [dict(zip(names, row)) for row in rows]
    for row in rows:
        for path in filter(None, [row["qry_img_path"], *row["tgt_img_path"]]):
            picture(root / images_in / path)
    parquet(root / rows_in / name / "test-00000-of-00001.parquet", rows)


def json_rows(root, name, rows):
    path = root / "video-tasks" / "data" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(listed)


def hashed_name(name):
    """The file of a page of VisRAG."""
    stem, suffix = name.rsplit(".", 1)
    return f"{stem[:50]}_{hashlib.md5(name.encode()).hexdigest()[:8]}.{suffix}"


def page_rows(root, name, queries, pages, grades, images_in="visdoc-tasks/images", stored=False):
    """A dataset of pages: queries (`query-id` → text), pages (`corpus-id` → file name), rows of qrels."""
    info = TASKS[name]
    folder = root / "visdoc-tasks" / "data" / info.data
    shard = f"{info.split}-00000-of-00001.parquet"
    rows = [{"query-id": key, "query": text, "language": "french"} for key, text in queries.items()]
    parquet(folder / "queries" / shard, rows)
    parquet(folder / "qrels" / shard, [dict(zip(("query-id", "corpus-id", "score"), row)) for row in grades])
    rows = []
    for key, file in pages.items():
        path = root / images_in / info.media.split("|")[0] / file
        picture(path, (60, 80))
        content = path.read_bytes() if stored else None
        if stored:
            path.unlink()
        rows.append({"corpus-id": key, "image": {"bytes": content, "path": None}})
    blob = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kind = pa.int64() if all(isinstance(key, int) for key in pages) else pa.string()
    half = len(rows) // 2 or 1
    for number, shards in enumerate((rows[:half], rows[half:])):
        path = folder / "corpus" / f"{info.split}-{number:05d}-of-00002.parquet"
        parquet(path, shards, pa.schema([("corpus-id", kind), ("image", blob)]))


def write_dataset(root, name, count=3):
    """Write any of the 78 datasets with `count` queries."""
    info, level = TASKS[name], f"video_{TASKS[name].meta_task[2:].lower()}"
    stored = root / "video-tasks" / "frames" / level / info.media.split("|")[0]
    numbers = range(count)
    if info.modality == "image":
        image_rows(root, name, [_image_row(info, number, count) for number in numbers])
    elif info.modality == "visdoc":
        hashed = info.layout == "hashed_pages"
        keys = [f"page {number}.jpg" if hashed else number for number in range(count + 2)]
        files = {key: hashed_name(key) if hashed else f"{key}.png" for key in keys}
        grades = [(number, keys[number], 1) for number in numbers]
        page_rows(root, name, {number: f"what is on page {number}?" for number in numbers}, files, grades)
    elif name == "MVBench":
        for subset in info.subset.split():
            frames(stored / subset / "v 0.mp4")
            row = {"video": "v 0.mp4", "question": "What?", "candidates": ["a", "b", "c"], "answer": "b"}
            json_rows(root, f"mvbench/{subset}.json", [row])
    else:
        rows = [ROWS[info.layout if info.layout in ROWS else name](info, number, stored) for number in numbers]
        json_rows(root, info.data.split("|")[0], rows)


def _image_row(info, number, count):
    def path(kind, i):
        return f"{info.name}/{kind}_{i}.jpg"

    asked = "" if info.query_kind == "text" else path("query", number)
    order = [number, *(i for i in range(count) if i != number)]
    images = [path("target", i) for i in order] if "image" in info.candidate_kind else [""] * count
    texts = [f"target {i}" if "text" in info.candidate_kind else "" for i in order]
    text = f"query {number}" if "text" in info.query_kind else ""
    return "<|image_1|>\nLook at it:", text, asked, "<|image_1|>\nRepresent it:", texts, images


def _class(info, number, stored):
    frames(stored / f"v_{number}")
    labels = {
        "K700": "playing_lute", "HMDB51": "clap", "UCF101": "Diving", "Breakfast": "tea", "SmthSmthV2": "Opening it"
    }  # fmt: skip
    row = {"video_id": f"v_{number}", "pos_text": labels[info.name]}
    return {**row, "neg_text": ["Closing it", "Opening it"]} if info.layout == "video_options" else row


def _retrieval(info, number, stored):
    frames(stored / f"v_{number}")
    column, caption = info.columns.split()
    video = f"videos/v_{number}.mp4" if info.name == "DiDeMo" else f"v_{number}"
    several = info.name in ("MSVD", "VATEX")
    return {column: video, caption: [f"scene {number}", "other"] if several else f"scene {number}"}


def _moments(info, number, stored):
    for clip in ("query", "positive_clip", *(f"negative_clip_{i}" for i in range(9))):
        frames(stored / f"v_{number}" / clip)
    return {"query": f"scene {number}", "video_path": f"/data/videos/v_{number}.mp4", "clips_dir_path": "/data/clips"}


def _seeker(info, number, stored):
    clips = [f"movie/{number}/clip_{i}.mp4" for i in range(3)]
    for clip in clips:
        frames(stored / "video_frames" / clip.removesuffix(".mp4").replace("/", "_"), 3)
    asked = ["", f"{number}.jpg", f"movie/{number}.mp4"][number % 3]
    if asked.endswith(".jpg"):
        picture(stored / f"query_{asked}")
    if asked.endswith(".mp4"):
        frames(stored / "video_frames" / f"movie_{number}", 3)
    right, *wrong = ([{"output_path": clip}] for clip in clips)
    negatives = [clip for clips in wrong for clip in clips]
    return {"query": f"scene {number}", "input_frames": asked, "positive_frames": right, "negative_frames": negatives}


def _video_mme(info, number, stored):
    frames(stored / f"v_{number}")
    options = ["A. One.", "B. Two.", "C. Three.", "D. Four."]
    return {"videoID": f"v_{number}", "question": f"How many in {number}?", "options": options, "answer": "C"}


def _nextqa(info, number, stored):
    frames(stored / str(4740931975 + number))
    options = {f"a{i}": f"because {i}" for i in range(5)}
    return {"video": 4740931975 + number, "question": "why", "answer": 3, **options}


def _egoschema(info, number, stored):
    frames(stored / f"v-{number}")
    options = [f"{letter}. C does {letter}." for letter in "ABCDE"]
    return {"video_idx": f"v-{number}", "question": "What does C do?", "option": options, "answer": "4"}


def _activitynetqa(info, number, stored):
    frames(stored / f"v_id{number}")
    return {"video_name": f"id{number}", "question": "is it day", "answer": "yes"}


ROWS = {
    "video_classification": _class,
    "video_options": _class,
    "video_retrieval": _retrieval,
    "moment_retrieval": _moments,
    "moment_seeker": _seeker,
    "Video-MME": _video_mme,
    "NExTQA": _nextqa,
    "EgoSchema": _egoschema,
    "ActivityNetQA": _activitynetqa,
}
