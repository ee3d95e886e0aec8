"""Embeddings on disk under a fingerprint of the model, and the encoding of what is missing."""

import json
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b
from itertools import chain

import numpy as np
import torch
from tqdm import tqdm

from btok_hf.evaluation.loading import read_input
from btok_hf.evaluation.metrics import check_embeddings
from btok_hf.files import replacing
from btok_hf.golden import versions
from btok_hf.inputs import estimate_tokens

ROWS_PER_FILE = 256
# Media that are decoded ahead of the model.
DECODED_AHEAD = 8


def fingerprint(model, prompt=None):
    """What embeddings depend on besides the input, as a short text: never the same for two models.

    It covers weights, modules, configuration, tokenizer, chat template, pixel settings, prompt, and the versions of
    torch, torchvision, transformers and sentence-transformers. Hashing takes about a second per gigabyte.

    Args:
        model (`SentenceTransformer`): The model.
        prompt (`str`, *optional*): Put before every input.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    first = model[0]
    processor, tokenizer = getattr(first, "processor", None), getattr(first, "tokenizer", None)
    config = getattr(model, "config", None)
    config = config.to_dict() if config is not None else {}
    settings = {
        "versions": versions(),
        "modules": [(type(module).__module__, type(module).__qualname__, _options(module)) for module in model],
        "config": {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")},
        "max_seq_length": model.max_seq_length,
        "truncate_dim": model.truncate_dim,
        "prompt": prompt,
        "template": [getattr(part, "chat_template", None) for part in (processor, tokenizer)],
        "pixels": [
            part.to_dict()
            for part in (getattr(processor, kind, None) for kind in ("image_processor", "video_processor"))
            if part is not None
        ],
    }
    if hasattr(tokenizer, "backend_tokenizer"):
        settings["tokenizer"] = json.loads(tokenizer.backend_tokenizer.to_str())
        # Set anew by every call.
        settings["tokenizer"] |= {"padding": None, "truncation": tokenizer.truncation_side}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _options(module):
    return module.get_config_dict() if hasattr(module, "get_config_dict") else None


def hash_of(*parts):
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def task_inputs(task):
    """Everything that is encoded for a task, queries first, as (key, what it is, input)."""
    rows = ((f"query {row} ({query.id!r})", query.input) for row, query in enumerate(task.queries))
    for label, item in chain(rows, ((f"candidate {name!r}", item) for name, item in task.candidates.items())):
        try:
            yield _key(item, task.num_frames), label, item
        except OSError as error:  # it was there when the task was loaded
            raise OSError(f"{task.name}, {label}: {error}. Put it back and start again.") from error


def _key(item, num_frames):
    """What an input is known by: text, and where its files are, how large and how old."""
    parts = {"text": item.get("text")}
    if "image" in item:
        parts["image"] = _known_by(item["image"])
    if "video" in item:
        frames = sorted(entry.path for entry in os.scandir(item["video"]))
        parts |= {"video": [_known_by(path) for path in frames], "num_frames": num_frames}
    return bytes.fromhex(hash_of(parts))


def _known_by(path):
    stat = os.stat(path)
    return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]


class EmbeddingStore:
    """Embeddings of one model on disk, by the key of their input.

    Args:
        folder (`Path`): One per model.
    """

    def __init__(self, folder):
        self.folder, self.dimension = folder, None
        self._files, self._places = [], {}
        folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __contains__(self, key):
        return key in self._places

    def refresh(self):
        """Take in what other processes wrote."""
        for path in sorted(set(self.folder.glob("*.embeddings")) - set(self._files)):
            with self._open(path) as (keys, vectors):
                self.dimension = self.dimension or vectors().shape[1]
            self._places |= {key.tobytes(): (len(self._files), row) for row, key in enumerate(keys)}
            self._files.append(path)

    def add(self, keys, vectors):
        """Write the embeddings, an array of shape `(keys, dimension)`, as one file."""
        keys = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
        with replacing(self.folder / f"{blake2b(keys.tobytes(), digest_size=16).hexdigest()}.embeddings") as file:
            np.save(file, keys)
            np.save(file, vectors)

    def vectors(self, keys):
        """The embeddings as an array of shape `(keys, dimension)`; each file is read once."""
        places = np.array([self._places[key] for key in keys])
        result = np.empty((len(keys), self.dimension), np.float32)
        for number in np.unique(places[:, 0]):
            chosen = np.flatnonzero(places[:, 0] == number)
            with self._open(self._files[number]) as (_, vectors):
                result[chosen] = vectors()[places[chosen, 1]]
        return result

    @contextmanager
    def _open(self, path):
        try:
            with open(path, "rb") as file:
                yield np.load(file), lambda: np.load(file)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"The file of embeddings {path} is damaged ({error}). Delete it and start again."
            ) from error


class Encoder:
    """Fills the store with the inputs of a task: those that it lacks, and this process's share of them."""

    def __init__(self, model, prompt, batch_tokens, store, state):
        self.model, self.prompt, self.batch_tokens = model, prompt, batch_tokens
        self.store, self.state = store, state
        self.tokenize = getattr(getattr(model, "tokenizer", None), "tokenize", None)
        self.processor = getattr(model, "processor", None)

    def encode(self, task):
        """Encode what is missing of a task. Every process must call it, and then synchronise and refresh the store."""
        missing = {}
        for key, label, item in task_inputs(task):
            if key not in self.store:
                missing.setdefault(key, (key, label, item))
        # Every other row, so that each process gets equally many images, videos and texts.
        share = [*missing.values()][self.state.process_index :: self.state.num_processes]
        bar = tqdm(total=len(share), desc=task.name, unit="row", disable=not (share and self.state.is_main_process))
        with bar, ThreadPoolExecutor(DECODED_AHEAD) as pool:
            for start in range(0, len(share), ROWS_PER_FILE):
                part = share[start : start + ROWS_PER_FILE]
                # Like inputs together: less padding, and many models take no batch of several kinds.
                part.sort(key=lambda row: (sorted(row[2]), len(row[2].get("text") or "")))
                vectors = []
                for batch in self._batches(part, task, pool):
                    labels, items = zip(*batch)
                    try:
                        vectors.append(check_embeddings(self._call(list(items)), labels, self.store.dimension))
                    except ValueError as error:
                        raise ValueError(f"{task.name}, {labels[0]} to {labels[-1]}: {error}") from error
                    self.store.dimension = vectors[-1].shape[1]
                    bar.update(len(batch))
                self.store.add([key for key, *_ in part], np.concatenate(vectors))

    def _call(self, items):
        if not hasattr(self.model, "encode"):
            return self.model(items)
        # Never below encode's own 32: stock models take the rows as one batch either way, and BTokSentenceTransformer,
        # which counts tokens by batch_size, would cut a batch of few long rows in parts.
        return self.model.encode(items, batch_size=max(len(items), 32), prompt=self.prompt, show_progress_bar=False)

    def _batches(self, part, task, pool):
        """Lists of (label, decoded input) of one kind within the budget of tokens."""
        batch, longest = [], 0
        for label, item in self._decoded(part, task, pool):
            tokens = self._tokens(item)
            if batch and (
                item.keys() != batch[0][1].keys() or max(longest, tokens) * (len(batch) + 1) > self.batch_tokens
            ):
                yield batch
                batch, longest = [], 0
            batch.append((label, item))
            longest = max(longest, tokens)
        yield batch

    def _decoded(self, part, task, pool):
        """Labels and inputs, with media decoded by threads a little ahead of the model."""
        ahead = deque()
        for _, label, item in part:
            ahead.append((label, pool.submit(read_input, item, task.num_frames)))
            if len(ahead) > DECODED_AHEAD:
                yield self._result(task, *ahead.popleft())
        while ahead:
            yield self._result(task, *ahead.popleft())

    def _result(self, task, label, future):
        try:
            return label, future.result()
        except (ValueError, OSError) as error:
            raise ValueError(f"{task.name}, {label}: {error}") from error

    def _tokens(self, item):
        """About how many tokens an input takes, with the 16 around the text and the media."""
        return 16 + estimate_tokens([self.prompt, item], self.processor, self.tokenize)
