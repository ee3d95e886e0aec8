"""What `btok app` writes into its page. Everything that comes from a database or a user is escaped here."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from posixpath import basename

from btok_hf.corpus.index import Hit
from btok_hf.corpus.results import excerpt

EXCERPT = 280  # characters of a text on a card
LONGEST = 20_000  # characters of a text in large

# Scoped to the component by Gradio. `{` must not stand twice in a row: it would be a template.
STYLE = """
ul { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; list-style: none;
  padding: 0; margin: 0; }
li { margin: 0; }
button { width: 100%; height: 100%; display: flex; flex-direction: column; gap: 6px; padding: 8px; text-align: left;
  border: 1px solid var(--border-color-primary); border-radius: 8px; background: var(--block-background-fill);
  color: var(--body-text-color); cursor: pointer; }
button:hover { border-color: var(--color-accent); }
button:focus-visible { outline: 2px dashed var(--body-text-color); outline-offset: 3px; }
button[aria-pressed=true] { border-color: var(--color-accent); box-shadow: 0 0 0 2px var(--color-accent); }
button img { width: 100%; height: 130px; object-fit: contain; background: #fff; border-radius: 4px; }
.text { font-size: 13px; line-height: 1.35; overflow: hidden; overflow-wrap: anywhere; display: -webkit-box;
  -webkit-line-clamp: 7; -webkit-box-orient: vertical; }
.name { font-size: 12px; overflow-wrap: anywhere; opacity: 0.75; }
figure { margin: 0; }
figure img, figure video { max-width: 100%; max-height: 60vh; min-width: min(100%, 220px); object-fit: contain;
  background: #fff; border-radius: 8px; }
section:focus { outline: none; }
a { text-decoration: underline; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 40vh; overflow: auto; font: inherit; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 12px; margin: 8px 0; }
dt { opacity: 0.75; }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def grid(hits: Sequence[Hit]) -> str:
    """Hits as buttons, best first."""
    return f'<ul aria-label="Hits">{"".join(map(_card, hits))}</ul>'


def _card(hit: Hit) -> str:
    content = ""
    if hit.thumbnail:
        content = f'<img alt="" src="{thumbnail_url(hit.thumbnail)}">'  # the name follows
    if hit.text and hit.kind in ("text", "mixed"):
        content += f'<span class="text">{escape(excerpt(hit.text, EXCERPT))}</span>'
    play = "▶ " if hit.kind == "video" else ""
    return (
        f'<li><button type="button" data-id="{attribute(hit.id)}" aria-pressed="false">{content}'
        f'<span class="name">{play}{hit.score:.3f} {escape(hit.kind)}: {escape(hit.id)}</span></button></li>'
    )


def large(hit: Hit, url: str | None, is_video: bool = False, note: str | None = None) -> str:
    """A hit in large.

    Args:
        hit (`Hit`): The hit.
        url (`str`, *optional*): Where the page finds its picture or clip. Default: its thumbnail is shown.
        is_video (`bool`): Whether there is a clip.
        note (`str`, *optional*): What to say of its file. Default: that there is none, if there is none.
    """
    label, still = escape(describe(hit)), thumbnail_url(hit.thumbnail) if hit.thumbnail else None
    if url is not None and is_video:
        poster = f' poster="{still}"' if still else ""
        media = (
            f'<figure><video controls loop src="{escape(url)}" aria-label="{label}"{poster}></video></figure>'
            '<p class="unplayable" hidden>This browser cannot play the clip. '  # shown by the page's script
            f'<a href="{escape(url)}" download="{escape(basename(hit.source or hit.id))}">Save it</a></p>'
        )
    elif url or still:
        media = f'<figure><img alt="{label}" src="{escape(url or still or "")}"></figure>'
    else:
        media = ""
    if note is None and url is None and hit.kind != "text":
        note = "The original is not there any more, or is not a file here."
    noted = f'<p role="status">{escape(note)}</p>' if note else ""
    text = f'<pre tabindex="0">{escape(shortened(hit.text, LONGEST))}</pre>' if hit.text else ""
    source = None if hit.source == hit.id else hit.source
    facts = {"id": hit.id, "kind": hit.kind, "source": source, "page": hit.page, **hit.metadata}
    listed = _listed({name: value for name, value in facts.items() if value is not None})
    # The page gives it the focus, so that it is read and the next key acts in it.
    return f'<section aria-label="Hit" tabindex="-1">{media}{noted}{text}{listed}</section>'


def guesses(decoded: Mapping[str, str]) -> str:
    """What a model decodes from Bottleneck Tokens, by what they are of."""
    return (
        "<p>A guess of the model: the text that it decodes from the Bottleneck Tokens alone, without seeing the "
        f"input. It shows what they may hold, and is often wrong.</p>{_listed(decoded)}"
    )


def summary(hits: int, items: int, seconds: float, words: bool = False) -> str:
    """How many hits there are, for screen readers too, and with `words` why their scores are in no order."""
    order = ", ordered by words and meaning; the numbers are of the meaning alone" if words else ""
    return f'<p role="status">{hits} of {items:,} items, found in {seconds:.3f} s{order}</p>'


def describe(hit: Hit) -> str:
    """A hit in words, instead of its picture."""
    text = f": {excerpt(hit.text, 80)}" if hit.text else ""
    return f"{hit.kind} {hit.id}{text}"


def attribute(text: str) -> str:
    """A text as the value of an attribute that a script reads back. Browsers would read CR as LF."""
    return escape(text).replace("\r", "&#13;")


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} …"


def thumbnail_url(thumbnail: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(thumbnail).decode()}"


def _listed(facts: Mapping[str, object]) -> str:
    return f"<dl>{''.join(_fact(name, value) for name, value in facts.items())}</dl>"


def _fact(name: str, value: object) -> str:
    return f"<dt>{escape(name)}</dt><dd>{escape(shortened(str(value), 2000))}</dd>"
