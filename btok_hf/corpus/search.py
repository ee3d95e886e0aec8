"""Search a database with a text, an image or a video: the model, the database, and the files that were indexed."""

import threading
from pathlib import Path
from typing import Any

import numpy as np

from btok_hf.arguments import named_source
from btok_hf.corpus.index import Hit, Index
from btok_hf.corpus.units import locate
from btok_hf.model_info import identify
from btok_hf.sentence_transformer import BTokSentenceTransformer


class Searcher:
    """A database and the model that its items were embedded with. Methods may be called in several threads.

    Args:
        path (`str` or `Path`): Database of `btok index`.
        model (`str` or `Path`, *optional*): Folder or Hub id of the model. Default: what the database names. It must
            be the same model, wherever it is.
        device (`str`, *optional*): Device of the model. Default: a GPU if there is one.

    Attributes:
        index (`Index`): The database.
        model (`BTokSentenceTransformer`): The model.

    Raises:
        FileNotFoundError: There is no database, or the model is no longer where it was.
        ValueError: The model is not the one that the items were embedded with.
    """

    def __init__(self, path: str | Path, model: str | Path | None = None, device: str | None = None) -> None:
        self.index = Index.open(path)
        self.model = _load(self.index.settings, model, device)
        self._lock = threading.Lock()

    def search(
        self,
        text: str | None = None,
        image: Any = None,
        video: Any = None,
        k: int = 10,
        where: str | None = None,
        hybrid: bool = False,
    ) -> list[Hit]:
        """Embed a query of one or several parts and find the nearest items.

        Args:
            text (`str`, *optional*): Always a text, also if it looks like the name of a file.
            image, video (*optional*): A path, or another form of an image or video that `encode` takes.
            k (`int`): Most hits to return.
            where (`str`, *optional*): SQL condition that hits fulfil, e.g. `kind = 'image'`.
            hybrid (`bool`): Search for the words of `text` as well, and fuse both rankings.

        Returns:
            `list[Hit]`: Best first.

        Raises:
            ValueError: An empty query, or a part or condition that cannot be used.
        """
        words = text if text and text.strip() else None
        if hybrid and words is None:
            raise ValueError("A hybrid search needs a text, whose words it looks for. Give one, or search without it.")
        return self.index.search(self.embed(text, image, video), words if hybrid else None, k, where)

    def embed(self, text: str | None = None, image: Any = None, video: Any = None) -> np.ndarray:
        """The embedding of a query: fp32, shape `(d,)`. Arguments and errors are those of `search`."""
        parts = {"image": image, "video": video, "text": text if text and text.strip() else None}
        item: Any = {name: value for name, value in parts.items() if value is not None}
        if not item:
            raise ValueError("The query is empty: give a text, an image or a video to search for.")
        with self._lock:
            vectors: Any = self.model.encode_query([item], show_progress_bar=False, convert_to_numpy=True)
        return vectors[0]

    def reconstruct(self, item: dict[str, Any], prompt: str | None = None) -> str:
        """The text that the model decodes from the Bottleneck Tokens of an input (`BTokSentenceTransformer`)."""
        with self._lock:
            return self.model.reconstruct([item], prompt=prompt)[0]

    def open(self, hit: Hit) -> Path | None:
        """The file that an item came from, or `None` if there is none on this machine (any more)."""
        path = None if hit.source is None else Path(locate(self.index.settings, hit.source))
        return path if path is not None and path.is_file() else None


def _load(settings: dict[str, Any], model: str | Path | None, device: str | None) -> BTokSentenceTransformer:
    """The model of a database, read as it was to embed, after a comparison with what the database remembers."""
    name = str(model or settings["model"])
    on_hub = not Path(name).exists()
    try:
        with named_source(name):
            # A database of a model on the Hub remembers the commit, and one of a folder a hash of its files.
            revision, _ = identify(name, settings["revision"] if on_hub else None)
    except OSError as error:
        if model is not None:
            raise
        raise FileNotFoundError(
            f"The database was made with the model {name}, which cannot be loaded here: {error}. Say where it is with "
            "--model (model=…)."
        ) from error
    if revision != settings["revision"]:
        raise ValueError(
            f"The database was made with {settings['model']} at {settings['revision']}, and {name} is at {revision}: "
            "its vectors would mean something else. Give the same files, or embed the corpus again with this model."
        )
    pixels = settings["max_pixels"]
    return BTokSentenceTransformer(
        name,
        revision=revision if on_hub else None,
        device=device,
        max_seq_length=settings["max_seq_length"],
        truncate_dim=settings["embedding_dimensions"],
        model_kwargs={"dtype": settings["dtype"]},
        processor_kwargs={"max_pixels": pixels} if pixels else {},
    )
