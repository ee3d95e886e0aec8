"""Rows of MMEB-V2 as queries and candidates: exact texts, names and media."""

import json

import numpy as np
import pytest
from support import mmeb_tree
from support.evaluation import asked, frames_of, original
from support.media import image
from support.mmeb_tree import frames, image_rows, json_rows, parquet, write_dataset

from btok_hf.evaluation.loading import load_task, read_input
from btok_hf.evaluation.tasks import TASKS

ANSWER = (
    "Given a video and a question, select the most accurate answer from the provided candidates. Return only the "
    "exact text of your chosen answer. Question:  "
)


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
    # Only the instructions of questions are stripped. A query without text (None in some rows) is the instruction.
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
        # Without the guard the third answer would be "n", its last letter.
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


def test_classes_of_videos(tmp_path, caplog):
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
    assert "labels.json" not in caplog.text
    json_rows(tmp_path, "hmdb51.jsonl", [{"video_id": "v_0", "pos_text": "new class"}])
    assert len(load_task("HMDB51", tmp_path).candidates) == 52
    assert "HMDB51: its rows have 1 classes that labels.json lacks (['new class'])" in caplog.text


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
    """Eight frames if there are more, and all of MomentSeeker. File names are sorted by their numbers."""
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
    # The order does not depend on the file system or the root.
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


def test_captions_and_paths_that_do_not_match(tmp_path):
    row = ("Find", "a", "", "<|image_1|>\nRepresent", ["x", "y"], ["MSCOCO_t2i/1.jpg"])
    image_rows(tmp_path, "MSCOCO_t2i", [row])
    with pytest.raises(ValueError, match=r"row 0 of .*tgt_img_path has 1 entries and tgt_text 2"):
        load_task("MSCOCO_t2i", tmp_path)
