"""Embed units: threads read and decode ahead of the model, and each unit is written when all its rows are done."""

import io
import logging
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from btok_hf.arguments import named_source
from btok_hf.corpus.job import Job
from btok_hf.corpus.listing import Unit
from btok_hf.corpus.rows import Known, Reading, Row, pages, prepare
from btok_hf.corpus.units import Corpus, embedded, unit_schema
from btok_hf.inputs import shown
from btok_hf.model_info import identify
from btok_hf.sentence_transformer import BTokSentenceTransformer

logger = logging.getLogger(__name__)

# The most that is decoded for one call of the model. As much again is decoded while the model runs.
CHUNK_ROWS, CHUNK_BYTES = 256, 128 * 2**20
# Embeddings and thumbnails of content that may come again.
KNOWN_BYTES = 128 * 2**20

Report = Callable[[Unit, int, bool], None]


class Counts(NamedTuple):
    """What became of rows.

    Args:
        rows (`int`): Rows that were written, failed ones included.
        failed (`int`): Failed rows.
        reused (`int`): Rows whose content was embedded before, in this process.
    """

    rows: int = 0
    failed: int = 0
    reused: int = 0

    def plus(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(self, other)))


class Embedder:
    """A loaded model that embeds units of a job.

    Args:
        job (`Job`): The job.

    Raises:
        ValueError: The model is another one than when the run was planned.
    """

    def __init__(self, job: Job) -> None:
        options = job.options
        self.job, self.source, self.corpus = job, job.source(), Corpus(job.out)
        self.schema = unit_schema(job.dimensions, job.metadata)
        with named_source(options.model):
            here = identify(options.model, options.revision)[0]
            if here != job.revision:  # on another machine, or changed since
                raise ValueError(
                    f"the model here is {here}, and this run embeds with {job.revision}. Give every machine the same "
                    "folder, and change none while a run uses it"
                )
            self.model = BTokSentenceTransformer(
                options.model,
                revision=options.revision,
                device=options.device,
                max_seq_length=options.max_seq_length,
                model_kwargs={"dtype": options.dtype},
                processor_kwargs={"max_pixels": options.max_pixels} if options.max_pixels else {},
            )
        self.known = _Memory(KNOWN_BYTES)
        # Whether these weights have given a finite embedding before. If so, a chunk without any fails by its rows; if
        # not, the weights may be broken, and the run ends.
        self._sound = bool(self.corpus.written())
        pixels = self.model.transformer.image_limits.max_pixels
        self.reading = Reading(pixels, options.thumbnail_pixels, self.known.get)

    def embed(self, units: Iterable[Unit], report: Report = lambda unit, rows, done: None) -> Counts:
        """Embed and write units. Those that another process wrote meanwhile are left out.

        Args:
            units (`Iterable[Unit]`): Units of the job.
            report (`Callable`): Called with a unit, its rows that were embedded since the last call, and whether it is
                written. Units that are left out have none.

        Returns:
            `Counts`

        Raises:
            Exception: An error that no row causes, such as too little memory or a full disk. Written units stay.
        """
        counts, writer = Counts(), _Writer(self.schema)
        for unit, rows, last in _ahead(self._chunks(units)):
            if rows is not None:
                of_chunk = self._embed_rows(rows)
                writer.add(rows)
                counts = counts.plus(of_chunk)
                if last:
                    self._write(unit, *writer.finish())
            report(unit, len(rows or ()), last)
        return counts

    def _write(self, unit: Unit, table: bytes, errors: Mapping[str, str]) -> None:
        """Write a unit, unless it is embedded again and rows fail that did not before."""
        if unit.name in self.job.again:
            lost = self.corpus.embedded(unit.name) - embedded(io.BytesIO(table))
            if lost:
                logger.warning(
                    f"{len(lost)} rows fail now and did not before, the first {min(lost)!r}: {errors.get(min(lost))}. "
                    "Their unit stays as it was."
                )
                return
        self.corpus.write(unit.name, table, errors)

    def _chunks(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, list[Row] | None, bool]]:
        """Units as lists of prepared rows; `True` with the last of a unit, `None` for one that is written already."""
        with ThreadPoolExecutor(self.job.options.threads) as pool:
            for unit in units:
                if unit.name not in self.job.again and self.corpus.has(unit.name):
                    yield unit, None, True
                    continue
                chunk: list[Row] = []
                size = 0
                for row in self._rows(unit, pool):
                    if chunk and (len(chunk) == CHUNK_ROWS or size + row.size > CHUNK_BYTES):
                        yield unit, chunk, False
                        chunk, size = [], 0
                    chunk.append(row)
                    size += row.size
                yield unit, chunk, True

    def _rows(self, unit: Unit, pool: ThreadPoolExecutor) -> Iterator[Row]:
        """The prepared rows of a unit, in order. Threads work a few rows ahead, fewer if rows are large."""
        window: deque[Future[Row]] = deque()
        for row in self.source.rows(unit):
            window.append(pool.submit(prepare, row, self.reading))
            while len(window) > 2 * self.job.options.threads or self._held(window) > CHUNK_BYTES:
                yield from self._pages(window.popleft().result())
        while window:
            yield from self._pages(window.popleft().result())

    def _held(self, window: Iterable[Future[Row]]) -> int:
        """Bytes of the rows that are ready. Those that are being read are not counted: one a thread."""
        return sum(future.result().size for future in window if future.done() and future.exception() is None)

    def _pages(self, row: Row) -> Iterator[Row]:
        """A row; of a PDF or TIFF its pages, which are drawn here, because PDFium runs in one thread only."""
        if not row.parts or row.error is not None:
            yield row
            return
        with closing(pages(row)) as drawn:
            for page in drawn:
                yield prepare(page, self.reading)

    def _embed_rows(self, rows: list[Row]) -> Counts:
        """Set the embedding, or the error, of each row."""
        reused = 0
        new: dict[str, list[Row]] = {}
        for row in rows:
            if row.error is not None:
                continue
            assert row.content_hash is not None
            if row.embedding is None and (known := self.known.get(row.content_hash)):
                row.embedding, row.thumbnail = known
            if row.embedding is None:
                reused += row.content_hash in new
                new.setdefault(row.content_hash, []).append(row)
            else:
                reused += 1
        if new:
            self._embed_new(new)
        return Counts(len(rows), sum(row.error is not None for row in rows), reused)

    def _embed_new(self, new: Mapping[str, list[Row]]) -> None:
        items: list[Any] = [same[0].item for same in new.values()]
        options = self.job.options
        vectors: dict[int, np.ndarray] = {}
        try:
            with _no_warnings():  # rows that fail are in the summary
                encoded: Any = self.model.encode_document(
                    items,
                    prompt=options.prompt,
                    batch_size=options.batch_size,
                    truncate_dim=self.job.dimensions,
                    normalize_embeddings=True,
                    show_progress_bar=False,
                    on_error="skip",
                )
            vectors, errors = (
                dict(zip(encoded.kept.tolist(), np.asarray(encoded.embeddings, np.float32))),
                encoded.errors,
            )
        except ValueError as error:  # all embeddings of this chunk are not finite
            if not self._sound:
                first = next(iter(new.values()))[0].id
                raise ValueError(f"No row of {first!r} and those after it could be embedded. {error}") from error
            errors = dict.fromkeys(range(len(items)), str(error))
        self._sound |= bool(vectors)
        for position, (content_hash, same) in enumerate(new.items()):
            vector = vectors.get(position)
            if vector is not None:
                self.known.put(content_hash, Known(vector, same[0].thumbnail))
            else:
                # The message names the input by its place in this call.
                reason = errors[position].removeprefix(f"Input {position} {shown(items[position])}: ")
                reason = re.sub(r"The embedding of input \d+ is", "The embedding is", reason)
            for row in same:
                row.item = None
                if vector is None:
                    row.error = reason
                else:
                    row.embedding = vector


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Hide the warnings of `encode` about rows that are left out."""
    logger = logging.getLogger("btok_hf.encoding")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Memory:
    """The results for content that came last, up to a size. Threads may use it at once."""

    def __init__(self, size: int) -> None:
        self._left, self._lock = size, threading.Lock()
        self._entries: OrderedDict[str, Known] = OrderedDict()

    def get(self, content_hash: str) -> Known | None:
        with self._lock:
            if content_hash not in self._entries:
                return None
            self._entries.move_to_end(content_hash)
            return self._entries[content_hash]

    def put(self, content_hash: str, known: Known) -> None:
        with self._lock:
            if content_hash in self._entries:
                return
            self._entries[content_hash] = known
            self._left -= _bytes(known)
            while self._left < 0:
                self._left += _bytes(self._entries.popitem(last=False)[1])


def _bytes(known: Known) -> int:
    return known.embedding.nbytes + len(known.thumbnail or b"") + 200  # of the objects themselves


class _Writer:
    """Rows as the content of a parquet file."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self._start()

    def _start(self) -> None:
        self._content, self._errors = io.BytesIO(), dict[str, str]()
        # Vectors and pictures hold nothing that could be compressed.
        self._parquet = pq.ParquetWriter(self._content, self.schema, compression="zstd", use_dictionary=["kind"])

    def add(self, rows: list[Row]) -> None:
        size = self.schema.field("embedding").type.list_size
        failed = np.array([row.embedding is None for row in rows], bool)
        vectors = np.zeros((len(rows), size), np.float32)
        for index in np.flatnonzero(~failed):
            vectors[index] = rows[index].embedding
        columns: dict[str, Any] = {
            "id": [_words(row.id) for row in rows],
            "kind": [row.kind for row in rows],
            "source": [_words(row.source) for row in rows],
            "page": [row.page for row in rows],
            "content_hash": [row.content_hash for row in rows],
            "text": [_words(row.text, "replace") for row in rows],
            "thumbnail": [row.thumbnail for row in rows],
            "embedding": pa.FixedSizeListArray.from_arrays(vectors.ravel(), size, mask=pa.array(failed)),
            "error": [_words(row.error) for row in rows],
        }
        for name in self.schema.names[len(columns) :]:
            kind = self.schema.field(name).type
            none = pa.nulls(1, kind)
            columns[name] = pa.concat_arrays([row.metadata.get(name, none) for row in rows] or [pa.nulls(0, kind)])
        self._parquet.write_table(pa.table(columns, self.schema))
        self._errors |= {id: error for id, error in zip(columns["id"], columns["error"]) if error is not None}

    def finish(self) -> tuple[bytes, dict[str, str]]:
        """The file and the errors of its rows, by id. The next rows go to another file."""
        self._parquet.close()
        result = self._content.getvalue(), self._errors
        self._start()
        return result


def _words(text: str | None, errors: str = "backslashreplace") -> str | None:
    """A text without lone surrogates, which parquet cannot store. File names that are not UTF-8 contain them."""
    return None if text is None else text.encode("utf-8", errors).decode()


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The items; a thread computes the next one while one is used."""
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = thread.submit(next, items, None)
            yield item
