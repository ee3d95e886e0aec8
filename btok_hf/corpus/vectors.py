"""How vectors are stored: cut to fewer dimensions, as 32 or 16 bits a number, or as one bit.

Embeddings have length 1. What is read back has length 1 too, so that a dot product is a cosine. A bit says whether a
number is positive: the vector of such signs keeps the direction roughly.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from btok_hf.arguments import named_source

Precision = Literal["float32", "float16", "binary"]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1, fp32. A vector of zeros or NaN is a `ValueError`: it has no direction."""
    vectors = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise ValueError(
            "A vector has the length 0 or is not finite: it points nowhere. Embed its row again with `btok embed`."
        )
    return vectors / lengths


def cut(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """The first `dimensions` numbers of vectors, with length 1.

    Args:
        vectors (`np.ndarray`): Shape `(..., d)`.
        dimensions (`int`): At most `d`.

    Returns:
        `np.ndarray`: fp32, shape `(..., dimensions)`.
    """
    return unit(vectors[..., :dimensions])


def check_dimensions(corpus: Mapping[str, Any], dimensions: int) -> None:
    """Raise an error if the model of a corpus was not trained for embeddings of so many dimensions.

    Args:
        corpus (`Mapping`): Settings of the corpus: `model`, `revision`, `dimensions`.
        dimensions (`int`): Leading dimensions that shall be kept.

    Raises:
        OSError: The model's `config.json` cannot be read.
        ValueError: It does not name these dimensions, or vectors of the corpus have fewer.
    """
    from transformers import AutoConfig  # slow to import, and needed only here

    from btok_hf import model_info

    name = corpus["model"]
    with named_source(name):
        config = AutoConfig.from_pretrained(name, revision=None if Path(name).exists() else corpus["revision"])
    model_info.check_dimensions(name, config, dimensions, corpus["dimensions"])


def stored_type(dimensions: int, precision: Precision) -> pa.DataType:
    """The Arrow type of a stored vector."""
    if precision == "binary":
        return pa.list_(pa.uint8(), -(-dimensions // 8))
    return pa.list_(pa.float16() if precision == "float16" else pa.float32(), dimensions)


def bits(vectors: np.ndarray) -> np.ndarray:
    """One bit for each number, eight of them a byte: uint8, shape `(..., ceil(d / 8))`."""
    return np.packbits(vectors > 0, axis=-1)


def store(vectors: np.ndarray, precision: Precision) -> pa.FixedSizeListArray:
    """Vectors of shape `(n, d)` as a column of a table."""
    kind = stored_type(vectors.shape[1], precision)
    numbers = bits(vectors) if precision == "binary" else vectors.astype(kind.value_type.to_pandas_dtype())
    return pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel(), kind.value_type), type=kind)


def load(column: pa.Array, dimensions: int, precision: Precision) -> np.ndarray:
    """A stored column as vectors of length 1: fp32, shape `(n, dimensions)`."""
    numbers = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)
    if precision == "binary":
        numbers = np.unpackbits(numbers, axis=1, count=dimensions) * 2.0 - 1.0
    return unit(numbers)
