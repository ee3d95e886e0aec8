"""The embedding function of LanceDB, in a table of a user's own."""

import io

import lancedb
import numpy as np
import pytest
from lancedb.embeddings import get_registry
from lancedb.pydantic import LanceModel, Vector
from PIL import Image
from support import forks

import btok_hf.corpus.lancedb  # noqa: F401  registers it


@pytest.fixture(scope="module")
def database(repo, tmp_path_factory):
    """A table of pictures and one of texts. Tests must not change them."""
    function = get_registry().get("btok").create(name=repo, device="cpu")

    class Picture(LanceModel):
        colour: str
        image: bytes = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()

    class Text(LanceModel):
        text: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()

    path = tmp_path_factory.mktemp("lancedb")
    connection = lancedb.connect(path)
    rows = [{"colour": colour, "image": png(colour)} for colour in ("red", "blue", "white")]
    connection.create_table("pictures", schema=Picture).add(rows)
    connection.create_table("texts", schema=Text).add([{"text": "a dog"}, {"text": "photo.png"}])
    return path


def png(colour):
    content = io.BytesIO()
    Image.new("RGB", (60, 60), colour).save(content, "PNG")
    return content.getvalue()


def first(table, query):
    return table.search(query).limit(1).to_list()[0]


def test_a_table_embeds_what_is_added_and_what_is_searched_for(database, model):
    table = lancedb.connect(database).open_table("pictures")
    vectors = np.array(table.to_arrow().column("vector").to_pylist())
    items = [{"image": Image.open(io.BytesIO(png(colour)))} for colour in ("red", "blue", "white")]
    assert np.allclose(vectors, model.encode_document(items), atol=1e-5)
    hits = table.search("a dog").distance_type("cosine").limit(3).to_list()
    scores = dict(zip(("red", "blue", "white"), vectors @ model.encode_query([{"text": "a dog"}])[0]))
    assert {hit["colour"]: pytest.approx(1 - hit["_distance"], abs=1e-5) for hit in hits} == scores
    assert len(table.search(Image.new("RGB", (60, 60), "blue")).limit(3).to_list()) == 3


def test_a_text_is_never_taken_for_a_file(database, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 60)).save("photo.png")
    table = lancedb.connect(database).open_table("texts")
    vector = next(row["vector"] for row in table.to_arrow().to_pylist() if row["text"] == "photo.png")
    assert np.allclose(vector, model.encode_document([{"text": "photo.png"}])[0], atol=1e-5)
    words = model.encode_query([{"text": "photo.png"}])[0]
    assert first(table, "photo.png")["_distance"] == pytest.approx(first(table, words)["_distance"], abs=1e-5)


def test_another_process_opens_the_table_once_the_module_is_imported(database):
    code = (
        "import lancedb, sys\n"
        "connection = lancedb.connect(sys.argv[1])\n"
        "try:\n"
        "    connection.open_table('texts').search('x')\n"
        "except KeyError as error:\n"
        "    print(error)\n"
        "import btok_hf.corpus.lancedb\n"
        "print(len(connection.open_table('texts').search('x').limit(2).to_list()))\n"
    )
    run = forks.run("-c", code, database)
    assert run.stdout == "'btok'\n2\n", run.stderr
