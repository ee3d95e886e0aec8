"""Batches of several datasets, drawn by weight."""

import itertools
import math

import numpy as np
from sentence_transformers.base.sampler import MultiDatasetDefaultBatchSampler


class MixtureBatchSampler(MultiDatasetDefaultBatchSampler):
    """Draws a dataset by its weight for each block of batches, as in arXiv 2604.11095, and never ends a dataset.

    All rows of a batch come from one dataset. Processes take turns at the batches (accelerate's `BatchSamplerShard`),
    so that a block is a part of the global batch. Each dataset is walked through in an order of its own, in full
    batches, and from the start in a new order once it is used up, whatever the other datasets do.

    The order follows from the seed, the epoch, the weights and the sizes alone, so a resumed run that skips the
    batches it has seen goes on with those it has not.

    Args:
        dataset (`ConcatDataset`): The datasets.
        batch_samplers (`list[DefaultBatchSampler]`): One per dataset, all with one batch size, as
            `SentenceTransformerTrainer.get_batch_sampler` makes them; they share `generator`.
        generator (`torch.Generator`): What they shuffle with.
        seed (`int`): Seed of every order and of the draws.
        names (`list[str]`): Names of the datasets, in their order.
        weights (`dict[str, float]`): Weight of each dataset by name, above 0; their sum does not matter.
        num_batches (`int`): Batches of all processes in an epoch. With `max_steps * gradient_accumulation_steps *
            world_size` training is one epoch, every process gets as many batches, and no dataset is started over
            before it is used up.
        block_size (`int`, *optional*): Rows that come from one drawn dataset, a multiple of the batch size. Default:
            one batch.

    Raises:
        ValueError: Weights that are not above 0 or do not name the datasets; a dataset with fewer rows than a batch,
            or (while iterating) one that its sampler makes no full batch of; a block that is no multiple of a batch.
    """

    def __init__(self, dataset, batch_samplers, generator, seed=0, *, names, weights, num_batches, block_size=None):
        super().__init__(dataset, batch_samplers=batch_samplers, generator=generator, seed=seed)
        unknown, missing = sorted(set(weights) - set(names)), sorted(set(names) - set(weights))
        if unknown or missing:
            raise ValueError(
                f"dataset_weights must name the datasets {', '.join(names)}: "
                + "; ".join(filter(None, [unknown and f"unknown {unknown}", missing and f"missing {missing}"]))
                + "."
            )
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
                raise ValueError(f"The weight of dataset {name!r} must be a number above 0, got {weight!r}.")
        if num_batches < 1:
            raise ValueError(
                f"A mixture by dataset_weights has no end of its own, got num_batches={num_batches}. Set max_steps."
            )
        block_size = block_size or self.batch_size
        if block_size % self.batch_size:
            raise ValueError(
                f"block_size={block_size} must be a multiple of the {self.batch_size} rows of a process's batch."
            )
        for name, rows in zip(names, map(len, dataset.datasets)):
            if rows < self.batch_size:
                raise ValueError(
                    f"Dataset {name!r} has {rows} rows, fewer than a batch of {self.batch_size}: its rows would meet "
                    "themselves. Give it more rows, leave it out, or lower per_device_train_batch_size."
                )
        self.names = names
        self.shares = np.array([weights[name] for name in names]) / sum(weights.values())
        self.num_batches = num_batches
        self.block_batches = block_size // self.batch_size

    def __iter__(self):
        draws = np.random.default_rng([self.seed, self.epoch])
        walks = [self._walk(number) for number in range(len(self.names))]
        offsets = [0, *self.dataset.cumulative_sizes]
        for start in range(0, self.num_batches, self.block_batches):
            number = draws.choice(len(walks), p=self.shares)
            for batch in itertools.islice(walks[number], min(self.block_batches, self.num_batches - start)):
                yield [index + offsets[number] for index in batch]

    def _walk(self, number):
        """Full batches of one dataset without end."""
        sampler = self.batch_samplers[number]
        for walked in itertools.count():
            # Samplers either seed the generator themselves, with seed + epoch, or draw their order from it at once.
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
                    "batch_sampler demands. Lower per_device_train_batch_size or take another batch_sampler."
                )

    def __len__(self):
        return self.num_batches
