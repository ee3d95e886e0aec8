"""Search emoji drawings with a text in any of the trained languages, or with a picture.

    python examples/search_emoji.py "polar bear" --top 5
    python examples/search_emoji.py drawing.png

Uses the model that `make demo` writes to runs/emoji/model, through stock Sentence-Transformers.
"""

import argparse
from pathlib import Path

from datasets import concatenate_datasets, load_dataset
from PIL import Image
from prepare_emoji import CATEGORIES, DATA, draw
from sentence_transformers import SentenceTransformer, util


def load_drawings():
    """All drawings of the trained categories, seen and unseen in training, as datasets rows."""
    splits = load_dataset(str(DATA))
    names = ("train", "unseen_drawings", "unseen_concepts")
    parts = [splits[name].add_column("split", [name] * len(splits[name])) for name in names]
    drawings = concatenate_datasets(parts)
    chosen = [index for index, category in enumerate(drawings["category"]) if category in CATEGORIES]
    return drawings.select(chosen)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("query", help="a text, or the path of an image")
    parser.add_argument("--top", type=int, default=5, help="number of hits")
    parser.add_argument("--model", default="runs/emoji/model", help="exported repository")
    arguments = parser.parse_args()
    if not Path(arguments.model, "modules.json").is_file():
        raise SystemExit(f"There is no model in {arguments.model}. Make one with: make demo")
    if arguments.top < 1:
        raise SystemExit(f"--top must be at least 1, got {arguments.top}.")

    model = SentenceTransformer(arguments.model)
    drawings = load_drawings()
    candidates = model.encode_document([draw(image) for image in drawings["image"]], batch_size=256)
    # A file is drawn like the training pictures: on white, small.
    query = draw(Image.open(arguments.query)) if Path(arguments.query).is_file() else arguments.query
    hits = util.semantic_search(model.encode_query([query]), candidates, top_k=arguments.top)[0]
    for hit in hits:
        row = drawings[hit["corpus_id"]]
        print(f"{hit['score']:.3f}  {row['emoji']}  {row['names']['en']}  ({row['artist']}, {row['split']})")


if __name__ == "__main__":
    main()
