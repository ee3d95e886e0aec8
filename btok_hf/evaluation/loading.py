"""Read a dataset of MMEB-V2 from disk: queries, candidates, and the paths of their media.

This file finds files and checks rows. What a row means is in `readers.py`, what a dataset is in `tasks.py`.
"""

import hashlib
import json
import logging
import os
import re
import reprlib
import sys
import zlib
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btok_hf.evaluation.readers import READERS, Pool, Row, query_text
from btok_hf.evaluation.tasks import MEDIA, TASKS, Media, Query, Task, TaskInfo, TaskInput, holds
from btok_hf.files import replacing
from btok_hf.media import read_image
from btok_hf.video import read_frames

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset

logger = logging.getLogger(__name__)

# Places below the root, in order of preference.
ROWS = {
    "image": (
        "image-query/{name}/{split}-*.parquet",
        "image-tasks/{name}/{split}-*.parquet",
        "MMEB_Test_Instruct/{name}/{split}-*.parquet",
    ),
    "video": ("video-tasks/data/{data}",),
    "visdoc": ("visdoc-tasks/data/{data}/{subset}/{split}-*.parquet",),
}
DOWNLOADS = {
    "image": "{repo} --repo-type dataset --local-dir {root}/image-query",
    "video": "TIGER-Lab/MMEB-V2 --repo-type dataset --include 'video-tasks/data/*' --local-dir {root}",
    "visdoc": "{repo} --repo-type dataset --local-dir {root}/visdoc-tasks/data/{data}",
}
SMALLEST_SIDE, ENLARGED = 28, (56, 56)


def read_input(item: TaskInput, num_frames: int | None = 8) -> dict[str, Any]:
    """Decode the media of an input. Called right before the input is encoded.

    Args:
        item (`TaskInput`): Input of a `Query` or a candidate.
        num_frames (`int`, *optional*): Frames of a video, evenly spaced (all of a shorter one); `None`: all.

    Returns:
        `dict[str, Any]`: What `encode` takes: `text`, `image` as RGB `PIL.Image.Image`, `video` as in `read_frames`.
        Images with a side under 28 pixels become 56 x 56, as in the original evaluation.

    Raises:
        FileNotFoundError, ValueError: Media that cannot be read; the message names the file.
    """
    decoded: dict[str, Any] = dict(item)
    if "image" in item:
        image = read_image(item["image"])
        decoded["image"] = image.resize(ENLARGED) if min(image.size) < SMALLEST_SIDE else image
    if "video" in item:
        decoded["video"] = read_frames(item["video"], num_frames)
    return decoded


def load_task(name: str, root: Path | str, limit: int | None = None) -> Task:
    """Read a dataset of MMEB-V2. Media are looked up, not decoded.

    Args:
        name (`str`): A key of `TASKS`.
        root (`str` or `Path`): Folder of the benchmark (see `btok_hf/evaluation/tasks.py`).
        limit (`int`, *optional*): Only this many queries, from the first, for a quick trial. Scores are then too high:
            except for pages and labels, candidates come from the queries' rows, so there are fewer of them too.

    Returns:
        `Task`: The dataset.

    Raises:
        FileNotFoundError: Rows or media are missing. The message says where they were looked for and what is there.
        ValueError: No such dataset, or a row that cannot be used; the message names it.
    """
    if name not in TASKS:
        raise ValueError(f"Unknown dataset {name!r}. Known are {', '.join(TASKS)}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be a number of queries above 0, got {limit}.")
    info, root = TASKS[name], Path(root)
    home = root / f"{info.modality}-tasks"
    if not home.is_dir():
        raise FileNotFoundError(
            f"{name}: there is no folder {home}; {holds(home)}. The root must be the folder of TIGER-Lab/MMEB-V2, "
            "with image-tasks, video-tasks and visdoc-tasks in it."
        )
    load = _load_pages if info.modality == "visdoc" else _load_rows
    queries, candidates = load(info, root, limit)
    return Task(info.name, info.modality, info.meta_task, info.metric, queries, candidates, info.num_frames)


def _load_rows(info: TaskInfo, root: Path, limit: int | None) -> tuple[list[Query], Pool]:
    """Queries and candidates of a dataset whose rows hold both."""
    records, where = _records(info, root, info.subset, info.columns.split())
    numbered = list(enumerate(records[: info.rows]))
    if info.layout == "moment_seeker":  # one release repeats rows: 1,800 instead of 1,602
        unique: dict[str, tuple[int, Row]] = {}
        for index, row in numbered:
            unique.setdefault(json.dumps(row, sort_keys=True), (index, row))
        numbered = list(unique.values())
    media = Media(info, root)
    pool: Pool = {}
    queries: list[Query] = []
    if info.layout == "video_classification":
        pool = {label: {"text": label} for label in _labels()[info.name]}
    for index, row in numbered[:limit]:
        try:
            _check_filled(info, row)
            item, names, right = READERS[info.layout](info, row, media, pool)
            _check_candidates(names, right, pool)
        except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            reason = f"no {error} in it" if isinstance(error, KeyError) else str(error)
            raise kind(f"{info.name}, row {index} of {where}: {reason}") from error
        # Interned to save memory: a name may be a candidate of a thousand queries.
        local = list(dict.fromkeys(map(sys.intern, names))) if info.scope == "local" else None
        queries.append(Query(str(index), item, local, dict.fromkeys(right, 1.0)))
    if info.layout == "video_classification" and (unknown := sorted(set(pool) - set(_labels()[info.name]))):
        logger.warning(
            f"{info.name}: its rows have {len(unknown)} classes that labels.json lacks ({reprlib.repr(unknown)}). "
            "They are candidates too, as in the original evaluation, but scores of other data are not comparable."
        )
    return _without_blanks(info, queries, pool)


def _check_filled(info: TaskInfo, row: Row) -> None:
    for column in info.columns.split():
        if row.get(column) is None and column not in ("qry_text", "input_frames"):
            raise ValueError(f"column {column!r} is empty")


def _check_candidates(names: list[str], right: list[str], pool: Pool) -> None:
    if not right:
        raise ValueError("it has no right candidate")
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"candidate {name!r} is not a text")
    for name in right:
        if name not in names:
            raise ValueError(f"the right candidate {name!r} is not among the candidates {names[:8]}")
        if _is_blank(pool[name]):
            raise ValueError("the right candidate is an empty text")


def _without_blanks(info: TaskInfo, queries: list[Query], pool: Pool) -> tuple[list[Query], Pool]:
    """Leave out candidates that are an empty text. (The original evaluation embeds their end token.)"""
    blank = {name for name, item in pool.items() if _is_blank(item)}
    if blank:
        queries = [
            query._replace(candidates=query.candidates and [n for n in query.candidates if n not in blank])
            for query in queries
        ]
        pool = {name: item for name, item in pool.items() if name not in blank}
        logger.warning(f"{info.name}: left out {len(blank)} candidates that are an empty text.")
    return queries, pool


def _is_blank(item: TaskInput) -> bool:
    return item.keys() == {"text"} and not item["text"].strip()


def _load_pages(info: TaskInfo, root: Path, limit: int | None) -> tuple[list[Query], Pool]:
    """Queries and candidates of a dataset with a corpus: tables of queries, pages and grades."""
    asked, where = _records(info, root, "queries", ["query-id", "query"])
    grades: dict[str, dict[str, float]] = {}
    qrels, qrels_place = _records(info, root, "qrels", ["query-id", "corpus-id", "score"])
    for index, row in enumerate(qrels):
        if not isinstance(row["score"], (int, float)):
            raise ValueError(f"{info.name}, row {index} of {qrels_place}: score {row['score']!r} is not a number")
        if row["score"] > 0:
            of_query, name = grades.setdefault(_id(row["query-id"]), {}), _id(row["corpus-id"])
            of_query[name] = max(of_query.get(name, 0.0), float(row["score"]))

    corpus, place = _rows(info, root, "corpus", ["corpus-id", "image"])
    folders = [root / pattern.format(media=media) for media in info.media.split("|") for pattern in MEDIA["visdoc"]]
    folder = next(filter(Path.is_dir, folders), folders[0])
    file_name = _hashed if info.layout == "hashed_pages" else "{}.png".format
    names = dict.fromkeys(map(_id, corpus.to_table(columns=["corpus-id"])["corpus-id"].to_pylist()))
    # Strings, because 100,000 Path objects take much memory.
    paths = {name: os.path.join(folder, file_name(name)) for name in names}
    absent = {name: path for name, path in paths.items() if not os.path.isfile(path)}
    if absent:
        _write_pages(info, corpus, place, folder, absent)
    pool: Pool = {name: {"image": path, "text": info.candidate_instruction} for name, path in paths.items()}

    queries = []
    for row in asked[:limit]:
        name = _id(row["query-id"])
        try:
            if name not in grades:
                raise ValueError("no page has a score above 0 in qrels")
            if unknown := [page for page in grades[name] if page not in pool]:
                raise ValueError(f"qrels name the page {unknown[0]!r}, which the corpus lacks")
            queries.append(Query(name, {"text": query_text(info.query_instruction, row["query"])}, None, grades[name]))
        except ValueError as error:
            raise ValueError(f"{info.name}, query-id {name} of {where}: {error}") from error
    return queries, pool


def _id(value: Any) -> str:
    """The id of a query or page as text. pandas writes whole numbers as 7.0 if one of the table's is missing."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _hashed(name: str) -> str:
    """File name of a VisRAG page. Names of pages are too long for some file systems."""
    base, suffix = os.path.splitext(name)
    return f"{base[:50]}_{hashlib.md5(name.encode()).hexdigest()[:8]}{suffix}"


def _write_pages(
    info: TaskInfo, corpus: "pyarrow.dataset.Dataset", place: str, folder: Path, absent: dict[str, str]
) -> None:
    """Write the pages that the folder of images lacks from the corpus, as the original evaluation does.

    Other processes may write the same pages now. So that a page replaced is the same file for `embeddings.py`, its
    time is a checksum of its content.
    """
    logger.warning(f"{info.name}: writing {len(absent)} pages of {place} to {folder}.")
    folder.mkdir(parents=True, exist_ok=True)
    for batch in corpus.to_batches(columns=["corpus-id", "image"], batch_size=16):
        for row in batch.to_pylist():
            path = absent.pop(_id(row["corpus-id"]), None)  # of two pages with one id, the first counts
            if path is None or os.path.isfile(path):  # by now
                continue
            if not row["image"] or not row["image"]["bytes"]:
                raise FileNotFoundError(
                    f"{info.name}: page {row['corpus-id']!r} is neither {path} nor in {place}. Unpack "
                    "visdoc-tasks.images.tar.gz in visdoc-tasks."
                )
            with replacing(Path(path)) as file:
                file.write(row["image"]["bytes"])
                file.flush()  # before the time is set
                seconds = zlib.crc32(row["image"]["bytes"]) % 2**30  # file systems hold times up to 2038, or later
                os.utime(file.name, (seconds, seconds))


@cache
def _labels() -> dict[str, list[str]]:
    """Classes of each dataset of video classification, sorted. All classes are candidates."""
    return json.loads(Path(__file__).with_name("labels.json").read_text(encoding="utf-8"))


def _records(info: TaskInfo, root: Path, subset: str, columns: list[str]) -> tuple[list[Row], str]:
    """The rows of a dataset, or of one of its tables, and the place that they are from."""
    files = _files(info, root, subset)
    subsets = subset.split()
    if files and files[0].suffix != ".parquet":
        if absent := sorted(set(subsets) - {file.stem for file in files} if len(subsets) > 1 else ()):
            raise FileNotFoundError(f"{info.name}: no {absent[0]}{files[0].suffix}; {holds(files[0].parent)}.")
        records = [{"subset": file.stem, **row} for file in files for row in _read_json(info, file)]
        where = str(files[0] if len(files) == 1 else files[0].parent)
        _check_columns(info, where, columns, records[0] if records else columns)
    else:
        records = []
        parts: list[str | None] = [*subsets] or [None]
        for part in parts:
            rows, where = _rows(info, root, part, columns)
            records += [{"subset": part, **row} for row in rows.to_table(columns=columns).to_pylist()]
    if not records:
        raise ValueError(f"{info.name}: {where} holds no rows. Download it again.")
    return records, where


def _rows(info: TaskInfo, root: Path, subset: str | None, columns: list[str]) -> tuple["pyarrow.dataset.Dataset", str]:
    """The parquet files below the root, or those of the Hub if there are none, and the place that they are from."""
    import pyarrow.dataset

    files = _files(info, root, subset)
    try:
        if files:
            where = str(files[0].parent)
            rows = pyarrow.dataset.dataset(list(map(str, files)), format="parquet")
            rows.count_rows()  # opens all of them
        else:
            where = f"{info.repo} on the Hub"
            rows = pyarrow.dataset.dataset(_from_hub(info, root, subset))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise ValueError(f"{info.name}: {where} cannot be read ({error}). Download it again.") from error
    _check_columns(info, where, columns, rows.schema.names)
    return rows, where


def _from_hub(info: TaskInfo, root: Path, subset: str | None) -> "pa.Table":
    """The rows of a repository, as a table in the cache of `datasets`."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    places = _places(info, root, subset)
    logger.warning(f"{info.name}: no {places[0]}; its rows are read from {info.repo} on the Hub.")
    try:
        return load_dataset(info.repo, subset, split=info.split).data.table
    except (OSError, ValueError, DatasetsError) as error:
        download = DOWNLOADS[info.modality].format(root=root, **info._asdict())
        raise FileNotFoundError(
            f"{info.name}: no rows. Looked for {', '.join(map(str, places))}; {holds(places[0])}. {info.repo} on the "
            f"Hub cannot be read ({error}). Get them where there is a network: hf download {download}"
        ) from error


def _files(info: TaskInfo, root: Path, subset: str | None) -> list[Path]:
    """The files of the first place that has any."""
    for place in _places(info, root, subset):
        if files := sorted(place.parent.glob(place.name)):
            _check_parts(info, files)
            return files
    return []


def _check_parts(info: TaskInfo, files: Sequence[Path]) -> None:
    """Refuse files named `…-00000-of-00002.parquet` if one of them is missing, or some are of another release."""
    named = [part for file in files if (part := re.search(r"-(\d+)-of-(\d+)\.parquet$", file.name))]
    if not named:
        return
    found, counts = {int(part[1]) for part in named}, {int(part[2]) for part in named}
    if len(counts) > 1 or len(named) < len(files) or found != set(range(max(counts))):
        raise ValueError(
            f"{info.name}: {files[0].parent} holds {', '.join(file.name for file in files)}, which are not all parts "
            "of one table and nothing else. Download them again into an empty folder."
        )


def _places(info: TaskInfo, root: Path, subset: str | None) -> list[Path]:
    names = [{**info._asdict(), "subset": subset, "data": data} for data in info.data.split("|")]
    return [root / pattern.format(**name) for pattern in ROWS[info.modality] for name in names]


def _read_json(info: TaskInfo, file: Path) -> list[Row]:
    """The rows of a JSON file, which holds a list, or of a JSON-lines file."""
    text = file.read_text(encoding="utf-8")
    parts = [text] if file.suffix == ".json" else text.split("\n")
    rows: list[Row] = []
    for number, part in enumerate(parts, 1):
        place = f"{info.name}: {file}, line {number}"
        try:
            read = json.loads(part) if part.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} cannot be read ({error}). Download it again.") from error
        read = read if isinstance(read, list) else [read]
        if wrong := [row for row in read if not isinstance(row, dict)]:
            raise ValueError(f"{place} is not a row: {reprlib.repr(wrong[0])}. Is this the format of {info.repo}?")
        rows += read
    return rows


def _check_columns(info: TaskInfo, where: str, columns: Sequence[str], found: Collection[str]) -> None:
    if absent := [column for column in columns if column not in found]:
        raise ValueError(
            f"{info.name}: {where} has no column {absent[0]!r}. It holds {', '.join(found)}. Is this the format of "
            f"{info.repo}?"
        )
