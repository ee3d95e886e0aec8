"""A folder of every kind of file that `btok embed` takes, tiny PDFs, and corpora as dicts."""

import random
from pathlib import Path

import numpy as np
from PIL import Image

from btok_hf.corpus.job import Options
from btok_hf.corpus.units import read_units
from btok_hf.corpus.workers import run


def picture(seed, size=(56, 56)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))


def pdf(*texts):
    """A PDF with a page of this text each."""
    pages = range(3, 3 + 2 * len(texts), 2)
    objects = [b"<</Type/Catalog/Pages 2 0 R>>"]
    kids = " ".join(f"{number} 0 R" for number in pages)
    objects.append(f"<</Type/Pages/Kids[{kids}]/Count {len(texts)}>>".encode())
    font = "<</Font<</F1<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>>>"
    for number, text in zip(pages, texts):
        stream = f"BT /F1 24 Tf 10 50 Td ({text}) Tj ET".encode()
        head = f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Resources{font}/Contents {number + 1} 0 R>>"
        objects += [head.encode(), b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream)]
    content, starts = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        starts.append(len(content))
        content += b"%d 0 obj%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % start for start in starts)
    size = len(objects) + 1
    tail = b"trailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (size, len(content))
    return content + b"xref\n0 %d\n0000000000 65535 f \n%s%s" % (size, table, tail)


def form(value):
    """A PDF with a text field that was filled in."""
    objects = [
        "<</Type/Catalog/Pages 2 0 R/AcroForm<</Fields[4 0 R]/DA(/F 24 Tf 0 g)/NeedAppearances true"
        "/DR<</Font<</F 5 0 R>>>>>>>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 400 300]/Annots[4 0 R]/Resources<</Font<</F 5 0 R>>>>>>",
        f"<</Type/Annot/Subtype/Widget/FT/Tx/T(name)/V({value})/DA(/F 24 Tf 0 g)/F 4/Rect[20 150 380 200]/P 3 0 R>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    content, places = "%PDF-1.7\n", []
    for number, each in enumerate(objects, 1):
        places.append(len(content))
        content += f"{number} 0 obj\n{each}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    end = f"xref\n0 6\n0000000000 65535 f \n{table}trailer<</Size 6/Root 1 0 R>>\nstartxref\n{len(content)}\n%%EOF"
    return (content + end).encode()


def write_files(folder, texts=4, pictures=4):
    """Texts and pictures, in folders of different depth."""
    folder = Path(folder)
    for index in range(texts):
        path = folder / "texts" / f"{index}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text {index}", "utf-8")
    for index in range(pictures):
        path = folder / "pictures" / "deep" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(path)
    return folder


def write_texts(folder, count, seed=0):
    """Texts of many lengths."""
    rng = random.Random(seed)
    folder.mkdir(exist_ok=True)
    for index in range(count):
        (folder / f"{index:04d}.txt").write_text(" ".join(rng.choices("abcdefgh", k=rng.randint(1, 30))) + f" {index}")
    return folder


def embed(given, out, model, **options):
    """Run in this process. Returns the errors."""
    more = {name: options.pop(name) for name in ("retry_failed", "ray", "workers") if name in options}
    return run(str(given), str(out), Options(str(model), device="cpu", **options), **more)


def read(out):
    """The rows of a corpus, by id."""
    _, batches = read_units(str(out))
    rows = [row for batch in batches for row in batch.to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def same(corpus, other, tolerance=1e-5):
    """Whether two corpora have the same rows. Batches of other sizes change the last bits of a vector."""
    return corpus.keys() == other.keys() and all(
        np.allclose(row["embedding"], other[id]["embedding"], atol=tolerance)
        and row | {"embedding": None} == other[id] | {"embedding": None}
        for id, row in corpus.items()
    )
