"""A Bottleneck-Token model as an embedding function of LanceDB, for tables of your own.

Importing this module registers it: `get_registry().get("btok").create(name="org/btok-2b")`. A table whose schema names
it embeds what is added to it and what is searched for. Import the module before you do either; otherwise LanceDB
raises `KeyError: 'btok'`.
"""

import io
from functools import cached_property
from typing import Any

try:
    import pyarrow as pa
    from lancedb.embeddings import EmbeddingFunction, register
except ModuleNotFoundError as error:
    raise ImportError(f"It needs the package {error.name}: pip install 'btok-hf[corpus]'.") from error
from PIL import Image

from btok_hf.sentence_transformer import BTokSentenceTransformer


@register("btok")
class BTokEmbeddings(EmbeddingFunction):
    """Embeds texts, images (bytes of a file, PIL) and dicts of them. Texts are never taken for names of files.

    Args:
        name (`str`): Folder or Hub id of the model.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        device (`str`, *optional*): Device of the model. Default: a GPU if there is one.
    """

    name: str
    revision: str | None = None
    device: str | None = None

    @cached_property
    def _model(self) -> BTokSentenceTransformer:
        return BTokSentenceTransformer(self.name, revision=self.revision, device=self.device)

    def ndims(self) -> int:
        """Dimensions of an embedding."""
        dimensions = self._model.get_embedding_dimension()
        assert dimensions is not None
        return dimensions

    def compute_query_embeddings(self, query: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """The embedding of a query, in a list."""
        return list(self._model.encode_query([_as_input(query)], show_progress_bar=False))

    def compute_source_embeddings(self, items: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """The embeddings of rows."""
        rows = items.to_pylist() if isinstance(items, (pa.Array, pa.ChunkedArray)) else items
        rows = [_as_input(row) for row in ([rows] if isinstance(rows, (str, bytes)) else rows)]
        return list(self._model.encode_document(rows, show_progress_bar=False))


def _as_input(value: Any) -> Any:
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, (bytes, bytearray)):
        return {"image": Image.open(io.BytesIO(value))}
    return value
