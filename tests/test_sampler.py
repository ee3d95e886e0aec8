"""Batches of a mixture: drawn by weight, in blocks, in a reproducible order."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler, NoDuplicatesBatchSampler
from torch.utils.data import ConcatDataset, RandomSampler

from btok_hf.training.sampler import GroupBatchSampler, MixtureBatchSampler

SIZES = {"a": 100, "b": 37, "c": 1000}


def mixture(weights=None, sizes=SIZES, batch_size=4, no_duplicates=False, seed=0, **kwargs):
    parts = [Dataset.from_dict({"group": np.arange(size) % 10}) for size in sizes.values()]
    generator = torch.Generator()
    options = {"batch_size": batch_size, "drop_last": False, "generator": generator, "seed": seed}
    samplers = [
        NoDuplicatesBatchSampler(part, **options)
        if no_duplicates
        else DefaultBatchSampler(RandomSampler(part, generator=generator), **options)
        for part in parts
    ]
    options = {"weights": weights or {"a": 1, "b": 2, "c": 0.5}, "num_batches": 300, **kwargs}
    return MixtureBatchSampler(ConcatDataset(parts), samplers, generator, seed, names=list(sizes), **options)


def source_of(batch):
    sources = {"a" if index < 100 else "b" if index < 137 else "c" for index in batch}
    assert len(sources) == 1
    return sources.pop()


def test_sources_are_drawn_by_weight():
    draws = 4000
    counts = Counter(map(source_of, mixture(num_batches=draws)))
    for name, share in {"a": 1 / 3.5, "b": 2 / 3.5, "c": 0.5 / 3.5}.items():
        assert abs(counts[name] - draws * share) < 4 * np.sqrt(draws * share * (1 - share)), name


def test_blocks_are_full_batches_of_one_source():
    sampler = mixture(block_size=16, num_batches=302)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 302 and all(len(set(batch)) == 4 for batch in batches)
    blocks = [set(map(source_of, batches[i : i + 4])) for i in range(0, 302, 4)]
    assert all(len(block) == 1 for block in blocks)
    changes = sum(first != second for first, second in itertools.pairwise(blocks))
    assert changes > 30  # drawn anew for each block


def test_each_source_is_walked_through_and_started_over():
    walks = {"a": [], "b": [], "c": []}
    for batch in mixture(num_batches=1000):
        walks[source_of(batch)] += batch
    first, second = walks["a"][:100], walks["a"][100:200]
    assert sorted(first) == sorted(second) == list(range(100)) and first != second
    # Each pass of 9 batches leaves out one of the 37 rows, and another one each time.
    passes = [walks["b"][i : i + 36] for i in range(0, 36 * 10, 36)]
    assert all(len(set(walked)) == 36 for walked in passes) and len(set(walks["b"])) == 37
    assert len(set(walks["c"])) == len(walks["c"])
    # Other weights change when a source is drawn, not the order of its rows.
    other = [index for batch in mixture({"a": 5, "b": 1, "c": 1}, num_batches=400) for index in batch]
    assert [index for index in other if index < 100][:300] == walks["a"][:300]


def test_no_duplicates_holds_in_a_mixture():
    batches = list(mixture(no_duplicates=True))
    assert batches == list(mixture(no_duplicates=True))
    offsets = {"a": 0, "b": 100, "c": 137}
    for batch in batches:
        assert len(batch) == 4 == len({(index - offsets[source_of(batch)]) % 10 for index in batch})
    assert len({index for batch in batches for index in batch if index < 100}) == 100
    assert len(set(map(tuple, batches))) == 300  # each pass in a new order


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ([40, 1, 1], "3 groups of up to 40 rows"),  # fewer than the rows of a batch
        ([40, 2, 2, 2], "4 groups of up to 40 rows"),
        ([3], "1 groups of up to 3 rows"),  # fewer than a batch, which would be one row
    ],
)
def test_groups_that_give_too_few_batches_are_refused(sizes, found):
    """Sentence-Transformers only warns. The training would end early, or not begin."""
    rows = Dataset.from_dict({"group": np.repeat(np.arange(len(sizes)), sizes)})
    for drop_last in (True, False):
        if sizes == [3] and drop_last:
            continue
        with pytest.raises(
            ValueError, match=rf"cannot fill \d+ batches of 4 .*: the \d+ rows give {found}\. Lower per_dev"
        ):
            GroupBatchSampler(rows, batch_size=4, drop_last=drop_last)


def test_an_epoch_that_is_too_short_is_an_error(monkeypatch):
    rows = Dataset.from_dict({"group": np.repeat(np.arange(5), [20, 5, 5, 5, 5])})
    samplers = [GroupBatchSampler(rows, batch_size=4, drop_last=drop_last) for drop_last in (True, False)]
    for sampler in samplers:
        assert list(map(len, sampler)) == [4] * 10  # in several passes
    once = GroupBatchSampler(rows, batch_size=4, drop_last=True, complete=False)
    monkeypatch.setattr("btok_hf.training.sampler.PASSES", 0)
    for sampler in samplers:
        with pytest.raises(ValueError, match=r"cannot fill 10 batches of 4 .*: the 40 rows give \d batches"):
            list(sampler)
    # A mixture reads the rows again, and an evaluation uses what there is.
    assert len(list(once)) < 10


@pytest.mark.parametrize(
    ("sizes", "lengths", "last"),
    [
        ([1] * 10, [4, 4, 2], 2),
        ([4, 1, 1, 1, 1, 1, 1], [4, 4, 2], 4),  # not a row of the large group alone; another pass may give 4
        ([2, 1], [2], 2),  # fewer than a batch
        ([1], [1], 1),
    ],
)
def test_the_last_batch_holds_the_rest_of_the_rows(sizes, lengths, last):
    rows = Dataset.from_dict({"group": np.repeat(np.arange(len(sizes)), sizes)})
    for epoch in range(5):
        sampler = GroupBatchSampler(rows, batch_size=4, drop_last=False, generator=torch.Generator())
        sampler.set_epoch(epoch)
        found = list(map(len, sampler))
        assert found[:-1] == lengths[:-1] and found[-1] in (lengths[-1], last) and len(sampler) == len(lengths)
        assert all(len({rows[index]["group"] for index in batch}) == len(batch) for batch in sampler)


@pytest.mark.parametrize("drop_last", [True, False])
def test_batches_without_duplicates_are_those_of_sentence_transformers(drop_last):
    for rows, most, seed in ((101, 60, 0), (200, 8, 1), (50, 3, 2)):
        groups = np.random.default_rng(seed).integers(most, size=rows)
        dataset = Dataset.from_dict({"group": groups})
        options = {"batch_size": 8, "drop_last": drop_last, "seed": seed}
        ours = GroupBatchSampler(dataset, **options, generator=torch.Generator(), complete=False)
        theirs = NoDuplicatesBatchSampler(dataset, **options, generator=torch.Generator())
        for epoch in range(3):
            ours.set_epoch(epoch), theirs.set_epoch(epoch)
            theirs.generator.manual_seed(seed + epoch)
            whole = list(theirs._iter_one_pass(lambda index, of=groups: {of[index]}, lambda a, b: bool(a & b)))
            assert list(ours) == whole and (drop_last or sum(map(len, whole)) == rows)


def test_a_large_group_takes_no_longer_than_small_ones():
    """A quarter of 100,000 rows. Passing over all that wait would take hours."""
    groups = [max(0, number - 25_000) for number in range(100_000)]
    sampler = GroupBatchSampler(
        Dataset.from_dict({"group": groups}), 64, True, generator=torch.Generator(), complete=False
    )
    start = time.monotonic()
    assert len(list(sampler)) > 1000 and time.monotonic() - start < 10


def test_groups_of_any_kind_are_compared_as_in_the_loss():
    rows = Dataset.from_dict({"group": [["x"], ["y"], ["x"], ["z"]] * 2})
    assert all({0, 2, 4, 6} & {*batch} for batch in GroupBatchSampler(rows, batch_size=3, drop_last=True))
    assert all(len({0, 2, 4, 6} & {*batch}) == 1 for batch in GroupBatchSampler(rows, batch_size=3, drop_last=True))


def test_the_order_follows_from_seed_and_epoch():
    def order(epoch=0, **kwargs):
        sampler = mixture(**kwargs)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order() == order() == order(num_batches=1000)[:300]
    later = mixture()
    assert list(later) == order()
    later.set_epoch(3)
    assert list(later) == list(later) == order(epoch=3)
    orders = [order(), order(epoch=1), order(epoch=2), order(seed=1), order(seed=1, epoch=1)]
    assert len(set(map(str, orders))) == len(orders)
    drawn = ["".join(map(source_of, batches)) for batches in orders]
    assert len(set(drawn)) == len(drawn)


def test_processes_share_blocks_and_resume(monkeypatch):
    """Two processes, with accelerate's wrappers of a batch sampler."""
    whole = list(mixture(block_size=8, num_batches=40))
    parts = [list(BatchSamplerShard(mixture(block_size=8, num_batches=40), 2, i, even_batches=False)) for i in (0, 1)]
    assert [len(part) for part in parts] == [20, 20]
    assert [batch for step in zip(*parts) for batch in step] == whole
    assert all(source_of(first) == source_of(second) for first, second in zip(*parts))
    for rank, part in enumerate(parts):
        shard = BatchSamplerShard(mixture(block_size=8, num_batches=40), 2, rank, even_batches=False)
        assert list(SkipBatchSampler(shard, 7)) == part[7:]


def test_bad_mixtures_are_refused():
    for kwargs, message in (
        ({"weights": {"a": 1, "b": 1, "d": 1}}, r"name the datasets a, b, c: unknown \['d'\]; missing \['c'\]"),
        ({"weights": {"a": 1, "b": 0, "c": 1}}, "weight of dataset 'b' must be a number above 0, got 0"),
        ({"weights": {"a": 1, "b": "x", "c": 1}}, "'b' must be a number above 0, got 'x'"),
        ({"weights": {"a": 1, "b": float("nan"), "c": 1}}, "'b' must be a number above 0, got nan"),
        ({"block_size": 10}, "block_size=10 must be a multiple of the 4 rows"),
        ({"num_batches": -2}, "Set max_steps"),
        ({"batch_size": 40}, "'b' has 37 rows, fewer than a batch of 40"),
    ):
        with pytest.raises(ValueError, match=message):
            mixture(**kwargs)
    with pytest.raises(ValueError, match=r"'[abc]' gives no batch of 12 rows that differ"):
        list(mixture(batch_size=12, no_duplicates=True))  # of 10 groups
