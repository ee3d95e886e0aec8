"""Write a folder that is a Space: a page that searches drawings, clips, pages and texts, with its model and files.

    python -m examples.space.prepare build/space             # with what `make model` built, or else the small model
    python build/space/app.py                                # the page, on this machine
    hf upload org/search build/space --repo-type space       # the same on the Hub

The files are emoji and pages of textbooks that the model was not trained on.
"""

import argparse
import re
import shutil
from pathlib import Path

import av
import numpy as np

from benchmarks.unified import inputs
from benchmarks.unified.inputs import DRAWING
from btok_hf.media import as_rgb
from examples.search import default_model

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LICENSES = {
    "LICENSES-emoji.md": ROOT / "data" / "emoji" / "LICENSES.md",
    "LICENSES-textbooks.md": ROOT / "benchmarks" / "unified" / "data" / "LICENSES.md",
}
PAGES_OF_PDF = 10
SPACE = ("README.md", "requirements.txt", "app.py")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="folder to write")
    parser.add_argument("--each", type=int, default=75, help="drawings, clips, texts and pages (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=default_model(), help="its folder (default: %(default)s)")
    arguments = parser.parse_args()
    if not arguments.model.is_dir():
        parser.error(f"--model {arguments.model} is not a folder. Give the folder of an exported model.")
    output = arguments.output_dir
    if arguments.model.resolve().is_relative_to((output / "model").resolve()):
        parser.error(f"--model {arguments.model} is the copy in {output}, which is replaced. Name the original.")
    output.mkdir(parents=True, exist_ok=True)
    for name, source in {**{name: HERE / name for name in SPACE}, **LICENSES}.items():
        shutil.copy(source, output / name)
    if (output / "model").exists():  # of an earlier run, whose weights may have other names
        shutil.rmtree(output / "model")
    shutil.copytree(arguments.model, output / "model")
    write_files(output / "files", arguments.each)
    print(f"Wrote {output}. Show the page with: python {output}/app.py")


def write_files(folder, count):
    """Write so many drawings, clips, texts and pages, each kind into a folder of its own."""
    for name in ("drawings", "clips", "texts", "pages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for row in spread(inputs.emoji()["unseen_drawings"], count):
        picture = as_rgb(row["image"]).resize((DRAWING, DRAWING))
        picture.save(folder / "drawings" / f"{slug(row['names']['en'])}.png")
    for row in spread(inputs.books("clips", "test"), count):
        write_clip(folder / "clips" / f"{slug(row['name'])}.mp4", inputs.clip(row["frames"])["video"]["array"])
    for row in spread(inputs.books("glossary", "test"), count):
        (folder / "texts" / f"{slug(row['term'])}.txt").write_text(f"{row['term']}: {row['definition']}\n", "utf-8")
    pages = spread(list(inputs.pages("test")), count)
    for start in range(0, len(pages), PAGES_OF_PDF):
        first, *rest = (inputs.page(page["title"], page["text"]) for page in pages[start : start + PAGES_OF_PDF])
        name = folder / "pages" / f"textbook-{start // PAGES_OF_PDF + 1}.pdf"
        first.save(name, save_all=True, append_images=rest)


def spread(rows, count):
    """So many rows, evenly spaced."""
    return [rows[int(index)] for index in np.linspace(0, len(rows) - 1, min(count, len(rows)))]


def slug(name):
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_clip(path, frames):
    """Frames of shape `(frames, height, width, 3)` as H.264, two per second."""
    with av.open(path, "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=2)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()
