"""Run by test_condensation_trainer.py in two processes: the trainer, whole and resumed."""

import json
import sys
from pathlib import Path

import torch

from support.processes import leave
from support.training import checkpointed_trainer, losses, text_pairs


def main(repo, untied, folder):
    whole = checkpointed_trainer(repo, f"{folder}/whole", per_device_train_batch_size=2)
    whole.train()
    resumed = checkpointed_trainer(repo, f"{folder}/resumed", per_device_train_batch_size=2)
    resumed.train(resume_from_checkpoint=f"{folder}/whole/out/checkpoint-2")
    whole.export(f"{folder}/exported")
    # Several datasets, resumed within their second epoch.
    mixed = []
    for name, checkpoint in (("mixed", None), ("mixed_resumed", f"{folder}/mixed/out/checkpoint-4")):
        pairs = {"first": text_pairs(6), "second": text_pairs().select(range(6, 12))}
        mixed.append(checkpointed_trainer(repo, f"{folder}/{name}", pairs=pairs, per_device_train_batch_size=2))
        mixed[-1].train(resume_from_checkpoint=checkpoint)
    head = checkpointed_trainer(untied, f"{folder}/head", per_device_train_batch_size=2)
    head.train()
    if whole.is_world_process_zero():
        torch.save(whole.model.state_dict(), f"{folder}/weights.pt")
        Path(folder, "losses.json").write_text(
            json.dumps([losses(trainer) for trainer in (whole, resumed, *mixed, head)])
        )
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
