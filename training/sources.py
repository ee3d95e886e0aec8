"""The training data of arXiv 2604.11095: where each source is, and how its rows become pairs.

No media are decoded before training. `datasets` writes the rows to Arrow files once (in `HF_DATASETS_CACHE`, as large
as the parquet files) and memory-maps them. When a worker of the data loader asks for a row, its images and frames are
read and it becomes a pair. So memory does not grow with the data.

`root` holds one folder per repository, as these commands make it (`cd` to the root first):

    hf download TIGER-Lab/MMEB-train --repo-type dataset --local-dir MMEB-train
    (cd MMEB-train && for zip in images_zip/*.zip; do unzip -qn $zip -d images; done)
    hf download ShareGPTVideo/train_video_and_instruction --repo-type dataset --include "train_300k/*" \\
        --include "video_instruction/train/sft/video_*" --local-dir train_video_and_instruction
    (cd train_video_and_instruction/train_300k && for tar in *.tar.gz; do tar -xzf $tar; done)
    hf download vidore/colpali_train_set --repo-type dataset --local-dir colpali_train_set
    hf download openbmb/VisRAG-Ret-Train-In-domain-data --repo-type dataset --local-dir VisRAG-Ret-Train-In-domain-data

Formats are those of the repositories. Instructions and the sides to generate are those of the public training code
(github TIGER-AI-Lab/VLM2Vec, siryuson/BottleneckTokens).

To add a source, write a function from row to pair and an entry of `SOURCES`. Your own pairs need neither: see
`data.py`.
"""

import ast
import io
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from btok_hf.media import read_image
from btok_hf.training.data import FORMATS
from btok_hf.video import read_frames

logger = logging.getLogger(__name__)

# Removed from texts, with the white space around it: the chat template puts media before the text.
PLACEHOLDER = re.compile(r"\s*(<\|image_\d+\|>|<video>)\s*")
NOTHING = r"^(<\|image_\d+\|>|[\s\[\]'\"])*$"  # a text without content; lists are stored as text
OPTION = re.compile(r"([A-E])(?:[.)](?:\s+(.*))?)?", re.DOTALL)  # "B", "B." or "B) text"

Pair = dict[str, Any]  # query, positive and, for MMEB-train, negative: dicts of text, image and video

# ------------------------------------------------------------------------------------- rows of a layout -> pairs
# Cells are dicts, because a string like "logo.png" would be read as a file.


def _mmeb_pair(row: dict[str, Any], folder: Path) -> Pair:
    """A row of MMEB-train: each side has a text with its instruction, an image path below `folder`, or both."""
    sides = {"query": ("qry", "qry_image_path"), "positive": ("pos_text", "pos_image_path")}
    if "neg_text" in row:
        sides["negative"] = ("neg_text", "neg_image_path")
    pair: Pair = {}
    for side, (text, image) in sides.items():
        cell = {}
        if row.get(image):
            cell["image"] = str(folder / row[image])
            if not Path(cell["image"]).is_file():
                raise FileNotFoundError(
                    f"{image} is {cell['image']!r}, which does not exist. Unpack images_zip/*.zip."
                )
        # Texts without an image may hold the placeholder too (queries of WebQA).
        if (words := _words(row[text] or "")).strip():
            cell["text"] = words
        pair[side] = cell or None
    if (negative := pair.get("negative")) and "text" not in negative and "text" in pair["positive"]:
        # VisDial's negatives lack the instruction of positives: the difference would tell them apart.
        negative["text"] = pair["positive"]["text"]
    return pair


def _video_pair(row: dict[str, Any], folder: Path, instruction: str = "", find_video: bool = False) -> Pair:
    """A row of LLaVA-Hound: a prompt and its answer about the frames in the folder `video`."""
    video = {"video": read_frames(folder / "train_300k" / row["video"])}
    prompt, answer = (turn["value"] for turn in row["conversations"][:2])
    if find_video:
        query = {"text": "Find a video that contains the following visual content: " + answer}
        return {"query": query, "positive": {**video, "text": "Understand the content of the provided video:"}}
    query = {**video, "text": instruction + _words(prompt)}
    return {"query": query, "positive": {"text": answer}}


def _page_question(row: dict[str, Any], folder: Path | None) -> Pair:
    """A row of colpali_train_set: a page with a question (and its options, if any), and the answer."""
    choices = _texts(row["options"])
    query = row["query"] if choices is None else f"{row['query']} Options: {row['options']}"
    return {"query": {"image": _page(row), "text": query}, "positive": {"text": _answer(row["answer"], choices)}}


def _page_search(row: dict[str, Any], folder: Path | None) -> Pair:
    """A row of VisRAG in-domain: a query and the page that answers it. Instructions depend on the page's origin."""
    instruction = PAGE_INSTRUCTIONS.get(row["source"])
    if instruction is None:
        return {"query": {"text": row["query"]}, "positive": {"image": _page(row)}}
    positive = {"image": _page(row), "text": instruction["page"]}
    return {"query": {"text": instruction["query"] + row["query"]}, "positive": positive}


def _words(text: str) -> str:
    return PLACEHOLDER.sub(" ", text).strip(" \t")


def _texts(value: str | None) -> list[str] | None:
    """The texts of a list that is stored as text, such as "['one', 'two']"; `None` for anything else."""
    if value is None or not value.startswith("["):
        return None
    try:
        parts = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return None
    return [str(part) for part in parts] or None


def _answer(answer: str, choices: list[str] | None) -> str:
    """The text of an answer, which is stored as a text, as a list in a text, or as the letter of an option."""
    option = OPTION.fullmatch(answer) if choices else None
    if choices and option:
        number = ord(option[1]) - ord("A")
        named = choices[number] if option[2] is None and number < len(choices) else answer
        labelled = OPTION.fullmatch(named)
        return labelled[2] if labelled and labelled[2] else named
    return ", ".join(_texts(answer) or [answer])


def _page(row: dict[str, Any]) -> Image.Image:
    stored = row["image"]
    if stored is None or not stored["bytes"]:
        raise ValueError("column 'image' is empty")
    try:
        return read_image(io.BytesIO(stored["bytes"]))
    except ValueError as error:
        raise ValueError(f"column 'image' cannot be decoded ({error})") from error


# --------------------------------------------------------------------------------------------------- the sources


@dataclass(frozen=True)
class Source:
    """One source of training pairs.

    Args:
        repo (`str`): Hub id of its dataset.
        files (`str`): Glob of its files of rows, relative to the repository's folder.
        condense (`str`): The side whose text is generated, as in `CondensationConfig`.
        pair (`Callable`): Makes a pair from a row and the repository's folder.
        filled (`tuple[tuple[str, ...], ...]`): Groups of columns. A row is left out if all columns of a group are
            empty.
        columns (`tuple[str, ...]`): More columns that `pair` reads.
        optional (`tuple[str, ...]`): More columns that `pair` reads if the files have them.
        rows (`int`, *optional*): If set, only this many rows, from the first, belong to the source.
    """

    repo: str
    files: str
    condense: str
    pair: Callable[[dict[str, Any], Any], Pair]
    filled: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    rows: int | None = None


def _mmeb(subset: str, condense: str) -> Source:
    return Source(
        "TIGER-Lab/MMEB-train",
        f"{subset}/original-*.parquet",
        condense,
        _mmeb_pair,
        filled=(("qry", "qry_image_path"), ("pos_text", "pos_image_path")),
        optional=("neg_text", "neg_image_path"),
    )


def _llava_hound(file: str, condense: str, rows: int | None = None, **kwargs: Any) -> Source:
    return Source(
        "ShareGPTVideo/train_video_and_instruction",
        f"video_instruction/train/sft/{file}.jsonl",
        condense,
        partial(_video_pair, **kwargs),
        filled=(("video",),),
        columns=("conversations",),
        rows=rows,
    )


MMEB = {
    "positive": "ImageNet_1K N24News HatefulMemes VOC2007 SUN397 OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA "
    "Visual7W VisualNews_i2t MSCOCO_i2t",
    "query": "VisDial VisualNews_t2i MSCOCO_t2i MSCOCO",
    "none": "CIRR NIGHTS",
    "both": "WebQA",
}

SOURCES = {
    **{subset: _mmeb(subset, condense) for condense, subsets in MMEB.items() for subset in subsets.split()},
    "colpali_train_set": Source(
        "vidore/colpali_train_set",
        "data/train-*.parquet",
        "positive",
        _page_question,
        filled=(("query",), ("answer",)),
        columns=("image", "options"),
    ),
    "visrag-indomain": Source(
        "openbmb/VisRAG-Ret-Train-In-domain-data",
        "data/train-*.parquet",
        "query",
        _page_search,
        filled=(("query",),),
        columns=("image", "source"),
    ),
    "video_caption_300k": _llava_hound("video_caption_300k", "positive"),
    "video_caption_300k-video": _llava_hound("video_caption_300k", "query", find_video=True),
    # The file ends in 15,000 captions, which are in video_caption_300k too.
    "video_qa_240k": _llava_hound(
        "video_240k_caption_15k",
        "positive",
        rows=240_000,
        instruction="Answer a question based on the content of a video. ",
    ),
}

# VisRAG: origin of a page → instruction of the query ("query") and of the page ("page")
PAGE_INSTRUCTIONS = json.loads(Path(__file__).with_name("page_instructions.json").read_text("utf-8"))


# --------------------------------------------------------------------------------------------------------- loading


def load_source(name: str, root: Path | str | None = None) -> Dataset:
    """Load a source of `SOURCES` as pairs: `query`, `positive` and, for MMEB-train, `negative` (may be `None`).

    Rows with an empty side are left out, and their number is logged. Eight rows are read at once, so that a wrong root
    is found before training starts.

    Args:
        name (`str`): Name of the source.
        root (`str` or `Path`, *optional*): Folder of the downloaded repositories (see the module's docstring). Without
            it, rows come from the Hub. That works for sources whose rows hold the images: colpali_train_set and
            visrag-indomain.

    Returns:
        `datasets.Dataset`: Memory-mapped, with a transform that makes pairs of the rows that are read.

    Raises:
        FileNotFoundError, ValueError: No such source, folder, file or column, or a row that cannot be read.
    """
    if name not in SOURCES:
        raise ValueError(f"Unknown source {name!r}. Known are {', '.join(SOURCES)}.")
    source = SOURCES[name]
    folder: Path | None = None
    if root is not None:
        folder = Path(root) / source.repo.split("/")[1]
        files = sorted(map(str, folder.glob(source.files)))
        if not files:
            raise FileNotFoundError(
                f"Source {name!r} has no files {str(folder / source.files)!r}. Download them to the root: hf download "
                f"{source.repo} --repo-type dataset --local-dir {folder} (archives: see btok_hf/training/sources.py)."
            )
        dataset = load_dataset(FORMATS[Path(files[0]).suffix], data_files=files, split="train")
    elif "image" in source.columns:
        dataset = load_dataset(source.repo, split="train")
    else:
        raise ValueError(
            f"Source {name!r} keeps its images or frames in archives of {source.repo}. Download and unpack them as "
            "btok_hf/training/sources.py says, and pass their folder as root (sources_root of btok train)."
        )

    columns = [column for columns in source.filled for column in columns] + list(source.columns)
    columns += [column for column in source.optional if column in dataset.column_names]
    for column in columns:
        found = column in dataset.column_names
        dtype = getattr(dataset.features[column], "dtype", None) if found else None
        if not found or (column not in ("image", "conversations") and dtype not in ("string", "null")):
            raise ValueError(
                f"Source {name!r}: {source.files} has {'no texts in' if found else 'no'} column {column!r}. It holds "
                f"{dataset.features}. Is this the format of {source.repo}?"
            )
    dataset = dataset.select_columns(columns)
    if "image" in columns:
        dataset = dataset.cast_column("image", ImageFeature(decode=False))
    if source.rows is not None:
        dataset = dataset.select(range(min(source.rows, len(dataset))))
    if "conversations" in columns:
        _check_conversations(dataset, name)
    # Numbered before rows are left out, because errors name the row of the file.
    dataset = dataset.add_column("row", np.arange(len(dataset)))
    dataset = _without_empty_sides(dataset, name)
    dataset = dataset.with_transform(partial(_pairs, name=name, folder=folder))
    for index in np.linspace(0, len(dataset) - 1, min(8, len(dataset))).astype(int):
        dataset[int(index)]
    return dataset


def _pairs(rows: Mapping[str, list], name: str, folder: Path | None) -> dict[str, list]:
    """The transform: a batch of raw rows, as a dict of columns, becomes a batch of pairs."""
    source, pairs = SOURCES[name], []
    for values in zip(*rows.values()):
        row = dict(zip(rows, values))
        try:
            pairs.append(source.pair(row, folder))
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"Source {name!r}, row {row['row']} of {source.files}: {error}") from error
    return {side: [pair[side] for pair in pairs] for side in pairs[0]} if pairs else {}


def _check_conversations(dataset: Dataset, name: str) -> None:
    """Refuse conversations without a prompt and an answer. The error names the first such row."""
    turns, row = dataset.data.column("conversations"), 0
    try:
        good = pc.greater_equal(pc.list_value_length(turns), 2).fill_null(False)
        if pc.all(good).as_py():
            for turn in (0, 1):
                good = pc.and_(good, _filled(pc.struct_field(pc.list_element(turns, turn), "value")))
        row = pc.index(good, False).as_py()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # the column holds no lists of turns with a text in "value"
        pass
    if row >= 0:
        raise ValueError(
            f"Source {name!r}, row {row} of {SOURCES[name].files}: column 'conversations' must hold a prompt and an "
            f"answer, each with a text in 'value', got {turns[row].as_py()}. Correct or remove the row."
        )


def _without_empty_sides(dataset: Dataset, name: str) -> Dataset:
    """`dataset` without the rows in which a side of the pair is empty. No image is read."""
    keep = np.ones(len(dataset), bool)
    for columns in SOURCES[name].filled:
        side = [_filled(dataset.data.column(column)) for column in columns]
        keep &= np.logical_or.reduce([column.to_numpy() for column in side])
    if not keep.any():
        raise ValueError(f"Source {name!r} has no rows with both sides of a pair in {SOURCES[name].files}.")
    if not keep.all():
        logger.warning(
            f"Source {name!r}: {(~keep).sum():,} of {len(keep):,} rows have an empty side and are left out."
        )
        dataset = dataset.select(np.flatnonzero(keep))
    return dataset


def _filled(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Which texts have content."""
    return pc.invert(pc.match_substring_regex(texts.cast(pa.string()).fill_null(""), NOTHING))
