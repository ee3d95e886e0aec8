"""Read a row of a dataset of images or videos: the query's input, its candidates, and which of them are right.

Texts are those of the public evaluation code (github TIGER-AI-Lab/VLM2Vec), apart from the media token. There it is a
part of the text, followed by a line break or a space. Here the chat template puts it before the text. So a text starts
at its first word and ends as in the original, line breaks included (as in the training data).

A reader takes the dataset's `TaskInfo`, a row, `Media`, which finds media, and the pool of candidates by name.
It adds new candidates to the pool. It returns the query's input, the names of its candidates, and the names of the
right ones. To find files or check rows, see `loading.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from btok_hf.evaluation.tasks import Media, TaskInfo, TaskInput

Row = dict[str, Any]
Pool = dict[str, TaskInput]
Read = tuple[TaskInput, list[str], list[str]]  # input, names of the candidates, names of the right ones

PLACEHOLDER = "<|image_1|>"


def _image_to_text(info: TaskInfo, row: Row, media: Media, pool: Pool) -> Read:
    """An image (with a question, or without); candidates are classes, answers or captions."""
    instruction = row["qry_inst"].replace(PLACEHOLDER, "")
    if info.layout == "image_question":
        instruction = instruction.strip()
    item: TaskInput = {"image": media.image(row["qry_img_path"]), "text": _image_text(instruction, row["qry_text"])}
    for text in row["tgt_text"]:
        pool.setdefault(text, {"text": text})
    return item, row["tgt_text"], row["tgt_text"][:1]


def _text_to_image(info: TaskInfo, row: Row, media: Media, pool: Pool) -> Read:
    """A text; candidates are images. The instructions of WebQA and EDIS mention an image that queries do not have."""
    text = query_text(row["qry_inst"].replace(PLACEHOLDER, ""), row["qry_text"]).lstrip() + "\n"
    if info.name == "VisDial":
        text += "\n"
    names = row["tgt_img_path"]
    return {"text": text}, *_images(row, names, media, pool, end="\n")


def _image_to_image(info: TaskInfo, row: Row, media: Media, pool: Pool) -> Read:
    """An image and a text; candidates are images, or parts of the query's image."""
    text = _image_text(row["qry_inst"].replace(PLACEHOLDER, "").strip(), row["qry_text"])
    # A dataset may ask for several objects of one image, so the caption is a part of the name.
    names = [f"{path}:" + caption.strip('"') for path, caption in zip(row["tgt_img_path"], row["tgt_text"])]
    return {"image": media.image(row["qry_img_path"]), "text": text}, *_images(row, names, media, pool, end="")


def _images(row: Row, names: list[str], media: Media, pool: Pool, end: str) -> tuple[list[str], list[str]]:
    """Candidates with an image. Without captions, their text is the instruction followed by `end`."""
    paths, captions = row["tgt_img_path"], row["tgt_text"]
    if len(paths) != len(captions):
        raise ValueError(f"tgt_img_path has {len(paths)} entries and tgt_text {len(captions)}")
    instruction = row["tgt_inst"].replace(PLACEHOLDER, "")
    captioned = bool(captions and captions[0].strip())
    for name, path, caption in zip(names, paths, captions):
        if name not in pool:
            text = _image_text(f"{instruction} {caption}") if captioned else _image_text(instruction, end=end)
            pool[name] = {"image": media.image(path), "text": text}
    return names, names[:1]


def _image_text(instruction: str, text: str = "", end: str = "\n") -> str:
    joined = f"{instruction} {text}" if text else instruction
    return joined.replace(" \n", "\n").lstrip() + end


def _video_class(info: TaskInfo, row: Row, media: Media, pool: Pool) -> Read:
    label = row["pos_text"]
    names = row["neg_text"] if info.layout == "video_options" else [label]
    for name in names:
        pool.setdefault(name, {"text": name})
    return {"video": media.frames(row["video_id"]), "text": info.query_instruction}, names, [label]


def _video_retrieval(info: TaskInfo, row: Row, media: Media, pool: Pool) -> Read:
    column, caption = info.columns.split()
    name, caption = str(row[column]), row[caption]
    if column == "video":  # the path of a file
        name = Path(name).stem
    if name not in pool:
        pool[name] = {"video": media.frames(name), "text": info.candidate_instruction}
    if isinstance(caption, list):
        caption = caption[0] if caption else ""
    return {"text": query_text(info.query_instruction, caption)}, [name], [name]


def _moment_retrieval(info: TaskInfo, row: Row, media: Media, pool: Pool) -> Read:
    """A text and a video; candidates are its clips, in folders beside that of the full video, `query`."""
    video = Path(row["video_path"]).stem
    item: TaskInput = {
        "video": media.frames(f"{video}/query"),
        "text": query_text(info.query_instruction, row["query"]),
    }
    folders = sorted(path for path in Path(item["video"]).parent.iterdir() if path.is_dir() and path.name != "query")
    names = [f"{video}/{folder.name}" for folder in folders]
    for name in names:
        pool[name] = {"video": media.frames(name), "text": info.candidate_instruction}
    return item, names, [f"{video}/{folder.name}" for folder in folders if folder.name.startswith("positive")]


def _moment_seeker(info: TaskInfo, row: Row, media: Media, pool: Pool) -> Read:
    """A text, alone or with an image or a video segment; candidates are clips. Each kind has its own instruction."""
    alone, with_image, with_video = info.query_instruction.split("|")
    asked = row["input_frames"] or ""
    item: TaskInput
    if asked.endswith(".mp4"):
        item = {"video": media.frames(_clip(asked)), "text": query_text(with_video, row["query"])}
    elif asked.endswith(".jpg"):
        item = {"image": media.image(f"query_{asked}"), "text": query_text(with_image, row["query"])}
    else:
        item = {"text": query_text(alone, row["query"])}
    right, wrong = (
        [_clip(clip["output_path"]) for clip in row[f"{kind}_frames"]] for kind in ("positive", "negative")
    )
    for name in right + wrong:
        pool[name] = {"video": media.frames(name), "text": info.candidate_instruction}
    return item, right + wrong, right


def _clip(path: str) -> str:
    """Folder of a clip's frames, from the path of its file."""
    return "video_frames/" + path.split(".mp4")[0].replace("/", "_")


def _video_question(info: TaskInfo, row: Row, media: Media, pool: Pool) -> Read:
    video, text, options, right = QUESTIONS[info.name](row)
    for name, option in options.items():
        pool.setdefault(name, {"text": option})
    return {"video": media.frames(video), "text": query_text(info.query_instruction, text)}, list(options), [right]


def query_text(instruction: str, text: Any) -> str:
    """Instruction and text of a query; a missing or blank text is refused."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the query's text is {text!r}")
    return f"{instruction} {text}"


READERS: dict[str, Callable[[TaskInfo, Row, Media, Pool], Read]] = {
    "image_to_label": _image_to_text,
    "image_question": _image_to_text,
    "text_to_image": _text_to_image,
    "image_to_image": _image_to_image,
    "video_classification": _video_class,
    "video_options": _video_class,
    "video_retrieval": _video_retrieval,
    "moment_retrieval": _moment_retrieval,
    "moment_seeker": _moment_seeker,
    "video_question": _video_question,
}


# Each reads a row of video questions. It returns the folder of frames, the question with its options, the texts of the
# candidates by name, and the right name.
Question = tuple[str, str, dict[str, str], str]


def _mvbench(row: Row) -> Question:
    names = _lettered(row["candidates"])
    text = "\n".join([row["question"], "Options:", *names]).rstrip()
    right = _chosen(row["candidates"], names, row["answer"])
    return f"{row['subset']}/{row['video']}", text, dict(zip(names, names)), right


def _nextqa(row: Row) -> Question:
    options = [row[f"a{number}"] for number in range(5)]
    text = "\n".join([row["question"], "Options:", *_lettered(options)]).rstrip()
    return row["video"], text, dict(zip(options, options)), _chosen(range(5), options, row["answer"])


def _video_mme(row: Row) -> Question:
    options = row["options"]
    text = "\n".join([row["question"], *options])
    return row["videoID"], text, _unlettered(options), _chosen("ABCD", options, row["answer"])


def _egoschema(row: Row) -> Question:
    options = row["option"]
    text = row["question"] + " ".join(options)
    return row["video_idx"], text, _unlettered(options), _chosen(range(5), options, int(row["answer"]))


def _activitynetqa(row: Row) -> Question:
    text = row["question"] + "? (A) yes; (B) no."
    return f"v_{row['video_name']}", text, {"yes": "yes", "no": "no"}, row["answer"]


def _lettered(options: Sequence[str]) -> list[str]:
    return [f"({letter}) {option}" for letter, option in zip(ascii_uppercase, options)]


def _chosen(answers: Iterable, options: Iterable[str], answer: Any) -> Any:
    """The option that belongs to an answer. An unknown answer is returned as it is; `load_task` then refuses it."""
    return dict(zip(answers, options)).get(answer, answer)


def _unlettered(options: Sequence[str]) -> dict[str, str]:
    """Options without their letters, by the full option."""
    return {option: option[max(option.find(". "), 0) :].strip(". ") for option in options}


QUESTIONS: dict[str, Callable[[Row], Question]] = {
    "MVBench": _mvbench,
    "NExTQA": _nextqa,
    "Video-MME": _video_mme,
    "EgoSchema": _egoschema,
    "ActivityNetQA": _activitynetqa,
}
