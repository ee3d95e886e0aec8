"""Read a dataset of MMEB-V2 from disk: its rows as queries and candidates, and where their media are."""

import hashlib
import json
import logging
import os
import reprlib
import sys
from functools import cache
from pathlib import Path

from btok_hf.evaluation.readers import READERS, query_text
from btok_hf.evaluation.tasks import TASKS, Query, Task
from btok_hf.media import read_frames, read_image

logger = logging.getLogger(__name__)

# Below the root, in order of preference.
ROWS = {
    "image": (
        "image-query/{name}/{split}-*.parquet",
        "image-tasks/{name}/{split}-*.parquet",
        "MMEB_Test_Instruct/{name}/{split}-*.parquet",
    ),
    "video": ("video-tasks/data/{data}",),
    "visdoc": ("visdoc-tasks/data/{data}/{subset}/{split}-*.parquet",),
}
MEDIA = {
    "image": ("image-tasks/MMEB", "image-tasks", "image-tasks/mmeb_v1/MMEB"),
    "video": (
        "video-tasks/frames/{level}/{media}",
        "video-tasks/frames/{media}",
        "video-tasks/frames/{level}/{level}/{media}",
        "video-tasks/frames/{level}/data/ziyan/video_retrieval/{media}/frames",
        "video-tasks/frames/data/ziyan/video_retrieval/{media}/frames",
    ),
    "visdoc": ("visdoc-tasks/images/{media}", "visdoc-tasks/{media}"),
}
DOWNLOADS = {
    "image": "{repo} --repo-type dataset --local-dir {root}/image-query",
    "video": "TIGER-Lab/MMEB-V2 --repo-type dataset --include 'video-tasks/data/*' --local-dir {root}",
    "visdoc": "{repo} --repo-type dataset --local-dir {root}/visdoc-tasks/data/{data}",
}
SMALLEST_SIDE, ENLARGED = 28, (56, 56)


def read_input(item, num_frames=8):
    """Decode the media of an input, right before it is encoded.

    Args:
        item (`dict`): Input of a `Query` or a candidate.
        num_frames (`int`, *optional*): Frames of a video, evenly spaced (all of a shorter one); `None`: all.

    Returns:
        `dict`: What `encode` takes: `text`, `image` as RGB `PIL.Image.Image`, `video` as in `read_frames`. Images with
        a side under 28 pixels become 56 x 56, as in the original.

    Raises:
        FileNotFoundError, ValueError: Media that cannot be read; the message names the file.
    """
    item = dict(item)
    if "image" in item:
        item["image"] = read_image(item["image"])
        if min(item["image"].size) < SMALLEST_SIDE:
            item["image"] = item["image"].resize(ENLARGED)
    if "video" in item:
        item["video"] = read_frames(item["video"], num_frames)
    return item


def load_task(name, root, limit=None):
    """Read a dataset of MMEB-V2: its rows, and where its media are, without decoding them.

    Args:
        name (`str`): A key of `TASKS`.
        root (`str` or `Path`): Folder of the benchmark (see the module's top).
        limit (`int`, *optional*): Only the first queries, to try things out. Candidates that are their own or their
            right ones (all but pages and labels) are fewer with them, so scores are too good.

    Returns:
        `Task`

    Raises:
        FileNotFoundError: No rows, or media that a row names; says what was looked for and what is there.
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
            f"{name}: there is no folder {home}; {_holds(home)}. The root is the folder of TIGER-Lab/MMEB-V2, with "
            "image-tasks, video-tasks and visdoc-tasks in it."
        )
    load = _load_pages if info.modality == "visdoc" else _load_rows
    queries, candidates = load(info, root, limit)
    return Task(info.name, info.modality, info.meta_task, info.metric, queries, candidates, info.num_frames)


def _load_rows(info, root, limit):
    """Queries and candidates of a dataset whose rows hold both."""
    records, where = _records(info, root, info.subset, info.columns.split())
    numbered = enumerate(records[: info.rows])
    if info.layout == "moment_seeker":  # one release repeats rows: 1,800 for 1,602
        unique = {}
        for index, row in numbered:
            unique.setdefault(json.dumps(row, sort_keys=True), (index, row))
        numbered = unique.values()
    media, pool, queries = _Media(info, root), {}, []
    if info.layout == "video_classification":
        pool = {label: {"text": label} for label in _labels()[info.name]}
    for index, row in list(numbered)[:limit]:
        try:
            _check_filled(info, row)
            item, names, right = READERS[info.layout](info, row, media, pool)
            _check_candidates(names, right, pool)
        except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            reason = f"no {error} in it" if isinstance(error, KeyError) else error
            raise kind(f"{info.name}, row {index} of {where}: {reason}") from error
        # Interned: a name is often a candidate of a thousand queries.
        local = list(dict.fromkeys(map(sys.intern, names))) if info.scope == "local" else None
        queries.append(Query(str(index), item, local, dict.fromkeys(right, 1.0)))
    return _without_blanks(info, queries, pool)


def _check_filled(info, row):
    for column in info.columns.split():
        if row.get(column) is None and column not in ("qry_text", "input_frames"):
            raise ValueError(f"column {column!r} is empty")


def _check_candidates(names, right, pool):
    if not right:
        raise ValueError("it has no right candidate")
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"candidate {name!r} is no text")
    for name in right:
        if name not in names:
            raise ValueError(f"the right candidate {name!r} is not among the candidates {names[:8]}")
        if _is_blank(pool[name]):
            raise ValueError("the right candidate is an empty text")


def _without_blanks(info, queries, pool):
    """Leave out candidates that are an empty text, which nothing can embed (the original embeds its end token)."""
    blank = {name for name, item in pool.items() if _is_blank(item)}
    if blank:
        queries = [query._replace(candidates=[n for n in query.candidates if n not in blank]) for query in queries]
        pool = {name: item for name, item in pool.items() if name not in blank}
        logger.warning(f"{info.name}: left out {len(blank)} candidates that are an empty text.")
    return queries, pool


def _is_blank(item):
    return item.keys() == {"text"} and not item["text"].strip()


def _load_pages(info, root, limit):
    """Queries and candidates of a dataset with a corpus: tables of queries, pages and grades."""
    asked, where = _records(info, root, "queries", ["query-id", "query"])
    grades = {}
    qrels, qrels_place = _records(info, root, "qrels", ["query-id", "corpus-id", "score"])
    for index, row in enumerate(qrels):
        if not isinstance(row["score"], (int, float)):
            raise ValueError(f"{info.name}, row {index} of {qrels_place}: score {row['score']!r} is no number")
        if row["score"] > 0:
            of_query, name = grades.setdefault(str(row["query-id"]), {}), str(row["corpus-id"])
            of_query[name] = max(of_query.get(name, 0.0), float(row["score"]))

    corpus, place = _rows(info, root, "corpus", ["corpus-id", "image"])
    folders = [root / pattern.format(media=media) for media in info.media.split("|") for pattern in MEDIA["visdoc"]]
    folder = next(filter(Path.is_dir, folders), folders[0])
    file_name = _hashed if info.layout == "hashed_pages" else "{}.png".format
    names = dict.fromkeys(map(str, corpus.to_table(columns=["corpus-id"])["corpus-id"].to_pylist()))
    # Texts, because objects of 10⁵ paths are large.
    paths = {name: os.path.join(folder, file_name(name)) for name in names}
    absent = {name: path for name, path in paths.items() if not os.path.isfile(path)}
    if absent:
        _write_pages(info, corpus, place, folder, absent)
    pool = {name: {"image": path, "text": info.candidate_instruction} for name, path in paths.items()}

    queries = []
    for row in asked[:limit]:
        name = str(row["query-id"])
        try:
            if name not in grades:
                raise ValueError("no page has a score above 0 in qrels")
            if unknown := [page for page in grades[name] if page not in pool]:
                raise ValueError(f"qrels name the page {unknown[0]!r}, which the corpus lacks")
            queries.append(Query(name, {"text": query_text(info.query_instruction, row["query"])}, None, grades[name]))
        except ValueError as error:
            raise ValueError(f"{info.name}, query-id {name} of {where}: {error}") from error
    return queries, pool


def _hashed(name):
    """The file of a VisRAG page: names are too long for some file systems."""
    base, suffix = os.path.splitext(name)
    return f"{base[:50]}_{hashlib.md5(name.encode()).hexdigest()[:8]}{suffix}"


def _write_pages(info, corpus, place, folder, absent):
    """Write the pages that are not in the folder of images from the corpus, as the original does."""
    logger.warning(f"{info.name}: writing {len(absent)} pages of {place} to {folder}.")
    folder.mkdir(parents=True, exist_ok=True)
    for batch in corpus.to_batches(columns=["corpus-id", "image"], batch_size=16):
        for row in batch.to_pylist():
            path = absent.pop(str(row["corpus-id"]), None)  # of two pages with one id the first counts
            if path is None:
                continue
            if not row["image"] or not row["image"]["bytes"]:
                raise FileNotFoundError(
                    f"{info.name}: page {row['corpus-id']!r} is neither {path} nor in {place}. Unpack "
                    "visdoc-tasks.images.tar.gz in visdoc-tasks."
                )
            part = Path(f"{path}.{os.getpid()}")  # never half a page under its name
            part.write_bytes(row["image"]["bytes"])
            part.replace(path)


class _Media:
    """Images and folders of frames of a dataset, below the first of its folders that holds what is asked for first."""

    def __init__(self, info, root):
        level = f"video_{info.meta_task[2:].lower()}"
        names = [(pattern, media) for pattern in MEDIA[info.modality] for media in info.media.split("|")]
        self.folders = [root / pattern.format(level=level, media=media) for pattern, media in names]
        self.found = {}

    def image(self, path):
        return self._find(path, Path.is_file)

    def frames(self, path):
        return self._find(path, lambda folder: folder.is_dir() and any(folder.iterdir()))

    def _find(self, path, exists):
        path = str(path)
        if path not in self.found:
            folder = next((folder for folder in self.folders if path and exists(folder / path)), None)
            if folder is None:
                looked = ", ".join(str(folder / path) for folder in self.folders)
                raise FileNotFoundError(
                    f"{path!r} is not there, or empty. Looked for {looked}; {_holds(self.folders[0] / path)}. Unpack "
                    "the archives of TIGER-Lab/MMEB-V2: see btok_hf/evaluation/tasks.py."
                )
            self.folders = [folder]
            self.found[path] = str(folder / path)
        return self.found[path]


def _holds(path):
    """The nearest folder above a path that exists, and what is in it."""
    while not path.is_dir():
        path = path.parent
    names = sorted(entry.name for entry in path.iterdir())
    return f"{path} holds {', '.join(names[:8]) or 'nothing'}{', …' if names[8:] else ''}"


@cache
def _labels():
    """Classes of the datasets of video classification, sorted: all of them are candidates."""
    return json.loads(Path(__file__).with_name("labels.json").read_text(encoding="utf-8"))


def _records(info, root, subset, columns):
    """The rows of a dataset, or of one of its tables, as dicts, and where they are from."""
    files = _files(info, root, subset)
    subsets = subset.split()
    if files and files[0].suffix != ".parquet":
        if absent := sorted(set(subsets) - {file.stem for file in files} if len(subsets) > 1 else ()):
            raise FileNotFoundError(f"{info.name}: no {absent[0]}{files[0].suffix}; {_holds(files[0].parent)}.")
        records = [{"subset": file.stem, **row} for file in files for row in _read_json(info, file)]
        where = str(files[0] if len(files) == 1 else files[0].parent)
        _check_columns(info, where, columns, records[0] if records else columns)
    else:
        records = []
        for part in subsets or [None]:
            rows, where = _rows(info, root, part, columns)
            records += [{"subset": part, **row} for row in rows.to_table(columns=columns).to_pylist()]
    if not records:
        raise ValueError(f"{info.name}: {where} holds no rows. Download it again.")
    return records, where


def _rows(info, root, subset, columns):
    """The parquet files below the root, or else those of the Hub, as a `pyarrow.dataset.Dataset`."""
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


def _from_hub(info, root, subset):
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
            f"{info.name}: no rows. Looked for {', '.join(map(str, places))}; {_holds(places[0])}. {info.repo} on the "
            f"Hub cannot be read ({error}). Get them where there is a network: hf download {download}"
        ) from error


def _files(info, root, subset):
    """The files of the first place that has any."""
    return next(filter(None, (sorted(place.parent.glob(place.name)) for place in _places(info, root, subset))), [])


def _places(info, root, subset):
    names = [{**info._asdict(), "subset": subset, "data": data} for data in info.data.split("|")]
    return [root / pattern.format(**name) for pattern in ROWS[info.modality] for name in names]


def _read_json(info, file):
    """The rows of a JSON file, a list, or of one with a row per line."""
    text = file.read_text(encoding="utf-8")
    parts = [text] if file.suffix == ".json" else text.split("\n")
    rows = []
    for number, part in enumerate(parts, 1):
        place = f"{info.name}: {file}, line {number}"
        try:
            read = json.loads(part) if part.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} cannot be read ({error}). Download it again.") from error
        read = read if isinstance(read, list) else [read]
        if wrong := [row for row in read if not isinstance(row, dict)]:
            raise ValueError(f"{place} is no row but {reprlib.repr(wrong[0])}. Is this the format of {info.repo}?")
        rows += read
    return rows


def _check_columns(info, where, columns, found):
    if absent := [column for column in columns if column not in found]:
        raise ValueError(
            f"{info.name}: {where} has no column {absent[0]!r}. It holds {', '.join(found)}. Is this the format of "
            f"{info.repo}?"
        )
