"""Search a folder of images, texts and videos with a text, an image or a video.

    python examples/search.py examples/files "tiger face"
    python examples/search.py FOLDER --image query.png --top 3
    python examples/search.py FOLDER "a chart of sales" --model path/or/name/of/a/model

All files of the folder and its subfolders are searched. Texts are .txt and .md files. Videos need PyAV
(`pip install av`). Files that cannot be read are named and skipped.

The default model is what `make model` built: it reads English and knows emoji drawings. Where nothing is built, it is
the small one in this repository. That knows drawings of 56 x 56 pixels of animals, food and faces, and terms of
textbooks. For photographs and documents use a large model.
"""

import argparse
from pathlib import Path

from sentence_transformers.util import semantic_search

from btok_hf import BTokSentenceTransformer
from btok_hf.errors import one_line_errors
from btok_hf.inputs import check_input
from btok_hf.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES

ROOT = Path(__file__).resolve().parents[1]
BUILT, SMALL = ROOT / "runs" / "btok-135m", ROOT / "benchmarks" / "unified" / "models" / "btok-small"
TEXT_SUFFIXES = (".txt", ".md")


def default_model():
    """What `make model` built, or else the small model in the repository."""
    return BUILT if (BUILT / "golden.json").exists() else SMALL


def as_input(path):
    """A file as an input of the model, which opens images and videos itself. So few of them are in memory at once."""
    if path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
        return path
    if path.suffix.lower() not in TEXT_SUFFIXES:
        raise ValueError(f"{path.name} is not an image, a text (.txt, .md) or a video")
    text = path.read_text("utf-8").strip()
    if not text:
        raise ValueError(f"{path.name} holds no text")
    return {"text": text}


def attempt(path, read, *arguments):
    """The result of `read`. If the file cannot be read, it is named, and the result is `None`."""
    try:
        return read(*arguments)
    except (ImportError, OSError, ValueError) as error:  # without PyAV, videos raise an ImportError
        # `check_input` puts the input before its error. The line names the file already.
        print(f"skipped {path}: {error.__cause__ if str(error).startswith('Input ') else error}")


def search(folder, query, image, model, top):
    """Print the files that are nearest to a text, or to an image or video."""
    item = {"text": query} if image is None else as_input(image)
    files = {path: attempt(path, as_input, path) for path in sorted(folder.rglob("*")) if path.is_file()}
    nothing = f"{folder} holds no file that can be read"
    if not any(files.values()):
        raise ValueError(nothing)
    model = BTokSentenceTransformer(model)
    query = model.encode_query([item], convert_to_tensor=True)
    limits = model.transformer.image_limits
    # The files are checked one by one, so that a bad one does not end the encoding. Images are not kept.
    paths = [path for path, item in files.items() if item and attempt(path, check_input, item, limits)]
    if not paths:
        raise ValueError(nothing)
    vectors = model.encode_document([files[path] for path in paths], convert_to_tensor=True)
    for hit in semantic_search(query, vectors, top_k=top)[0]:
        print(f"{hit['score']:.3f}  {paths[hit['corpus_id']]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to search")
    parser.add_argument("query", nargs="?", help="text to search for")
    parser.add_argument("--image", type=Path, help="image or video to search for, instead of a text")
    parser.add_argument(
        "--model", default=default_model(), help="folder or Hub name of a model (default: %(default)s)"
    )
    parser.add_argument("--top", type=int, default=5, help="number of hits")
    arguments = parser.parse_args()
    if not arguments.folder.is_dir():
        parser.error(f"{arguments.folder} is not a folder. Give the folder to search first, then the query.")
    if (arguments.query is None) == (arguments.image is None):
        parser.error("give a text or --image, and not both")
    if arguments.query is not None and not arguments.query.strip():
        parser.error("the query is empty. Give a text to search for.")
    if arguments.image is not None and not arguments.image.is_file():
        parser.error(f"--image {arguments.image} is not a file")
    if arguments.top < 1:
        parser.error(f"--top must be 1 or more, got {arguments.top}")
    with one_line_errors():
        search(**vars(arguments))


if __name__ == "__main__":
    main()
