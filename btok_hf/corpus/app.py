"""`btok app`: a page that searches a database by text, picture or clip, on Gradio.

This file lays out the page and starts it. Its answers are in `btok_hf/corpus/answers.py`, its HTML is in `cards.py`,
and the requests that it refuses are in `guard.py`.
"""

import os
import re
import signal
import tempfile
from collections.abc import Collection
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from btok_hf.arguments import check_free
from btok_hf.corpus import cards
from btok_hf.corpus.answers import Answers, said
from btok_hf.corpus.guard import OwnOnly, own_hosts
from btok_hf.corpus.search import Searcher
from btok_hf.corpus.units import KINDS

MAX_UPLOAD = "100mb"
MAX_HITS = 100
WAITING = 64  # requests; more are refused
STYLE = """
/* Cutting a clip would load a program from elsewhere. */
#clip button[aria-label='Trim video to selection'] { display: none; }
/* The panel belongs to the pressed card. An answer that comes when its card is gone must not open it again. */
body:not(:has(#hits [aria-pressed=true])) #hit { display: none; }
#k input:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 2px; }
"""

# A card marks itself, and the listener reads the mark. So an id is all that a browser sends.
CHOOSE = """element.addEventListener('click', (event) => {
    const card = event.target.closest('button');
    if (!card) return;
    element.querySelectorAll('button').forEach((other) => other.setAttribute('aria-pressed', other === card));
    trigger('click');
});"""
CHOSEN = "() => [document.querySelector('#hits [aria-pressed=true]')?.dataset.id ?? '']"
UNCHOOSE = "() => { document.querySelector('#hits [aria-pressed=true]')?.setAttribute('aria-pressed', false); }"
# A browser without the codec shows a dead player, and says so only to scripts. Such events do not bubble.
UNPLAYABLE = """element.addEventListener('error', (event) => {
    const said = element.querySelector('.unplayable');
    if (event.target.tagName === 'VIDEO' && said) said.hidden = false;
}, true);"""
# In narrow windows hits and panel lie below: go there, and back. Focus, because a screen reader reads what has it.
TO_HITS = """() => {
    const said = document.querySelector('#summary'), { top, bottom } = said.getBoundingClientRect();
    if (top < 0 || bottom > innerHeight) said.scrollIntoView();
}"""
TO_HIT = """() => {
    document.querySelector('#hit')?.scrollIntoView({ block: 'nearest' });
    document.querySelector('#large section')?.focus({ preventScroll: true });
}"""
BACK = "() => { document.querySelector('#hits [aria-pressed=true]')?.focus(); }"


def serve(db: str, host: str, port: int, public_host: str | None = None, **load: Any) -> None:
    """Load a database and its model, and show the page until SIGINT or SIGTERM.

    What is uploaded and shown is copied into a folder that only this user can read, and which is removed at the end.
    It lies in `GRADIO_TEMP_DIR`, or where the system has such folders.

    Args:
        db (`str`): Folder or address of the database.
        host, port: Where to listen.
        public_host (`str`, *optional*): As in `own_hosts`.
        load: For `Searcher`.

    Raises:
        ValueError: Nothing can listen there, or `public_host` is no host.
    """
    # Before the model is loaded, because that takes a while.
    if ":" in host:
        raise ValueError(
            f"Gradio does not listen on IPv6 addresses, got --host {host}. Give a name or an IPv4 address."
        )
    check_free(host, port)
    hosts = own_hosts(host, public_host)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the folder is removed then too
    if parent := os.environ.get("GRADIO_TEMP_DIR"):
        os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="btok-app-", dir=parent) as own:
        os.environ["GRADIO_TEMP_DIR"] = own  # Gradio reads it when a page is made
        launch(make_page(Searcher(db, **load)), hosts, server_name=host, server_port=port)


def launch(page: gr.Blocks, hosts: Collection[str] | None = None, **options: Any) -> None:
    """Show a page until SIGINT, without requests to other machines, and print where.

    Args:
        page (`gradio.Blocks`): What `make_page` returns.
        hosts (`Collection[str]`, *optional*): Names that the page has (default: any).
        options: For `gradio.Blocks.launch`. On Spaces, the address is in the environment.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    # Fonts of the system; white on the darker shades is readable.
    theme = gr.themes.Default(
        primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
    )
    page.queue(max_size=WAITING, default_concurrency_limit=4)
    _, url, _ = page.launch(
        theme=theme,
        css=STYLE,
        share=False,
        ssr_mode=False,
        footer_links=[],
        max_file_size=MAX_UPLOAD,
        app_kwargs={"middleware": [Middleware(OwnOnly, hosts=hosts)]},
        quiet=True,  # Gradio would advise to share the page
        prevent_thread_lock=True,
        **options,
    )
    print(f"The page is at {url} until Ctrl-C", flush=True)
    page.block_thread()


def make_page(searcher: Searcher) -> gr.Blocks:
    """The page.

    Args:
        searcher (`Searcher`): Database and model, loaded.

    Returns:
        `gradio.Blocks`: To pass to `launch`.
    """
    hit = gr.HTML(
        css_template=cards.STYLE, js_on_load=UNPLAYABLE, apply_default_css=False, elem_id="large", render=False
    )
    answers = Answers(searcher, hit)
    with gr.Blocks(
        title="BTok search", analytics_enabled=False, delete_cache=(3600, 24 * 3600), fill_width=True
    ) as page:
        title = gr.Markdown()
        query, chosen = gr.State({}), gr.Textbox(visible=False)
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                text = gr.Textbox(label="Text", placeholder="What to look for", elem_id="text")
                go = gr.Button("Search", variant="primary", elem_id="go")
                picture = gr.Image(label="Picture", sources=["upload", "clipboard"], height=170, elem_id="picture")
                # The file as it is: Gradio would open it here, where an error has no message.
                unopened: Any = lambda payload: payload and payload.path  # noqa: E731 (typed)
                picture.preprocess = unopened  # type: ignore[method-assign]
                clip = gr.Video(label="Clip", sources=["upload"], height=170, elem_id="clip")
                kinds = gr.CheckboxGroup(list(KINDS), label="Kinds (none: all)", elem_id="kinds")
                names = ", ".join(map(plain, answers.columns))
                where = gr.Textbox(label="Condition (SQL)", info=f"on {names}", elem_id="where")
                words = gr.Checkbox(label="Match words of the text too", elem_id="words")
                k = gr.Slider(1, MAX_HITS, 24, step=1, label="Hits", elem_id="k")
            with gr.Column(scale=5, min_width=320):
                summary = gr.HTML(elem_id="summary")
                hits = gr.HTML(elem_id="hits", css_template=cards.STYLE, js_on_load=CHOOSE, apply_default_css=False)
            with gr.Column(scale=3, min_width=280, visible=False, elem_id="hit") as panel:
                back = gr.Button("Back to the hits", size="sm", elem_id="back")
                hit.render()
                with gr.Row():
                    more = gr.Button("More like this", elem_id="more")
                    why = gr.Button("Why this hit?", elem_id="why", visible=answers.decodes)
                guesses = gr.HTML(css_template=cards.STYLE, apply_default_css=False, elem_id="guesses")
        found = [hits, summary, query, panel]
        asked = [text, picture, clip, kinds, where, words, k]
        # Of what is asked while an answer is awaited, the last counts.
        gr.on(
            [go.click, text.submit, where.submit],
            said(answers.search),
            asked,
            found,
            api_name="search",
            trigger_mode="always_last",
        ).success(None, js=TO_HITS)
        opened = hits.click(
            said(answers.show),
            [chosen],
            [chosen, panel, hit, guesses],
            js=CHOSEN,
            api_name="show",
            trigger_mode="always_last",
        )
        opened.success(None, js=TO_HIT)
        opened.failure(None, js=UNCHOOSE)
        back.click(None, js=BACK)
        more.click(said(answers.more), [chosen, kinds, where, k], found, api_name="more").success(None, js=TO_HITS)
        # One at a time: decoding is slow, and searches should not wait long for the model.
        why.click(said(answers.why), [chosen, query], guesses, api_name="why", concurrency_limit=1)
        page.load(said(answers.extent), None, [title, kinds], api_visibility="private")
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


def plain(text: str) -> str:
    """A text of which Markdown shows every character."""
    return re.sub(r"([^\w\s]|_)", r"\\\1", text)
