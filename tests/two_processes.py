"""Run by test_training.py under torchrun: the gradients of half a batch in each of two processes."""

import sys

import torch
from test_training import batch_features, named_gradients
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from btok_hf import BTokSentenceTransformer
from btok_hf.training import CondensationLoss


def main(repo, output):
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    model = BTokSentenceTransformer(repo, device="cpu").train()
    features = batch_features(model, rows=slice(3 * rank, 3 * rank + 3))
    loss = CondensationLoss(model, mini_batch_size=2, gather_across_devices=True, condensation_weight=0.5)
    loss.model = DistributedDataParallel(model, find_unused_parameters=True)  # as the trainer does
    loss(features).backward()
    total = loss.infonce + 0.5 * loss.condensation
    distributed.all_reduce(total)
    if rank == 0:
        torch.save({"gradients": named_gradients(model), "loss": total / 2}, output)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
