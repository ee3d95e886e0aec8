"""Search drawings, videos, textbook pages, definitions and figures with a text or a picture: one model, one space.

    python examples/search.py "polar bear"
    python examples/search.py drawing.png --among videos --top 3
    python examples/search.py "polar bear" --model runs/emoji/model    # after `make demo`; trained on drawings alone

Searched are all drawings, and the clips and textbooks that the unified benchmark's models do not train on. The default
model is that benchmark's, of 1.6 million parameters, which is in the repository; stock Sentence-Transformers loads it.
It knows animals, food and faces. How well it does on each kind is in docs/results.md: pages it cannot read.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image
from sentence_transformers import SentenceTransformer, util

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "unified"))
from tasks import DRAWING, ROOT, books, clip, cut, draw, emoji, page, pages, square

MODEL = ROOT / "benchmarks" / "unified" / "models" / "btok-small"

# kind: (label, input) of each thing to find
COLLECTIONS = {
    "drawings": lambda: [
        (f"{row['emoji']} {row['names']['en']}", draw(row["image"], size=DRAWING))
        for part in emoji().values()
        for row in part
    ],
    "videos": lambda: [(f"{row['emoji']} {row['name']}", clip(row["frames"])) for row in books("clips", "test")],
    "pages": lambda: [(part["title"], page(part["title"], part["text"])) for part in pages("test")],
    "definitions": lambda: [(row["term"], cut(row["definition"])) for row in books("glossary", "test")],
    "figures": lambda: [(row["caption"][:80], square(row["image"])) for row in books("figures", "test")],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("query", help="a text, or the path of an image")
    parser.add_argument("--among", choices=COLLECTIONS, default="drawings", help="what to search")
    parser.add_argument("--top", type=int, default=5, help="number of hits")
    parser.add_argument("--model", default=MODEL, help="exported repository (default: the one of docs/results.md)")
    arguments = parser.parse_args()
    if not Path(arguments.model, "modules.json").is_file():
        raise SystemExit(f"{arguments.model} is not the folder of an exported model. Make one with: make demo")
    if arguments.top < 1:
        raise SystemExit(f"--top must be at least 1, got {arguments.top}.")

    model = SentenceTransformer(str(arguments.model))
    labels, things = zip(*COLLECTIONS[arguments.among]())
    candidates = model.encode_document(list(things), batch_size=128)
    # A file is drawn like the training pictures: on white, small.
    is_file = Path(arguments.query).is_file()
    query = draw(Image.open(arguments.query), size=DRAWING) if is_file else arguments.query
    hits = util.semantic_search(model.encode_query([query]), candidates, top_k=arguments.top)[0]
    for hit in hits:
        print(f"{hit['score']:.3f}  {labels[hit['corpus_id']]}")


if __name__ == "__main__":
    main()
