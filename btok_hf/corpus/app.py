"""`btok app`: a page that searches a database by text, picture or clip, on Gradio.

A client names nothing that is opened: a query is a text or an upload, and a hit is the id of a row of the database.
What is written into the page is escaped, in `btok_hf/corpus/cards.py`.
"""

import functools
import html
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pypdfium2
from gradio.processing_utils import save_pil_to_cache
from PIL import Image
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from btok_hf.corpus import cards
from btok_hf.corpus.index import Hit
from btok_hf.corpus.search import Searcher
from btok_hf.corpus.units import KINDS
from btok_hf.media import VIDEO_SUFFIXES, read_image

MAX_TEXT = 10_000  # characters of a query; models cut texts long before
MAX_UPLOAD = "100mb"
MAX_HITS = 100
LARGE = 1400  # pixels of the longer side of a hit's picture in the page
WAITING = 64  # requests; more are refused
PDF = threading.Lock()  # pdfium works in one thread at a time
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
# Cutting a clip would load a program from elsewhere.
STYLE = "#clip button[aria-label='Trim video to selection'] { display: none; }"

# A card marks itself, and the listener reads the mark. So an id is all that a browser sends.
CHOOSE = """element.addEventListener('click', (event) => {
    const card = event.target.closest('button');
    if (!card) return;
    element.querySelectorAll('button').forEach((other) => other.setAttribute('aria-pressed', other === card));
    trigger('click');
});"""
CHOSEN = "() => [document.querySelector('#hits [aria-pressed=true]')?.dataset.id ?? '']"
TO_HIT = "() => { document.querySelector('#hit')?.scrollIntoView({block: 'nearest'}); }"


def serve(db: str, host: str, port: int, **load: Any) -> None:
    """Load a database and its model, and show the page until SIGINT.

    Args:
        db (`str`): Folder or address of the database.
        host, port: Where to listen.
        load: For `Searcher`.
    """
    launch(make_page(Searcher(db, **load)), server_name=host, server_port=port)


def launch(page: gr.Blocks, **options: Any) -> Any:
    """Show a page until SIGINT, without requests to other machines.

    Args:
        page (`gradio.Blocks`): What `make_page` returns.
        options: For `gradio.Blocks.launch`. On Spaces, the address is in the environment.

    Returns:
        What `gradio.Blocks.launch` returns.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    # Fonts of the system; white on the darker shades is readable.
    theme = gr.themes.Default(
        primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800")
    page.queue(max_size=WAITING, default_concurrency_limit=4)
    return page.launch(
        theme=theme,
        css=STYLE,
        share=False,
        ssr_mode=False,
        footer_links=[],
        max_file_size=MAX_UPLOAD,
        app_kwargs={"middleware": [Middleware(OwnOnly)]},
        **options,
    )


class OwnOnly:
    """Keeps the page to its own host: addresses are not fetched here, and browsers load nothing from elsewhere."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        # Gradio would fetch and pass on what such an address holds.
        if scope["type"] == "http" and re.search(r"/(file|proxy)[=/]+\w+:", scope["path"]):
            await PlainTextResponse("addresses are not opened", 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send_with_policy)


def make_page(searcher: Searcher) -> gr.Blocks:
    """The page.

    Args:
        searcher (`Searcher`): Database and model, loaded.

    Returns:
        `gradio.Blocks`: To pass to `launch`.
    """
    hit = gr.HTML(css_template=cards.STYLE, apply_default_css=False, elem_id="large", render=False)
    answers = Answers(searcher, hit)
    with gr.Blocks(
        title="BTok search", analytics_enabled=False, delete_cache=(3600, 24 * 3600), fill_width=True
    ) as page:
        gr.Markdown(f"# Search {answers.items:,} items")
        query, chosen = gr.State({}), gr.Textbox(visible=False)
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                text = gr.Textbox(label="Text", placeholder="What to look for", elem_id="text", max_length=MAX_TEXT)
                go = gr.Button("Search", variant="primary", elem_id="go")
                picture = gr.Image(label="Picture", sources=["upload", "clipboard"], height=170, elem_id="picture")
                # The file as it is: Gradio would open it here, where an error has no message.
                unopened: Any = lambda payload: payload and payload.path  # noqa: E731 (typed)
                picture.preprocess = unopened  # type: ignore[method-assign]
                clip = gr.Video(label="Clip", sources=["upload"], height=170, elem_id="clip")
                kinds = gr.CheckboxGroup(answers.kinds, label="Kinds (none: all)", elem_id="kinds")
                where = gr.Textbox(
                    label="Condition (SQL)", info=f"on {', '.join(answers.columns)}", elem_id="where", max_length=1000
                )
                words = gr.Checkbox(label="Match words of the text too", elem_id="words")
                k = gr.Slider(1, MAX_HITS, 24, step=1, label="Hits", elem_id="k")
            with gr.Column(scale=5, min_width=320):
                summary = gr.HTML(elem_id="summary")
                hits = gr.HTML(elem_id="hits", css_template=cards.STYLE, js_on_load=CHOOSE, apply_default_css=False)
            with gr.Column(scale=3, min_width=280, visible=False, elem_id="hit") as panel:
                hit.render()
                with gr.Row():
                    more = gr.Button("More like this", elem_id="more")
                    why = gr.Button("Why this hit?", elem_id="why", visible=answers.decodes)
                guesses = gr.HTML(css_template=cards.STYLE, apply_default_css=False, elem_id="guesses")
        found = [hits, summary, query]
        asked = [text, picture, clip, kinds, where, words, k]
        gr.on([go.click, text.submit], said(answers.search), asked, [*found, panel], api_name="search")
        hits.click(said(answers.show), [chosen], [chosen, panel, hit, guesses], js=CHOSEN, api_name="show").success(
            None, js=TO_HIT
        )
        more.click(said(answers.more), [chosen, kinds, where, k], found, api_name="more")
        # One at a time: decoding is slow, and searches should not wait long for the model.
        why.click(said(answers.why), [chosen, query], guesses, api_name="why", concurrency_limit=1)
    for block in page.blocks.values():
        refuse_addresses(block)
    return page


def refuse_addresses(block: Any) -> None:
    """Let a component read files in its cache, but fetch no address that a client names."""
    move = block.async_move_resource_to_block_cache

    async def move_file(path: Any) -> Any:
        if path is not None and re.match(r"\s*\w+://", str(path)):
            raise gr.Error("Addresses are not opened. Upload a file.", print_exception=False)
        return await move(path)

    block.async_move_resource_to_block_cache = move_file


def said(answer: Callable[..., Any]) -> Callable[..., Any]:
    """A listener whose errors of users are said in the page. Others are logged, and the page says only that."""

    @functools.wraps(answer)
    def listener(*inputs: Any) -> Any:
        try:
            return answer(*inputs)
        except (ImportError, OSError, ValueError) as error:
            reason: BaseException = error
            if str(error).startswith("Input ") and error.__cause__:  # which names the input once more
                reason = error.__cause__
            message = re.sub(r"'/[^']*/([^'/]+)'", r"'\1'", str(reason))  # names of files, without their folders
            raise gr.Error(html.escape(message, quote=False), duration=None, print_exception=False) from error

    return listener


class Answers:
    """What the page answers, as values of its components.

    Args:
        searcher (`Searcher`): Database and model.
        files (`gradio.HTML`): What shows hits in large. Gradio serves the files in its cache, and removes them later.

    Attributes:
        items (`int`): Number of rows.
        kinds (`list[str]`): Kinds of rows that there are.
        columns (`list[str]`): Names that a condition can use.
        decodes (`bool`): Whether the model has Bottleneck Tokens to decode text from.
    """

    def __init__(self, searcher: Searcher, files: gr.HTML) -> None:
        self.searcher, self.files, index = searcher, files, searcher.index
        self.items = index.count()
        self.kinds = [kind for kind in KINDS if index.count(f"kind = '{kind}'")]
        self.columns = index.columns
        self.decodes = bool(getattr(searcher.model.transformer.config, "btok_num_tokens", 0))

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
        start = time.perf_counter()
        hits = self.searcher.search(**query, k=int(k), where=condition(kinds, where), hybrid=words)
        return *self._found(hits, start), query, gr.update(visible=False)

    def _uploaded(self, path: str | None) -> Path | None:
        """An uploaded file. A client may name any other, which Gradio checks only for some forms of a request."""
        if not path:
            return None
        if not Path(path).resolve().is_relative_to(Path(self.files.GRADIO_CACHE).resolve()):
            raise ValueError("The file was not uploaded here. Upload it.")
        return Path(path)

    def more(self, chosen: str, kinds: list[str], where: str | None, k: float) -> tuple[Any, ...]:
        """The neighbours of a row, their number, and the row as the query."""
        start = time.perf_counter()
        row, vector = self.searcher.index.get(chosen)
        hits = self.searcher.index.search(vector, k=int(k), where=condition(kinds, where))
        return *self._found(hits, start), {"id": row.id}

    def show(self, chosen: str) -> tuple[Any, ...]:
        """A row in large."""
        row, _ = self.searcher.index.get(chosen)
        path = self._original(row)
        file, moves = None, path is not None and is_video(row, path)
        if moves:
            file = self.files.move_resource_to_block_cache(path)
        elif path is not None and row.kind != "text":
            picture = as_picture(path, row.page)
            picture.thumbnail((LARGE, LARGE))
            file = save_pil_to_cache(picture, self.files.GRADIO_CACHE, name="hit")
            self.files.temp_files.add(file)
        return row.id, gr.update(visible=True), cards.large(row, file and f"gradio_api/file={file}", moves), ""

    def why(self, chosen: str, query: dict[str, Any]) -> str:
        """What the Bottleneck Tokens of the query and of a row hold as text."""
        row, _ = self.searcher.index.get(chosen)
        if not query:
            raise ValueError("Search first.")
        asked = self._as_input(self.searcher.index.get(query["id"])[0]) if "id" in query else query
        prompts, of_rows = self.searcher.model.prompts, self.searcher.index.settings["prompt"]
        if of_rows is None:  # as in `btok embed`
            of_rows = prompts.get("document")
        decoded = {
            "query": self.searcher.reconstruct(asked, of_rows if "id" in query else prompts.get("query")),
            "hit, its first file and text" if row.kind == "mixed" else "hit": self.searcher.reconstruct(
                self._as_input(row), of_rows
            ),
        }
        return cards.guesses(decoded)

    def _found(self, hits: list[Hit], start: float) -> tuple[str, str]:
        return cards.grid(hits), cards.summary(len(hits), self.items, time.perf_counter() - start)

    def _original(self, row: Hit) -> Path | None:
        """The file of a row, if it is there and below the folder of the corpus."""
        path = self.searcher.open(row)
        if path is None or not os.path.exists(path):
            return None
        root = Path(self.searcher.index.settings["root"]).resolve()
        path = Path(path).resolve()  # a link may lead elsewhere
        return path if path.is_relative_to(root) else None

    def _as_input(self, row: Hit) -> dict[str, Any]:
        """A row as an input of the model."""
        path = self._original(row)
        item: dict[str, Any] = {"text": row.text} if row.text and row.kind in ("text", "mixed") else {}
        if row.kind == "text":
            return item
        if path is None:
            raise ValueError(f"The file of {row.id} is not there any more, so there is nothing to decode.")
        return {"video": path, **item} if is_video(row, path) else {"image": as_picture(path, row.page), **item}


def is_video(row: Hit, path: Path) -> bool:
    """Whether the file of a row is a clip."""
    return row.kind == "video" or (row.kind == "mixed" and path.suffix.lower() in VIDEO_SUFFIXES)


def as_picture(path: Path, page: int | None) -> Image.Image:
    """A picture's file, or a page of a PDF or TIFF, as it was embedded."""
    if page is None or path.suffix.lower() != ".pdf":
        return read_image(path, max_pixels=LARGE * LARGE, page=page)
    with PDF, pypdfium2.PdfDocument(path) as pdf:
        pdf.init_forms()  # as `pdf_pages` does: what was filled in is drawn
        leaf = pdf[page - 1]
        return leaf.render(scale=LARGE / max(leaf.get_size())).to_pil()


def condition(kinds: list[str], where: str | None) -> str | None:
    """The kinds and the user's own condition as one."""
    parts = [f"kind IN ({', '.join(map(repr, kinds))})"] if kinds else []
    if where and where.strip():
        parts.append(f"({where})")
    return " AND ".join(parts) or None
