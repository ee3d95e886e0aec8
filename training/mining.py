"""Hard negatives for pairs of texts, images and videos, mined with a model.

The options and their meaning are those of `sentence_transformers.util.mine_hard_negatives`. That function is not used
underneath, because it compares inputs as strings and knows no groups. Here an input is known by its content, so that a
side can be anything that training takes, and what training would mask as a false negative is never mined.
"""

import logging
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value
from sentence_transformers import SentenceTransformer
from tqdm import tqdm, trange

from btok_hf.content import content_hash
from btok_hf.evaluation.metrics import check_embeddings
from btok_hf.files import check_writable, replacing
from btok_hf.training.cells import MEDIA_ROWS, TEXT_ROWS, as_input, as_stored, decode_cell
from btok_hf.training.checks import AS_DATASET, check_columns, check_rows, group_hash
from btok_hf.training.nearest import Excluded, faiss_search, torch_search

ROWS = 1024  # that are written at a time
BYTES = 2**28  # of negatives that are written at a time

logger = logging.getLogger(__name__)


@dataclass
class MiningReport:
    """What was mined and what was left out.

    Args:
        rows (`int`): Rows written.
        negatives (`Counter`): Number of rows by their number of negatives.
        left_out (`Counter`): Number of candidates by the reason that they are no negatives: `content` (the positive of
            the same query, or the query itself), `group`, `absolute_margin`, `relative_margin`, `max_score`,
            `min_score`. Of the first two, those count that are nearer than the last candidate considered.
        positive_scores, negative_scores (`list[float]`): Cosines of the pairs, and of queries and mined negatives.
    """

    rows: int = 0
    negatives: Counter[int] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    positive_scores: list[float] = field(default_factory=list)
    negative_scores: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.rows:,} rows with {sum(k * n for k, n in self.negatives.items()):,} negatives"]
        lines += [f"  {count:,} of them with {number}" for number, count in sorted(self.negatives.items())]
        for name, scores in (("positives", self.positive_scores), ("negatives", self.negative_scores)):
            if scores:
                cuts = " ".join(f"{value:.3f}" for value in np.percentile(scores, [0, 25, 50, 75, 100]))
                lines.append(f"  cosines of {name} (least, quartiles, most): {cuts}")
        lines += [f"  left out by {reason}: {count:,}" for reason, count in self.left_out.most_common()]
        return "\n".join(lines)


def mine_hard_negatives(
    pairs: Dataset,
    model: SentenceTransformer,
    output: str | Path,
    *,
    num_negatives: int = 3,
    range_min: int = 0,
    range_max: int | None = None,
    max_score: float | None = None,
    min_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    sampling_strategy: Literal["random", "top"] = "top",
    batch_size: int = 32,
    use_faiss: bool = False,
    faiss_batch_size: int = 1024,
    seed: int = 0,
) -> MiningReport:
    """Write pairs with a column `negatives`, which training takes, as a parquet file; with `group` also their groups.

    The candidates are the distinct positives of all rows. Rows whose query is null are candidates only and are not
    written. No negative of a row has the content of its query, of a positive of the same query, or of a positive of
    the same `group`. Memory: the embeddings of all distinct queries and positives in fp32, and the cosines of
    `faiss_batch_size` queries with all of them (without faiss).

    Args:
        pairs (`datasets.Dataset`): As from `load_pairs`, without a column `negatives`. A positive with several groups
            has the first of them in `negative_groups`.
        model (`SentenceTransformer`): The model to mine with. `encode_query` and `encode_document` embed the sides.
        output (`str` or `Path`): Parquet file to write. It appears when it is complete.
        num_negatives (`int`): Most negatives of a row. A row may have fewer.
        range_min (`int`): Number of nearest remaining candidates to skip.
        range_max (`int`, *optional*): Number of nearest candidates to consider. Default: `range_min + num_negatives`,
            ten times as many negatives with a margin or a bound or to draw from, and the most rows of a query.
        max_score, min_score (`float`, *optional*): Bounds of the cosine of query and negative.
        absolute_margin (`float`, *optional*): A negative's cosine is at least this much below the lowest of the
            query's positives.
        relative_margin (`float`, *optional*): The same, as a fraction of that positive's cosine. 0.05 is the
            recommendation of NV-Retriever (arXiv 2407.15831).
        sampling_strategy (`str`): `top` takes the nearest candidates, `random` draws from them.
        batch_size (`int`): As in `encode`.
        use_faiss (`bool`): Search with a flat index of faiss instead of torch. The results are equal, but for
            ties.
        faiss_batch_size (`int`): Queries searched at a time.
        seed (`int`): Seed of `random`.

    Returns:
        `MiningReport`

    Raises:
        ValueError: Options that do not fit, a column `negatives`, no pair, or a row that cannot be embedded; the
            message names it.
        ImportError: `use_faiss` without faiss.
    """
    check_output(output)
    _check_options(pairs, num_negatives, range_min, range_max, sampling_strategy, use_faiss)
    _check_bounds(max_score, min_score, absolute_margin, relative_margin)
    check_rows(pairs, "the pairs", required=("positive",))  # embedding takes hours
    sides = {name: _Side(pairs, name) for name in ("query", "positive")}
    if not sides["query"].rows:
        raise ValueError("The pairs have no row with a query. Give them queries, or another file.")
    if range_max is None:
        given = (max_score, min_score, absolute_margin, relative_margin)
        chosen_from = given != (None,) * 4 or sampling_strategy != "top"
        most_positives = max(map(len, sides["query"].rows))
        range_max = range_min + num_negatives * (10 if chosen_from else 1) + most_positives
    excluded = _FalseNegatives(pairs, sides["query"], sides["positive"])
    queries = sides["query"].embed(model.encode_query, batch_size)
    corpus = sides["positive"].embed(model.encode_document, batch_size)
    report, rng = MiningReport(), random.Random(seed)
    found: list[list[int]] = []
    search = (faiss_search if use_faiss else torch_search)(corpus)
    for start in trange(0, len(queries), faiss_batch_size, desc="Searching"):
        numbers = range(start, min(start + faiss_batch_size, len(queries)))
        answers = [excluded.of(number) for number in numbers]
        for number, nearest in zip(numbers, search(queries[numbers], answers, range_max)):
            report.left_out.update(nearest.left_out)
            kept = list(zip(nearest.scores, nearest.candidates))
            own = corpus[excluded.positives(number)] @ queries[number]
            lowest = float(own.min())
            bounds = {
                "absolute_margin": None if absolute_margin is None else lowest - absolute_margin,
                "relative_margin": None if relative_margin is None else lowest - abs(lowest) * relative_margin,
                "max_score": max_score,
            }
            for name, bound in bounds.items():
                if bound is not None:
                    report.left_out[name] += sum(score > bound for score, _ in kept)
                    kept = [pair for pair in kept if pair[0] <= bound]
            if min_score is not None:
                report.left_out["min_score"] += sum(score < min_score for score, _ in kept)
                kept = [pair for pair in kept if pair[0] >= min_score]
            kept = kept[range_min:]
            if sampling_strategy == "random":
                kept = sorted(rng.sample(kept, min(num_negatives, len(kept))), reverse=True)
            kept = kept[:num_negatives]
            report.positive_scores += own.tolist()
            report.negative_scores += [score for score, _ in kept]
            found.append([excluded.row_of(candidate) for _, candidate in kept])
    report.left_out = +report.left_out  # without zeros
    _write(pairs, Path(output), sides["query"], found, report)
    if not any(report.negatives):
        logger.warning("No row got a negative. Raise range_max, or loosen the margins and bounds.")
    return report


def check_output(output: str | Path) -> None:
    """Raise `ValueError` or `OSError` if mined pairs cannot be written to this file."""
    if Path(output).suffix != ".parquet":
        raise ValueError(
            f"Mined pairs are written as parquet, got {str(output)!r}. Name a file that ends in .parquet."
        )
    check_writable(Path(output).parent)


def _check_options(
    pairs: Dataset,
    num_negatives: int,
    range_min: int,
    range_max: int | None,
    sampling_strategy: str,
    use_faiss: bool,
) -> None:
    if not isinstance(pairs, Dataset):
        raise ValueError(f"The pairs must be a datasets.Dataset, got {type(pairs).__name__}. {AS_DATASET}")
    if pairs.format["type"] == "custom":
        raise ValueError(
            "The pairs have a transform, which would be lost: mined pairs are written as they are stored. Apply it "
            "first with dataset.map, or leave it out with with_format(None)."
        )
    if num_negatives < 1 or range_min < 0:
        raise ValueError(
            f"num_negatives must be 1 or more and range_min 0 or more, got {num_negatives} and {range_min}."
        )
    if range_max is not None and num_negatives > range_max - range_min:
        raise ValueError(
            f"{num_negatives} negatives do not fit between range_min={range_min} and range_max={range_max}. Lower "
            "num_negatives or range_min, or raise range_max."
        )
    if sampling_strategy not in ("top", "random"):
        raise ValueError(f"sampling_strategy must be 'top' or 'random', got {sampling_strategy!r}.")
    if mined := [column for column in ("negatives", "negative_groups") if column in pairs.column_names]:
        raise ValueError(
            f"The pairs already have {' and '.join(mined)}. Remove what was mined: dataset.remove_columns({mined})."
        )
    check_columns(pairs.column_names)
    if use_faiss:
        try:
            import faiss  # noqa: F401
        except ImportError as error:
            raise ImportError("use_faiss needs faiss: pip install faiss-cpu. Or leave use_faiss out.") from error


def _check_bounds(
    max_score: float | None, min_score: float | None, absolute_margin: float | None, relative_margin: float | None
) -> None:
    """Cosines are between -1 and 1, and margins are distances below a positive."""
    if not -1 <= (-1 if min_score is None else min_score) <= (1 if max_score is None else max_score) <= 1:
        raise ValueError(
            f"min_score and max_score are cosines, between -1 and 1 and the lower first, got {min_score} and "
            f"{max_score}. Correct them."
        )
    if absolute_margin is not None and not absolute_margin >= 0:
        raise ValueError(f"absolute_margin must be 0 or more, got {absolute_margin}. Use a distance between cosines.")
    if relative_margin is not None and not 0 <= relative_margin < 1:
        raise ValueError(
            f"relative_margin is a fraction, 0 or more and below 1, got {relative_margin}. 0.05 means 5 percent."
        )


class _Side:
    """The distinct inputs of a column.

    `numbers[row]` is the number of a row's input, -1 without one; `first[number]` is the first row that has it;
    `rows[number]` are all of them; `hashes[number]` is the hash of its content.
    """

    def __init__(self, pairs: Dataset, column: str) -> None:
        self.pairs, self.column = as_stored(pairs.select_columns([column])), column
        self.numbers = np.full(len(pairs), -1)
        self.first: list[int] = []
        self.rows: list[list[int]] = []
        self.hashes: list[int] = []
        known: dict[int, int] = {}
        for row in trange(len(pairs), desc=f"Reading {column}"):
            value = as_input(self.pairs[row][column])
            if value is None:
                continue
            content = content_hash(value)
            number = known.setdefault(content, len(known))
            if number == len(self.first):
                self.first.append(row)
                self.rows.append([])
                self.hashes.append(content)
            self.rows[number].append(row)
            self.numbers[row] = number

    def embed(self, encode: Any, batch_size: int) -> np.ndarray:
        """Unit vectors of the distinct inputs, fp32 of shape `(inputs, hidden)`."""
        parts = []
        size = TEXT_ROWS if isinstance(self.pairs[self.first[0]][self.column], str) else MEDIA_ROWS
        for start in tqdm(range(0, len(self.first), size), desc=f"Embedding {self.column}"):
            rows = self.first[start : start + size]
            inputs = [decode_cell(self.pairs[row][self.column]) for row in rows]
            try:
                vectors = encode(inputs, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
                parts.append(check_embeddings(vectors, [f"row {row}" for row in rows]))
            except ValueError as error:
                found = re.match(r"Input (\d+)", str(error))  # counted by `encode`
                if found is None:
                    raise
                row, rest = rows[int(found[1])], str(error)[found.end() :]
                raise ValueError(f"Row {row} of the pairs, its {self.column}{rest}") from error
        return np.concatenate(parts)


class _FalseNegatives:
    """Which candidates answer a query, as training decides it: by content or by group."""

    def __init__(self, pairs: Dataset, queries: _Side, candidates: _Side) -> None:
        self._queries, self._candidates = queries, candidates
        self._number = {content: number for number, content in enumerate(candidates.hashes)}
        # As stored, because formats may have NaN where there is no group.
        groups = as_stored(pairs)["group"] if "group" in pairs.column_names else [None] * len(pairs)
        self._groups = [None if group is None else group_hash(group) for group in groups]
        of_group: dict[int, set[int]] = defaultdict(set)
        for row, group in enumerate(self._groups):
            if group is not None and candidates.numbers[row] >= 0:
                of_group[group].add(int(candidates.numbers[row]))
        self._of_group = {group: np.fromiter(numbers, np.int64) for group, numbers in of_group.items()}

    def positives(self, query: int) -> list[int]:
        """The distinct positives of a query."""
        return list(dict.fromkeys(int(self._candidates.numbers[row]) for row in self._queries.rows[query]))

    def row_of(self, candidate: int) -> int:
        """The first row with this positive that has a group, or the first of all."""
        rows = self._candidates.rows[candidate]
        return next((row for row in rows if self._groups[row] is not None), rows[0])

    def of(self, query: int) -> Excluded:
        """Numbers of candidates by reason. The queries of a group share its array."""
        own = self._number.get(self._queries.hashes[query])
        content = dict.fromkeys(self.positives(query) + ([] if own is None else [own]))
        groups = dict.fromkeys(self._groups[row] for row in self._queries.rows[query])
        of_groups = [("group", self._of_group[group]) for group in groups if group is not None]
        return [("content", np.fromiter(content, np.int64)), *of_groups]


def _write(pairs: Dataset, output: Path, queries: _Side, found: Sequence[list[int]], report: MiningReport) -> None:
    """Write the rows that have a query, with the positives of other rows as their negatives."""
    sources = {"negatives": "positive", "negative_groups": "group"}  # the columns that lists are taken from
    # A column of nulls alone has no type that Arrow could make lists of.
    sources = {name: of for name, of in sources.items() if pairs.features.get(of) not in (None, Value("null"))}
    features = Features({**pairs.features, **{name: List(pairs.features[of]) for name, of in sources.items()}})
    schema = features.arrow_schema
    # Rows and negatives are taken from Arrow, so that media stay as they are stored.
    table = pairs.with_format("arrow")
    rows = [row for row in range(len(pairs)) if queries.numbers[row] >= 0]
    with replacing(output) as file, pq.ParquetWriter(file, schema) as writer:
        parts = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)][::-1]
        while parts:
            part = parts.pop()
            negatives = [found[queries.numbers[row]] for row in part]
            flat = [index for each in negatives for index in each]
            taken = table.select(flat)[:] if flat else table.select([0])[:].slice(0, 0)
            if taken.nbytes > BYTES and len(part) > 1:  # an array of Arrow holds 2 GiB
                parts += [part[len(part) // 2 :], part[: len(part) // 2]]
                continue
            report.rows += len(part)
            report.negatives.update(map(len, negatives))
            offsets = pa.array(np.cumsum([0, *map(len, negatives)]), pa.int32())
            own = table.select(part)[:]
            for name, source in sources.items():
                own = own.append_column(name, pa.ListArray.from_arrays(offsets, _one_array(taken[source])))
            writer.write_table(own.cast(schema))


def _one_array(values: Any) -> pa.Array:
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
