"""A Space that searches the files beside it: embed them, index them, show the page. `prepare.py` puts them there."""

import hashlib
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from btok_hf.corpus.app import launch, make_page
from btok_hf.corpus.index import Index
from btok_hf.corpus.job import Options
from btok_hf.corpus.search import Searcher
from btok_hf.corpus.workers import run

HERE = Path(__file__).resolve().parent
# Not in this folder, which may be uploaded or moved: the database holds paths of this machine.
# Another model has other vectors, and so another database.
NAME = hashlib.sha256(str(HERE).encode() + (HERE / "model" / "golden.json").read_bytes()).hexdigest()[:16]
CACHE = Path(HF_HOME, "btok-space", NAME)

if __name__ == "__main__":
    # Only what is new or changed since the last start.
    run(str(HERE / "files"), str(CACHE / "embedded"), Options(model=str(HERE / "model")))
    Index.build(CACHE / "embedded", CACHE / "db")
    launch(make_page(Searcher(CACHE / "db")))
