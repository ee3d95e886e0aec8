"""A Space that searches the files beside it: embed them, index them, show the page. `prepare.py` puts them there."""

import hashlib
import shutil
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from btok_hf.corpus.app import launch, make_page
from btok_hf.corpus.index import Index
from btok_hf.corpus.job import Options
from btok_hf.corpus.search import Searcher
from btok_hf.corpus.workers import run

HERE = Path(__file__).resolve().parent
# Not in this folder, which may be uploaded or moved: the database holds paths of this machine.
OWN = Path(HF_HOME, "btok-space", hashlib.sha256(str(HERE).encode()).hexdigest()[:16])

if __name__ == "__main__":
    # Another model has other vectors, and so another database.
    model = b"".join(path.read_bytes() for path in sorted((HERE / "model").glob("*.json")))
    cache = OWN / hashlib.sha256(model).hexdigest()[:16]
    for old in OWN.glob("*"):
        if old != cache:
            shutil.rmtree(old)
    # Only what is new or changed since the last start.
    run(str(HERE / "files"), str(cache / "embedded"), Options(model=str(HERE / "model")))
    Index.build(cache / "embedded", cache / "db")
    launch(make_page(Searcher(cache / "db")))
