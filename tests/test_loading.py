"""Datasets of MMEB-V2 from files or the Hub: places, pages, and what is refused."""

import json
import logging
import os

import datasets
import numpy as np
import pytest
from datasets.naming import camelcase_to_snakecase
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image
from support import mmeb_tree
from support.evaluation import asked, frames_of, original
from support.mmeb_tree import image_rows, json_rows, page_rows, parquet, picture, write_dataset

from btok_hf.evaluation.embeddings import task_inputs
from btok_hf.evaluation.loading import load_task, read_input
from btok_hf.evaluation.tasks import TASKS


@pytest.mark.parametrize("name", TASKS)
def test_every_dataset_is_read(tmp_path, name):
    info = TASKS[name]
    write_dataset(tmp_path, name)
    task = load_task(name, tmp_path)
    assert task[:4] == (name, info.modality, info.meta_task, info.metric) and task.num_frames == info.num_frames
    assert len(task.queries) == (20 if name == "MVBench" else 3)
    queries = [query.input for query in task.queries]
    for inputs, kinds in ((queries, info.query_kind), (task.candidates.values(), info.candidate_kind)):
        # Media have an instruction as their text.
        allowed = [{*kind.split("+"), "text"} for kind in kinds.split("|")]
        assert all(set(item) in allowed and item["text"].strip() for item in inputs)
        assert len({frozenset(item) for item in inputs}) == len(allowed)
        for item in inputs:
            read = read_input(item, task.num_frames)
            assert read["text"] == item["text"] and set(read) == set(item)
            assert "image" not in item or read["image"].mode == "RGB"
            assert "video" not in item or read["video"]["array"].shape[1:] == (40, 40, 3)
    for query in task.queries:
        assert query.relevance and set(query.relevance) <= set(task.candidates)
        assert (query.candidates is None) == (info.scope == "global")
        if info.scope == "local":
            assert len(set(query.candidates)) == len(query.candidates) > 1
            assert set(query.relevance) < set(query.candidates) <= set(task.candidates)
    assert len({query.id for query in task.queries}) == len(task.queries)
    first = load_task(name, tmp_path, limit=2)
    assert first.queries == task.queries[:2]


def test_pages(tmp_path):
    long = "a" * 60 + "é.jpg"
    short = "é" * 2 + ".v2.png"
    file = f"{'a' * 50}_{mmeb_tree.hashlib.md5(long.encode()).hexdigest()[:8]}.jpg"
    page_rows(
        tmp_path,
        "VisRAG_ArxivQA",
        {"q1": "Which curve?"},
        {long: file, short: mmeb_tree.hashed_name(short)},
        [("q1", short, 1)],
    )
    task = load_task("VisRAG_ArxivQA", tmp_path)
    assert asked(task) == ["Find a document image that matches the given query: Which curve?"]
    folder = tmp_path / "visdoc-tasks" / "images" / "VisRAG_ArxivQA"
    assert task.candidates[long]["image"] == str(folder / file)
    assert original(task.candidates[long]) == "<image>\nUnderstand the content of the provided document image."
    assert task.queries[0] == ("q1", {"text": asked(task)[0]}, None, {short: 1.0})


def test_grades_and_languages(tmp_path):
    """Grades are kept, zeros are dropped, the best of several grades counts, and all languages are read."""
    name = "ViDoRe_esg_reports_v2_multilingual"
    grades = [(0, 3, 1), (0, 3, 2), (0, 4, 1), (0, 5, 0), (0, 6, -1), (1, 5, 2), (1, 5, 1)]
    page_rows(tmp_path, name, {0: "Où?", 1: "Where?"}, {key: f"{key}.png" for key in (3, 4, 5, 6)}, grades)
    task = load_task(name, tmp_path)
    assert [query.relevance for query in task.queries] == [{"3": 2.0, "4": 1.0}, {"5": 2.0}]
    assert [query.id for query in task.queries] == ["0", "1"] and list(task.candidates) == ["3", "4", "5", "6"]
    assert load_task(name, tmp_path, limit=1).candidates == task.candidates
    with pytest.raises(ValueError, match=r"Unknown dataset 'ViDoRe_esg_reports_v2'\. Known are ImageNet-1K"):
        load_task("ViDoRe_esg_reports_v2", tmp_path)


def test_pages_that_only_the_corpus_holds_are_written(tmp_path, caplog, monkeypatch):
    pages = {key: f"{key}.png" for key in range(40)}
    page_rows(tmp_path, "ViDoSeek-page", {0: "Which?"}, pages, [(0, 39, 1)], stored=True)
    folder = tmp_path / "visdoc-tasks" / "images" / "ViDoSeek-page-fixed"
    Image.new("RGB", (30, 30)).save(folder / "7.png")  # there already
    with caplog.at_level(logging.WARNING):
        task = load_task("ViDoSeek-page", tmp_path)
    assert f"writing 39 pages of {tmp_path}" in caplog.text
    assert sorted(os.listdir(folder)) == sorted(pages.values())
    sizes = {read_input(item)["image"].size for name, item in task.candidates.items() if name != "7"}
    assert sizes == {(60, 80)} and read_input(task.candidates["7"])["image"].size == (30, 30)
    caplog.clear()
    assert load_task("ViDoSeek-page", tmp_path) == task and not caplog.text
    # Another process that writes a page again, because it looked for it before, changes no key of an embedding.
    keys = [row.key for row in task_inputs(task)]
    (folder / "3.png").unlink()
    monkeypatch.setattr(os.path, "isfile", lambda path: False)
    assert load_task("ViDoSeek-page", tmp_path) == task and "writing 40 pages" in caplog.text
    assert [row.key for row in task_inputs(task)][:7] == keys[:7]
    monkeypatch.undo()
    caplog.clear()
    # Of two pages with one id the first counts.
    corpus = tmp_path / "visdoc-tasks" / "data" / "ViDoSeek-page-fixed" / "corpus"
    rows = mmeb_tree.pq.read_table(corpus).to_pylist()
    parquet(corpus / "test-00001-of-00002.parquet", [rows[20], {**rows[21], "corpus-id": 20}, *rows[22:]])
    (folder / "20.png").unlink()

    def full(number):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="the disk is full"):
            load_task("ViDoSeek-page", tmp_path)
    assert sorted(os.listdir(folder)) == sorted({*pages.values()} - {"20.png"})  # and no draft
    assert len(load_task("ViDoSeek-page", tmp_path).candidates) == 39
    assert (folder / "20.png").read_bytes() == rows[20]["image"]["bytes"] != rows[21]["image"]["bytes"]
    (folder / "39.png").unlink()
    page_rows(tmp_path, "ViDoSeek-page", {0: "Which?"}, {}, [(0, 39, 1)])
    parquet(
        tmp_path / "visdoc-tasks/data/ViDoSeek-page-fixed/corpus/test-00000-of-00002.parquet",
        [{"corpus-id": 39, "image": {"bytes": None, "path": "39.png"}}],
    )
    with pytest.raises(
        FileNotFoundError, match=r"ViDoSeek-page: page 39 is neither .*39\.png nor in .*corpus\. Unpack"
    ):
        load_task("ViDoSeek-page", tmp_path)


def test_a_table_with_a_missing_part_is_refused(tmp_path):
    """Without some of the pages that are not relevant, every score would be too high."""
    write_dataset(tmp_path, "ViDoRe_docvqa")
    corpus = tmp_path / "visdoc-tasks" / "data" / "docvqa_test_subsampled_beir" / "corpus"
    last = corpus / "test-00001-of-00002.parquet"
    content = last.read_bytes()
    last.unlink()
    with pytest.raises(ValueError, match=r"docvqa: .*corpus holds test-00000-of-00002\.parquet, which are not all"):
        load_task("ViDoRe_docvqa", tmp_path)
    for other in ("test-00001-of-00003.parquet", "test-00002-of-00002.parquet", "test-own.parquet"):
        (corpus / other).write_bytes(content)
        with pytest.raises(ValueError, match=f"-00002.parquet, {other}, which are not all parts of one table"):
            load_task("ViDoRe_docvqa", tmp_path)
        (corpus / other).unlink()
    last.write_bytes(content)
    assert len(load_task("ViDoRe_docvqa", tmp_path).queries) == 3
    for number, file in enumerate(sorted(corpus.iterdir())):  # names of one's own
        file.rename(corpus / f"test-{number}.parquet")
    assert len(load_task("ViDoRe_docvqa", tmp_path).queries) == 3


def test_whole_numbers_of_pandas_are_ids(tmp_path):
    page_rows(
        tmp_path, "ViDoRe_docvqa", {0: "Which?", 1: "What?"}, {7: "7.png", 8: "8.png"}, [(0.0, 7.0, 1), (1, 8, 1)]
    )
    task = load_task("ViDoRe_docvqa", tmp_path)
    assert [query.relevance for query in task.queries] == [{"7": 1.0}, {"8": 1.0}]


def test_small_images_are_enlarged(tmp_path):
    for size, read in {(27, 500): (56, 56), (500, 27): (56, 56), (28, 28): (28, 28), (3, 3): (56, 56)}.items():
        picture(tmp_path / "small.png", size)
        assert read_input({"image": str(tmp_path / "small.png")})["image"].size == read
    pixels = np.asarray(read_input({"image": str(tmp_path / "small.png")})["image"])
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(tmp_path / "small.png").resize((56, 56))))


@pytest.mark.parametrize("rows_in", ["image-query", "image-tasks", "MMEB_Test_Instruct"])
@pytest.mark.parametrize("images_in", ["image-tasks/MMEB", "image-tasks", "image-tasks/mmeb_v1/MMEB"])
def test_places_of_images(tmp_path, rows_in, images_in):
    row = ("<|image_1|>\nLook", "", "VOC2007/1.jpg", "", ["cat"], [""])
    image_rows(tmp_path, "VOC2007", [row], rows_in, images_in)
    assert load_task("VOC2007", tmp_path).queries[0].input["image"] == str(tmp_path / images_in / "VOC2007" / "1.jpg")


@pytest.mark.parametrize(
    "name, folder",
    [
        ("K700", "K700"),
        ("SmthSmthV2", "video_cls/SmthSmthV2"),
        ("MSVD", "video_ret/data/ziyan/video_retrieval/MSVD/frames"),
        ("MSVD", "data/ziyan/video_retrieval/MSVD/frames"),
        ("EgoSchema", "video_qa/video_qa/egoschema"),
        ("Charades-STA", "video_mret/Charades_STA"),
        ("MomentSeeker", "video_mret/video_mret/MomentSeeker"),
    ],
)
def test_places_of_frames(tmp_path, name, folder):
    write_dataset(tmp_path, name)
    task, root = load_task(name, tmp_path), tmp_path / "video-tasks" / "frames"
    published = frames_of(tmp_path, TASKS[name].meta_task[2:].lower(), TASKS[name].media.split("|")[0])
    (root / folder).parent.mkdir(parents=True, exist_ok=True)
    published.rename(root / folder)
    moved = load_task(name, tmp_path)
    items = [
        item["video"] for item in [*moved.candidates.values(), *(q.input for q in moved.queries)] if "video" in item
    ]
    assert items and all(item.startswith(str(root / folder)) for item in items)
    assert [query[2:] for query in moved.queries] == [query[2:] for query in task.queries]


def test_places_of_pages_and_rows(tmp_path):
    files = {key: f"{key}.png" for key in range(3)}
    page_rows(tmp_path, "MMLongBench-doc", {0: "Which?"}, files, [(0, 1, 1)], images_in="visdoc-tasks")
    page = load_task("MMLongBench-doc", tmp_path).candidates["1"]["image"]
    assert page == str(tmp_path / "visdoc-tasks" / "MMLongBench-doc" / "1.png")
    write_dataset(tmp_path, "MomentSeeker")
    folder = tmp_path / "video-tasks" / "data"
    (folder / "momentseeker_1k6.jsonl").rename(folder / "momentseeker.jsonl")
    assert len(load_task("MomentSeeker", tmp_path).queries) == 3


def cached(folder, repo, subset, split, rows):
    """Write what `load_dataset` leaves in its cache and reads when the Hub cannot be reached."""
    owner, name = repo.split("/")
    parquet(folder / "rows.parquet", rows)
    files = {split: [str(folder / "rows.parquet")]}
    builder = Parquet(str(folder / "made"), name, config_name=subset or "default", hash="0" * 40, data_files=files)
    builder.download_and_prepare()
    place = (
        folder / "cache" / f"{owner}___{camelcase_to_snakecase(name)}" / (subset or "default") / "0.0.0" / ("0" * 40)
    )
    place.parent.mkdir(parents=True)
    os.rename(builder.cache_dir, place)


@pytest.mark.parametrize("name", ["ImageNet-1K", "MVBench", "MSR-VTT", "YouCook2", "ViDoRe_tatdqa", "VisRAG_PlotQA"])
def test_rows_from_the_hub(tmp_path, monkeypatch, caplog, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    info = TASKS[name]
    write_dataset(tmp_path, name)
    local = load_task(name, tmp_path)
    if info.modality == "video":
        for file in (tmp_path / "video-tasks" / "data").glob(info.data.split("|")[0]):
            rows = json.loads(file.read_text()) if file.suffix == ".json" else map(json.loads, file.open())
            cached(tmp_path, info.repo, file.stem if file.suffix == ".json" else info.subset, info.split, list(rows))
            file.unlink()
    else:
        folder = {"image": tmp_path / "image-query", "visdoc": tmp_path / "visdoc-tasks" / "data" / info.data}
        for part in folder[info.modality].iterdir():
            rows = [row for file in sorted(part.iterdir()) for row in mmeb_tree.pq.read_table(file).to_pylist()]
            cached(tmp_path, info.repo, part.name, info.split, rows)
        folder[info.modality].rename(tmp_path / "gone")
    with caplog.at_level(logging.WARNING):
        task = load_task(name, tmp_path)
    assert f"{name}: no {tmp_path}" in caplog.text and f"its rows are read from {info.repo} on the Hub" in caplog.text
    assert task.candidates == local.candidates
    assert sorted(query.input["text"] for query in task.queries) == sorted(q.input["text"] for q in local.queries)


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "VOC2007",
            r"Looked for .*image-query/VOC2007/test-\*\.parquet, .*; .* holds image-tasks, .*--local-dir .*/image-",
        ),
        (
            "K700",
            r"Looked for .*video-tasks/data/k700\.jsonl; .*video-tasks/data holds ucf101\.jsonl.*'video-tasks/data/",
        ),
        (
            "ViDoSeek-page",
            r"Looked for .*ViDoSeek-page-fixed/queries/test-\*.*; .*holds MMLongBench, ViDoSeek-page\. .*",
        ),
    ],
)
def test_an_absent_dataset_is_named_with_what_is_there(tmp_path, name, message):
    (tmp_path / "image-tasks" / "MMEB").mkdir(parents=True)
    json_rows(tmp_path, "ucf101.jsonl", [{}])
    for version in ("ViDoSeek-page", "MMLongBench"):  # the faulty release
        (tmp_path / "visdoc-tasks" / "data" / version).mkdir(parents=True)
    download = f"{TASKS[name].repo} on the Hub cannot be read .*hf download "
    with pytest.raises(FileNotFoundError, match=f"{name}: no rows. {message}") as raised:
        load_task(name, tmp_path)
    assert raised.match(download)


def test_a_wrong_root_or_limit_is_refused_at_once(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"VOC2007: there is no folder .*/image-tasks; .* holds data\. The root"
    ):
        load_task("VOC2007", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere/video-tasks; .* holds data"):
        load_task("K700", tmp_path / "nowhere")
    assert "Hub" not in caplog.text
    write_dataset(tmp_path, "K700")
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"limit must be a number of queries above 0, got {limit}"):
            load_task("K700", tmp_path, limit)
    assert len(load_task("K700", tmp_path, limit=99).queries) == 3


def test_media_of_two_releases_are_not_mixed(tmp_path):
    write_dataset(tmp_path, "VOC2007")
    folder = tmp_path / "image-tasks" / "VOC2007"
    folder.mkdir()
    (tmp_path / "image-tasks/MMEB/VOC2007/query_1.jpg").rename(folder / "query_1.jpg")
    with pytest.raises(FileNotFoundError, match=r"VOC2007, row 1 of .*'VOC2007/query_1\.jpg' is missing"):
        load_task("VOC2007", tmp_path)


def test_absent_media_are_named(tmp_path):
    write_dataset(tmp_path, "VOC2007")
    (tmp_path / "image-tasks" / "MMEB" / "VOC2007" / "query_2.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"VOC2007, row 2 of .*: 'VOC2007/query_2\.jpg' is missing.*query_1\.jpg"
    ):
        load_task("VOC2007", tmp_path)
    assert len(load_task("VOC2007", tmp_path, limit=2).queries) == 2
    write_dataset(tmp_path, "K700")
    folder = frames_of(tmp_path, "cls", "K700")
    for frame in (folder / "v_1").iterdir():
        frame.unlink()
    with pytest.raises(FileNotFoundError, match=r"K700, row 1 of .*k700\.jsonl: 'v_1' is missing or empty"):
        load_task("K700", tmp_path)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"'v_0' is .*video_cls/K700/v_0, .*frames/K700/v_0, .*; .* holds"):
        load_task("K700", tmp_path)
    picture(tmp_path / "bad.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.png' is not an image"):
        read_input({"image": str(tmp_path / "bad.png"), "text": "a"})


@pytest.mark.parametrize(
    "grades, queries, message",
    [
        ([(0, 1, 0)], {0: "a"}, "query-id 0 of .*queries: no page has a score above 0 in qrels"),
        ([(0, 1, 1)], {0: "a", 1: "b"}, "query-id 1 of .*no page has a score above 0"),
        ([(0, 9, 1)], {0: "a"}, "query-id 0 .*qrels name the page '9', which the corpus lacks"),
        ([(0, 1, 1)], {0: " "}, "query-id 0 .*the query's text is ' '"),
        ([(0, 1, 1), (0, 2, None)], {0: "a"}, "row 1 of .*qrels: score None is not a number"),
    ],
)
def test_queries_for_pages_that_cannot_be_used(tmp_path, grades, queries, message):
    page_rows(tmp_path, "ViDoRe_docvqa", queries, {1: "1.png", 2: "2.png"}, grades)
    with pytest.raises(ValueError, match=f"ViDoRe_docvqa, {message}"):
        load_task("ViDoRe_docvqa", tmp_path)


def test_empty_candidates_are_left_out_and_counted(tmp_path, caplog):
    look = "<|image_1|>\nLook:"
    rows = [
        (look, "one", "VizWiz/1.jpg", "", ["yes", "", "no", " "], [""] * 4),
        (look, "two", "VizWiz/2.jpg", "", ["no", "", "yes", ""], [""] * 4),
    ]
    image_rows(tmp_path, "VizWiz", rows)
    with caplog.at_level(logging.WARNING):
        task = load_task("VizWiz", tmp_path)
    assert list(task.candidates) == ["yes", "no"] == task.queries[0].candidates
    assert task.queries[1].candidates == ["no", "yes"]
    assert "VizWiz: left out 2 candidates that are an empty text" in caplog.text


def test_malformed_files_are_named(tmp_path):
    write_dataset(tmp_path, "K700")
    path = tmp_path / "video-tasks" / "data" / "k700.jsonl"
    for content, message in (
        ('{"video_id": "v_0"}\n', r"jsonl has no column 'pos_text'. It holds .*video_id. Is this the format of VLM"),
        ('{"video_id": "v_0", "pos_text": "x"}\n{"video_id"\n', r"k700\.jsonl, line 2 cannot be read \(Expecting ':'"),
        ("", r"k700\.jsonl holds no rows"),
        ("3\n", r"k700\.jsonl, line 1 is not a row: 3"),
    ):  # fmt: skip
        path.write_text(content)
        with pytest.raises(ValueError, match=f"K700: .*{message}"):
            load_task("K700", tmp_path)
    # A Unicode line break inside a text does not end the row.
    path.write_text('{"video_id": "v_0", "pos_text": "a\u2028b"}\n')
    assert list(load_task("K700", tmp_path).queries[0].relevance) == ["a\u2028b"]

    write_dataset(tmp_path, "VOC2007")
    path = tmp_path / "image-query" / "VOC2007" / "test-00000-of-00001.parquet"
    parquet(path, [{"qry_inst": "a", "qry_img_path": "b"}])
    with pytest.raises(ValueError, match=r"VOC2007: .* has no column 'qry_text'. It holds qry_inst, qry_img_path"):
        load_task("VOC2007", tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"VOC2007: .*VOC2007 cannot be read \(.*\. Download it again"):
        load_task("VOC2007", tmp_path)

    write_dataset(tmp_path, "ViDoRe_docvqa")
    folder = tmp_path / "visdoc-tasks" / "data" / "docvqa_test_subsampled_beir"
    shard = folder / "corpus" / "test-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"ViDoRe_docvqa: .*corpus cannot be read"):
        load_task("ViDoRe_docvqa", tmp_path)
    parquet(folder / "qrels" / "test-00000-of-00001.parquet", [{"query-id": 0, "corpus-id": 0}])
    with pytest.raises(ValueError, match=r"ViDoRe_docvqa: .*qrels has no column 'score'"):
        load_task("ViDoRe_docvqa", tmp_path)
