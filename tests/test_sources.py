"""Training sources in the formats of their repositories."""

import io
import logging
import pickle

import datasets
import numpy as np
import pytest
from datasets import Dataset
from PIL import Image as PILImage
from support.media import image
from support.source_tree import llava_hound, mmeb, pages, question, stored

from btok_hf import BTokSentenceTransformer
from btok_hf.training.sources import PAGE_INSTRUCTIONS, SOURCES, load_source

pytestmark = pytest.mark.usefixtures("own_cache")


OPTIONS = "['A. It falls.', 'B. It rises.', 'C) It stays.', '-']"


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
        # An empty text alone would tell it from positives.
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


def test_pages_are_the_pictures_that_encode_sees(tmp_path):
    """Upright, on white, and with 16 bits scaled to 8."""
    clear, turned = PILImage.new("RGBA", (60, 80), (255, 0, 0, 0)), image(60, 80)
    deep = PILImage.fromarray(np.full((80, 60), 40_000, np.uint16))
    exif = PILImage.Exif()
    exif[0x0112] = 6  # lies on its side
    rows = [question(f"q{i}", "a", image=None) for i in range(3)]
    for row, (page, options) in zip(rows, ((clear, {}), (turned, {"exif": exif}), (deep, {}))):
        content = io.BytesIO()
        page.save(content, "PNG", **options)
        row["image"] = {"bytes": content.getvalue(), "path": None}
    pages(tmp_path, "colpali_train_set", rows)
    clear, turned, deep = (row["query"]["image"] for row in load_source("colpali_train_set", tmp_path))
    assert clear.getpixel((0, 0)) == (255, 255, 255) and turned.size == (80, 60)
    assert deep.getpixel((0, 0)) == (156, 156, 156)


def test_visrag_rows(tmp_path):
    rows = [{"query": f"q {s}?", "image": stored(), "source": s} for s in [*PAGE_INSTRUCTIONS, "else", None]]
    pages(tmp_path, "VisRAG-Ret-Train-In-domain-data", rows)
    *known, other, none = load_source("visrag-indomain", tmp_path)
    for row, (name, instruction) in zip(known, PAGE_INSTRUCTIONS.items(), strict=True):
        query = instruction["query"]
        assert query.endswith(": ") and row["query"] == {"text": f"{query}q {name}?"}
        assert row["positive"]["text"] == instruction["page"] and row["positive"]["image"].size == (60, 80)
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
        (1, ValueError, "is not an image that Pillow can read"),
        (2, FileNotFoundError, "has no images"),
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
