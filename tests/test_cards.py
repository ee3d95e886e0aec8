"""What the page of `btok app` shows of a hit. Nothing of it can be markup."""

from html.parser import HTMLParser

import pytest

from btok_hf.corpus import cards
from btok_hf.corpus.index import Hit

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>`${alert(1)}{{#if x}}"
OURS = {"ul", "li", "button", "img", "span", "figure", "video", "pre", "dl", "dt", "dd", "p", "section", "a"}


class Seen(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def hit(kind="image", text=None, thumbnail=b"jpeg", name="a.png", **metadata):
    return Hit(name, 0.5, kind, name, None, text, thumbnail, metadata)


def test_a_grid_has_a_button_for_each_hit():
    seen = Seen(cards.grid([hit(), hit("video", name="b.mp4"), hit("text", "some words", None, "c.txt")]))
    assert [button["data-id"] for button in seen.of("button")] == ["a.png", "b.mp4", "c.txt"]
    assert [image["alt"] for image in seen.of("img")] == ["", ""]  # the names follow
    assert all(image["src"] == "data:image/jpeg;base64,anBlZw==" for image in seen.of("img"))
    assert "0.500 image: a.png" in seen.text and "▶" in seen.text and "some words" in seen.text
    assert Seen(cards.grid([hit("page", "a long text layer")])).text.count("layer") == 0  # pictures stand for pages


@pytest.mark.parametrize("kind", ["text", "image", "video", "page", "mixed"])
def test_everything_is_escaped(kind):
    hostile = hit(kind, HOSTILE, name=HOSTILE, **{HOSTILE: HOSTILE})
    large = (cards.large(hostile, None), cards.large(hostile, f"file={HOSTILE}", kind == "video"))
    for html in (cards.grid([hostile]), *large, cards.guesses({"query": HOSTILE})):
        seen = Seen(html)
        assert {tag for tag, _ in seen.elements} <= OURS
        assert not any(name.startswith("on") for _, attributes in seen.elements for name in attributes)
        assert "<script" not in html and HOSTILE in seen.text


def test_a_large_hit_shows_its_original_or_says_that_it_is_gone():
    seen = Seen(cards.large(hit("video", year=2001), "file=clip.mp4", True))
    (video,) = seen.of("video")
    assert video["src"] == "file=clip.mp4" and "controls" in video and video["aria-label"] == "video a.png"
    assert "year2001" in seen.text and "not there" not in seen.text
    seen = Seen(cards.large(hit(), "file=a.png"))
    assert seen.of("img")[0]["src"] == "file=a.png" and not seen.of("video") and "not there" not in seen.text
    seen = Seen(cards.large(hit("video"), None))
    assert seen.of("img")[0]["src"].startswith("data:") and "not there" in seen.text
    seen = Seen(cards.large(hit("text", "word " * 10_000, None), None))
    assert 20_000 <= len(seen.text) < 20_100 and "not there" not in seen.text


def test_a_large_hit_says_what_is_wrong_with_its_file():
    seen = Seen(cards.large(hit(), None, note="The original cannot be shown: <b>"))
    assert "The original cannot be shown: <b>" in seen.text and "not there" not in seen.text
    assert "It has changed." in Seen(cards.large(hit(), "file=a.png", note="It has changed.")).text
    seen = Seen(cards.large(hit("video", name="clips/a.avi"), "file=a.avi", True))
    (said,) = (each for each in seen.of("p") if each.get("class") == "unplayable")
    (link,) = seen.of("a")
    assert "hidden" in said and "This browser cannot play the clip" in seen.text  # a script of the page shows it
    assert link == {"href": "file=a.avi", "download": "a.avi"}


def test_a_large_hit_is_a_region_that_can_have_the_focus():
    (region,) = Seen(cards.large(hit(), None)).of("section")
    assert region == {"aria-label": "Hit", "tabindex": "-1"}


def test_the_file_is_named_where_the_id_does_not():
    named = Hit("7", 0.5, "image", "pictures/a.png", None, None, None)
    assert "sourcepictures/a.png" in Seen(cards.large(named, None)).text
    assert "source" not in Seen(cards.large(hit(), None)).text


def test_an_id_reaches_the_page_as_it_is():
    html = cards.grid([hit(name='cr\rlf\n".png')])
    assert 'data-id="cr&#13;lf\n&quot;.png"' in html and Seen(html).of("button")[0]["data-id"] == 'cr\rlf\n".png'


def test_a_guess_is_called_one():
    seen = Seen(cards.guesses({"query": "a cat", "hit": "a dog"}))
    assert seen.text.startswith("A guess of the model") and "querya cathita dog" in seen.text


def test_a_summary_says_how_many_and_in_which_order():
    assert 'role="status"' in cards.summary(3, 1234, 0.5) and "3 of 1,234 items" in cards.summary(3, 1234, 0.5)
    assert "ordered by words and meaning" in cards.summary(3, 1234, 0.5, words=True)
