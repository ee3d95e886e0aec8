"""Dynamic batching: rows of many clients are queued, and one thread embeds whatever has queued up.

So batches grow under load, and a single row does not wait for others. A `Budget` bounds what is queued.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np


class Row(NamedTuple):
    """The embedding of one input and the tokens it took."""

    embedding: np.ndarray
    tokens: int


class QueueFull(Exception):
    """A request would exceed a bound on all requests together."""


class Budget:
    """A bound on all requests together, e.g. on the pixels of images that wait, are read, or are embedded.

    Args:
        most (`int`): The bound.
        what (`str`): What is counted, and the flag that sets the bound, for the error message.
    """

    def __init__(self, most: int, what: str) -> None:
        self.held, self._most, self._what, self._lock = 0, most, what, threading.Lock()

    @contextmanager
    def reserve(self, amount: int = 0) -> Iterator[Callable[[int], None]]:
        """Reserve an amount for the time of a request. Nothing waits: what does not fit is refused.

        Yields:
            `Callable[[int], None]`: Function that reserves more for the same request, or releases some if the number
            is negative. It may be called from any thread, and raises `QueueFull` too once the request has ended.

        Raises:
            QueueFull: The amount does not fit at the moment.
        """
        mine, ended = 0, False

        def add(more: int) -> None:
            nonlocal mine
            with self._lock:
                if ended:
                    raise QueueFull("the request has ended")
                if self.held + more > self._most:
                    raise QueueFull(f"the queue of {self._most} {self._what} is full; try again soon")
                self.held += more
                mine += more

        add(amount)
        try:
            yield add
        finally:
            with self._lock:
                ended = True
                self.held -= mine


class Batcher:
    """Embeds rows in one thread, in batches of whatever is waiting.

    Args:
        embed (`Callable`): Function from a list of inputs and their prompt (`str`) to the embeddings, an array of
            shape `(inputs, dimensions)`, and the number of tokens of each input.
        batch_rows (`int`): Largest number of rows in a batch.
        observe (`Callable`, *optional*): Called with the number of rows of each batch.
    """

    def __init__(
        self,
        embed: Callable[[list[Any], str], tuple[np.ndarray, Sequence[int] | np.ndarray]],
        batch_rows: int,
        observe: Callable[[int], Any] | None = None,
    ) -> None:
        self._embed, self._batch_rows, self._observe = embed, batch_rows, observe
        self._waiting: deque[tuple[Any, str, Future[Row]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        # A daemon thread, so that a process that is interrupted twice ends without waiting for it.
        self._thread = threading.Thread(target=self._run, name="btok-batches", daemon=True)
        self._thread.start()

    def submit(self, items: Sequence[Any], prompt: str) -> list[Future[Row]]:
        """Queue inputs that were checked. An input whose future is cancelled before its batch is not embedded.

        Raises:
            RuntimeError: The batcher is closed.
        """
        futures: list[Future[Row]] = [Future() for _ in items]
        with self._changed:
            if self._closed:
                raise RuntimeError("The server is stopping.")
            self._waiting.extend((item, prompt, future) for item, future in zip(items, futures))
            self._changed.notify()
        return futures

    def close(self) -> None:
        """Embed what is queued, then end the thread. Waits for it."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                taken = [self._waiting.popleft() for _ in range(min(self._batch_rows, len(self._waiting)))]
            by_prompt: dict[str, list[tuple[Any, Future[Row]]]] = {}
            for item, prompt, future in taken:
                if future.set_running_or_notify_cancel():
                    by_prompt.setdefault(prompt, []).append((item, future))
            for prompt, batch in by_prompt.items():
                self._answer(batch, prompt)

    def _answer(self, batch: list[tuple[Any, Future[Row]]], prompt: str) -> None:
        """Embed rows with the same prompt. If that fails, they are embedded one by one, so that only bad rows fail."""
        if self._observe is not None:
            self._observe(len(batch))
        try:
            embeddings, tokens = self._embed([item for item, _ in batch], prompt)
            if not len(embeddings) == len(tokens) == len(batch):
                raise RuntimeError(f"The model gave {len(embeddings)} embeddings for {len(batch)} rows.")
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            else:
                for row in batch:
                    self._answer([row], prompt)
            return
        for (_, future), embedding, count in zip(batch, embeddings, tokens):
            if np.isfinite(embedding).all():
                future.set_result(Row(embedding, int(count)))
            else:
                future.set_exception(RuntimeError("The model's embedding is not finite."))
