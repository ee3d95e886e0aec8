"""The loop of `encode`: put inputs into batches by their number of tokens, embed the batches, restore the order."""

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.decorators import deprecated_kwargs
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedConfig

from btok_hf.arguments import check_truncate_dim
from btok_hf.compat import require_methods
from btok_hf.input_kinds import is_message
from btok_hf.inputs import ImageLimits, check_input
from btok_hf.lengths import estimate_tokens
from btok_hf.modeling.modeling_btok import bottleneck_token_ids

require_methods(SentenceTransformer, "_inference")
logger = logging.getLogger(__name__)

# Tokens per row of `encode`'s batch_size. The default of 32 rows is 2,048 tokens on a CPU, where larger batches exceed
# the caches, and 16,384 tokens on other devices.
CPU_ROW_TOKENS, ROW_TOKENS = 64, 512
# Errors of a single input. Other errors end the whole call.
ROW_ERRORS = (ValueError, OSError)

# Types of one input that can be iterated.
SINGULAR = (str, bytes, list, tuple, Mapping, np.ndarray, Tensor)

Item = TypeVar("Item")
Result = TypeVar("Result")
Batch = tuple[list[int], dict[str, Any]]


class Encoded(NamedTuple):
    """What `encode(…, on_error="skip")` returns.

    Args:
        embeddings (`numpy.ndarray` or `torch.Tensor` of shape `(kept, hidden)`, or `list` of tensors): As `encode`
            would return them for the kept inputs alone.
        kept (`numpy.ndarray` of shape `(kept,)`): int64. `embeddings[i]` belongs to `inputs[kept[i]]`. Ascending.
        errors (`dict[int, str]`): Why each other input was skipped, by its position.
    """

    embeddings: Any
    kept: np.ndarray
    errors: dict[int, str]


class Skipping(list):
    """Inputs of which unreadable ones are skipped.

    Attributes:
        errors (`dict[int, str]`): Filled by `embed_batches`: the reason for each skipped position.
    """

    def __init__(self, inputs: Iterable[Any]) -> None:
        super().__init__(inputs)
        self.errors: dict[int, str] = {}

    def result(self, embeddings: Any) -> Encoded:
        """The embeddings of the kept inputs with their positions. Skipped ones are counted in a warning."""
        kept = np.array([index for index in range(len(self)) if index not in self.errors], dtype=np.int64)
        if self.errors:
            first = min(self.errors)
            logger.warning(
                "%d of %d inputs were skipped. The first: %s", len(self.errors), len(self), self.errors[first]
            )
        return Encoded(embeddings, kept, dict(sorted(self.errors.items())))


class PackedEncoder(SentenceTransformer):
    """`encode` of a model with one `BottleneckTransformer`: batches by tokens, and unreadable inputs skipped."""

    @deprecated_kwargs(sentences="inputs")
    def encode(self, inputs: Any, *args: Any, on_error: Literal["raise", "skip"] = "raise", **kwargs: Any) -> Any:
        """Embed inputs. All other arguments and results are those of `SentenceTransformer.encode`.

        `encode_query` and `encode_document` take `on_error` as well.

        Args:
            inputs: A list of inputs (see `preprocess`), or one input.
            on_error (`str`): What to do with an input that cannot be read. "raise" ends with an error that names it.
                "skip" leaves it out, and returns an `Encoded` instead of only embeddings.

        Returns:
            The embeddings; with "skip", an `Encoded`: `embeddings`, `kept` (the position of each) and `errors` (why
            each other input was skipped, by position).

        Raises:
            FileNotFoundError, OSError, ValueError: With "raise", an input that cannot be read. The message has its
                position. An unknown `on_error`, or "skip" with one input, `output_value` or several processes.
        """
        if on_error == "raise":
            return super().encode(inputs, *args, **kwargs)
        if on_error != "skip":
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}.")
        bound = inspect.signature(super().encode).bind(inputs, *args, **kwargs).arguments
        if self.is_singular_input(inputs):
            raise ValueError(
                "on_error='skip' needs a list of inputs. Put the one input (messages are one) into a list."
            )
        if bound.get("output_value", "sentence_embedding") != "sentence_embedding":
            raise ValueError("on_error='skip' gives embeddings only. Leave output_value out.")
        if bound.get("pool") is not None or isinstance(bound.get("device"), list):
            raise ValueError(
                "on_error='skip' works in one process. Leave pool out and name one device, or start processes that "
                "each encode a part of the inputs."
            )
        rows = Skipping(inputs)
        embeddings = super().encode(rows, *args, **kwargs)
        if not len(embeddings) and not isinstance(embeddings, list):
            embeddings = embeddings.reshape(0, bound.get("truncate_dim") or self.get_embedding_dimension())
            if isinstance(embeddings, np.ndarray):
                embeddings = embeddings.astype(np.float32)  # the array of an empty list is of float64
        return rows.result(embeddings)

    # The superclass narrows the type.
    def is_singular_input(self, inputs: Any) -> bool:  # type: ignore[override]
        """Whether this is a single input. A list of chat messages is; a list that mixes them with others is not.

        Raises `ValueError` for what holds inputs and is no list, such as a generator or a data frame.
        """
        if isinstance(inputs, list) and any(map(is_message, inputs)) and not all(map(is_message, inputs)):
            return False
        is_singular = super().is_singular_input(inputs)
        if is_singular and hasattr(inputs, "__iter__") and not isinstance(inputs, SINGULAR):
            raise ValueError(
                f"encode takes a list of inputs or one input, got {type(inputs).__name__}. Give a list: list(…) of "
                'them; of a dataset or data frame, list(data["column"]).'
            )
        return is_singular

    def start_multi_process_pool(self, target_devices: list[str] | None = None) -> Any:
        """As in Sentence-Transformers, also after images were embedded.

        transformers observes the layers of some vision towers with functions that cannot be sent to other processes.
        It sets them up again when they are needed.
        """
        for module in self.modules():
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__name__", "") == "output_capturing_hook":
                    del module._forward_hooks[key]
            vars(module).pop("_output_capturing_hooks_installed", None)
        return super().start_multi_process_pool(target_devices)

    # As in SentenceTransformer, the superclass names fewer arguments.
    @torch.inference_mode()
    def _inference(  # type: ignore[override]
        self,
        inputs: list,
        *,
        prompt: str | None,
        batch_size: int,
        show_progress_bar: bool,
        output_value: str | None,
        save_to_cpu: bool,
        normalize_embeddings: bool,
        truncate_dim: int | None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> list[Tensor] | Tensor | list[dict[str, Any]]:
        """Embed inputs in batches of similar length. `encode` calls this after checking its arguments."""
        if output_value not in ("sentence_embedding", None):
            raise ValueError(
                f"output_value must be 'sentence_embedding', or None for all features, got {output_value!r}: packed "
                "encoding gives no states of single tokens. AutoModel(…).last_hidden_state has them."
            )
        if output_value is None:  # all features of each row, padded
            try:
                return super()._inference(
                    inputs,
                    prompt=prompt,
                    batch_size=batch_size,
                    show_progress_bar=show_progress_bar,
                    output_value=output_value,
                    save_to_cpu=save_to_cpu,
                    normalize_embeddings=normalize_embeddings,
                    truncate_dim=truncate_dim,
                    device=device,
                    **kwargs,
                )
            except (ValueError, OSError) as error:
                if str(error).startswith("Input "):  # the superclass sorts them, and does not say from where
                    for place in np.argsort([-self._input_length(item) for item in inputs]):
                        self.preprocess([inputs[place]], prompt=prompt, positions=[int(place)], **kwargs)
                raise
        check_truncate_dim(truncate_dim)
        device = self._resolve_inference_device(device)
        self.eval()
        token_ids = bottleneck_token_ids(cast(PreTrainedConfig, self.config))
        around = estimate_tokens({"text": prompt or ""}, self.processor) + len(token_ids) + 4
        longest = self.max_seq_length or math.inf
        tokens = [min(around + estimate_tokens(item, self.processor), longest) for item in inputs]

        def preprocess(items: list[Any], positions: list[int]) -> dict[str, Any]:
            return self.preprocess(items, prompt=prompt, positions=positions, **kwargs)

        def embed(features: dict[str, Any]) -> Tensor:
            # Features stay on the CPU: `condense` copies them to the device after its checks.
            rows = self(features, **kwargs)["sentence_embedding"][:, :truncate_dim]
            return F.normalize(rows, dim=1) if normalize_embeddings else rows

        limits = cast(ImageLimits, self[0].image_limits)
        embeddings = embed_batches(
            inputs,
            tokens,
            batch_size * (CPU_ROW_TOKENS if device.type == "cpu" else ROW_TOKENS),
            lambda item, position: check_input(item, limits, position),
            preprocess,
            embed,
            save_to_cpu=save_to_cpu,
            # On a CPU a thread does not help: resizing in another thread starts a second pool of OpenMP threads, which
            # competes for the same cores.
            ahead=device.type != "cpu",
            show_progress_bar=show_progress_bar,
        )
        return torch.tensor([], device=device) if embeddings is None else embeddings


def embed_batches(
    inputs: list[Any],
    tokens: Sequence[float],
    budget: float,
    check: Callable[[Any, int], Any],
    preprocess: Callable[[list[Any], list[int]], dict[str, Any]],
    embed: Callable[[dict[str, Any]], Tensor],
    *,
    save_to_cpu: bool,
    ahead: bool,
    show_progress_bar: bool = False,
) -> Tensor | None:
    """Embed inputs in batches of similar length.

    Args:
        inputs (`list`): Inputs of `encode`. Those in a `Skipping` that cannot be read are left out and noted there.
        tokens (`Sequence[float]`): Estimated tokens of each input.
        budget (`float`): Tokens of a batch.
        check (`Callable`): From one input and its position to a checked input.
        preprocess (`Callable`): From inputs and their positions to features. Raises ValueError or OSError for a batch
            with an unreadable input.
        embed (`Callable`): From features to embeddings of shape `(batch, hidden)`.
        save_to_cpu (`bool`): Return the embeddings on the CPU.
        ahead (`bool`): Prepare the next batch in a thread while one is embedded.
        show_progress_bar (`bool`): Show a bar of batches.

    Returns:
        `torch.Tensor` of shape `(kept, hidden)`, in the order of the inputs; `None` if no input is left.

    Raises:
        ValueError: An embedding is not finite (of a `Skipping`: all that are left), or what `preprocess` raises.
    """

    def prepare(batch: list[int]) -> Batch:
        if not isinstance(inputs, Skipping):
            return batch, preprocess([inputs[index] for index in batch], batch)
        rows = {}
        for index in batch:
            try:
                rows[index] = check(inputs[index], index)
            except ROW_ERRORS as error:
                inputs.errors[index] = str(error)
        return _fitting(inputs, rows, preprocess)

    batches = token_batches(tokens, budget)
    queued: list[_Queued] = []
    # Leaving the block, also through an error, waits for the batch in the thread.
    with ThreadPoolExecutor(1) as thread:
        prepared = _ahead(thread, prepare, batches) if ahead else map(prepare, batches)
        for batch, features in tqdm(prepared, "Batches", len(batches), disable=not show_progress_bar):
            if not batch:
                continue
            queued.append(_Queued(batch, embed(features), save_to_cpu))
            # Read the batch before this one: a GPU is already computing this one.
            for last in queued[-2:-1]:
                last.read(inputs)
    if not queued:
        return None
    embeddings = torch.cat([batch.read(inputs) for batch in queued])
    if not len(embeddings):  # skipping all that could be read would hide broken weights
        broken = {index: reason for batch in queued for index, reason in batch.errors.items()}
        raise ValueError(broken[min(broken)])
    order = torch.tensor([index for batch in queued for index in batch.positions])
    return embeddings[order.argsort().to(embeddings.device)]


class NotFiniteError(ValueError):
    """An embedding is not finite. The cause is the weights, and not the input."""


class _Queued:
    """Embeddings that a GPU may still compute, of the inputs at these positions."""

    def __init__(self, positions: list[int], embeddings: Tensor, save_to_cpu: bool) -> None:
        self.positions, on_gpu = positions, embeddings.is_cuda
        self.errors: dict[int, str] = {}  # of those that are not finite, by position
        self.embeddings = embeddings.to("cpu", non_blocking=on_gpu) if save_to_cpu else embeddings
        self.finite = embeddings.isfinite().all(1).to("cpu", non_blocking=on_gpu)
        self.event = torch.cuda.current_stream(embeddings.device).record_event() if on_gpu else None

    def read(self, inputs: list[Any]) -> Tensor:
        """Wait for the embeddings. Of a `Skipping`, those that are not finite are left out and noted."""
        if self.event is not None:
            self.event.synchronize()
            self.event = None
            if self.embeddings.device.type == "cpu":  # in pinned memory, of which a machine has little
                self.embeddings = self.embeddings.clone()
        if not self.finite.all():
            broken = [index for index, good in zip(self.positions, self.finite.tolist()) if not good]
            self.errors = {index: _not_finite(index, self.embeddings.dtype) for index in broken}
            if not isinstance(inputs, Skipping):
                raise NotFiniteError(self.errors[broken[0]])
            inputs.errors |= self.errors
            self.positions = [index for index in self.positions if index not in self.errors]
            self.embeddings = self.embeddings[self.finite.to(self.embeddings.device)]
            self.finite = self.finite[self.finite]
        return self.embeddings


def _not_finite(index: int, dtype: torch.dtype) -> str:
    return (
        f"The embedding of input {index} is not finite. The weights are broken, or too large for {dtype}: check the "
        "checkpoint, or load it with model_kwargs={'dtype': 'bfloat16'}."
    )


def _fitting(inputs: Skipping, rows: dict[int, Any], preprocess: Callable[[list[Any], list[int]], Any]) -> Batch:
    """The features of the checked rows that can be processed. The reasons why others cannot are noted in `inputs`."""
    if not rows:
        return [], {}
    positions = list(rows)
    try:
        return positions, preprocess(list(rows.values()), positions)
    except ROW_ERRORS as error:
        reason = str(error)
    if len(rows) == 1:
        try:
            preprocess([inputs[positions[0]]], positions)
        except ROW_ERRORS as error:  # of the input as the user gave it, with its file name
            reason = str(error)
        inputs.errors[positions[0]] = reason
        return [], {}
    # Bisection: one bad row among n costs about log2(n) further attempts instead of n.
    middle = len(rows) // 2
    for half in (positions[:middle], positions[middle:]):
        kept, _ = _fitting(inputs, {index: rows[index] for index in half}, preprocess)
        rows = {index: row for index, row in rows.items() if index not in half or index in kept}
    return _fitting(inputs, rows, preprocess)


def _ahead(thread: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map(function, items)`, but the executor `thread` computes the next result while one is used."""
    ahead: Future[Result] | None = None
    for item in items:
        ready, ahead = ahead, thread.submit(function, item)
        if ready:
            yield ready.result()
    if ahead:
        yield ahead.result()


def token_batches(tokens: Sequence[float], budget: float) -> list[list[int]]:
    """Batches of input indices with at most `budget` tokens, longest inputs first. A longer input is alone."""
    batches: list[list[int]] = []
    room = 0.0
    for index in sorted(range(len(tokens)), key=tokens.__getitem__, reverse=True):
        if not batches or tokens[index] > room:
            batches.append([])
            room = budget
        batches[-1].append(index)
        room -= tokens[index]
    return batches
