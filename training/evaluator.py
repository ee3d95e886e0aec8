"""Retrieval metrics of pairs: every distinct query against every distinct positive."""

import bisect
import logging
import os
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from btok_hf.content import content_hash
from btok_hf.evaluation.metrics import ranking_keys
from btok_hf.training.cells import MEDIA_ROWS, TEXT_ROWS, StoredInputs, as_input, as_stored
from btok_hf.training.checks import check_columns, check_rows, group_hash
from btok_hf.training.data import load_pairs

logger = logging.getLogger(__name__)

SCORES_AT_ONCE = 2**23  # cosines of queries and candidates


def retrieval_evaluator(
    source: str | Path | Dataset, batch_size: int = 64, name: str | None = None
) -> InformationRetrievalEvaluator:
    """An `InformationRetrievalEvaluator` over a pair file: every distinct query against every distinct positive.

    Equal queries are one query with several right answers. The positives of a `group` are right answers of each of its
    queries. Equal positives (images: equal files) are one candidate. A query that is a candidate too, as in pairs of
    both directions, is not ranked against itself, unless a row has it as its own positive. Images stay encoded in
    memory.

    Args:
        source (`str`, `Path` or `Dataset`): As in `load_pairs`, or its result. The positive of a row whose `query` is
            null is a candidate only.
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
    themselves = set()  # queries that are their own positives
    dataset = as_stored(source if isinstance(source, Dataset) else load_pairs(source))
    check_columns(dataset.column_names)
    check_rows(dataset, "the pairs" if isinstance(source, Dataset) else str(source), required=("positive",))
    for row in cast(Any, dataset):
        query, positive = as_input(row["query"]), as_input(row["positive"])
        candidate = str(content_hash(positive))
        corpus.setdefault(candidate, positive)
        group = row.get("group")
        right = set() if group is None else groups.setdefault(group_hash(group), set())
        right.add(candidate)
        if query is not None:
            asked = str(content_hash(query))
            queries.setdefault(asked, query)
            answers.setdefault(asked, {})[id(right)] = right
            if asked == candidate:
                themselves.add(asked)
    if not queries:
        raise ValueError("The pairs have no row with a query: there is nothing to evaluate. Give them queries.")
    return PairEvaluator(
        queries,
        corpus,
        {asked: _answers(list(sets.values()), asked, asked in themselves) for asked, sets in answers.items()},
        name=name or ("pairs" if isinstance(source, Dataset) else Path(os.path.abspath(source)).stem),
        accuracy_at_k=[1, 10],
        precision_recall_at_k=[1, 10],
        mrr_at_k=[len(corpus)],
        ndcg_at_k=[10],
        map_at_k=[100],
        batch_size=batch_size,
        write_csv=False,
    )


def _answers(sets: list[set[str]], asked: str, itself: bool) -> Set[str]:
    """Right answers: the union of sets without the query, which its group may hold, unless it answers `itself`."""
    union = sets[0] if len(sets) == 1 else set[str]().union(*sets)
    return union if itself or asked not in union else _Others(union, asked)


class _Others(Set[str]):
    """A set without one of its elements, not copied: the queries of a large group share theirs."""

    def __init__(self, whole: set[str], one: str) -> None:
        self._whole, self._one = whole, one

    def __contains__(self, item: object) -> bool:
        return item != self._one and item in self._whole

    def __iter__(self) -> Iterator[str]:
        return (item for item in self._whole if item != self._one)

    def __len__(self) -> int:
        return len(self._whole) - 1


class PairEvaluator(InformationRetrievalEvaluator):
    """Ranks no query against itself, and takes MRR from the scores, for which the base class lists every candidate.

    Ids are hashes of contents, so a query and a candidate with the same id are the same input.
    """

    description = "Information Retrieval"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.queries, self.corpus = StoredInputs(self.queries), StoredInputs(self.corpus)

    def embed_inputs(self, model: Any, sentences: Any, *args: Any, **kwargs: Any) -> Any:
        """Embed inputs in parts: the images of a part are decoded, and the processes share a part."""
        size = TEXT_ROWS if all(isinstance(value, str) for value in list.__iter__(sentences)) else MEDIA_ROWS
        parts: list[Any] = []
        for start in range(0, len(sentences), size):
            parts.append(super().embed_inputs(model, sentences[start : start + size], *args, **kwargs))
        return torch.cat(parts)

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
            hits = _Hits([self.corpus_ids[index] for index in order])
            ranks: list[int] = []
            for start in range(0, len(queries), size):
                scores = similarity(queries[start : start + size], corpus_embeddings).float().cpu()[:, order]
                block = self.queries_ids[start : start + size]
                for row, asked in enumerate(block):
                    if asked in places and asked not in self.relevant_docs[asked]:
                        scores[row, places[asked]] = -torch.inf  # the query itself
                keys = ranking_keys(scores)
                nearest = keys.topk(depth).indices
                hits.add(nearest, scores.gather(1, nearest))
                for asked, own in zip(block, keys):
                    best = own[[places[answer] for answer in self.relevant_docs[asked]]].max()
                    ranks.append(1 + int((own > best).sum()))
            found[name] = self.compute_metrics(cast(Any, hits))
            found[name]["mrr@k"] = {
                k: sum(1 / rank for rank in ranks if rank <= k) / len(ranks) for k in self.mrr_at_k
            }
            logger.info(f"{len(queries):,} queries, {len(order):,} candidates, {name}:")
            self.output_scores(found[name])
        return found


class _Hits(Sequence[Any]):
    """What `compute_metrics` takes, a list of dicts for each query, which are made when they are asked for.

    All at once they would take many times the memory of their numbers.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._ends: list[int] = []

    def add(self, nearest: torch.Tensor, scores: torch.Tensor) -> None:
        """Positions of the nearest candidates and their scores, of shape `(queries, depth)`."""
        self._parts.append((nearest.int(), scores))
        self._ends.append(len(self) + len(nearest))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, query: Any) -> list[dict[str, Any]]:
        part = bisect.bisect_right(self._ends, query)
        nearest, scores = (rows[query - self._ends[part]].tolist() for rows in self._parts[part])
        return [{"corpus_id": self._names[at], "score": score} for at, score in zip(nearest, scores)]


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
