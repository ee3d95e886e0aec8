"""Pair files: load them, decode their cells, evaluate retrieval on them.

Columns and rows are checked in `checks.py`. Several datasets in one run are in `mixture.py`, the paper's data in
`sources.py`.
"""

import csv
import glob
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from datasets.fingerprint import Hasher
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from btok_hf.content import content_hash
from btok_hf.evaluation.metrics import ranking_keys
from btok_hf.inputs import is_cell
from btok_hf.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from btok_hf.training.checks import NOT_EMBEDDED, check_columns, check_rows, holds_json

logger = logging.getLogger(__name__)

MAX_PATH = 255  # characters: longer strings are texts
SCORES_AT_ONCE = 2**23  # cosines of queries and candidates, in an evaluation
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def load_pairs(source: str) -> Dataset:
    """Load pairs with the columns of `CondensationTrainer`.

    Args:
        source (`str`): A parquet, JSON-lines or CSV file, or the Hub id of a dataset with a `train` split. A column
            holds texts, images (as the `datasets` feature, or as file paths), or dicts of both. Relative paths start
            at the folder of the file; what does not lie there is looked for from the current folder.

    Returns:
        `datasets.Dataset`

    Raises:
        FileNotFoundError, ValueError: No such file, an unknown format, or wrong columns.
    """
    suffix = Path(source).suffix.lower()
    if suffix in FORMATS:
        if not Path(source).is_file():
            raise FileNotFoundError(
                f"Pair file {source!r} does not exist. Check the path; relative paths start at the current folder."
            )
        if Path(source).stat().st_size == 0:
            raise ValueError(f"Pair file {source!r} is empty.")
        with _named_file(source):
            dataset = _read_file(source, FORMATS[suffix])
        check_columns(dataset.column_names, source)
        with _named_file(source):
            return _with_own_paths(dataset, Path(source).resolve().parent)
    if Path(source).exists():
        raise ValueError(f"Pair file {source!r} has an unknown format. Use one of {', '.join(FORMATS)}.")
    dataset = load_dataset(source, split="train")
    check_columns(dataset.column_names, source)
    return dataset


@contextmanager
def _named_file(source: str) -> Iterator[None]:
    try:
        yield
    except (DatasetsError, ValueError, OSError, csv.Error) as error:
        raise ValueError(f"Pair file {source!r} cannot be read ({error.__cause__ or error}). Correct it.") from error


def _read_file(source: str, kind: str) -> Dataset:
    dataset = load_dataset(kind, data_files=glob.escape(str(source)), split="train", **_options(source))
    plain = _without_dates(dataset.features)
    if plain == dataset.features or kind != "json":
        return dataset
    # The JSON reader takes texts such as 2026-11-26 for dates.
    options = {"path": str(Path(source).resolve()), "modified": Path(source).stat().st_mtime_ns}
    return cast(Dataset, Dataset.from_generator(_json_rows, features=plain, gen_kwargs=options))


def _without_dates(feature: Any) -> Any:
    """A feature with texts in place of dates, which nothing else in pairs could be."""
    if isinstance(feature, datasets.Value) and feature.dtype.startswith(("timestamp", "date", "time")):
        return datasets.Value("string")
    if isinstance(feature, dict):
        return type(feature)({name: _without_dates(part) for name, part in feature.items()})
    return datasets.List(_without_dates(feature.feature)) if isinstance(feature, datasets.List) else feature


def _json_rows(path: str, modified: int) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines, or of one JSON list. `modified` makes a changed file another dataset."""
    with open(path, encoding="utf-8-sig") as file:
        start = file.read(1024).lstrip()
        file.seek(0)
        if start.startswith("["):
            yield from json.load(file)
        else:
            yield from (json.loads(line) for line in file if line.strip())


def _with_own_paths(dataset: Dataset, folder: Path) -> Dataset:
    """Pairs in which a relative path of a picture or video that lies beside the pair file is absolute."""
    columns = [
        name
        for name, feature in dataset.features.items()
        if name not in NOT_EMBEDDED and not isinstance(feature, (datasets.Image, datasets.Video))
    ]
    rows: Any = dataset.select_columns(columns)
    if not any(holds_json(dataset.features[name]) for name in columns):
        # Rows as Arrow stores them: no image is decoded.
        rows = (row for part in rows.with_format("arrow").iter(batch_size=1000) for row in part.to_pylist())
    found: list[str] = []
    for row in rows if columns else ():
        _resolve(row, folder, found)
    if not found:
        return dataset
    # What `datasets` makes of a file is cached. It would not notice files that come or go.
    fingerprint = Hasher.hash((dataset._fingerprint, str(folder), found, version("btok-hf")))
    options = {"folder": folder, "columns": columns}
    return dataset.map(_resolve_row, fn_kwargs=options, new_fingerprint=fingerprint, desc="Finding files")


def _resolve_row(row: dict[str, Any], folder: Path, columns: list[str]) -> dict[str, Any]:
    return {name: _resolve(row[name], folder, []) for name in columns}


def _resolve(value: Any, folder: Path, found: list[str]) -> Any:
    """A cell with absolute paths of the files that lie in `folder`. Their names are added to `found`."""
    if isinstance(value, str):
        named = len(value) < MAX_PATH and Path(value).suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES
        if not named or Path(value).is_absolute() or not (folder / value).is_file():
            return value
        found.append(value)
        return str(folder / value)
    if isinstance(value, list) and isinstance(next(filter(None, value), None), (str, dict)):  # no frames
        return [_resolve(part, folder, found) for part in value]
    if isinstance(value, dict) and value.get("bytes") is None:  # in a dict, text is never a path
        return {key: part if key == "text" else _resolve(part, folder, found) for key, part in value.items()}
    return value


def _options(source: str) -> dict[str, Any]:
    """How to read a file. In CSV every cell is a text, also `007`, `NA` and `null`; an empty one is no value."""
    if Path(source).suffix.lower() != ".csv":
        return {}
    limit = csv.field_size_limit(2**31 - 1)  # of a process; pandas, which reads the file, has none
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            columns = next(rows, [])
            if len(set(columns)) < len(columns):
                raise ValueError(f"its header names a column twice: {', '.join(columns)}")
            for row in rows:
                if len(row) > len(columns):  # pandas would take the first for the names of the rows
                    raise ValueError(
                        f"line {rows.line_num} has {len(row)} cells and the header {len(columns)}: texts with commas "
                        "need quotation marks"
                    )
    finally:
        csv.field_size_limit(limit)
    features = datasets.Features(dict.fromkeys(columns, datasets.Value("string")))
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def retrieval_evaluator(
    source: str | Dataset, batch_size: int = 64, name: str | None = None
) -> InformationRetrievalEvaluator:
    """An `InformationRetrievalEvaluator` over a pair file: every distinct query against every distinct positive.

    Equal queries are one query with several right answers. The positives of a `group` are right answers of each of its
    queries. Equal positives (images: equal pixels or files) are one candidate. A query that is a candidate too, as in
    pairs of both directions, is not ranked against itself.

    Args:
        source (`str` or `Dataset`): As in `load_pairs`, or its result. The positive of a row whose `query` is null is
            a candidate only.
        batch_size (`int`): Rows per forward.
        name (`str`, *optional*): Name of the metrics. Default: that of the file; of a dataset `pairs`.

    Returns:
        `InformationRetrievalEvaluator`: With accuracy, precision and recall at 1 and 10, nDCG@10, MAP@100, and MRR
        over all candidates.

    Raises:
        FileNotFoundError, ValueError: As in `load_pairs`; a row without a positive or with a file that does not exist;
            or no query.
    """
    queries: dict[str, Any] = {}
    corpus: dict[str, Any] = {}
    groups: dict[int, set[str]] = {}
    answers: dict[str, dict[int, set[str]]] = {}  # sets that grow with later rows, each once
    dataset = load_pairs(source) if isinstance(source, str) else source
    check_columns(dataset.column_names)
    check_rows(dataset, "the pairs" if isinstance(source, Dataset) else source, required=("positive",))
    for row in cast(Any, dataset):
        query, positive = decode_cell(row["query"]), decode_cell(row["positive"])
        candidate = str(content_hash(positive))
        corpus.setdefault(candidate, positive)
        group = row.get("group")
        right = set() if group is None else groups.setdefault(content_hash({"group": group}), set())
        right.add(candidate)
        if query is not None:
            asked = str(content_hash(query))
            queries.setdefault(asked, query)
            answers.setdefault(asked, {})[id(right)] = right
    if not queries:
        raise ValueError("The pairs have no row with a query: there is nothing to evaluate. Give them queries.")
    return PairEvaluator(
        queries,
        corpus,
        {asked: _union(list(parts.values())) for asked, parts in answers.items()},
        name=name or (Path(source).stem if isinstance(source, str) else "pairs"),
        accuracy_at_k=[1, 10],
        precision_recall_at_k=[1, 10],
        mrr_at_k=[len(corpus)],
        ndcg_at_k=[10],
        map_at_k=[100],
        batch_size=batch_size,
        write_csv=False,
    )


def _union(sets: list[set[str]]) -> set[str]:
    """One set is not copied: the queries of a large group share theirs."""
    return sets[0] if len(sets) == 1 else set().union(*sets)


class PairEvaluator(InformationRetrievalEvaluator):
    """Ranks no query against itself, and takes MRR from the scores, for which the base class lists every candidate.

    Ids are hashes of contents, so a query and a candidate with the same id are the same input.
    """

    description = "Information Retrieval"

    def compute_all_metrics(
        self, model: Any, corpus_model: Any = None, corpus_embeddings: Any = None, output_path: str | None = None
    ) -> dict[str, Any]:
        """Metrics by the name of the similarity. Of equally similar candidates, the first by its id ranks first."""
        queries: Any = self.embed_inputs(model, self.queries, encode_fn_name="query")
        if corpus_embeddings is None:
            corpus_embeddings = self.embed_inputs(corpus_model or model, self.corpus, encode_fn_name="document")
        order = sorted(range(len(self.corpus)), key=self.corpus_ids.__getitem__)
        places = {self.corpus_ids[index]: place for place, index in enumerate(order)}
        depth = min(max(self.map_at_k), len(order))
        size = max(1, SCORES_AT_ONCE // len(order))
        found = {}
        for name, similarity in (self.score_functions or {}).items():
            hits: list[object] = []
            ranks: list[int] = []
            for start in range(0, len(queries), size):
                scores = similarity(queries[start : start + size], corpus_embeddings).float().cpu()[:, order]
                block = self.queries_ids[start : start + size]
                for row, asked in enumerate(block):
                    if asked in places and asked not in self.relevant_docs[asked]:
                        scores[row, places[asked]] = -torch.inf  # the query itself
                keys = ranking_keys(scores)
                for asked, own, row, top in zip(block, keys, scores, keys.topk(depth).indices):
                    best = own[[places[answer] for answer in self.relevant_docs[asked]]].max()
                    ranks.append(1 + int((own > best).sum()))
                    listed = zip(top.tolist(), row[top].tolist())
                    hits.append([{"corpus_id": self.corpus_ids[order[at]], "score": score} for at, score in listed])
            found[name] = self.compute_metrics(hits)
            found[name]["mrr@k"] = {
                k: sum(1 / rank for rank in ranks if rank <= k) / len(ranks) for k in self.mrr_at_k
            }
            logger.info(f"{len(queries):,} queries, {len(order):,} candidates, {name}:")
            self.output_scores(found[name])
        return found


def metric_names(evaluator: InformationRetrievalEvaluator, model: SentenceTransformer) -> list[str]:
    """Names of the metrics that an evaluator of `retrieval_evaluator` gives for this model."""
    cutoffs = {
        "accuracy": evaluator.accuracy_at_k,
        "precision": evaluator.precision_recall_at_k,
        "recall": evaluator.precision_recall_at_k,
        "ndcg": evaluator.ndcg_at_k,
        "mrr": evaluator.mrr_at_k,
        "map": evaluator.map_at_k,
    }
    start = f"{evaluator.name}_{model.similarity_fn_name}"
    return [f"{start}_{metric}@{k}" for metric, ks in cutoffs.items() for k in ks]


def decode_cell(cell: Any) -> Any:
    """A cell of a dataset as an input.

    Arrow gives all dicts of a column the same keys; those with `None` or an empty list are dropped. Images inside
    dicts come encoded, as `bytes` and `path`, and frames as lists of numbers; they are decoded. Files of videos, and
    what cannot be decoded, stay as they are for `check_input`, which names an input in its errors.
    """
    if isinstance(cell, (list, tuple)):
        return [decode_cell(part) for part in cell]
    if not isinstance(cell, dict):
        return cell
    if is_cell(cell):
        try:
            return datasets.Image().decode_example(cell)
        except MemoryError:
            raise
        except Exception:  # decoders raise any type
            return cell
    if "array" in cell:  # a video
        frames = np.asarray(cell["array"])
        if frames.dtype.kind == "i" and frames.size and frames.min() >= 0 and frames.max() <= 255:
            frames = frames.astype(np.uint8)  # Python's integers, in an eighth of the memory
        return {**{key: part for key, part in cell.items() if part is not None}, "array": frames}
    return {
        key: part if key == "video" and _is_encoded(part) else decode_cell(part)
        for key, part in cell.items()
        if not (part is None or (isinstance(part, list) and not part))
    }


def _is_encoded(part: Any) -> bool:
    """Whether this is a file as `datasets` stores it, or a list of them."""
    parts = part if isinstance(part, list) else [part]
    return bool(parts) and all(isinstance(each, dict) and is_cell(each) for each in parts)
