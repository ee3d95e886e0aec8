"""Training sources: small files in the formats of their repositories."""

import io
import json
import zlib

import datasets
from datasets import Dataset, Features, Value

from support.media import image


def mmeb(root, subset, rows, negatives=True):
    """MMEB-train: `rows` of (qry, qry_image_path, pos_text, pos_image_path[, neg_text, neg_image_path])."""
    folder = root / "MMEB-train"
    names = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
    rows = [dict(zip(names if negatives else names[:4], (*row, "", ""))) for row in rows]
    for row in rows:
        for path in filter(None, (row.get(name) for name in names if name.endswith("path"))):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            image(40, 40, len(path)).save(folder / path)
    (folder / subset).mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(folder / subset / "original-00000-of-00001.parquet")
    Dataset.from_list([{"qry": "not the split"}]).to_parquet(
        folder / subset / "diverse_instruction-00000-of-00001.parquet"
    )


def llava_hound(root, file, rows, frames=10):
    folder = root / "train_video_and_instruction"
    path = folder / "video_instruction" / "train" / "sft" / f"{file}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for video, *turns in rows:
        people = ("human", "gpt") * len(turns)
        conversation = [{"from": person, "value": value} for person, value in zip(people, turns)]
        lines.append(json.dumps({"id": f"{video}_1", "video": video, "conversations": conversation}))
        for number in range(1, frames + 1):
            frame = folder / "train_300k" / video / f"c01_{number:04d}.jpeg"
            frame.parent.mkdir(parents=True, exist_ok=True)
            image(56, 40, zlib.crc32(frame.as_posix().encode())).save(frame)
    path.write_text("\n".join(lines) + "\n")


def stored(width=60, height=80, seed=0, mode="RGB"):
    buffer = io.BytesIO()
    image(width, height, seed).convert(mode).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": "1.png"}


def pages(root, repository, rows, shards=2):
    folder = root / repository / "data"
    folder.mkdir(parents=True)
    texts = {name: Value("string") for name in rows[0] if name != "image"}
    whole = Dataset.from_list(rows, features=Features({**texts, "image": datasets.Image()}))
    for shard in range(shards):
        part = whole.shard(shards, shard, contiguous=True)
        part.to_parquet(folder / f"train-{shard:05d}-of-{shards:05d}.parquet")
    Dataset.from_list([{"query": "not the split"}]).to_parquet(folder / "test-00000-of-00001.parquet")


def question(query, answer, options=None, **kwargs):
    row = {"image": stored(), "image_filename": "a.png", "query": query, "answer": answer, "source": "x"}
    return {**row, "options": options, "page": "1", "model": None, "prompt": "long", "answer_type": None, **kwargs}


def all_sources(root):
    """Small files of every layout; returns the names of the sources."""
    asked = "<|image_1|>\nRepresent the given image with the following question: what is {}?\n"
    mmeb(
        root,
        "A-OKVQA",
        [(asked.format(i), f"images/A-OKVQA/Train/{i}.jpg", f"cab {i}", "", f"train {i}", "") for i in range(8)],
    )
    found = "<|image_1|>\nFind a Wikipedia image that answers this question: {}?\n"
    shown = "<|image_1|>\nRepresent the given Wikipedia image with related text information: {}.\n"
    mmeb(root, "WebQA", [(found.format(i), "", shown.format(i), f"images/WebQA/Train/{i}.jpg") for i in range(8)])
    changed, given = "<|image_1|>\nGiven an image, {}.\n", "<|image_1|>\nRepresent the given image.\n"
    paths = [f"images/CIRR/Train/{i}.jpg" for i in range(9)]
    mmeb(root, "CIRR", [(changed.format(i), paths[i], given, paths[i + 1]) for i in range(8)], negatives=False)
    rows = [(f"v_{i}-Scene-001", "<video>\nWhat is it?", f"caption {i}") for i in range(8)]
    llava_hound(root, "video_caption_300k", rows)
    llava_hound(root, "video_240k_caption_15k", rows)
    pages(root, "colpali_train_set", [question(f"q{i}", f"a{i}") for i in range(8)])
    pages(
        root,
        "VisRAG-Ret-Train-In-domain-data",
        [{"query": f"q{i}", "image": stored(seed=i), "source": "InfoVQA"} for i in range(8)],
    )
    return [
        *("A-OKVQA", "WebQA", "CIRR", "video_caption_300k", "video_caption_300k-video", "video_qa_240k"),
        *("colpali_train_set", "visrag-indomain"),
    ]
