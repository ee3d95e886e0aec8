"""Searching with texts, images and videos: the small model of the repository over a few of its pictures."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import ROOT
from support.units import rows_of, write_units

from btok_hf import BTokSentenceTransformer
from btok_hf.commands.corpus import run_search
from btok_hf.corpus.index import Index
from btok_hf.corpus.search import Searcher
from btok_hf.model_info import identify

MODEL = ROOT / "benchmarks" / "unified" / "models" / "btok-small"
PICTURES = ("example_1.png", "example_2.png", "example_3.png")


@pytest.fixture(scope="module")
def folder(mp4, tmp_path_factory):
    """A database of three pictures, a clip and two texts. Tests must not change it."""
    folder = tmp_path_factory.mktemp("search")
    root = folder / "files"
    root.mkdir()
    for name in PICTURES:
        shutil.copy(MODEL / "assets" / name, root)
    shutil.copy(mp4, root / "clip.mp4")
    model = BTokSentenceTransformer(MODEL, device="cpu")
    texts = ["Photosynthesis turns light into sugar.", "A cup of hot tea."]
    items = [
        *({"image": root / name} for name in PICTURES),
        {"video": root / "clip.mp4"},
        *({"text": t} for t in texts),
    ]
    names = [*PICTURES, "clip.mp4", "one.txt", "gone.txt"]
    rows = rows_of(model.encode_document(items), text=[None] * 4 + texts, source=names)
    for row, name, kind in zip(rows, names, ["image"] * 3 + ["video"] + ["text"] * 2):
        row |= {"id": name, "kind": kind}
    settings = {"model": str(MODEL), "revision": identify(str(MODEL))[0], "root": str(root), "input": str(root)}
    Index.build(write_units(folder / "out", rows, dimensions=128, **settings), folder / "db")
    return folder


@pytest.fixture(scope="module")
def searcher(folder):
    return Searcher(folder / "db", device="cpu")


def test_texts_find_pictures_and_texts(searcher):
    hits = searcher.search("hot beverage", where="kind = 'image'")
    assert hits[0].id == "example_1.png" and len(hits) == 3
    # The numbers of README.md, which stock Sentence-Transformers computes.
    assert {hit.id: round(hit.score, 2) for hit in hits} == dict(zip(PICTURES, (0.69, 0.05, 0.29)))
    assert searcher.search("photosynthesis", hybrid=True, k=1)[0].id == "one.txt"


def test_every_form_of_a_picture_and_a_clip_finds_itself(searcher, folder):
    path = folder / "files" / "example_2.png"
    for image in (path, str(path), Image.open(path)):
        hit = searcher.search(image=image, k=1)[0]
        assert hit.id == "example_2.png" and hit.score == pytest.approx(1, abs=1e-4)
    assert searcher.search(video=folder / "files" / "clip.mp4", k=1)[0].id == "clip.mp4"


def test_a_text_and_a_picture_are_one_query(searcher, folder):
    path = folder / "files" / "example_2.png"
    both = searcher.embed("hot beverage", path)
    expected = searcher.model.encode_query([{"image": path, "text": "hot beverage"}])[0]
    assert np.allclose(both, expected, atol=1e-6) and not np.allclose(both, searcher.embed("hot beverage"), atol=0.01)


def test_nothing_that_a_text_names_is_opened(searcher, folder, monkeypatch):
    monkeypatch.chdir(folder / "files")
    alone = searcher.model.encode_query([{"text": "example_2.png"}])[0]
    assert np.allclose(searcher.embed("example_2.png"), alone, atol=1e-6)
    for text in ("/etc/passwd", "https://example.com/a.png", "<|btok_0|><|image_pad|>", "x" * 100_000, "{'image': 1}"):
        assert len(searcher.search(text, k=2)) == 2


def test_what_the_tokens_hold(searcher):
    expected = searcher.model.reconstruct([{"text": "tiger face"}], prompt="Find it.")
    assert [searcher.reconstruct({"text": "tiger face"}, "Find it.")] == expected and expected[0]


def test_empty_queries_are_refused(searcher):
    for text in (None, "", " \n\t"):
        with pytest.raises(ValueError, match="query is empty"):
            searcher.search(text)
    with pytest.raises(ValueError, match="hybrid search needs a text"):
        searcher.search(image=Image.new("RGB", (56, 56)), hybrid=True)


def test_originals_that_are_still_there(searcher, folder):
    paths = {hit.id: searcher.open(hit) for hit in searcher.search("anything")}
    assert paths["clip.mp4"] == folder / "files" / "clip.mp4" and paths["gone.txt"] is None and len(paths) == 6


def test_threads_get_their_own_hits(searcher):
    queries = ["hot beverage", "photosynthesis", "tiger"]
    expected = [[hit.id for hit in searcher.search(query)] for query in queries]
    found = {}

    def search(number):
        found[number] = [hit.id for hit in searcher.search(queries[number % 3])]

    threads = [threading.Thread(target=search, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(12)] == expected * 4


def with_settings(folder, target, **changes):
    """A copy of the database whose settings are changed."""
    index = Index.open(folder / "db")
    table = index._table.to_arrow().replace_schema_metadata({"btok": json.dumps(index.settings | changes)})
    import lancedb

    lancedb.connect(target).create_table("items", table)
    return target


def test_a_model_that_moved_is_named_and_may_be_given(folder, tmp_path):
    path = with_settings(folder, tmp_path / "db", model=str(tmp_path / "moved"))
    with pytest.raises(OSError, match="/no/where is neither a local folder nor a readable Hub repository"):
        Searcher(path, "/no/where")
    with pytest.raises(FileNotFoundError, match=r"made with the model .*moved, which cannot be loaded.*--model"):
        Searcher(path, device="cpu")
    assert Searcher(path, MODEL, device="cpu").search("hot beverage", k=1)[0].id == "example_1.png"


def test_another_model_is_refused(folder, tmp_path):
    other = Path(shutil.copytree(MODEL, tmp_path / "model"))
    assert Searcher(folder / "db", other, device="cpu").index.count() == 6  # the same files elsewhere
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"note": 1}))
    with pytest.raises(ValueError, match=r"made with .*btok-small at .*, and .*model is at "):
        Searcher(folder / "db", other, device="cpu")


def test_queries_are_read_as_the_corpus_was(folder, tmp_path):
    path = with_settings(folder, tmp_path / "db", max_seq_length=40, max_pixels=28 * 28 * 2, dtype="float64")
    model = Searcher(path, device="cpu").model
    assert model.max_seq_length == 40 and model.transformer.image_limits.max_pixels == 28 * 28 * 2
    assert str(model.transformer.model.dtype) == "torch.float64"


def test_the_command_explains_the_order_by_words(folder, capsys):
    given = {"image": None, "video": None, "k": 2, "where": None, "sheet": None, "html": None, "model": None}
    for hybrid, json_, says in ((True, False, True), (False, False, False), (True, True, False)):
        run_search("tea", str(folder / "db"), hybrid=hybrid, json=json_, device="cpu", **given)
        assert ("ordered by words and meaning" in capsys.readouterr().err) == says
