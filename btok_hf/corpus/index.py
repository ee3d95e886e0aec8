"""A corpus as a LanceDB table: built from units, brought up to date, searched.

- One table, `items`, holds vectors, texts, thumbnails and metadata. Its schema names the model, so that a query is
  never embedded by another one.
- A run reads all units and writes the rows that changed, in chunks. Each write is a transaction: a killed run leaves
  whole rows, and the next one goes on.
- Small tables are searched exactly. Larger ones have an index of one bit per dimension (RaBitQ), whose best candidates
  are then compared by their stored vectors.
- Scores are cosines of the query and the stored vectors.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np

try:
    import pyarrow as pa
    from lancedb.index import FTS, BTree, IvfFlat, IvfRq
    from lancedb.query import MatchQuery
except ModuleNotFoundError as error:
    raise ImportError(f"The index needs the package {error.name}: pip install 'btok-hf[corpus]'.") from error

from btok_hf.corpus.conditions import named_condition, whole
from btok_hf.corpus.database import SETTINGS, TABLE, connect, find_table, lock
from btok_hf.corpus.stream import Changes, Held, RowStream, check_same_corpus, database_settings, wanted_ids
from btok_hf.corpus.units import read_units
from btok_hf.corpus.vectors import Precision, bits, check_dimensions, cut, load

# Columns with a meaning. All others are metadata of the user's table.
COLUMNS = ("id", "kind", "source", "page", "content_hash", "text", "thumbnail", "row_hash", "vector")

# Rows times dimensions above which vectors get an index. Exact search of 12.8 million numbers took 27 ms on one core
# (docs/corpus.md).
EXACT_NUMBERS = 16_000_000
# To find k hits, this many times k candidates are compared by their stored vectors.
REFINE = 10
MOST_HITS = 10**9  # LanceDB takes 64 bits
# At least so many rows of each ranking, by meaning and by words, are fused. A row far down in one ranking may be the
# best of both, and the first hits should not depend on how many are asked for.
FUSED = 1000
# Reciprocal rank fusion gives 1 / (RRF + place); 60 in its paper (Cormack, Clarke, Büttcher 2009).
RRF = 60
# Partitions of the index that a search reads.
PROBES = 40
# Old versions of the table are removed after this time. A search that takes longer could miss its files.
KEEP = timedelta(hours=1)


@dataclass(frozen=True)
class Hit:
    """An item that was found.

    Args:
        id (`str`): Its id, as in the units.
        score (`float`): Cosine of query and item; for a search by words alone, its BM25 score.
        kind (`str`): `text`, `image`, `video`, `page` or `mixed`.
        source (`str`, *optional*): Path relative to the corpus's input, or address.
        page (`int`, *optional*): Page number of a PDF or TIFF, from 1.
        text (`str`, *optional*): The text of the item.
        thumbnail (`bytes`, *optional*): A JPEG.
        metadata (`dict[str, Any]`): The other columns.
        content_hash (`str`, *optional*): Equal for equal content (`btok_hf.corpus.rows.hash_contents`).
    """

    id: str
    score: float
    kind: str
    source: str | None
    page: int | None
    text: str | None
    thumbnail: bytes | None
    metadata: dict[str, Any] = field(default_factory=dict)
    content_hash: str | None = None


class Index:
    """A table of items. Use `Index.open` or `Index.build`.

    Attributes:
        path (`str`): Folder or address of the database.
        settings (`dict[str, Any]`): What made the vectors: model, revision, prompt, dimensions, precision, input.
    """

    def __init__(self, path: str, table: Any) -> None:
        self.path, self._table = path, table
        self.settings: dict[str, Any] = json.loads(table.schema.metadata[SETTINGS])

    @classmethod
    def open(cls, path: str | Path) -> "Index":
        """Open a database to search it. Rows that are added later are seen within a second.

        Args:
            path (`str` or `Path`): Folder or address that `btok index` wrote.

        Raises:
            FileNotFoundError: There is no database of `btok index`.
        """
        table = find_table(str(path))
        if table is None:
            raise FileNotFoundError(f"{path} holds no database of btok index. Write one: btok index OUT --db {path}")
        return cls(str(path), table)

    @classmethod
    def build(
        cls,
        out: str | Path,
        path: str | Path,
        *,
        precision: Precision | None = None,
        dimensions: int | None = None,
        rebuild: bool = False,
    ) -> tuple["Index", Changes, np.ndarray]:
        """Write units into a database, or bring the database up to date: add, replace and delete rows.

        Args:
            out (`str` or `Path`): Folder or address that `btok embed` wrote.
            path (`str` or `Path`): Folder or address of the database; made if it does not exist.
            precision (`str`, *optional*): How vectors are stored: `float32` (default), `float16`, `binary`.
            dimensions (`int`, *optional*): Leading dimensions of each vector to keep. Default: all.
            rebuild (`bool`): Train the vector index again, also after small changes.

        Returns:
            `Index`: The database.
            `Changes`: What was added, replaced, deleted and left out.
            `np.ndarray`: Embeddings of up to 100 rows chosen at random, to measure recall with.

        Raises:
            RuntimeError: Another process is writing to the same folder.
            ValueError: Rows of another model than the database's, ids that are not unique, or no rows.
        """
        with lock(str(path)):  # before anything is read: rows that another run adds meanwhile would be deleted
            wanted, missing = wanted_ids(str(out))
            corpus, batches = read_units(str(out))
            table = find_table(str(path))
            if table is None:
                if dimensions is not None:
                    check_dimensions(corpus, dimensions)
                settings = database_settings(corpus, precision or "float32", dimensions)
            else:
                settings = cls(str(path), table).settings
                check_same_corpus(corpus, settings, str(path))
                for name, given in (("precision", precision), ("dimensions", dimensions)):
                    if given not in (None, settings[name]):
                        raise ValueError(
                            f"{path} stores vectors with {name} {settings[name]}, got {given}. Leave {name} out, or "
                            "write another database."
                        )
            stream = RowStream(batches, settings)
            if table is None:
                schema = stream.schema.with_metadata({SETTINGS: json.dumps(settings)})
                table = connect(str(path)).create_table(TABLE, schema=schema)
            table.checkout_latest()
            # Compared by `==`: maps that are equal have several hashes.
            there, now = ({column.name: column.type for column in schema} for schema in (table.schema, stream.schema))
            if differing := sorted(name for name in there | now if there.get(name) != now.get(name)):
                raise ValueError(
                    f"{path} has other columns than the units: {', '.join(differing)}. Write another database."
                )
            held = Held(table.search().select(["id", "row_hash"]).to_batches(), wanted)
            changes = Changes(missing=missing)
            for added, changed in stream.changes(held):
                # LanceDB holds all rows of a merge in memory, and those of an addition not.
                if len(changed):
                    table.merge_insert("id").when_matched_update_all().execute(changed)
                if len(added):
                    table.add(added)
                changes.added += len(added)
                changes.replaced += len(changed)
            index = cls(str(path), table)
            if not changes.missing:
                changes.deleted = index.delete(held.gone)
            changes.failed = stream.failed
            index._update_indexes(rebuild)
        return index, changes, stream.sample

    def _update_indexes(self, rebuild: bool) -> None:
        """Bring all indexes up to date. Rows that are not in them yet are found, but slowly."""
        have = {column: entry.name for entry in self._table.list_indices() for column in entry.columns}
        if "id" not in have:  # without it, `get`, and each chunk of rows to replace or delete, would read all ids
            self._table.create_index("id", config=BTree())
        if "text" not in have:
            # No stemming and no stop words, which belong to one language. ICU finds the words of all scripts.
            words = FTS(base_tokenizer="icu", stem=False, remove_stop_words=False)
            self._table.create_index("text", config=words)
        large = self.count() * self.settings["dimensions"] > EXACT_NUMBERS
        if "vector" in have:  # also rows of a run that was killed before it came here
            new = self._table.index_stats(have["vector"]).num_unindexed_rows
            rebuild = rebuild or new > self.count() // 2
        if large and (rebuild or "vector" not in have):
            binary = self.settings["precision"] == "binary"
            config = IvfFlat(distance_type="hamming") if binary else IvfRq(distance_type="cosine", num_bits=1)
            self._table.create_index("vector", config=config, replace=True)
        self._table.optimize(cleanup_older_than=KEEP)

    @property
    def exact(self) -> bool:
        """Whether a search compares the query with every row."""
        return all("vector" not in entry.columns for entry in self._table.list_indices())

    @property
    def lossless(self) -> bool:
        """Whether a search finds what an exact search of the embeddings in 32 bits does."""
        full = self.settings["dimensions"] == self.settings["embedding_dimensions"]
        return self.exact and full and self.settings["precision"] == "float32"

    def count(self, where: str | None = None) -> int:
        """The number of rows, or of those for which an SQL condition holds."""
        with self._named(where):
            return self._table.count_rows(None if where is None else whole(where))

    @property
    def written(self) -> float:
        """When rows were last written or optimized, in seconds since 1970."""
        return max(version["timestamp"].timestamp() for version in self._table.list_versions())

    @property
    def columns(self) -> list[str]:
        """The columns that people may want to use in a condition."""
        hidden = ("vector", "row_hash", "content_hash", "thumbnail")
        return [name for name in self._table.schema.names if name not in hidden]

    def get(self, key: str) -> tuple[Hit, np.ndarray]:
        """A row by its id.

        Args:
            key (`str`): The id.

        Returns:
            `Hit`: The row, with score 1.
            `np.ndarray`: Its vector, as `search` takes it: fp32, shape `(d,)`; numbers that are not stored are 0.

        Raises:
            ValueError: There is no such row.
        """
        quoted = key.replace("'", "''")
        found = self._table.search().where(f"id = '{quoted}'").limit(1).to_arrow()
        if not len(found):
            raise ValueError(f"There is no item {key!r} here (any more).")
        column = cast(pa.Array, found.column("vector").combine_chunks())
        vector = load(column, self.settings["dimensions"], self.settings["precision"])[0]
        return _hits(found, [1.0])[0], np.pad(vector, (0, self.settings["embedding_dimensions"] - len(vector)))

    def delete(self, ids: Iterable[str]) -> int:
        """Delete rows. The next `btok index` adds them again if they are still in the units.

        Args:
            ids (`Iterable[str]`): Ids of rows. Unknown ones are ignored.

        Returns:
            `int`: How many rows were deleted.
        """
        quoted, before = ["'" + key.replace("'", "''") + "'" for key in ids], self.count()
        for start in range(0, len(quoted), 1000):
            self._table.delete(f"id IN ({', '.join(quoted[start : start + 1000])})")
        return before - self.count()

    def search(
        self,
        vector: np.ndarray | Sequence[float] | None,
        text: str | None = None,
        k: int = 10,
        where: str | None = None,
        *,
        exact: bool = False,
    ) -> list[Hit]:
        """Find the nearest items.

        Args:
            vector (`np.ndarray`, *optional*): Embedding of the query, shape `(d,)`, with all dimensions of the model.
            text (`str`, *optional*): Words to search for in the items' texts. With a vector, both rankings are fused
                (reciprocal ranks); without one, only words count.
            k (`int`): Most hits to return.
            where (`str`, *optional*): SQL condition on the columns that hits fulfil, e.g. `kind = 'image'`.
            exact (`bool`): Compare with every row, also where there is an index.

        Returns:
            `list[Hit]`: Best first.

        Raises:
            ValueError: Neither vector nor text, `k` below 1 or above a billion, or a condition that is not one.
        """
        if vector is None and not (text and text.strip()):
            raise ValueError("The query is empty: give a text, an image or a video to search for.")
        if not 1 <= k <= MOST_HITS:
            raise ValueError(f"k is the number of hits and must be 1 to {MOST_HITS:,}, got {k}.")
        if vector is None:
            found = self._run(self._by_words(text), where, k)
            return _hits(found, found.column("_score").to_pylist())
        vector = self._as_query(vector)
        if text is None:
            binary = self.settings["precision"] == "binary"
            found = self._run(self._by_meaning(vector, REFINE, exact), where, k * REFINE if binary else k)
        else:
            found = self._fuse(lambda: (self._by_meaning(vector, 1, exact), self._by_words(text)), where, k)
        column = cast(pa.Array, found.column("vector").combine_chunks())
        scores = load(column, self.settings["dimensions"], self.settings["precision"]) @ vector
        if text is None:  # candidates by bits are ordered anew
            order = np.argsort(-scores, kind="stable")[:k]
            found, scores = found.take(order), scores[order]
        return _hits(found, scores.tolist())

    def _by_words(self, text: Any) -> Any:
        # A string in quotation marks would be a phrase, and there is no index of phrases.
        any_word = MatchQuery(text, "text")  # type: ignore[call-arg]  # the others have defaults
        return self._table.search(any_word, query_type="fts")

    def _by_meaning(self, vector: np.ndarray, refine: int, exact: bool) -> Any:
        binary = self.settings["precision"] == "binary"
        query = self._table.search(bits(vector) if binary else vector, vector_column_name="vector")
        query = query.distance_type("hamming" if binary else "cosine")
        if exact:
            return query.bypass_vector_index()
        # Without an index these do nothing. If few rows fulfil a condition, more partitions are searched for them.
        query = query.minimum_nprobes(PROBES).maximum_nprobes(0)
        return query if binary else query.refine_factor(refine)

    def _run(self, query: Any, where: str | None, limit: int) -> pa.Table:
        with self._named(where):
            return (query if where is None else query.where(whole(where))).limit(limit).to_arrow()

    def _fuse(self, rankings: Callable[[], Iterable[Any]], where: str | None, k: int) -> pa.Table:
        """The first `k` rows of rankings fused by reciprocal ranks. Rows are read when it is known which ones."""
        while True:
            points: dict[str, float] = defaultdict(float)
            rows: dict[str, int] = {}
            for query, score in zip(rankings(), ("_distance", "_score")):
                ranked = self._run(query.select(["id", score]).with_row_id(True), where, max(k * REFINE, FUSED))
                keys = ranked.column("id").to_pylist()
                rows |= zip(keys, ranked.column("_rowid").to_pylist())
                for place, key in enumerate(keys, 1):
                    points[key] += 1 / (RRF + place)
            first = sorted(points, key=lambda key: -points[key])[:k]
            found = self._table.take_row_ids([rows[key] for key in first]).to_arrow()
            places = {key: place for place, key in enumerate(found.column("id").to_pylist())}
            # Another process may have moved or deleted rows since they were ranked.
            if places.keys() == set(first):
                return found.take(np.array([places[key] for key in first], np.int64))

    def _named(self, where: str | None) -> AbstractContextManager[None]:
        return named_condition(
            where, [name for name in self._table.schema.names if name not in ("vector", "row_hash")]
        )

    def _as_query(self, vector: Any) -> np.ndarray:
        vector, full = np.asarray(vector, np.float32), self.settings["embedding_dimensions"]
        if vector.shape != (full,):
            raise ValueError(
                f"A query of this database has {full} dimensions, got shape {vector.shape}. Embed it with "
                f"{self.settings['model']}."
            )
        return cut(vector, self.settings["dimensions"])


def _hits(found: pa.Table, scores: Sequence[float]) -> list[Hit]:
    names = [name for name in found.column_names if name not in COLUMNS and not name.startswith("_")]
    shown = ("id", "kind", "source", "page", "text", "thumbnail", "content_hash")
    rows = found.select([*shown, *names]).to_pylist()
    return [
        Hit(**{name: row[name] for name in shown}, score=score, metadata={name: row[name] for name in names})
        for row, score in zip(rows, scores)
    ]
