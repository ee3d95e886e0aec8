"""Run by test_condensation_loss.py in two processes: the gradients of half a batch in each."""

import sys
from pathlib import Path
from types import MethodType, SimpleNamespace

import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from btok_hf import BTokSentenceTransformer
from btok_hf.training import CondensationLoss, CondensationTrainer
from btok_hf.training.checkpoints import full_parameters
from support.processes import leave
from support.training import batch_features


def wrap(model, how):
    """`model` as DistributedDataParallel, or sharded as accelerate does it."""
    if how == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model[0].model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def prepare(repo, how, unequal, mini_batch_size=2):
    """The model, its loss and this process's half of the batch; with `unequal`, fewer negatives in the first."""
    rank = distributed.get_rank()
    model = BTokSentenceTransformer(repo, device="cpu").train()
    wrapped = wrap(model, how)
    features = batch_features(model, rows=slice(3 * rank, 3 * rank + 3))
    if rank == 0 and unequal:
        features[2] = {key: value[:2] for key, value in features[2].items() if isinstance(value, torch.Tensor)}
    loss = CondensationLoss(
        model, mini_batch_size=mini_batch_size, gather_across_devices=True, condensation_weight=0.5
    )
    loss.model = wrapped  # as the trainer does
    return model, loss, features


def save_gradients(repo, folder, how, mini_batch_size):
    model, loss, features = prepare(repo, how, how == "ddp", mini_batch_size)
    loss(features).backward()
    total = loss.infonce + 0.5 * loss.condensation
    distributed.all_reduce(total)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    if how == "fsdp2" and loss.cached:
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if distributed.get_rank() == 0:
            with full_parameters(model, whole):
                model.save_pretrained(str(folder / "fsdp2_model"))
        loss(features).backward()  # it still works when sharded
        load_again(model, whole, folder)
    if distributed.get_rank() == 0:
        torch.save({"gradients": gradients, "loss": total / 2}, folder / f"{how}-{mini_batch_size}.pt")


def load_again(model, whole, folder):
    """Load a checkpoint into shards, as the trainer does when it resumes, or takes the best one."""
    distributed.barrier()  # the first process saved it
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    trainer = SimpleNamespace(model=model)
    trainer._is_sharded = MethodType(CondensationTrainer._is_sharded, trainer)
    CondensationTrainer._load_from_checkpoint(trainer, str(folder / "fsdp2_model"), model)
    again = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.items())


def save_refusal(repo, folder):
    """The error of sharded processes that have unequally many mini-batches."""
    _, loss, features = prepare(repo, "fsdp2", unequal=True)
    try:
        loss(features)
    except ValueError as error:
        (folder / f"refusal_{distributed.get_rank()}.txt").write_text(str(error))


def main(repo, folder):
    distributed.init_process_group("gloo")
    for how in ("ddp", "fsdp2"):
        for mini_batch_size in (2, 100):
            save_gradients(repo, folder, how, mini_batch_size)
    save_refusal(repo, folder)
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
