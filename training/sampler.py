"""Batches of several datasets, drawn by weight, and batches whose rows differ in their group.

For all else, Sentence-Transformers' own samplers are used.
"""

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers.base.sampler import (
    BatchSamplers,
    DefaultBatchSampler,
    MultiDatasetDefaultBatchSampler,
)
from torch.utils.data import BatchSampler, ConcatDataset
from transformers.utils import logging

from btok_hf.training.cells import as_stored
from btok_hf.training.checks import first_rows, group_hash, negative_columns
from btok_hf.training.condensation_config import CondensationConfig

logger = logging.get_logger(__name__)


def check_batches(trainer: Any, args: CondensationConfig, weights: Mapping[str, float], num_batches: int) -> None:
    """Refuse batches that would train or measure nothing, before the first of them is drawn.

    Args:
        trainer (`CondensationTrainer`): Its datasets and its loss are set up.
        args (`CondensationConfig`): Its arguments.
        weights, num_batches: As in `MixtureBatchSampler`, if datasets have weights.

    Raises:
        ValueError: Batches of one row without condensation; incomplete batches are dropped and a dataset has no
            other; datasets to evaluate that `no_duplicates` cannot draw from; weights that do not fit.
    """
    trained, evaluated = (
        {} if part is None else part if isinstance(part, dict) else {name: part}
        for name, part in (("train_dataset", trainer.train_dataset), ("eval_dataset", trainer.eval_dataset))
    )
    rows = {name: len(dataset) for name, dataset in trained.items()}
    without_duplicates = args.batch_sampler in (BatchSamplers.NO_DUPLICATES, BatchSamplers.NO_DUPLICATES_HASHED)
    if weights:
        if rows:
            check_mixture(rows, weights, args.train_batch_size, num_batches, args.block_size)
        for name, dataset in trained.items() if without_duplicates else ():
            if (groups := len(set(groups_of(dataset)))) < args.train_batch_size:
                raise ValueError(
                    f"Dataset {name!r} has {groups} groups, and batch_sampler=no_duplicates takes one row of each: no "
                    f"batch of {args.train_batch_size} would be full. Lower per_device_train_batch_size, leave the "
                    "dataset out, or leave batch_sampler out: mask_false_negatives already masks the rows of a group."
                )
    elif rows and args.dataloader_drop_last:  # Sentence-Transformers sets it for several processes
        check_full_batches(rows, args.train_batch_size, args.world_size)
    if args.train_batch_size == 1 and not (trainer.loss.gather_across_devices and args.world_size > 1):
        condensed = trainer.loss.condensation_weight and args.condensation_steps != 0
        for row in first_rows(trainer.train_dataset):
            if not negative_columns(row):
                problem = (
                    f"A batch of {row.get('dataset_name', 'train_dataset')!r} has one row (per_device_train_batch_size"
                    "=1) and no hard negatives: InfoNCE has nothing to compare, and its loss is always 0. Raise "
                    "per_device_train_batch_size, which gradient_accumulation_steps does not replace; memory is set "
                    "by mini_batch_size."
                )
                if not condensed:
                    raise ValueError(problem)
                logger.warning(problem)
    for name, dataset in evaluated.items() if args.eval_strategy != "no" else ():
        if args.dataloader_drop_last and len(dataset) < args.eval_batch_size:
            raise ValueError(
                f"{name!r} has {len(dataset)} rows to evaluate, fewer than a batch of {args.eval_batch_size}, and "
                "incomplete batches are dropped (dataloader_drop_last, always so with several processes): nothing "
                "would be measured. Give it more rows, or lower per_device_eval_batch_size."
            )
        if without_duplicates:
            groups_of(dataset)


def check_mixture(
    rows: Mapping[str, int], weights: Mapping[str, float], batch_size: int, num_batches: int, block_size: int | None
) -> None:
    """Raise `ValueError` for what `MixtureBatchSampler` refuses.

    Args:
        rows (`dict[str, int]`): Rows of each dataset, by name.
        weights, num_batches, block_size: As in `MixtureBatchSampler`.
        batch_size (`int`): Rows of a process's batch.
    """
    unknown, missing = sorted(set(weights) - set(rows)), sorted(set(rows) - set(weights))
    if unknown or missing:
        problems = [f"{problem} {part}" for problem, part in (("unknown", unknown), ("missing", missing)) if part]
        raise ValueError(f"dataset_weights must name the datasets {', '.join(rows)}: {'; '.join(problems)}.")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ValueError(f"The weight of dataset {name!r} must be a number above 0, got {weight!r}.")
    if num_batches < 1:
        raise ValueError(
            f"With dataset_weights, an epoch needs a length, got num_batches={num_batches}. Set max_steps."
        )
    if (block_size or batch_size) % batch_size:
        raise ValueError(f"block_size={block_size} must be a multiple of the {batch_size} rows of a process's batch.")
    for name, count in rows.items():
        if count < batch_size:
            raise ValueError(
                f"Dataset {name!r} has {count} rows, fewer than a batch of {batch_size}: a batch would hold "
                "rows twice. Give it more rows, leave it out, or lower per_device_train_batch_size."
            )


def check_full_batches(rows: Mapping[str, int], batch_size: int, processes: int) -> None:
    """Raise `ValueError` if incomplete batches are dropped, and a dataset or a process would have none then.

    Args:
        rows (`dict[str, int]`): Rows of each dataset, by name.
        batch_size (`int`): Rows of a process's batch.
        processes (`int`): How many of them train.
    """
    for name, count in rows.items():
        if count < batch_size:
            raise ValueError(
                f"Dataset {name!r} has {count} rows, fewer than a batch of {batch_size}, and incomplete batches are "
                "dropped (dataloader_drop_last, always so with several processes): none would be trained on. Give it "
                "more rows, leave it out, or lower per_device_train_batch_size."
            )
    batches = sum(count // batch_size for count in rows.values())
    if batches < processes:
        raise ValueError(
            f"The {sum(rows.values())} rows make {batches} full batches of {batch_size}, fewer than the {processes} "
            "processes: nothing would be trained. Give more rows, or lower per_device_train_batch_size."
        )


# As in Sentence-Transformers: rows are read so often to fill an epoch without duplicates, and once more for its end.
PASSES = 3


def groups_of(dataset: Dataset) -> list[int]:
    """A hash of each row's `group`, for `no_duplicates`; raises `ValueError` without groups, or a row without one."""
    if "group" not in dataset.column_names:
        raise ValueError(
            f"batch_sampler=no_duplicates compares rows by the column group, but the dataset has only "
            f"{dataset.column_names}. Add group (rows of one group answer each other's queries), or leave "
            "batch_sampler out: mask_false_negatives already masks copies of a positive."
        )
    groups = as_stored(dataset)["group"][:]  # formats may have NaN where there is no group
    if any(group is None for group in groups):
        raise ValueError(
            "batch_sampler=no_duplicates treats rows without a group as rows of one group: a batch would hold "
            "only one of them. Give each row a group, or leave batch_sampler out."
        )
    return [group_hash(group) for group in groups]


class GroupBatchSampler(DefaultBatchSampler):
    """Batches with at most one row of each `group`. An epoch that cannot be filled with full batches is an error.

    The batches are those of Sentence-Transformers' `NoDuplicatesBatchSampler` on the groups: a batch takes the first
    rows, in a random order, whose groups it does not have. That sampler passes over all rows that wait, so a large
    group takes time by its square; and it goes on with ever smaller batches when it has no full ones.

    Args:
        dataset (`Dataset`): Rows with a column `group`. Others are ignored.
        args, kwargs: As in `DefaultBatchSampler`.
        complete (`bool`): Whether an epoch must have its length, in full batches but for the rest of the rows. So rows
            are read again if one pass does not give them. It need not where a mixture draws the batches, or for
            evaluation; these get each row once.

    Raises:
        ValueError: No column `group`, a row without a group, or too few groups; at the end of an epoch, too few
            batches.
    """

    seed: int

    def __init__(self, dataset: Dataset, *args: Any, complete: bool = True, **kwargs: Any) -> None:
        super().__init__(dataset, *args, **kwargs)
        self.groups, self.complete = groups_of(dataset), complete
        rows_of_group = Counter(self.groups)
        full = len(self.groups) // self.batch_size
        needed = -(-full // PASSES)  # full batches of a pass; a batch takes one row of a group
        fits = sum(min(rows, needed) for rows in rows_of_group.values()) >= needed * self.batch_size
        alone = not full and not self.drop_last and len(rows_of_group) == 1 < len(self.groups)
        if complete and (alone or not fits):
            raise ValueError(self._too_few(f"{len(rows_of_group)} groups of up to {max(rows_of_group.values())} rows"))

    def __iter__(self) -> Iterator[list[int]]:
        if self.generator is not None:
            self.generator.manual_seed(self.seed + self.epoch)
        if not self.complete:
            yield from (batch for batch in self._pass() if len(batch) == self.batch_size or not self.drop_last)
            return
        full, rest = divmod(len(self.groups), self.batch_size)
        count = 0
        for batch in itertools.chain.from_iterable(self._pass() for _ in range(1 + PASSES)):
            if count == len(self):
                return
            # The last batch holds the rest of the rows. Fewer than a batch of rows may share groups.
            least = self.batch_size if count < full else rest if full else min(rest, 2)
            if len(batch) >= least:
                count += 1
                yield batch
        if count < len(self):
            raise ValueError(self._too_few(f"{count} batches"))

    def _pass(self) -> Iterator[list[int]]:
        """Each row once, in a random order. At the end there are batches that are not full."""
        order = torch.randperm(len(self.groups), generator=self.generator, dtype=torch.int32).tolist()
        waiting: dict[int, list[int]] = {}  # places in the order by group, the first of them last
        for place in reversed(range(len(order))):
            waiting.setdefault(self.groups[order[place]], []).append(place)
        first = [(places.pop(), group) for group, places in waiting.items()]
        heapq.heapify(first)
        while first:
            taken = [heapq.heappop(first) for _ in range(min(self.batch_size, len(first)))]
            for _, group in taken:
                if waiting[group]:
                    heapq.heappush(first, (waiting[group].pop(), group))
            yield [order[place] for place, _ in taken]

    def _too_few(self, found: str) -> str:
        return (
            f"batch_sampler=no_duplicates cannot fill {len(self)} batches of {self.batch_size} rows of different "
            f"groups: the {len(self.groups)} rows give {found}. Lower per_device_train_batch_size, or leave "
            "batch_sampler out: mask_false_negatives already masks the rows of a group."
        )


class MixtureBatchSampler(MultiDatasetDefaultBatchSampler):
    """Draws a dataset by its weight for each block of batches, as in arXiv 2604.11095. No dataset ends.

    All rows of a batch come from one dataset. Processes take the batches in turn (accelerate's `BatchSamplerShard`),
    so a block is a part of the global batch. Each dataset is shuffled on its own and read in full batches. When it is
    used up, it is shuffled again and read from the start, independently of the other datasets.

    The order depends only on the seed, the epoch, the weights and the sizes. So a resumed run skips the batches that
    it has seen and continues with those that it has not.

    Args:
        dataset (`ConcatDataset`): The datasets.
        batch_samplers (`list[DefaultBatchSampler]`): One per dataset, all with one batch size, as
            `SentenceTransformerTrainer.get_batch_sampler` makes them. They share `generator`.
        generator (`torch.Generator`): The generator that they shuffle with.
        seed (`int`): Seed of all orders and draws.
        names (`list[str]`): Names of the datasets, in the order of `dataset`.
        weights (`dict[str, float]`): Weight of each dataset by name, above 0. They need not sum to 1.
        num_batches (`int`): Batches of all processes in an epoch. With `max_steps * gradient_accumulation_steps *
            world_size`, training is one epoch, all processes get the same number of batches, and no dataset is
            restarted before it is used up.
        block_size (`int`, *optional*): Rows that come from one drawn dataset, a multiple of the batch size. Default:
            one batch.

    Raises:
        ValueError: Weights that are not above 0 or do not match the names; a dataset with fewer rows than a batch, or
            (while iterating) without a full batch; a block that is not a multiple of the batch size.
    """

    generator: torch.Generator

    def __init__(
        self,
        dataset: ConcatDataset,
        batch_samplers: list[BatchSampler],
        generator: torch.Generator,
        seed: int = 0,
        *,
        names: Sequence[str],
        weights: Mapping[str, float],
        num_batches: int,
        block_size: int | None = None,
    ) -> None:
        super().__init__(dataset, batch_samplers=batch_samplers, generator=generator, seed=seed)
        rows = [end - start for start, end in itertools.pairwise([0, *dataset.cumulative_sizes])]
        block_size = block_size or self.batch_size
        check_mixture(dict(zip(names, rows)), weights, self.batch_size, num_batches, block_size)
        self.names = names
        self.shares = np.array([weights[name] for name in names]) / sum(weights.values())
        self.num_batches = num_batches
        self.block_batches = block_size // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        draws = np.random.default_rng([self.seed, self.epoch])
        walks = [self._walk(number) for number in range(len(self.names))]
        offsets = [0, *self.dataset.cumulative_sizes]
        for start in range(0, self.num_batches, self.block_batches):
            number = draws.choice(len(walks), p=self.shares)
            for batch in itertools.islice(walks[number], min(self.block_batches, self.num_batches - start)):
                yield [index + offsets[number] for index in batch]

    def _walk(self, number: int) -> Iterator[list[int]]:
        """Full batches of one dataset, without end."""
        sampler = cast(DefaultBatchSampler, self.batch_samplers[number])
        for walked in itertools.count():
            # Some samplers seed the generator with seed + epoch; others draw their order from it as it is.
            seed = int(np.random.SeedSequence([self.seed, self.epoch, number, walked]).generate_state(1)[0])
            sampler.set_epoch(seed)
            self.generator.manual_seed(seed)
            full = 0
            for batch in sampler:
                if len(batch) == self.batch_size:
                    full += 1
                    yield batch
            if not full:
                raise ValueError(
                    f"Dataset {self.names[number]!r} gives no batch of {self.batch_size} rows that differ as "
                    "batch_sampler requires. Lower per_device_train_batch_size or use another batch_sampler."
                )

    def __len__(self) -> int:
        return self.num_batches
