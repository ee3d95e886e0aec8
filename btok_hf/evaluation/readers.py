"""From a row of a dataset of images or videos to the texts and names of its query and candidates.

Texts are those of the public evaluation code (github TIGER-AI-Lab/VLM2Vec), up to the media token: there it is a part
of the text, followed by a line break or a space, here a chat template puts it in front with a separator of its own.
So a text starts at its first word, and ends as the original's does, line breaks included (as in the training data).

A reader takes the dataset's `TaskInfo`, a row as a dict, what finds media (`tasks._Media`) and the pool of candidates
by name, to which it adds new ones. It returns the query's input, the names of its candidates, and those of the right
ones.
"""

from pathlib import Path
from string import ascii_uppercase

PLACEHOLDER = "<|image_1|>"


def _image_to_text(info, row, media, pool):
    """Classes, answers or captions of an image."""
    instruction = row["qry_inst"].replace(PLACEHOLDER, "")
    if info.layout == "image_question":
        instruction = instruction.strip()
    item = {"image": media.image(row["qry_img_path"]), "text": _image_text(instruction, row["qry_text"])}
    for text in row["tgt_text"]:
        pool.setdefault(text, {"text": text})
    return item, row["tgt_text"], row["tgt_text"][:1]


def _text_to_image(info, row, media, pool):
    """Images for a text. The instructions of WebQA and EDIS ask for an image that the queries do not have."""
    text = query_text(row["qry_inst"].replace(PLACEHOLDER, ""), row["qry_text"]).lstrip() + "\n"
    if info.name == "VisDial":
        text += "\n"
    names = row["tgt_img_path"]
    return {"text": text}, *_images(row, names, media, pool, end="\n")


def _image_to_image(info, row, media, pool):
    """Images, or parts of the image, for an image and a text."""
    text = _image_text(row["qry_inst"].replace(PLACEHOLDER, "").strip(), row["qry_text"])
    # Several objects of an image can be asked for: the caption is a part of the name.
    names = [f"{path}:" + caption.strip('"') for path, caption in zip(row["tgt_img_path"], row["tgt_text"])]
    return {"image": media.image(row["qry_img_path"]), "text": text}, *_images(row, names, media, pool, end="")


def _images(row, names, media, pool, end):
    """Candidates with an image. Without captions they end in `end`, and have the instruction alone as text."""
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


def _image_text(instruction, text="", end="\n"):
    joined = f"{instruction} {text}" if text else instruction
    return joined.replace(" \n", "\n").lstrip() + end


def _video_class(info, row, media, pool):
    label = row["pos_text"]
    names = row["neg_text"] if info.layout == "video_options" else [label]
    for name in names:
        pool.setdefault(name, {"text": name})
    return {"video": media.frames(row["video_id"]), "text": info.query_instruction}, names, [label]


def _video_retrieval(info, row, media, pool):
    column, caption = info.columns.split()
    name, caption = str(row[column]), row[caption]
    if column == "video":  # the path of a file
        name = Path(name).stem
    if name not in pool:
        pool[name] = {"video": media.frames(name), "text": info.candidate_instruction}
    if isinstance(caption, list):
        caption = caption[0] if caption else ""
    return {"text": query_text(info.query_instruction, caption)}, [name], [name]


def _moment_retrieval(info, row, media, pool):
    """The clips of a video; each is a folder beside that of the whole video, `query`."""
    video = Path(row["video_path"]).stem
    item = {"video": media.frames(f"{video}/query"), "text": query_text(info.query_instruction, row["query"])}
    folders = sorted(path for path in Path(item["video"]).parent.iterdir() if path.is_dir() and path.name != "query")
    names = [f"{video}/{folder.name}" for folder in folders]
    for name in names:
        pool[name] = {"video": media.frames(name), "text": info.candidate_instruction}
    return item, names, [f"{video}/{folder.name}" for folder in folders if folder.name.startswith("positive")]


def _moment_seeker(info, row, media, pool):
    """Clips for a text, alone or with an image or a video segment; each kind of query has its instruction."""
    alone, with_image, with_video = info.query_instruction.split("|")
    asked = row["input_frames"] or ""
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


def _clip(path):
    return "video_frames/" + path.split(".mp4")[0].replace("/", "_")


def _video_question(info, row, media, pool):
    video, text, options, right = QUESTIONS[info.name](row)
    for name, option in options.items():
        pool.setdefault(name, {"text": option})
    return {"video": media.frames(video), "text": query_text(info.query_instruction, text)}, list(options), [right]


def query_text(instruction, text):
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the query's text is {text!r}")
    return f"{instruction} {text}"


READERS = {
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


# Each reads a row of video questions: folder of frames, question with options, names and texts of the candidates, and
# the right name.


def _mvbench(row):
    names = _lettered(row["candidates"])
    text = "\n".join([row["question"], "Options:", *names]).rstrip()
    right = _chosen(row["candidates"], names, row["answer"])
    return f"{row['subset']}/{row['video']}", text, dict(zip(names, names)), right


def _nextqa(row):
    options = [row[f"a{number}"] for number in range(5)]
    text = "\n".join([row["question"], "Options:", *_lettered(options)]).rstrip()
    return row["video"], text, dict(zip(options, options)), _chosen(range(5), options, row["answer"])


def _video_mme(row):
    options = row["options"]
    text = "\n".join([row["question"], *options])
    return row["videoID"], text, _unlettered(options), _chosen("ABCD", options, row["answer"])


def _egoschema(row):
    options = row["option"]
    text = row["question"] + " ".join(options)
    return row["video_idx"], text, _unlettered(options), _chosen(range(5), options, int(row["answer"]))


def _activitynetqa(row):
    text = row["question"] + "? (A) yes; (B) no."
    return f"v_{row['video_name']}", text, {"yes": "yes", "no": "no"}, row["answer"]


def _lettered(options):
    return [f"({letter}) {option}" for letter, option in zip(ascii_uppercase, options)]


def _chosen(answers, options, answer):
    """The option of an answer, or the answer itself, which then is none of the candidates."""
    return dict(zip(answers, options)).get(answer, answer)


def _unlettered(options):
    """Names are the options as they are, texts what follows the letter."""
    return {option: option[max(option.find(". "), 0) :].strip(". ") for option in options}


QUESTIONS = {
    "MVBench": _mvbench,
    "NExTQA": _nextqa,
    "Video-MME": _video_mme,
    "EgoSchema": _egoschema,
    "ActivityNetQA": _activitynetqa,
}
