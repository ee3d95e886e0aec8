"""Batches from many clients: order, isolation of faults, bounds."""

import threading

import numpy as np
import pytest

from btok_hf.serving.batching import Batcher, Budget, QueueFull


class Model:
    """Embeds numbers. It refuses batches with a negative one, and waits until it may go on."""

    def __init__(self):
        self.batches, self.may_go_on, self.waits = [], threading.Event(), threading.Event()

    def embed(self, items, prompt):
        self.batches.append((prompt, items))
        self.waits.set()
        self.may_go_on.wait(10)
        if min(items) < 0:
            raise ValueError(f"{items} is bad")
        return np.array([[item, len(prompt)] for item in items], dtype=float), [1] * len(items)


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def batcher(model):
    batcher = Batcher(model.embed, batch_rows=4)
    yield batcher
    model.may_go_on.set()
    batcher.close()


def test_rows_that_wait_become_batches_by_prompt(model, batcher):
    first = batcher.submit([1], "")
    model.waits.wait(10)
    rest = batcher.submit([2, 3], "p") + batcher.submit([4], "") + batcher.submit([5, 6], "p")
    model.may_go_on.set()
    assert [future.result(10).embedding.tolist() for future in first + rest] == [
        [1, 0],
        [2, 1],
        [3, 1],
        [4, 0],
        [5, 1],
        [6, 1],
    ]
    assert model.batches == [("", [1]), ("p", [2, 3, 5]), ("", [4]), ("p", [6])]


def test_a_bad_row_fails_alone(model, batcher):
    model.may_go_on.set()
    good, bad, other = batcher.submit([1, -1, float("nan")], "")
    assert good.result(10).embedding[0] == 1
    with pytest.raises(ValueError, match=r"\[-1\] is bad"):
        bad.result(10)
    with pytest.raises(RuntimeError, match="not finite"):
        other.result(10)


def test_cancelled_rows_cost_nothing(model, batcher):
    batcher.submit([1], "")
    model.waits.wait(10)
    gone, kept = batcher.submit([2, 3], "")
    assert gone.cancel()
    model.may_go_on.set()
    assert kept.result(10).embedding[0] == 3 and model.batches[-1] == ("", [3])


def test_a_budget_is_bounded_and_released():
    budget = Budget(8, "rows (--queue-rows)")
    with budget.reserve(5):
        with pytest.raises(QueueFull, match=r"the queue of 8 rows \(--queue-rows\) is full"), budget.reserve(4):
            pass
        with budget.reserve(3):
            assert budget.held == 8
    assert budget.held == 0
    with pytest.raises(KeyError), budget.reserve(8):
        raise KeyError
    with budget.reserve(8):
        pass


def test_a_request_reserves_more_until_it_has_ended():
    budget = Budget(8, "pixels")
    with budget.reserve() as add:
        add(5)
        with pytest.raises(QueueFull, match="the queue of 8 pixels is full"):
            add(4)
        add(3)
        assert budget.held == 8
        add(-2)
        assert budget.held == 6
    assert budget.held == 0
    with pytest.raises(QueueFull, match="ended"):  # a thread that still reads for it
        add(1)
    assert budget.held == 0


def test_a_model_that_loses_rows_is_an_error_and_not_a_wait():
    batcher = Batcher(lambda items, prompt: (np.ones((1, 2)), [1] * len(items)), batch_rows=4)
    first, second = batcher.submit([1, 2], "")
    assert first.result(10).tokens == second.result(10).tokens == 1  # one by one
    batcher.close()
    batcher = Batcher(lambda items, prompt: (np.ones((0, 2)), []), batch_rows=4)
    with pytest.raises(RuntimeError, match="0 embeddings for 1 rows"):
        batcher.submit([1], "")[0].result(10)
    batcher.close()


def test_closing_answers_what_is_queued(model):
    batcher = Batcher(model.embed, batch_rows=4)
    futures = batcher.submit([1], "") + batcher.submit([2], "")
    model.may_go_on.set()
    batcher.close()
    assert [future.result(0).embedding[0] for future in futures] == [1, 2]
    with pytest.raises(RuntimeError, match="stopping"):
        batcher.submit([3], "")
