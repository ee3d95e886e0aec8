"""The inputs that a card's snippets show, and the similarities that the model computes for them."""

import io
import platform
import re
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from btok_hf.hub_card.card import EXAMPLES
from btok_hf.inputs import REMOTE, is_media_path
from btok_hf.media import IMAGE_SUFFIXES, read_image

# Inputs of the snippets: texts are cut, images reduced, before they are embedded for the printed numbers.
EXAMPLE_CHARACTERS = 120
EXAMPLE_PIXELS = 512


def measured_examples(model, evaluator, files):
    """Inputs of the snippets and the similarities that the model computes for them.

    Args:
        model (`BTokSentenceTransformer`): The trained model.
        evaluator (`InformationRetrievalEvaluator` or `None`): Where the inputs come from. Fixed texts where it is
            `None`, or has no query and answer made of texts and images.
        files (`dict[str, bytes]`): Receives the images, PNG files by their path in the repository.

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
        "source": chosen and evaluation_name(evaluator),
        "where": f"{precision(model)} on {hardware(model.device)}",
    }
    return {**rows, "similarities": similarities}


def _choose(evaluator):
    """The first two queries with an answer each, these answers, and the first other candidate; `None` without any."""
    corpus = dict(zip(evaluator.corpus_ids, evaluator.corpus))
    queries, documents = [], {}
    for query_id, query in zip(evaluator.queries_ids, map(_parts, evaluator.queries)):
        answer = min(evaluator.relevant_docs[query_id])
        if query and answer not in documents and _parts(corpus[answer]):
            queries.append(query)
            documents[answer] = _parts(corpus[answer])
        if len(queries) == 2:
            break
    if not queries:
        return None
    others = (
        parts for document, parts in zip(corpus, map(_parts, corpus.values())) if parts and document not in documents
    )
    return {"queries": queries, "documents": [*documents.values(), *islice(others, 1)]}


def _parts(value):
    """The images and the text of an input; `None` if a snippet cannot show it (video, messages, addresses)."""
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
    # Alone, a text that names a file or an address would be taken for it.
    named = not images and (is_media_path(text) or text.startswith(REMOTE))
    shown = all(isinstance(image, Image.Image) or _is_image_path(image) for image in images)
    return (images, text or None) if shown and not named and (images or text) else None


def _is_image_path(value):
    return isinstance(value, str) and Path(value).suffix.lower() in IMAGE_SUFFIXES and Path(value).is_file()


def _shown(images, text, files):
    """An input as the snippets name it; its images go to `files`."""
    paths = []
    for image in images:
        image = (image if isinstance(image, Image.Image) else read_image(image)).convert("RGB")
        if min(image.size) * EXAMPLE_PIXELS > 64 * max(image.size):  # thin ones would end below one patch
            image.thumbnail((EXAMPLE_PIXELS, EXAMPLE_PIXELS))
        paths.append(f"assets/example_{sum(path.startswith('assets/example_') for path in files) + 1}.png")
        content = io.BytesIO()
        image.save(content, format="PNG")
        files[paths[-1]] = content.getvalue()
    return paths, text


def _read(paths, text, files):
    """The same input as the snippets embed it."""
    if not paths:
        return text
    images = [Image.open(io.BytesIO(files[path])) for path in paths]
    return {"image": images, "text": text} if text else {"image": images}


def evaluation_name(evaluator):
    """What the card calls an evaluator's data."""
    return evaluator.name or "evaluation"


def precision(model):
    """Data type of the weights, e.g. `bfloat16`."""
    return str(model.dtype).removeprefix("torch.")


def hardware(device):
    """Name of the GPU, or of the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{(names or [platform.machine()])[0]} ({device.type}, {torch.get_num_threads()} threads)"
