"""Search a folder of images, texts and videos with a text, an image or a video.

    python examples/search.py examples/files "tiger face"
    python examples/search.py FOLDER --image query.png --top 3
    python examples/search.py FOLDER "a chart of sales" --model path/or/name/of/a/model

All files of the folder and its subfolders are searched. Texts are .txt and .md files. Videos need PyAV
(`pip install av`). Files that cannot be read are named and skipped.

The default model is the small one in this repository. It knows drawings of 56 x 56 pixels of animals, food and faces,
and terms of textbooks. For photographs and documents use a large model.
"""

import argparse
from pathlib import Path

import torch
from sentence_transformers.util import semantic_search

from btok_hf import BTokSentenceTransformer
from btok_hf.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES

MODEL = Path(__file__).resolve().parents[1] / "benchmarks" / "unified" / "models" / "btok-small"
TEXT_SUFFIXES = (".txt", ".md")
UNREADABLE = (OSError, ValueError, ImportError)  # no such file, broken content, PyAV is not installed


def read(path):
    """A file as an input of the model, which opens images and videos itself."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return {"image": str(path)}
    if suffix in VIDEO_SUFFIXES:
        return {"video": str(path)}
    if suffix not in TEXT_SUFFIXES:
        raise ValueError("not an image, a text (.txt, .md) or a video")
    text = path.read_text("utf-8").strip()
    if not text:
        raise ValueError("holds no text")
    return {"text": text}


def encode(model, paths):
    """The files that can be read and their vectors. A batch that fails is halved until the bad file is alone."""
    try:
        return paths, list(model.encode_document([read(path) for path in paths], convert_to_tensor=True))
    except UNREADABLE as error:
        if len(paths) == 1:
            print(f"skipped {paths[0]}: {error}")
            return [], []
        middle = len(paths) // 2
        (first, some), (second, others) = encode(model, paths[:middle]), encode(model, paths[middle:])
        return first + second, some + others


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to search")
    parser.add_argument("query", nargs="?", help="text to search for")
    parser.add_argument("--image", type=Path, help="image or video to search for, instead of a text")
    parser.add_argument("--model", default=MODEL, help="folder or Hub name of a model (default: the one in here)")
    parser.add_argument("--top", type=int, default=5, help="number of hits")
    arguments = parser.parse_args()
    if not arguments.folder.is_dir():
        parser.error(f"{arguments.folder} is not a folder. Give the folder to search first, then the query.")
    if (arguments.query is None) == (arguments.image is None):
        parser.error("give a text or --image, and not both")

    model = BTokSentenceTransformer(arguments.model)
    try:
        query = model.encode_query([arguments.query or read(arguments.image)], convert_to_tensor=True)
    except UNREADABLE as error:
        parser.error(f"cannot read the query {arguments.image}: {error}")
    paths, vectors = encode(model, sorted(path for path in arguments.folder.rglob("*") if path.is_file()))
    if not paths:
        parser.error(f"{arguments.folder} holds no file that can be read")
    for hit in semantic_search(query, torch.stack(vectors), top_k=arguments.top)[0]:
        print(f"{hit['score']:.3f}  {paths[hit['corpus_id']]}")


if __name__ == "__main__":
    main()
