"""Keep embeddings on disk under a fingerprint of the model, and encode the inputs that are missing.

The order of an evaluation is in `mmeb.py`; ranking and scores are in `metrics.py`.
"""

import inspect
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from btok_hf.evaluation.loading import read_input
from btok_hf.evaluation.metrics import check_embeddings
from btok_hf.evaluation.tasks import Task, TaskInput
from btok_hf.files import replacing
from btok_hf.golden import versions
from btok_hf.lengths import estimate_tokens

ROWS_PER_FILE = 256
# Inputs whose media are decoded ahead of the model.
DECODED_AHEAD = 8


class KeyedInput(NamedTuple):
    """An input to encode.

    Args:
        key (`bytes`): Identifies the input in an `EmbeddingStore`.
        label (`str`): Its name in error messages.
        item (`TaskInput`): The input.
    """

    key: bytes
    label: str
    item: TaskInput


def fingerprint(model: SentenceTransformer, prompt: str | None = None) -> str:
    """A hash of everything that embeddings depend on, apart from the input.

    It covers weights, modules, adapters, configuration, tokenizer, chat template, pixel settings, prompt, and the
    versions of btok-hf, pillow, torch, torchvision, transformers and sentence-transformers. Hashing takes about a
    second per gigabyte.

    Args:
        model (`SentenceTransformer`): The model.
        prompt (`str`, *optional*): Prompt before every input.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = getattr(model, "config", None)
    options = config.to_dict() if config is not None else {}
    settings: dict[str, Any] = {
        "versions": installed(),
        "adapters": _adapters(model),
        "modules": [(type(module).__module__, type(module).__qualname__, _options(module)) for module in model],
        **_own_class(model),
        "config": {k: v for k, v in options.items() if k not in ("_name_or_path", "transformers_version")},
        "max_seq_length": model.max_seq_length,
        "truncate_dim": model.truncate_dim,
        "prompt": prompt,
        # A Router has several modules that read inputs.
        "readers": [_reading(part) for module in model for part in module.modules() if hasattr(part, "tokenizer")],
    }
    digest.update(json.dumps(_with_texts_as_keys(settings), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _reading(module: Any) -> dict[str, Any]:
    """How a module turns inputs into tokens and pixels: template, image sizes, tokenizer."""
    processor, tokenizer = getattr(module, "processor", None), module.tokenizer
    parts = (getattr(processor, kind, None) for kind in ("image_processor", "video_processor"))
    settings: dict[str, Any] = {
        "template": [getattr(part, "chat_template", None) for part in (processor, tokenizer)],
        "pixels": [part.to_dict() for part in parts if part is not None],
    }
    if hasattr(tokenizer, "backend_tokenizer"):
        settings["tokenizer"] = json.loads(tokenizer.backend_tokenizer.to_str())
        # The tokenizer's padding and truncation are left out: every call sets them.
        settings["tokenizer"] |= {"padding": None, "truncation": tokenizer.truncation_side}
    return settings


def _with_texts_as_keys(value: Any) -> Any:
    """For JSON: the keys of a Router's settings are tuples."""
    if isinstance(value, dict):
        return {str(key): _with_texts_as_keys(part) for key, part in value.items()}
    return [_with_texts_as_keys(part) for part in value] if isinstance(value, (list, tuple)) else value


def installed() -> dict[str, str]:
    """Versions of the packages that embeddings depend on, with those that read images and videos."""
    return {**{name: version(name) for name in ("btok-hf", "pillow")}, **versions()}


def _own_class(model: SentenceTransformer) -> dict[str, Any]:
    """Classes of a user's own, which may embed otherwise, with their code. Those of the two libraries embed alike."""
    own = []
    for kind in type(model).__mro__:
        if kind.__module__.partition(".")[0] in ("btok_hf", "sentence_transformers"):
            break
        try:
            code = inspect.getsource(kind)
        except (OSError, TypeError):  # written into an interpreter
            code = None
        own.append((kind.__module__, kind.__qualname__, code))
    return {"class": own} if own else {}


def _options(module: torch.nn.Module) -> Any:
    read = getattr(module, "get_config_dict", None)
    return None if read is None else read()


def _adapters(model: torch.nn.Module) -> list[tuple[Any, ...]]:
    """What adapters do to each layer, apart from their weights: how much they count, and which of them are in use."""
    return [
        (
            name,
            layer.active_adapters,
            layer.disable_adapters,
            getattr(layer, "scaling", None),
            getattr(layer, "merged_adapters", None),
        )
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "disable_adapters", None), bool)  # of PEFT's layers; models have such a method
    ]


def hash_of(*parts: Any) -> str:
    """A hash of values that JSON can hold."""
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def task_inputs(task: Task) -> Iterator[KeyedInput]:
    """All inputs of a task: its queries, then its candidates."""
    rows = ((f"query {row} ({query.id!r})", query.input) for row, query in enumerate(task.queries))
    for label, item in chain(rows, ((f"candidate {name!r}", item) for name, item in task.candidates.items())):
        try:
            yield KeyedInput(_key(item, task.num_frames), label, item)
        except OSError as error:  # the file was there when the task was loaded
            raise OSError(f"{task.name}, {label}: {error}. Put it back and start again.") from error


def _key(item: TaskInput, num_frames: int | None) -> bytes:
    """A hash of an input: its text, and the path, size and time of its files."""
    parts: dict[str, Any] = {"text": item.get("text")}
    if "image" in item:
        parts["image"] = _file_state(item["image"])
    if "video" in item:
        frames = sorted(entry.path for entry in os.scandir(item["video"]))
        parts |= {"video": [_file_state(path) for path in frames], "num_frames": num_frames}
    return bytes.fromhex(hash_of(parts))


def _file_state(path: str) -> list:
    stat = os.stat(path)
    return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]


class EmbeddingStore:
    """Embeddings of one model on disk, by the key of their input.

    Args:
        folder (`Path`): Folder of this model's embeddings.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dimension: int | None = None
        self._files: list[Path] = []
        self._places: dict[bytes, tuple[int, int]] = {}  # number of the file, row in it
        folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def refresh(self) -> None:
        """Find the files that other processes wrote."""
        for path in sorted(set(self.folder.glob("*.embeddings")) - set(self._files)):
            with self._open(path) as (keys, vectors):
                self.dimension = self.dimension or vectors().shape[1]
            self._places |= {key.tobytes(): (len(self._files), row) for row, key in enumerate(keys)}
            self._files.append(path)

    def add(self, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        """Write embeddings, an array of shape `(keys, dimension)`, to one file."""
        rows = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
        with replacing(self.folder / f"{blake2b(rows.tobytes(), digest_size=16).hexdigest()}.embeddings") as file:
            np.save(file, rows)
            np.save(file, vectors)

    def vectors(self, keys: Sequence[bytes]) -> np.ndarray:
        """The embeddings as an array of shape `(keys, dimension)`. Each file is read once."""
        assert self.dimension is not None  # the store holds the keys, so it is not empty
        if absent := sum(key not in self._places for key in keys):
            raise ValueError(
                f"Of {len(keys)} inputs, {absent} have no embedding: their files were changed while the model ran. "
                "Start again when nothing writes to them any more."
            )
        places = np.array([self._places[key] for key in keys])
        result = np.empty((len(keys), self.dimension), np.float32)
        for number in np.unique(places[:, 0]):
            chosen = np.flatnonzero(places[:, 0] == number)
            with self._open(self._files[number]) as (_, vectors):
                result[chosen] = vectors()[places[chosen, 1]]
        return result

    @contextmanager
    def _open(self, path: Path) -> Iterator[tuple[np.ndarray, Callable[[], np.ndarray]]]:
        """The keys of a file, and a function that reads its vectors."""
        try:
            with open(path, "rb") as file:
                yield np.load(file), lambda: np.load(file)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"The file of embeddings {path} is damaged ({error}). Delete it and start again."
            ) from error


class Encoder:
    """Encodes the inputs of a task that the store lacks; each process encodes its share of them.

    Args:
        model (`SentenceTransformer` or `Callable`): As in `mmeb.evaluate`.
        prompt (`str`, *optional*): Prompt before every input.
        batch_tokens (`int`): About how many tokens a forward pass may take, padding included.
        store (`EmbeddingStore`): Where embeddings are written.
        state (`PartialState`): The processes.
    """

    def __init__(
        self,
        model: SentenceTransformer | Callable[[list], Any],
        prompt: str | None,
        batch_tokens: int,
        store: EmbeddingStore,
        state: PartialState,
    ) -> None:
        self.model, self.prompt, self.batch_tokens = model, prompt, batch_tokens
        self.store, self.state = store, state
        self.tokenize = getattr(getattr(model, "tokenizer", None), "tokenize", None)
        self.processor = getattr(model, "processor", None)

    def encode(self, task: Task) -> None:
        """Encode what is missing of a task. Every process must call it, then synchronise and refresh the store."""
        missing: dict[bytes, KeyedInput] = {}
        for row in task_inputs(task):
            if row.key not in self.store:
                missing.setdefault(row.key, row)
        # Strided, so that each process gets the same mix of images, videos and texts.
        share = [*missing.values()][self.state.process_index :: self.state.num_processes]
        bar = tqdm(total=len(share), desc=task.name, unit="row", disable=not (share and self.state.is_main_process))
        with bar, ThreadPoolExecutor(DECODED_AHEAD) as pool:
            for start in range(0, len(share), ROWS_PER_FILE):
                part = share[start : start + ROWS_PER_FILE]
                # Sorted by kind and length: less padding, and many models refuse batches of mixed kinds.
                part.sort(key=lambda row: (sorted(row.item), len(row.item.get("text") or "")))
                vectors: list[np.ndarray] = []
                for batch in self._batches(part, task, pool):
                    labels, items = zip(*batch)
                    try:
                        vectors.append(check_embeddings(self._call(list(items)), labels, self.store.dimension))
                    except ValueError as error:
                        raise ValueError(f"{task.name}, {labels[0]} to {labels[-1]}: {error}") from error
                    self.store.dimension = vectors[-1].shape[1]
                    bar.update(len(batch))
                self.store.add([row.key for row in part], np.concatenate(vectors))

    def _call(self, items: list[dict[str, Any]]) -> Any:
        encode = getattr(self.model, "encode", None)
        if encode is None:
            return self.model(items)
        # At least 32, the default of encode. Stock models take the rows as one batch either way. With a smaller value
        # BTokSentenceTransformer, which counts tokens by batch_size, would split a batch of few long rows.
        return encode(items, batch_size=max(len(items), 32), prompt=self.prompt, show_progress_bar=False)

    def _batches(
        self, part: Sequence[KeyedInput], task: Task, pool: ThreadPoolExecutor
    ) -> Iterator[list[tuple[str, dict[str, Any]]]]:
        """Lists of (label, decoded input) of one kind that fit the token budget."""
        batch: list[tuple[str, dict[str, Any]]] = []
        longest = 0
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

    def _decoded(
        self, part: Sequence[KeyedInput], task: Task, pool: ThreadPoolExecutor
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Labels and inputs. Threads decode the media a few inputs ahead of the model."""
        ahead: deque[tuple[str, Future[dict[str, Any]]]] = deque()
        for row in part:
            ahead.append((row.label, pool.submit(read_input, row.item, task.num_frames)))
            if len(ahead) > DECODED_AHEAD:
                yield self._result(task, *ahead.popleft())
        while ahead:
            yield self._result(task, *ahead.popleft())

    def _result(self, task: Task, label: str, future: Future[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        try:
            return label, future.result()
        except (ValueError, OSError) as error:
            raise ValueError(f"{task.name}, {label}: {error}") from error

    def _tokens(self, item: dict[str, Any]) -> int:
        """About how many tokens an input takes. The template adds about 16 to those of text and media."""
        return 16 + estimate_tokens([self.prompt, item], self.processor, self.tokenize)
