"""What the page of `btok app` answers: hits, a hit in large, its neighbours, what its tokens hold, and errors.

A client names nothing that is opened: a query is a text or an upload, and a hit is the id of a row of the database.
"""

import functools
import html
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from PIL import Image

from btok_hf.corpus import cards, originals
from btok_hf.corpus.conditions import check_functions, condition
from btok_hf.corpus.index import Hit
from btok_hf.corpus.search import Searcher
from btok_hf.corpus.units import KINDS
from btok_hf.video import read_video

MAX_TEXT = 10_000  # characters of a query; models cut texts long before
MAX_CONDITION = 1000  # characters; one of a megabyte ends the process, from within the database's library
# A file of 20 kB can hold 177 million pixels, which keep everybody waiting (docs/experiments.md, 2026-11-30).
MAX_PIXELS, MAX_CLIP_PIXELS = 50_000_000, 100_000_000  # of a picture; of the frames of a clip, e.g. eight of 4K
MAX_CLIP_SECONDS = 30.0  # of decoding
LOG = logging.getLogger(__name__)


def said(answer: Callable[..., Any]) -> Callable[..., Any]:
    """A listener that shows errors of users in the page. Other errors are logged, and the page says only that."""

    @functools.wraps(answer)
    def listener(*inputs: Any) -> Any:
        try:
            return answer(*inputs)
        except (ImportError, OSError, ValueError) as error:
            raise gr.Error(html.escape(in_words(error), quote=False), duration=None, print_exception=False) from error
        except Exception as error:
            LOG.exception("An answer of the page failed")
            message = "This failed here; the log of btok app says why."
            raise gr.Error(message, duration=None, print_exception=False) from error

    return listener


def in_words(error: BaseException) -> str:
    """An error without folders of this machine, and without the model's count of inputs."""
    if str(error).startswith("Input ") and error.__cause__:  # which names the input once more
        error = error.__cause__
    return re.sub(r"'/[^']*/([^'/]+)'", r"'\1'", str(error))


class Answers:
    """What the page answers, as values of its components.

    Args:
        searcher (`Searcher`): Database and model.
        files (`gradio.HTML`): What shows hits in large. Gradio serves the files in its cache, and removes them later.

    Attributes:
        columns (`list[str]`): Names that a condition can use.
        decodes (`bool`): Whether the model has Bottleneck Tokens to decode text from.
    """

    def __init__(self, searcher: Searcher, files: gr.HTML) -> None:
        self.searcher, self.index, self.files = searcher, searcher.index, files
        self.columns = self.index.columns
        self.decodes = bool(getattr(searcher.model.transformer.config, "btok_num_tokens", 0))

    def extent(self) -> tuple[Any, ...]:
        """How many rows there are now, and of which kinds: `btok index` may add some while the page is shown."""
        kinds = [kind for kind in KINDS if self.index.count(f"kind = '{kind}'")]
        return f"# Search {self.index.count():,} items", gr.update(choices=kinds)

    def search(
        self,
        text: str | None,
        picture: str | None,
        clip: str | None,
        kinds: list[str],
        where: str | None,
        words: bool,
        k: float,
    ) -> tuple[Any, ...]:
        """Hits, their number, the query, and no hit in large."""
        text = (text or "").strip()
        if len(text) > MAX_TEXT:
            raise ValueError(f"The text has {len(text):,} characters; at most {MAX_TEXT:,} are allowed. Shorten it.")
        given = {"image": self._uploaded(picture), "video": self._uploaded(clip), "text": text}
        query: dict[str, Any] = {key: value for key, value in given.items() if value}
        if not query:
            raise ValueError("There is nothing to search for. Type a text, or give a picture or a clip.")
        if words and not text:
            raise ValueError("There are no words to match. Type a text, or untick it.")
        start, filter = time.perf_counter(), self._filter(kinds, where)
        hits = self.searcher.search(**_bounded(query), k=int(k), where=filter, hybrid=words)
        return *self._found(hits, start, words), query, gr.update(visible=False)

    def _uploaded(self, path: str | None) -> Path | None:
        """An uploaded file. A client may name any other, which Gradio checks only for some forms of a request."""
        if not path:
            return None
        if not Path(path).resolve().is_relative_to(Path(self.files.GRADIO_CACHE).resolve()):
            raise ValueError("The file was not uploaded here. Upload it.")
        return Path(path)

    def _filter(self, kinds: list[str], where: str | None) -> str | None:
        """Kinds and condition as one. The condition is tried alone, so that errors quote what was typed."""
        if where and len(where) > MAX_CONDITION:
            raise ValueError(
                f"The condition has {len(where):,} characters; at most {MAX_CONDITION:,} are allowed. Shorten it."
            )
        if where and where.strip():
            check_functions(where, self.columns)
            self.index.count(where)
        return condition(kinds, where)

    def more(self, chosen: str, kinds: list[str], where: str | None, k: float) -> tuple[Any, ...]:
        """The neighbours of a row, their number, the row as the query, and no hit in large."""
        start = time.perf_counter()
        row, vector = self.index.get(chosen)
        hits = self.index.search(vector, k=int(k), where=self._filter(kinds, where))
        return *self._found(hits, start), {"id": row.id}, gr.update(visible=False)

    def show(self, chosen: str) -> tuple[Any, ...]:
        """A row in large: its file, or why that cannot be shown."""
        row, _ = self.index.get(chosen)
        path = originals.find(self.index, row)
        file, note, moves = None, None, path is not None and originals.is_video(row, path)
        if path is not None and row.kind != "text":
            try:
                note = originals.change(self.index, row, path)
                file = self._clip(path) if moves else self._picture(path, row.page)
            except Exception as error:  # decoders raise any type at damaged files
                LOG.warning("%s cannot be shown: %r", path, error)
                note = f"The original cannot be shown: {in_words(error)}"
        url = file and f"gradio_api/file={quote(file)}"
        return row.id, gr.update(visible=True), cards.large(row, url, moves, note), ""

    def _clip(self, path: Path) -> str:
        return str(self.files.move_resource_to_block_cache(path))

    def _picture(self, path: Path, page: int | None) -> str:
        picture = originals.as_picture(path, page)
        picture.thumbnail((originals.LARGE, originals.LARGE))
        file = save_pil_to_cache(picture, self.files.GRADIO_CACHE, name="hit")
        self.files.temp_files.add(file)
        return file

    def why(self, chosen: str, query: dict[str, Any]) -> str:
        """What the Bottleneck Tokens of the query and of a row hold as text."""
        row, _ = self.index.get(chosen)
        if not query:
            raise ValueError("Search first.")
        asked = self._as_input(self.index.get(query["id"])[0]) if "id" in query else query
        prompts, of_rows = self.searcher.model.prompts, self.index.settings["prompt"]
        if of_rows is None:  # as in `btok embed`
            of_rows = prompts.get("document")
        decoded = {
            "query": self.searcher.reconstruct(asked, of_rows if "id" in query else prompts.get("query")),
            "hit, its first file and text" if row.kind == "mixed" else "hit": self.searcher.reconstruct(
                self._as_input(row), of_rows
            ),
        }
        return cards.guesses(decoded)

    def _found(self, hits: list[Hit], start: float, words: bool = False) -> tuple[str, str]:
        return cards.grid(hits), cards.summary(len(hits), self.index.count(), time.perf_counter() - start, words)

    def _as_input(self, row: Hit) -> dict[str, Any]:
        """A row as an input of the model."""
        path = originals.find(self.index, row)
        item: dict[str, Any] = {"text": row.text} if row.text and row.kind in ("text", "mixed") else {}
        if row.kind == "text":
            return item
        if path is None:
            raise ValueError(f"The file of {row.id} is not there any more, so there is nothing to decode.")
        if originals.is_video(row, path):
            return {"video": path, **item}
        return {"image": originals.as_picture(path, row.page), **item}


def _bounded(query: dict[str, Any]) -> dict[str, Any]:
    """A query with the frames of its clip. Raises `ValueError` if its picture or clip takes long to decode."""
    if "image" in query:
        _check_size(query["image"])
    if "video" not in query:
        return query
    frames = read_video(query["video"], most_pixels=MAX_CLIP_PIXELS, most_seconds=MAX_CLIP_SECONDS)
    return {**query, "video": frames}


def _check_size(path: Path) -> None:
    """Raise `ValueError` for a picture that takes long to decode. One that is none is refused when it is read."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"The picture has {width:,} x {height:,} pixels; at most {MAX_PIXELS:,} are allowed. Reduce it."
        )
