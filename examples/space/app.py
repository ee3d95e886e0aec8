"""A Space that searches the files beside it: embed them, index them, show the page. `prepare.py` puts them there."""

from pathlib import Path

from btok_hf.corpus.app import launch, make_page
from btok_hf.corpus.index import Index
from btok_hf.corpus.job import Options
from btok_hf.corpus.search import Searcher
from btok_hf.corpus.workers import run

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    # Only what is new or changed since the last start.
    run(str(HERE / "files"), str(HERE / "embedded"), Options(model=str(HERE / "model")))
    Index.build(HERE / "embedded", HERE / "db")
    launch(make_page(Searcher(HERE / "db")))
