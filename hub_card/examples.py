"""The inputs in the snippets of a model card, and the similarities that the model computes for them.

The snippets themselves are in `card.md.jinja`.
"""

import io
import platform
import re
from collections.abc import MutableMapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from btok_hf.hub_card.card import EXAMPLES, Example
from btok_hf.input_kinds import is_media_path
from btok_hf.inputs import REMOTE
from btok_hf.media import IMAGE_SUFFIXES, as_rgb, read_image

if TYPE_CHECKING:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    from btok_hf.sentence_transformer import BTokSentenceTransformer

# Texts are truncated and images reduced to these sizes, before the similarities are computed.
EXAMPLE_CHARACTERS = 120
EXAMPLE_PIXELS = 512

Parts = tuple[Sequence[Any], str | None]  # images (PIL, or paths) and text of an input


def measured_examples(
    model: "BTokSentenceTransformer",
    evaluator: "InformationRetrievalEvaluator | None",
    files: MutableMapping[str, Any],
) -> dict[str, Any]:
    """The inputs of the snippets, and the similarities that the model computes for them.

    Args:
        model (`BTokSentenceTransformer`): The trained model.
        evaluator (`InformationRetrievalEvaluator` or `None`): Source of the inputs. Fixed texts are used if it is
            `None` or has no query with an answer that consist of texts and images.
        files (`dict[str, bytes]`): The images are added to it as PNG files, by path in the repository.

    Returns:
        `dict`: `queries` and `documents`, each a list of (paths of images, text or `None`), and `similarities`.
    """
    chosen = None if evaluator is None else _choose(evaluator)
    rows = {side: [_shown(*row, files) for row in chosen[side]] for side in chosen} if chosen else EXAMPLES
    queries, documents = ([_read(*row, files) for row in rows[side]] for side in ("queries", "documents"))
    scores = model.similarity(model.encode_query(queries), model.encode_document(documents)).float().cpu()
    similarities = {
        "table": str(scores).splitlines(),
        "first": f"{scores[0, 0].item():.4f}",
        "source": evaluation_name(evaluator) if chosen and evaluator is not None else None,
        "where": f"{precision(model)} on {hardware(model.device)}",
    }
    return {**rows, "similarities": similarities}


def _choose(evaluator: "InformationRetrievalEvaluator") -> dict[str, list[Parts]] | None:
    """The first two queries, an answer to each, and another candidate. `None` if no query can be shown."""
    places = {document: place for place, document in enumerate(evaluator.corpus_ids)}
    queries: list[Parts] = []
    documents: dict[str, Parts] = {}
    for query_id, query in zip(evaluator.queries_ids, map(_parts, evaluator.queries)):
        answer = min(evaluator.relevant_docs[query_id])
        document = _parts(evaluator.corpus[places[answer]])
        if query and document and answer not in documents:
            queries.append(query)
            documents[answer] = document
        if len(queries) == 2:
            break
    if not queries:
        return None
    candidates = zip(places, map(_parts, evaluator.corpus))  # one by one: each image is decoded for it
    others = (parts for document, parts in candidates if parts and document not in documents)
    return {"queries": queries, "documents": [*documents.values(), *islice(others, 1)]}


def _parts(value: Any) -> Parts | None:
    """The images and the text of an input. `None` if a snippet cannot show it (video, messages, addresses)."""
    if isinstance(value, str):
        value = {"image" if is_media_path(value) else "text": value}
    elif not isinstance(value, dict):
        value = {"image": value}
    if not value.keys() <= {"image", "text"}:
        return None
    images, texts = (
        part if isinstance(part, (list, tuple)) else [part] for part in (value.get("image", []), value.get("text", []))
    )
    text = " ".join(texts).strip()[:EXAMPLE_CHARACTERS]
    # A text without images that looks like a file or an address would be read as such.
    named = not images and (is_media_path(text) or text.startswith(REMOTE))
    shown = all(isinstance(image, Image.Image) or _is_image_path(image) for image in images)
    return (images, text or None) if shown and not named and (images or text) else None


def _is_image_path(value: Any) -> bool:
    return isinstance(value, str) and Path(value).suffix.lower() in IMAGE_SUFFIXES and Path(value).is_file()


def _shown(images: Sequence[Any], text: str | None, files: MutableMapping[str, Any]) -> Example:
    """An input with paths instead of images. The images are added to `files`."""
    paths: list[str] = []
    for image in images:
        image = as_rgb(image) if isinstance(image, Image.Image) else read_image(image)
        if min(image.size) * EXAMPLE_PIXELS > 64 * max(image.size):  # a reduced thin image could be below one patch
            image.thumbnail((EXAMPLE_PIXELS, EXAMPLE_PIXELS))
        paths.append(f"assets/example_{sum(path.startswith('assets/example_') for path in files) + 1}.png")
        content = io.BytesIO()
        image.save(content, format="PNG")
        files[paths[-1]] = content.getvalue()
    return paths, text


def _read(paths: list[str], text: str | None, files: MutableMapping[str, Any]) -> Any:
    """The input that the snippets embed."""
    if not paths:
        return text
    images = [Image.open(io.BytesIO(files[path])) for path in paths]
    return {"image": images, "text": text} if text else {"image": images}


def evaluation_name(evaluator: "InformationRetrievalEvaluator") -> str:
    """Name of the evaluation data in the card."""
    return evaluator.name or "evaluation"


def precision(model: "BTokSentenceTransformer") -> str:
    """Data type of the weights, e.g. `bfloat16`."""
    return str(model.dtype).removeprefix("torch.")


def hardware(device: torch.device) -> str:
    """Name of the GPU, or of the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{(names or [platform.machine()])[0]} ({device.type}, {torch.get_num_threads()} threads)"
