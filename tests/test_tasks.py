"""The datasets of MMEB-V2 in the formats of their repositories: exact texts, names, places, and what is refused."""

import json
import logging
import os
from collections import Counter
from pathlib import Path

import datasets
import mmeb_tree
import numpy as np
import pytest
from conftest import image
from datasets.naming import camelcase_to_snakecase
from datasets.packaged_modules.parquet.parquet import Parquet
from mmeb_tree import frames, image_rows, json_rows, page_rows, parquet, picture, write_dataset
from PIL import Image

from btok_hf.evaluation.loading import load_task, read_input
from btok_hf.evaluation.readers import READERS
from btok_hf.evaluation.tasks import TASKS

ANSWER = (
    "Given a video and a question, select the most accurate answer from the provided candidates. Return only the "
    "exact text of your chosen answer. Question:  "
)


def original(item):
    """The text as the original has it, with the media token and what separates it from the text."""
    return {"image": "<image>\n", "video": "<video> "}.get(next(iter(item)), "") + item["text"]


def asked(task):
    return [original(query.input) for query in task.queries]


def frames_of(root, kind, name):
    return root / "video-tasks" / "frames" / f"video_{kind}" / name


# --------------------------------------------------------------------------------------------------------- the table


def test_the_table_is_the_benchmark():
    assert len(TASKS) == 78
    assert Counter(info.modality for info in TASKS.values()) == {"image": 36, "video": 18, "visdoc": 24}
    assert Counter(info.meta_task for info in TASKS.values()) == {
        **{"I-CLS": 10, "I-QA": 10, "I-RET": 12, "I-VG": 4, "V-CLS": 5, "V-QA": 5, "V-RET": 5, "V-MRET": 3},
        **{"VD-ViDoRe-V1": 10, "VD-ViDoRe-V2": 4, "VD-VisRAG": 6, "VD-OOD": 4},
    }
    for info in TASKS.values():
        assert info.metric == ("ndcg_linear@5" if info.modality == "visdoc" else "hit@1")
        assert info.layout in READERS or (info.modality == "visdoc" and info.layout in ("pages", "hashed_pages"))
    layouts = {"I-CLS": "image_to_label", "I-QA": "image_question", "I-VG": "image_to_image"}
    to_text, to_image = {"VisualNews_i2t", "MSCOCO_i2t"}, {"CIRR", "NIGHTS", "FashionIQ", "OVEN"}
    for name, info in TASKS.items():
        if info.modality == "image":
            of_text = "image_to_label" if name in to_text else "text_to_image"
            retrieval = "image_to_image" if name in to_image else of_text
            assert info.layout == layouts.get(info.meta_task, retrieval), name
        if info.modality == "visdoc":
            assert info.layout == ("hashed_pages" if info.meta_task == "VD-VisRAG" else "pages")
            assert info.query_instruction == "Find a document image that matches the given query:"
            assert info.candidate_instruction == "Understand the content of the provided document image."
    # Page-level sets: the corrected data, by which models gain over 30 points. ViDoRe V2: all languages.
    assert TASKS["ViDoSeek-page"].repo == "VLM2Vec/ViDoSeek-page-fixed"
    assert TASKS["MMLongBench-page"].repo == "VLM2Vec/MMLongBench-page-fixed"
    v2 = [name for name, info in TASKS.items() if info.meta_task == "VD-ViDoRe-V2"]
    assert [name.endswith("_multilingual") for name in v2] == [False, True, True, True]


@pytest.mark.parametrize("name", TASKS)
def test_every_dataset_is_read(tmp_path, name):
    info = TASKS[name]
    write_dataset(tmp_path, name)
    task = load_task(name, tmp_path)
    assert task[:4] == (name, info.modality, info.meta_task, info.metric) and task.num_frames == info.num_frames
    assert len(task.queries) == (20 if name == "MVBench" else 3)
    queries = [query.input for query in task.queries]
    for inputs, kinds in ((queries, info.query_kind), (task.candidates.values(), info.candidate_kind)):
        # Media come with an instruction, or follow one.
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


# ------------------------------------------------------------------------------------- 1 to 3: texts and names, images


def test_classes_and_captions_of_images(tmp_path):
    classify = "<|image_1|>\nRepresent the given image for classification"
    news = "<|image_1|>\nRepresent the given news image with the following caption for domain classification:"
    image_rows(
        tmp_path, "ImageNet-1K", [(classify, "", "ImageNet-1K/a b.jpg", "", ["cat", "dog", "cat"], ["", "", ""])]
    )
    image_rows(tmp_path, "N24News", [(news, "Rain \nagain ", "N24News/1.jpg", "", ["Sport"], [""])])
    task = load_task("ImageNet-1K", tmp_path)
    assert asked(task) == ["<image>\nRepresent the given image for classification\n"]
    assert task.queries[0].input["image"] == str(tmp_path / "image-tasks/MMEB/ImageNet-1K/a b.jpg")
    assert task.candidates == {"cat": {"text": "cat"}, "dog": {"text": "dog"}}
    assert task.queries[0].candidates == ["cat", "dog"] and task.queries[0].relevance == {"cat": 1.0}
    assert asked(load_task("N24News", tmp_path)) == [
        "<image>\nRepresent the given news image with the following caption for domain classification: Rain\nagain \n"
    ]
    # Only the instructions of questions are stripped. Without a text of its own (None in some rows) a query is these.
    caption = "<|image_1|>\nFind a caption: "
    image_rows(tmp_path, "MSCOCO_i2t", [(caption, None, "MSCOCO_i2t/1.jpg", "", ["a dog"], [""])])
    assert asked(load_task("MSCOCO_i2t", tmp_path)) == ["<image>\nFind a caption: \n"]


def test_questions_about_images(tmp_path):
    question = "<|image_1|>\nRepresent the given image with the following question: \n"
    image_rows(
        tmp_path, "DocVQA", [(question, "what is the date?", "DocVQA/1.jpg", "", ["1/8/93 ", "a.png"], ["", ""])]
    )
    task = load_task("DocVQA", tmp_path)
    assert asked(task) == ["<image>\nRepresent the given image with the following question: what is the date?\n"]
    assert task.candidates == {"1/8/93 ": {"text": "1/8/93 "}, "a.png": {"text": "a.png"}}


def test_images_for_a_text(tmp_path):
    everyday = "Find me an everyday image that matches the given caption:"
    given = "<|image_1|>\nRepresent the given image."
    paths = [f"MSCOCO_t2i/{i}.jpg" for i in range(3)]
    image_rows(
        tmp_path,
        "MSCOCO_t2i",
        [
            (everyday, "man riding", "", given, ["", "", ""], paths),
            # The second of two candidates with one name is not used: its caption is another here.
            (everyday, "a dog", "", "<|image_1|>\nAnother instruction", [" ", " "], paths[1:]),
            (everyday, "a cat", "", given, [" "], ["MSCOCO_t2i/3.jpg"]),
        ],
    )
    task = load_task("MSCOCO_t2i", tmp_path)
    assert asked(task) == [f"{everyday} man riding\n", f"{everyday} a dog\n", f"{everyday} a cat\n"]
    assert list(task.candidates) == [*paths, "MSCOCO_t2i/3.jpg"] and task.queries[0].candidates == paths
    assert {original(item) for item in task.candidates.values()} == {"<image>\nRepresent the given image.\n"}
    assert task.queries[1].candidates == paths[1:] and task.queries[1].relevance == {paths[1]: 1.0}

    dialogue = "Represent the given dialogue about an image, which is used for image retrieval:"
    image_rows(tmp_path, "VisDial", [(dialogue, "Q:is it\nA:yes\n", "", given, [""], ["VisDial/1.jpg"])])
    assert asked(load_task("VisDial", tmp_path)) == [f"{dialogue} Q:is it\nA:yes\n\n\n"]


@pytest.mark.parametrize(
    "name, question, shown",
    [
        (
            "WebQA",
            "Find a Wikipedia image that answers this question:",
            "Represent the given Wikipedia image with related text information:",
        ),
        (
            "EDIS",
            "Find a news image that matches the provided caption:",
            "Represent the given image with related text information:",
        ),
    ],
)
def test_text_queries_that_ask_for_an_image_they_lack(tmp_path, name, question, shown):
    paths = [f"{name}/1.jpg", f"{name}/2.jpg", f"{name}/1.jpg"]
    row = (
        f"<|image_1|>\n{question}",
        "which?",
        "",
        f"<|image_1|>\n{shown}",
        ["A tower", "A lake", "Same tower"],
        paths,
    )
    image_rows(tmp_path, name, [row])
    task = load_task(name, tmp_path)
    assert task.queries[0].input == {"text": f"{question} which?\n"}  # the original: "<image>\n" before it
    # Two captions of one image are one candidate, the first.
    assert [original(item) for item in task.candidates.values()] == [
        f"<image>\n{shown} A tower\n",
        f"<image>\n{shown} A lake\n",
    ]
    assert list(task.candidates) == task.queries[0].candidates == paths[:2]


def test_images_for_an_image(tmp_path):
    changes = "<|image_1|>\nGiven an image, find a similar everyday image with the described changes: "
    paths = ["CIRR/2.jpg", "CIRR/3.jpg"]
    image_rows(
        tmp_path,
        "CIRR",
        [(changes, "two dogs", "CIRR/1.jpg", "<|image_1|>\nRepresent the given image.", ["", ""], paths)],
    )
    task = load_task("CIRR", tmp_path)
    assert asked(task) == [
        "<image>\nGiven an image, find a similar everyday image with the described changes: two dogs\n"
    ]
    assert {original(item) for item in task.candidates.values()} == {"<image>\nRepresent the given image."}
    assert list(task.candidates) == ["CIRR/2.jpg:", "CIRR/3.jpg:"]

    select = "Select the portion of the image that follows the language expressions:"
    paths = ["RefCOCO/1.jpg", "RefCOCO/1.jpg", "RefCOCO/2.jpg"]
    told = ['"left man"', '"right man"', '"left man"']
    row = (f"<|image_1|>\n{select}", '"left man"', paths[0], f"<|image_1|>\n{select}", told, paths)
    image_rows(tmp_path, "RefCOCO-Matching", [row])
    task = load_task("RefCOCO-Matching", tmp_path)
    assert asked(task) == [f'<image>\n{select} "left man"\n']
    assert {name: original(item) for name, item in task.candidates.items()} == {
        "RefCOCO/1.jpg:left man": f'<image>\n{select} "left man"\n',
        "RefCOCO/1.jpg:right man": f'<image>\n{select} "right man"\n',
        "RefCOCO/2.jpg:left man": f'<image>\n{select} "left man"\n',
    }
    assert task.queries[0].relevance == {"RefCOCO/1.jpg:left man": 1.0}


# ------------------------------------------------------------------------------------- 4 to 7: texts and names, videos


def question(tmp_path, name, file, video, row, frames_in=None):
    frames(frames_of(tmp_path, "qa", frames_in or name) / video)
    json_rows(tmp_path, file, [row])
    task = load_task(name, tmp_path)
    texts = {candidate: item["text"] for candidate, item in task.candidates.items()}
    return asked(task)[0], texts, list(task.queries[0].relevance)


def test_questions_about_videos(tmp_path):
    row = {"video": 4740931975, "question": "why did he run", "answer": 2, "qid": "6", "type": "CW"}
    row |= {"a0": "late", "a1": "rain ", "a2": "for fun", "a3": "dog", "a4": "late"}
    assert question(tmp_path, "NExTQA", "nextqa.jsonl", "4740931975", row) == (
        f"<video> {ANSWER}why did he run\nOptions:\n(A) late\n(B) rain \n(C) for fun\n(D) dog\n(E) late",
        {"late": "late", "rain ": "rain ", "for fun": "for fun", "dog": "dog"},
        ["for fun"],
    )
    options = ["A. In Rome.", "B. The U.S.", "C.Milan", "D. 2. May"]
    row = {"videoID": "fFjv93ACGo8", "question": "Where?", "options": options, "answer": "B"}
    assert question(tmp_path, "Video-MME", "video-mme.jsonl", "fFjv93ACGo8", row) == (
        f"<video> {ANSWER}Where?\nA. In Rome.\nB. The U.S.\nC.Milan\nD. 2. May",
        # Without the guard the third would be "n", its last letter.
        {"A. In Rome.": "In Rome", "B. The U.S.": "The U.S", "C.Milan": "C.Milan", "D. 2. May": "2. May"},
        ["B. The U.S."],
    )
    options = [f"{letter}. C holds {letter}." for letter in "ABCDE"]
    row = {"video_idx": "001-a", "question": "What is it?", "option": options, "answer": "3", "question_idx": "1"}
    text, texts, right = question(tmp_path, "EgoSchema", "egoschema.jsonl", "001-a", row, "egoschema")
    assert text == f"<video> {ANSWER}What is it?A. C holds A. B. C holds B. C. C holds C. D. C holds D. E. C holds E."
    assert texts["D. C holds D."] == "C holds D" and right == ["D. C holds D."]
    row = {"video_name": "1QIUV7WYKXg", "question": "is the man old", "answer": "no", "question_id": "7"}
    assert question(tmp_path, "ActivityNetQA", "activitynetqa.jsonl", "v_1QIUV7WYKXg", row) == (
        f"<video> {ANSWER}is the man old? (A) yes; (B) no.",
        {"yes": "yes", "no": "no"},
        ["no"],
    )


def test_mvbench_is_twenty_files(tmp_path):
    write_dataset(tmp_path, "MVBench")
    row = {
        "video": "ZS9XR.mp4",
        "question": "What happened?",
        "candidates": ["Took it.", "Ate it. "],
        "answer": "Ate it. ",
    }
    json_rows(tmp_path, "mvbench/action_sequence.json", [])
    (tmp_path / "video-tasks/data/mvbench/action_sequence.json").write_text(json.dumps([row], indent=4))
    frames(frames_of(tmp_path, "qa", "MVBench") / "action_sequence" / "ZS9XR.mp4")
    task = load_task("MVBench", tmp_path)
    query = next(query for query in task.queries if "ZS9XR" in query.input["video"])
    assert original(query.input) == f"<video> {ANSWER}What happened?\nOptions:\n(A) Took it.\n(B) Ate it."
    assert query.candidates == ["(A) Took it.", "(B) Ate it. "] and query.relevance == {"(B) Ate it. ": 1.0}
    assert task.candidates["(B) Ate it. "] == {"text": "(B) Ate it. "}
    (tmp_path / "video-tasks/data/mvbench/moving_count.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"MVBench: no moving_count\.json; .*mvbench holds action_antonym\.json"
    ):
        load_task("MVBench", tmp_path)


def test_classes_of_videos(tmp_path):
    for name in ("K700", "Breakfast", "HMDB51", "UCF101", "SmthSmthV2"):
        write_dataset(tmp_path, name, count=1)
    assert asked(load_task("K700", tmp_path)) == ["<video> Recognize the category of the video content."]
    # The original's ends in a space.
    breakfast = load_task("Breakfast", tmp_path)
    assert asked(breakfast) == [
        "<video> Recognize the breakfast type that the person is cooking in the video. ",
    ]
    assert asked(load_task("HMDB51", tmp_path)) == [
        "<video> What actions or objects interactions are the person in the video doing?"
    ]
    assert asked(load_task("UCF101", tmp_path)) == [
        "<video> What activities or sports are being performed by the person in the video?"
    ]
    assert asked(load_task("SmthSmthV2", tmp_path)) == [
        "<video> What actions or object interactions are being performed by the person in the video?"
    ]
    meals = "cereal coffee friedegg juice milk pancake salad sandwich scrambledegg tea"
    assert " ".join(sorted(breakfast.candidates)) == meals
    assert len(load_task("K700", tmp_path).candidates) == 700 and len(load_task("UCF101", tmp_path).candidates) == 101
    # A class that is not in the list is a candidate too, as in the original.
    json_rows(tmp_path, "hmdb51.jsonl", [{"video_id": "v_0", "pos_text": "new class"}])
    assert len(load_task("HMDB51", tmp_path).candidates) == 52


def test_the_first_thousand_rows_of_smthsmthv2(tmp_path):
    frames(frames_of(tmp_path, "cls", "SSv2") / "101")
    row = {"video_id": 101, "pos_text": "Closing it", "neg_text": ["Opening it", "Closing it"]}
    json_rows(tmp_path, "ssv2.jsonl", [row] * 1200)
    task = load_task("SmthSmthV2", tmp_path)
    assert len(task.queries) == 1000 and task.queries[0].candidates == ["Opening it", "Closing it"]


def test_videos_for_a_text(tmp_path):
    scene = ["A man sings. ", "second", "third"]
    for name, file, row, text in (
        (
            "MSVD",
            "msvd.jsonl",
            {"video_id": "a_0_9", "video": "a_0_9.avi", "caption": scene},
            "Find the video snippet that corresponds to the given summary: A man sings. ",
        ),
        (
            "VATEX",
            "vatex.jsonl",
            {"videoID": "a_0_9", "enCap": scene},
            "Select a video that fits the description provided: A man sings. ",
        ),
        (
            "DiDeMo",
            "didemo.jsonl",
            {"video": "videos/a_0_9.mp4", "caption": "A man sings."},
            "Find a video that includes the following described scenes: A man sings.",
        ),
        (
            "MSR-VTT",
            "msr-vtt.jsonl",
            {"video_id": "a_0.9", "video": "a_0.9.mp4", "caption": "it rains"},
            "Find a video that contains the following visual content: it rains",
        ),
        (
            "YouCook2",
            "youcook2-val.jsonl",
            {"id": "a_0_9", "video_path": "x.mp4", "sentence": "boil"},
            "Find a video that demonstrates the following action while making a recipe: boil",
        ),
    ):
        video = "a_0.9" if name == "MSR-VTT" else "a_0_9"  # no suffix
        frames(frames_of(tmp_path, "ret", name) / video)
        json_rows(tmp_path, file, [row])
        task = load_task(name, tmp_path)
        assert asked(task) == [text] and task.queries[0].candidates is None
        assert list(task.candidates) == [video] == list(task.queries[0].relevance)
        assert original(task.candidates[video]) == "<video> Understand the content of the provided video."


def test_frames_of_videos(tmp_path):
    """Eight of more, all of fewer, all of MomentSeeker; numbers in file names count as numbers."""
    write_dataset(tmp_path, "MSR-VTT")
    folder = frames_of(tmp_path, "ret", "MSR-VTT")
    for count in (1, 3, 20):
        colours = [image(40, 40, count + number) for number in range(count)]
        (folder / f"v{count}").mkdir()
        for number, colour in enumerate(colours):
            colour.save(folder / f"v{count}" / f"frame_{number}.png")
        json_rows(tmp_path, "msr-vtt.jsonl", [{"video_id": f"v{count}", "caption": "it"}])
        task = load_task("MSR-VTT", tmp_path)
        array = read_input(task.candidates[f"v{count}"], task.num_frames)["video"]["array"]
        kept = {1: [0, 0], 3: [0, 1, 2], 20: [0, 2, 5, 8, 10, 13, 16, 19]}[count]
        np.testing.assert_array_equal(array, np.stack([colours[number] for number in kept]))
    write_dataset(tmp_path, "MomentSeeker")
    frames(frames_of(tmp_path, "mret", "MomentSeeker") / "video_frames" / "movie_0_clip_0", 12)
    task = load_task("MomentSeeker", tmp_path)
    item = task.candidates["video_frames/movie_0_clip_0"]
    assert len(read_input(item, task.num_frames)["video"]["array"]) == 12


@pytest.mark.parametrize("name", ["QVHighlight", "Charades-STA"])
def test_moments_of_a_video(tmp_path, name):
    write_dataset(tmp_path, name, count=1)
    (tmp_path / "elsewhere").mkdir()
    write_dataset(tmp_path / "elsewhere", name, count=1)
    stored = frames_of(tmp_path, "mret", TASKS[name].media.split("|")[0]) / "v_0"
    (stored / "notes.txt").touch()
    task = load_task(name, tmp_path)
    assert asked(task) == ["<video> Find the clip that corresponds to the described scene in the given video: scene 0"]
    assert task.queries[0].input["video"] == str(stored / "query")
    assert original(task.candidates["v_0/positive_clip"]) == "<video> Understand the content of the provided video."
    # Sorted, whatever the file system lists first, and without the root.
    clips = sorted(f"v_0/negative_clip_{i}" for i in range(9))
    assert task.queries[0].candidates == list(task.candidates) == [*clips, "v_0/positive_clip"]
    assert task.queries[0].relevance == {"v_0/positive_clip": 1.0}
    other = load_task(name, tmp_path / "elsewhere")
    assert other.queries[0][2:] == task.queries[0][2:] and list(other.candidates) == list(task.candidates)


def test_moment_seeker(tmp_path):
    write_dataset(tmp_path, "MomentSeeker")
    path = tmp_path / "video-tasks" / "data" / "momentseeker_1k6.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["positive_frames"].append(rows[0]["negative_frames"].pop())
    rows[0]["input_frames"] = None
    json_rows(tmp_path, path.name, [rows[0], rows[1], rows[0], rows[2], rows[1]])
    task = load_task("MomentSeeker", tmp_path)
    assert [original(query.input) for query in task.queries] == [
        "Find the clip that corresponds to the given text: scene 0",
        "<image>\nSelect the video clip that aligns with the given text and image: scene 1",
        "<video> Find the clip that corresponds to the given sentence and video segment: scene 2",
    ]
    assert [query.id for query in task.queries] == ["0", "1", "3"]
    assert load_task("MomentSeeker", tmp_path, limit=3).queries == task.queries
    stored = frames_of(tmp_path, "mret", "MomentSeeker")
    assert task.queries[1].input["image"] == str(stored / "query_1.jpg")
    assert task.queries[2].input["video"] == str(stored / "video_frames" / "movie_2")
    clips = [f"video_frames/movie_0_clip_{i}" for i in (0, 2, 1)]
    assert task.queries[0].candidates == clips and task.queries[0].relevance == dict.fromkeys(clips[:2], 1.0)
    assert original(task.candidates[clips[0]]) == "<video> Understand the content of the provided video clip."


# --------------------------------------------------------------------------------------------------- 8 to 10: pages


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
    """Grades are kept, zeros dropped, the best of several counts; no language is left out."""
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
    # Of two pages with one id the first counts.
    corpus = tmp_path / "visdoc-tasks" / "data" / "ViDoSeek-page-fixed" / "corpus"
    rows = mmeb_tree.pq.read_table(corpus).to_pylist()
    parquet(corpus / "test-00001-of-00002.parquet", [rows[20], {**rows[21], "corpus-id": 20}, *rows[22:]])
    (folder / "20.png").unlink()

    def interrupted(path, content):
        with open(path, "wb") as file:
            file.write(content[:9])
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", interrupted)
        with pytest.raises(OSError, match="the disk is full"):
            load_task("ViDoSeek-page", tmp_path)
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


def test_small_images_are_enlarged(tmp_path):
    for size, read in {(27, 500): (56, 56), (500, 27): (56, 56), (28, 28): (28, 28), (3, 3): (56, 56)}.items():
        picture(tmp_path / "small.png", size)
        assert read_input({"image": str(tmp_path / "small.png")})["image"].size == read
    pixels = np.asarray(read_input({"image": str(tmp_path / "small.png")})["image"])
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(tmp_path / "small.png").resize((56, 56))))


# ------------------------------------------------------------------------------------------------- places and the Hub


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
    """What `load_dataset` leaves in its cache, and reads from there when the Hub cannot be reached."""
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


# ------------------------------------------------------------------------------------------------------ bad input


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
    with pytest.raises(ValueError, match=r"bad\.png' cannot be decoded"):
        read_input({"image": str(tmp_path / "bad.png"), "text": "a"})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tgt_text": []}, "it has no right candidate"),
        ({"tgt_text": [" ", "a"]}, "the right candidate is an empty text"),
        ({"tgt_text": ["a", None]}, "candidate None is not a text"),
        ({"tgt_text": None}, "column 'tgt_text' is empty"),
        ({"qry_img_path": ""}, "'' is missing or empty"),
        ({"qry_inst": None}, "column 'qry_inst' is empty"),
    ],
)
def test_rows_of_images_that_cannot_be_used(tmp_path, changes, message):
    write_dataset(tmp_path, "VOC2007")
    path = tmp_path / "image-query" / "VOC2007" / "test-00000-of-00001.parquet"
    row = mmeb_tree.pq.read_table(path).to_pylist()[0]
    parquet(path, [row | changes])
    with pytest.raises((ValueError, FileNotFoundError), match=f"VOC2007, row 0 of .*: {message}"):
        load_task("VOC2007", tmp_path)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("K700", {"pos_text": None}, "column 'pos_text' is empty"),
        ("SmthSmthV2", {"pos_text": "Eating it"}, r"'Eating it' is not among the candidates \['Closing it', 'Op"),
        ("Video-MME", {"answer": ""}, "the right candidate '' is not among the candidates"),
        ("Video-MME", {"answer": "AB"}, "the right candidate 'AB' is not among the candidates"),
        ("NExTQA", {"answer": -1}, "the right candidate -1 is not among the candidates"),
        ("EgoSchema", {"answer": "5"}, "the right candidate 5 is not among the candidates"),
        ("ActivityNetQA", {"answer": "maybe"}, r"'maybe' is not among the candidates \['yes', 'no'\]"),
        ("MSVD", {"caption": []}, "the query's text is ''"),
        ("MSR-VTT", {"caption": " "}, "the query's text is ' '"),
        ("MSR-VTT", {"caption": None}, "column 'caption' is empty"),
        ("MomentSeeker", {"positive_frames": []}, "it has no right candidate"),
        ("MomentSeeker", {"positive_frames": [{"path": "a.mp4"}]}, "no 'output_path' in it"),
    ],
)  # fmt: skip
def test_rows_of_videos_that_cannot_be_used(tmp_path, name, changes, message):
    write_dataset(tmp_path, name)
    path = tmp_path / "video-tasks" / "data" / TASKS[name].data.split("|")[0]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    json_rows(tmp_path, path.name, [rows[0], rows[1] | changes])
    with pytest.raises(ValueError, match=rf"{name}, row 1 of .*{path.name}: .*{message}"):
        load_task(name, tmp_path)


def test_a_video_without_a_right_clip(tmp_path):
    write_dataset(tmp_path, "QVHighlight")
    folder = frames_of(tmp_path, "mret", "QVHighlight") / "v_1"
    (folder / "positive_clip").rename(folder / "negative_clip_9")
    with pytest.raises(ValueError, match=r"QVHighlight, row 1 of .*it has no right candidate"):
        load_task("QVHighlight", tmp_path)


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


def test_captions_and_paths_that_do_not_match(tmp_path):
    row = ("Find", "a", "", "<|image_1|>\nRepresent", ["x", "y"], ["MSCOCO_t2i/1.jpg"])
    image_rows(tmp_path, "MSCOCO_t2i", [row])
    with pytest.raises(ValueError, match=r"row 0 of .*tgt_img_path has 1 entries and tgt_text 2"):
        load_task("MSCOCO_t2i", tmp_path)


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
    # A line break of Unicode inside a text ends no row.
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
