"""Run by test_training.py under torchrun: the gradients of half a batch in each of two processes."""

import sys

import pytest
import torch
from test_training import batch_features
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from btok_hf import BTokSentenceTransformer
from btok_hf.training import CondensationLoss
from btok_hf.training.checkpoints import full_parameters


def main(repo, output, how):
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    model = BTokSentenceTransformer(repo, device="cpu").train()
    wrapped = model
    if how == "ddp":
        wrapped = DistributedDataParallel(model)
    else:  # as accelerate does it
        mesh = init_device_mesh("cpu", (2,))
        for layer in model[0].model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    features = batch_features(model, rows=slice(3 * rank, 3 * rank + 3))
    if rank == 0 and how != "fsdp2":  # unequal numbers of negatives
        features[2] = {key: value[:2] for key, value in features[2].items() if isinstance(value, torch.Tensor)}
    loss = CondensationLoss(model, mini_batch_size=2, gather_across_devices=True, condensation_weight=0.5)
    loss.model = wrapped  # as the trainer does
    if how == "fsdp2_unequal":
        with pytest.raises(ValueError, match=r"processes have \[5, 6\] mini-batches .* equally many negatives"):
            loss(features)
        return
    loss(features).backward()
    total = loss.infonce + 0.5 * loss.condensation
    distributed.all_reduce(total)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    if how == "fsdp2":
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            with full_parameters(model, whole):
                model.save_pretrained(output + ".model")
        loss(features).backward()  # still sharded, and still works
    if rank == 0:
        torch.save({"gradients": gradients, "loss": total / 2}, output)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
