"""Training sources in the formats of their repositories, and their mixture: pairs, batches, order."""

import io
import itertools
import json
import logging
import pickle
import zlib
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from conftest import image
from datasets import Dataset, Features, Value
from sentence_transformers.base.sampler import DefaultBatchSampler, NoDuplicatesBatchSampler
from torch.utils.data import ConcatDataset, RandomSampler

from btok_hf import BTokSentenceTransformer
from btok_hf.media import read_frames
from btok_hf.training import CondensationConfig, CondensationTrainer
from btok_hf.training.condensation_collator import CondensationCollator
from btok_hf.training.mixture import load_mixture
from btok_hf.training.sampler import MixtureBatchSampler
from btok_hf.training.sources import PAGE_INSTRUCTIONS, SOURCES, load_source

RECIPE = Path(__file__).resolve().parents[1] / "training" / "recipes" / "mixture_paper.yaml"
OPTIONS = "['A. It falls.', 'B. It rises.', 'C) It stays.', '-']"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# ------------------------------------------------------------------------ files as the repositories hold them


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


# --------------------------------------------------------------------------------------------- rows become pairs


def test_mmeb_rows(tmp_path, repo):
    path = "images/DocVQA/Train/DocVQA_image_0.jpg"
    asked = "<|image_1|>\nRepresent the given image with the following question: what is the date?\n"
    mmeb(
        tmp_path,
        "DocVQA",
        [
            (asked, path, "1/8/93 ", "", "398,627.92", ""),
            (asked, path, "logo.png", "", "", ""),
            (asked, path, "", "", "no answer", ""),  # as some rows of OK-VQA and A-OKVQA are
            ("<|image_1|>\n", "", "nothing asked", "", "", ""),
            (asked, path, "last", "", "  ", ""),
        ],
    )
    dataset = load_source("DocVQA", tmp_path)
    query = {"image": str(tmp_path / "MMEB-train" / path), "text": asked.removeprefix("<|image_1|>\n")}
    assert list(dataset) == [
        {"query": query, "positive": {"text": "1/8/93"}, "negative": {"text": "398,627.92"}},
        {"query": query, "positive": {"text": "logo.png"}, "negative": None},
        {"query": query, "positive": {"text": "last"}, "negative": None},
    ]
    model = BTokSentenceTransformer(repo, device="cpu")
    rows = model.preprocess([dataset[0]["query"], dataset[1]["positive"]])["input_ids"]
    shown, name = model.tokenizer.batch_decode(rows)
    assert "<|vision_end|> Represent the given image with the following question: what is the date?\n<|btok_0" in shown
    assert name.startswith("logo.png<|btok_0|>")


def test_mmeb_placeholders_and_negatives_without_text(tmp_path):
    paths = [f"images/VisDial/Train/558840_object_hot dog {i}.jpg" for i in range(2)]
    asked = "Represent the given dialogue about an image, which is used for image retrieval: Q:is it\nA:yes\n\n"
    mmeb(tmp_path, "VisDial", [(asked, "", "<|image_1|>\nRepresent the given image\n", paths[0], "", paths[1])])
    first, second = (str(tmp_path / "MMEB-train" / path) for path in paths)
    assert load_source("VisDial", tmp_path)[0] == {
        "query": {"text": asked},
        "positive": {"image": first, "text": "Represent the given image\n"},
        # With an empty text it would be told from positives by that alone.
        "negative": {"image": second, "text": "Represent the given image\n"},
    }
    mmeb(tmp_path, "WebQA", [("<|image_1|>\nFind it: which <|image_1|> one?\n", "", "<|image_1|>\n", paths[0])], False)
    assert load_source("WebQA", tmp_path)[0] == {
        "query": {"text": "Find it: which one?\n"},
        "positive": {"image": first},
    }


def test_llava_hound_rows(tmp_path):
    rows = [
        ("v_--0edUL8zmA-Scene-001", "<video>\nWrite a depiction.", "A court."),
        ("b", "Say.\n<video>", "A cat.", "More?", "No."),
    ]
    llava_hound(tmp_path, "video_caption_300k", rows)
    llava_hound(tmp_path, "video_240k_caption_15k", rows)
    caption, search, answer = (
        list(load_source(name, tmp_path))
        for name in ("video_caption_300k", "video_caption_300k-video", "video_qa_240k")
    )
    assert [row["query"]["text"] for row in caption] == ["Write a depiction.", "Say."]
    assert [row["positive"] for row in caption] == [{"text": "A court."}, {"text": "A cat."}]
    assert search[0]["query"] == {"text": "Find a video that contains the following visual content: A court."}
    assert search[0]["positive"]["text"] == "Understand the content of the provided video:"
    instruction = "Answer a question based on the content of a video. "
    assert answer[0]["query"]["text"] == instruction + "Write a depiction."
    assert answer[0]["positive"] == {"text": "A court."}
    for cell in (caption[0]["query"], search[0]["positive"], answer[0]["query"]):
        assert cell["video"]["array"].shape == (8, 40, 56, 3)


def test_first_rows_of_a_file_that_goes_on(tmp_path, monkeypatch):
    llava_hound(tmp_path, "video_240k_caption_15k", [("a", "<video>\nq", str(i)) for i in range(5)], frames=1)
    short = {"video_qa_240k": SOURCES["video_qa_240k"].__class__(**{**vars(SOURCES["video_qa_240k"]), "rows": 3})}
    monkeypatch.setattr("btok_hf.training.sources.SOURCES", short)
    assert [row["positive"]["text"] for row in load_source("video_qa_240k", tmp_path)] == ["0", "1", "2"]
    assert SOURCES["video_qa_240k"].rows == 240_000


@pytest.mark.parametrize(
    "count, kept", [(20, [0, 2, 5, 8, 10, 13, 16, 19]), (8, range(8)), (3, range(3)), (1, [0, 0])]
)
def test_frames(tmp_path, repos, count, kept):
    # Without padding of the numbers, so that only a natural order is the right one.
    colours = [image(56, 40, number) for number in range(count)]
    for number, colour in enumerate(colours):
        colour.save(tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").touch()
    video = read_frames(tmp_path)
    np.testing.assert_array_equal(video["array"], np.stack([np.asarray(colours[number]) for number in kept]))
    assert len(read_frames(tmp_path, None)["array"]) == max(2, count)
    for path in repos.values():  # no processor samples them again
        grid = BTokSentenceTransformer(path, device="cpu").preprocess([{"video": video}])["video_grid_thw"]
        assert grid[0, 0] == (len(video["array"]) + 1) // 2


def test_colpali_rows(tmp_path):
    rows = [
        question("Which is true?", "B", OPTIONS, image=stored(mode="L")),
        question("Which is true?", "C) It stays.", OPTIONS),
        question("Which is true?", "E", OPTIONS),
        question("Which is true?", "Both", OPTIONS),
        question("How long?", "['five to ten hours, not including trips']"),
        question("Which two?", '["one", "it\'s two"]'),
        question("How much?", "-456.96"),
        question("Odd", "[sic"),
        question("Left out", ""),
        question("Left out", "['']"),
        question(None, "left out"),
    ]
    pages(tmp_path, "colpali_train_set", rows)
    dataset = load_source("colpali_train_set", tmp_path)
    assert [row["positive"]["text"] for row in dataset] == [
        *("It rises.", "It stays.", "E", "Both"),
        *("five to ten hours, not including trips", "one, it's two", "-456.96", "[sic"),
    ]
    assert dataset[0]["query"]["text"] == f"Which is true? Options: {OPTIONS}"
    assert dataset[4]["query"]["text"] == "How long?"
    assert dataset[0]["query"]["image"].size == (60, 80) and dataset[0]["query"]["image"].mode == "RGB"


def test_visrag_rows(tmp_path):
    rows = [{"query": f"q {s}?", "image": stored(), "source": s} for s in [*PAGE_INSTRUCTIONS, "else", None]]
    pages(tmp_path, "VisRAG-Ret-Train-In-domain-data", rows)
    *known, other, none = load_source("visrag-indomain", tmp_path)
    for row, (name, (query, page)) in zip(known, PAGE_INSTRUCTIONS.items(), strict=True):
        assert query.endswith(": ") and row["query"] == {"text": f"{query}q {name}?"}
        assert row["positive"]["text"] == page and row["positive"]["image"].size == (60, 80)
    assert other["query"] == {"text": "q else?"} and set(other["positive"]) == {"image"}
    assert none["query"] == {"text": "q None?"}


def test_rows_are_read_when_asked_for_only(tmp_path, monkeypatch):
    pages(tmp_path, "colpali_train_set", [question(f"q{i}", f"a{i}") for i in range(40)])
    opened, decode = [], datasets.Image.decode_example
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *args: opened.append(1) or decode(*args))
    monkeypatch.setattr("btok_hf.training.sources._page", lambda row: opened.append(2) or "page")
    dataset = load_source("colpali_train_set", tmp_path)
    assert opened == [2] * 8  # the rows checked at once
    assert dataset[3]["positive"] == {"text": "a3"} and opened == [2] * 9
    assert pickle.loads(pickle.dumps(dataset))[3]["positive"] == {"text": "a3"}  # to a spawned worker
    assert dataset[:0] == {}


# ------------------------------------------------------------------------------------------------------ bad input


def test_a_wrong_root_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown source 'ImageNet'.*ImageNet_1K.*video_qa_240k"):
        load_source("ImageNet", tmp_path)
    with pytest.raises(ValueError, match=r"'CIRR' keeps its images or frames in archives of TIGER-Lab/MMEB-train"):
        load_source("CIRR")
    with pytest.raises(FileNotFoundError, match=r"'CIRR' has no files .*original-\*\.parquet.*hf download TIGER-Lab"):
        load_source("CIRR", tmp_path)
    paths = [f"images/CIRR/Train/{i}.jpg" for i in range(20)]
    mmeb(tmp_path, "CIRR", [("a", path, "b", path) for path in paths])
    (tmp_path / "MMEB-train" / paths[19]).unlink()
    with pytest.raises(FileNotFoundError, match=r"'CIRR', row 19 of CIRR/original.*qry_image_path is '.*19\.jpg'"):
        load_source("CIRR", tmp_path)


def test_a_file_that_is_missing_or_broken_is_named_with_its_row(tmp_path):
    rows = [("a", "", "b", f"images/VisDial/Train/{i}.jpg") for i in range(40)]
    mmeb(tmp_path, "VisDial", [("", "", "left out", ""), *rows])
    dataset = load_source("VisDial", tmp_path)
    (tmp_path / "MMEB-train" / rows[1][3]).unlink()
    with pytest.raises(FileNotFoundError, match=r"row 2 of VisDial/.*pos_image_path is '.*/1\.jpg'.*Unpack"):
        dataset[1]

    llava_hound(tmp_path, "video_caption_300k", [(f"v{i}", "<video>\nq", "a") for i in range(40)], frames=2)
    dataset = load_source("video_caption_300k", tmp_path)
    frames = tmp_path / "train_video_and_instruction" / "train_300k"
    for frame in (frames / "v1").iterdir():
        frame.write_bytes(b"no image")
    for frame in (frames / "v2").iterdir():
        frame.unlink()
    image(20, 20).save(frames / "v3" / "c01_0001.jpeg")
    (frames / "v4").rename(tmp_path / "elsewhere")
    for row, kind, message in (
        (1, ValueError, "cannot be decoded"),
        (2, FileNotFoundError, "holds no images"),
        (3, ValueError, "same shape"),
        (4, FileNotFoundError, r"v4' does not exist. Unpack its archive"),
    ):
        with pytest.raises(kind, match=f"'video_caption_300k', row {row} of .*jsonl: .*{message}"):
            dataset[row]

    rows = [question(f"q{i}", "a") for i in range(40)]
    rows[1]["image"], rows[2]["image"] = None, {"bytes": b"no image", "path": None}
    pages(tmp_path, "colpali_train_set", rows)
    dataset = load_source("colpali_train_set", tmp_path)
    with pytest.raises(ValueError, match=r"'colpali_train_set', row 1 of .*'image' is empty"):
        dataset[1]
    with pytest.raises(ValueError, match=r"'colpali_train_set', row 2 of .*'image' cannot be decoded"):
        dataset[2]


def test_malformed_files_are_refused(tmp_path):
    folder = tmp_path / "MMEB-train" / "NIGHTS"
    folder.mkdir(parents=True)
    row = {"qry": "a", "qry_image_path": "", "pos_text": "b"}
    Dataset.from_list([row]).to_parquet(folder / "original-00000-of-00001.parquet")
    with pytest.raises(
        ValueError, match=r"'NIGHTS': .* no column 'pos_image_path'.*'qry_image_path'.*format of TIGER"
    ):
        load_source("NIGHTS", tmp_path)
    for wrong in (3, ["b.png"]):
        Dataset.from_list([{**row, "pos_image_path": wrong}]).to_parquet(folder / "original-00000-of-00001.parquet")
        with pytest.raises(ValueError, match="no texts in column 'pos_image_path'"):
            load_source("NIGHTS", tmp_path)
    Dataset.from_list([{**row, "pos_image_path": None}]).to_parquet(folder / "original-00000-of-00001.parquet")
    assert len(load_source("NIGHTS", tmp_path)) == 1
    Dataset.from_list([{**row, "pos_image_path": "", "pos_text": ""}]).to_parquet(
        folder / "original-00000-of-00001.parquet"
    )
    with pytest.raises(ValueError, match="'NIGHTS' has no rows with both sides"):
        load_source("NIGHTS", tmp_path)
    good = ("a", "<video>\nq", "a")
    for bad in (("b", "<video>\nq"), ("b", "<video>\nq", ""), ("b",)):
        llava_hound(tmp_path, "video_caption_300k", [good, good, bad])
        with pytest.raises(ValueError, match=r"row 2 of .*300k\.jsonl: column 'conversations' must hold a prompt"):
            load_source("video_caption_300k", tmp_path)
    path = tmp_path / "train_video_and_instruction/video_instruction/train/sft/video_caption_300k.jsonl"
    path.write_text('{"video": "a", "conversations": "<video> q"}\n')
    with pytest.raises(ValueError, match=r"row 0 of .*column 'conversations' must hold a prompt"):
        load_source("video_caption_300k", tmp_path)


def test_rows_left_out_are_counted(tmp_path, caplog):
    mmeb(tmp_path, "NIGHTS", [("a", "", "b", ""), ("a", "", "", ""), ("", "", "b", "")])
    with caplog.at_level(logging.WARNING):
        assert len(load_source("NIGHTS", tmp_path)) == 1
    assert "2 of 3 rows have an empty side" in caplog.text


# --------------------------------------------------------------------------------------------- mixtures of sources


def test_a_mixture_of_own_files_and_sources(tmp_path):
    mmeb(tmp_path, "CIRR", [("a", "", "b", "")])
    (tmp_path / "pairs.jsonl").write_text('{"query": "x", "positive": "y"}\n')
    mine = str(tmp_path / "pairs.jsonl")
    loaded, weights, condense = load_mixture(
        {
            "mine": {"file": mine, "weight": 3, "condense": "query"},
            "CIRR": {"weight": 0.5},
            "again": {"file": "CIRR", "weight": 1, "condense": "positive"},
        },
        tmp_path,
    )
    assert {name: len(dataset) for name, dataset in loaded.items()} == {"mine": 1, "CIRR": 1, "again": 1}
    assert weights == {"mine": 3, "CIRR": 0.5, "again": 1}
    assert condense == {"mine": "query", "CIRR": "none", "again": "positive"}
    for entries in (mine, {"pairs": mine}, {"pairs": {"file": mine}}):
        loaded, weights, condense = load_mixture(entries)
        assert list(loaded) == ["pairs"] and weights is None and condense == {}
    assert load_mixture({"CIRR": None}, tmp_path)[0]["CIRR"][0]["query"] == {"text": "a"}
    for entries, message in (
        ({"a": {"file": mine, "weight": 1}, "CIRR": {}}, "but CIRR have none. Give all"),
        ({"a": {"file": mine, "wieght": 1}}, r"'a' has unknown keys \['wieght'\]"),
        ({"a": {"file": mine, "condense": "postive"}}, "'a': condense must be one of positive, query"),
        ({"ImageNet": {"weight": 1}}, r"'ImageNet' is not a pair file, .* or known source. Known .* ImageNet_1K"),
    ):
        with pytest.raises(ValueError, match=message):
            load_mixture(entries, tmp_path)


def test_the_recipe_is_the_papers_mixture():
    recipe = yaml.safe_load(RECIPE.read_text())
    weights = {name: entry["weight"] for name, entry in recipe.items()}
    assert set(weights) == set(SOURCES) and len(weights) == 25
    assert all(set(entry) == {"weight"} for entry in recipe.values())
    assert Counter(weights.values()) == {0.5: 10, 1: 10, 5: 3, 10: 1, 12: 1}
    assert Counter(source.condense for source in SOURCES.values()) == {
        "positive": 16,
        "query": 6,
        "none": 2,
        "both": 1,
    }


# ------------------------------------------------------------------------------------------------------- batches


SIZES = {"a": 100, "b": 37, "c": 1000}


def mixture(weights=None, sizes=SIZES, batch_size=4, no_duplicates=False, seed=0, **kwargs):
    parts = [Dataset.from_dict({"group": np.arange(size) % 10}) for size in sizes.values()]
    generator = torch.Generator()
    options = {"batch_size": batch_size, "drop_last": False, "generator": generator, "seed": seed}
    samplers = [
        NoDuplicatesBatchSampler(part, **options)
        if no_duplicates
        else DefaultBatchSampler(RandomSampler(part, generator=generator), **options)
        for part in parts
    ]
    options = {"weights": weights or {"a": 1, "b": 2, "c": 0.5}, "num_batches": 300, **kwargs}
    return MixtureBatchSampler(ConcatDataset(parts), samplers, generator, seed, names=list(sizes), **options)


def source_of(batch):
    sources = {"a" if index < 100 else "b" if index < 137 else "c" for index in batch}
    assert len(sources) == 1
    return sources.pop()


def test_sources_are_drawn_by_weight():
    draws = 4000
    counts = Counter(map(source_of, mixture(num_batches=draws)))
    for name, share in {"a": 1 / 3.5, "b": 2 / 3.5, "c": 0.5 / 3.5}.items():
        assert abs(counts[name] - draws * share) < 4 * np.sqrt(draws * share * (1 - share)), name


def test_blocks_are_full_batches_of_one_source():
    sampler = mixture(block_size=16, num_batches=302)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 302 and all(len(set(batch)) == 4 for batch in batches)
    blocks = [set(map(source_of, batches[i : i + 4])) for i in range(0, 302, 4)]
    assert all(len(block) == 1 for block in blocks)
    changes = sum(first != second for first, second in itertools.pairwise(blocks))
    assert changes > 30  # drawn anew for each block


def test_each_source_is_walked_through_and_started_over():
    walks = {"a": [], "b": [], "c": []}
    for batch in mixture(num_batches=1000):
        walks[source_of(batch)] += batch
    first, second = walks["a"][:100], walks["a"][100:200]
    assert sorted(first) == sorted(second) == list(range(100)) and first != second
    # Of 37 rows one is left over in each pass of 9 batches, another one each time.
    passes = [walks["b"][i : i + 36] for i in range(0, 36 * 10, 36)]
    assert all(len(set(walked)) == 36 for walked in passes) and len(set(walks["b"])) == 37
    assert len(set(walks["c"])) == len(walks["c"])
    # The other weights change when a source is drawn, not its order.
    other = [index for batch in mixture({"a": 5, "b": 1, "c": 1}, num_batches=400) for index in batch]
    assert [index for index in other if index < 100][:300] == walks["a"][:300]


def test_no_duplicates_holds_in_a_mixture():
    batches = list(mixture(no_duplicates=True))
    assert batches == list(mixture(no_duplicates=True))
    offsets = {"a": 0, "b": 100, "c": 137}
    for batch in batches:
        assert len(batch) == 4 == len({(index - offsets[source_of(batch)]) % 10 for index in batch})
    assert len({index for batch in batches for index in batch if index < 100}) == 100
    assert len(set(map(tuple, batches))) == 300  # each pass in a new order


def test_the_order_follows_from_seed_and_epoch():
    def order(epoch=0, **kwargs):
        sampler = mixture(**kwargs)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order() == order() == order(num_batches=1000)[:300]
    later = mixture()
    assert list(later) == order()
    later.set_epoch(3)
    assert list(later) == list(later) == order(epoch=3)
    orders = [order(), order(epoch=1), order(epoch=2), order(seed=1), order(seed=1, epoch=1)]
    assert len(set(map(str, orders))) == len(orders)
    drawn = ["".join(map(source_of, batches)) for batches in orders]
    assert len(set(drawn)) == len(drawn)


def test_processes_share_blocks_and_resume(monkeypatch):
    """Two processes, through the wrappers that accelerate puts around a batch sampler."""
    whole = list(mixture(block_size=8, num_batches=40))
    parts = [list(BatchSamplerShard(mixture(block_size=8, num_batches=40), 2, i, even_batches=False)) for i in (0, 1)]
    assert [len(part) for part in parts] == [20, 20]
    assert [batch for step in zip(*parts) for batch in step] == whole
    assert all(source_of(first) == source_of(second) for first, second in zip(*parts))
    for rank, part in enumerate(parts):
        shard = BatchSamplerShard(mixture(block_size=8, num_batches=40), 2, rank, even_batches=False)
        assert list(SkipBatchSampler(shard, 7)) == part[7:]


def test_bad_mixtures_are_refused():
    for kwargs, message in (
        ({"weights": {"a": 1, "b": 1, "d": 1}}, r"name the datasets a, b, c: unknown \['d'\]; missing \['c'\]"),
        ({"weights": {"a": 1, "b": 0, "c": 1}}, "weight of dataset 'b' must be a number above 0, got 0"),
        ({"weights": {"a": 1, "b": "x", "c": 1}}, "'b' must be a number above 0, got 'x'"),
        ({"weights": {"a": 1, "b": float("nan"), "c": 1}}, "'b' must be a number above 0, got nan"),
        ({"block_size": 10}, "block_size=10 must be a multiple of the 4 rows"),
        ({"num_batches": -2}, "Set max_steps"),
        ({"batch_size": 40}, "'b' has 37 rows, fewer than a batch of 40"),
    ):
        with pytest.raises(ValueError, match=message):
            mixture(**kwargs)
    with pytest.raises(ValueError, match=r"'[abc]' gives no batch of 12 rows that differ"):
        list(mixture(batch_size=12, no_duplicates=True))  # of 10 groups


# ------------------------------------------------------------------------------------------------------- training


def config(tmp_path, **kwargs):
    defaults = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "warmup_steps": 0}
    return CondensationConfig(output_dir=str(tmp_path / "out"), **{**defaults, **kwargs})


def test_every_layout_trains(repo, tmp_path, monkeypatch):
    names = all_sources(tmp_path)
    loaded, weights, condense = load_mixture({name: {"weight": 1} for name in names}, tmp_path)
    args = config(
        tmp_path,
        dataset_weights=weights,
        condense=condense,
        per_device_train_batch_size=2,
        mini_batch_size=1,
        max_steps=24,
        logging_steps=1,
        dataloader_num_workers=1,
    )
    model = BTokSentenceTransformer(repo, device="cpu")
    trainer = CondensationTrainer(model=model, args=args, train_dataset=loaded)
    drawn, draw = [], MixtureBatchSampler.__iter__
    monkeypatch.setattr(MixtureBatchSampler, "__iter__", lambda self: (drawn.append(b) or b for b in draw(self)))
    trainer.train()
    assert {batch[0] // 8 for batch in drawn} == set(range(8))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 24 and all(np.isfinite(log["loss"]) for log in logs)
    condensed = [log.get("condensation", 0) > 0 for log in logs]
    assert condensed == [names[batch[0] // 8] != "CIRR" for batch in drawn[:24]]


def test_every_layout_collates(repo, tmp_path):
    names = all_sources(tmp_path)
    loaded, _, condense = load_mixture(dict.fromkeys(names), tmp_path)
    model = BTokSentenceTransformer(repo, device="cpu")
    collate = CondensationCollator(
        preprocess_fn=model.preprocess,
        tokenizer=model.tokenizer,
        args=config(tmp_path, condense=condense, max_target_length=400),
    )
    targets = {
        "A-OKVQA": ("query", "cab 1"),
        "video_caption_300k": ("query", "caption 1"),
        "video_caption_300k-video": ("positive", "following visual content: caption 1"),
        "video_qa_240k": ("query", "caption 1"),
        "colpali_train_set": ("query", "a1"),
        "visrag-indomain": ("positive", "the query: q1"),
        "WebQA": ("positive", "that answers this question: 1?"),
    }
    for name, dataset in loaded.items():
        batch = collate([{**row, "dataset_name": name} for row in dataset.select(range(2))])
        if name not in targets:
            assert not any(key.endswith("target_ids") for key in batch)
            continue
        side, text = targets[name]
        ids, labels = batch[f"{side}_target_ids"][1, 0], batch[f"{side}_target_labels"][1, 0]
        assert model.tokenizer.decode(ids[labels != -100]).endswith(text + "<|im_end|>"), name


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_resumed_run_sees_the_batches_it_has_not_seen(repo, tmp_path, monkeypatch, epochs):
    batches, collate = [], CondensationCollator.__call__
    monkeypatch.setattr(
        CondensationCollator,
        "__call__",
        lambda self, rows: batches.append([row["query"] for row in rows]) or collate(self, rows),
    )
    if epochs > 1:  # so that the checkpoint lies in the middle of the second epoch
        monkeypatch.setattr(MixtureBatchSampler, "__len__", lambda self: self.num_batches // epochs)
        draw = MixtureBatchSampler.__iter__
        monkeypatch.setattr(MixtureBatchSampler, "__iter__", lambda self: (b for b, _ in zip(draw(self), range(8))))
    words = ["red", "old", "tall", "wet", "loud", "thin", "deep", "odd", "warm", "slow", "flat", "gray"]
    parts = {
        name: Dataset.from_dict({"query": [f"{name} {w}" for w in words], "positive": [f"{w} thing" for w in words]})
        for name in ("a", "b")
    }

    def run(folder, resume=None):
        args = config(
            folder,
            dataset_weights={"a": 1, "b": 2},
            block_size=8,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=12,
            save_strategy="steps",
            save_steps=6,
        )
        model = BTokSentenceTransformer(repo, device="cpu")
        trainer = CondensationTrainer(model=model, args=args, train_dataset=dict(parts))
        batches.clear()
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.epoch == epochs
        return [tuple(batch) for batch in batches], model

    whole, model = run(tmp_path / "whole")
    assert len(whole) == 24 and len(set(whole)) > 20
    rest, resumed = run(tmp_path / "rest", str(tmp_path / "whole" / "out" / "checkpoint-6"))
    assert rest == whole[12:]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, atol=1e-6, rtol=0, msg=name)
