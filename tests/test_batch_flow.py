"""A batch stays on the host until `condense` packs a mini-batch, and the host never waits for a value on the device.

There is no device here. What the model computes is told from what the host holds by where it comes from: a tensor is
"on the device" if a parameter of the model, or another such tensor, went into it.
"""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from support.media import image
from torch.distributed.utils import _to_kwargs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from btok_hf import BTokSentenceTransformer
from btok_hf.features import HostFeatures
from btok_hf.training import CondensationConfig, CondensationTrainer

# Operations whose result the host has to wait for.
LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount")


class DeviceLooks(TorchDispatchMode):
    """Notes the operations that look at a value which came from one of these tensors."""

    def __init__(self, tensors):
        super().__init__()
        self.found, self._kept, self._storages = [], [], set()
        self._mark(tensors)

    def _mark(self, tensors):
        self._kept += tensors  # alive, so that no other storage gets the same address
        self._storages |= {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}

    def _marked(self, values):
        leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.numel()]
        return any(leaf.untyped_storage().data_ptr() in self._storages for leaf in leaves)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self._marked((args, kwargs)):
            if any(word in str(function) for word in LOOKS):
                self.found.append(str(function))
            self._mark([leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)])
        return result


def trainer(repo, folder, rows, **options):
    args = CondensationConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=8,
        mini_batch_size=3,
        **options,
    )
    return CondensationTrainer(
        BTokSentenceTransformer(repo, device="cpu"),
        args,
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=2),
    )


TEXTS = [{"query": f"query {'long ' * i}{i}", "positive": f"answer {i % 5}", "group": str(i % 5)} for i in range(8)]


@pytest.mark.parametrize("options", [{}, {"mini_batch_num_tokens": 60}, {"gradient_checkpointing": True}], ids=str)
def test_a_training_step_never_waits_for_the_device(repo, tmp_path, options):
    run = trainer(repo, tmp_path, TEXTS, **options)
    run.create_optimizer()
    batch = next(iter(run.get_train_dataloader()))
    batch = run._prepare_inputs(batch)
    run.model.train()
    with DeviceLooks(list(run.model.parameters())) as looks:
        loss = run.compute_loss(run.model, copy.copy(batch))
        loss.backward()  # GradCache's second pass
    assert run.loss.cached and run.loss.condensation > 0
    assert looks.found == []
    with DeviceLooks(list(run.model.parameters())) as looks:  # it does notice
        run.model(HostFeatures(run.model.preprocess(["a"])))["sentence_embedding"].sum().item()
    assert looks.found == ["aten._local_scalar_dense.default"]


def test_nothing_moves_a_batch_before_the_model_sees_it(repo, tmp_path):
    """Neither the trainer nor DDP and FSDP, which copy the tensors of their inputs to a device (here `meta`)."""
    rows = [{"query": {"image": image(56, 56, i), "text": str(i)}, "positive": str(i)} for i in range(8)]
    run = trainer(repo, tmp_path, rows)
    batch = next(iter(run.get_train_dataloader()))
    assert run._prepare_inputs(batch) is batch
    seen = []
    run.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    run.model.train()
    run.compute_loss(run.model, copy.copy(batch)).backward()
    assert len(seen) > 8 and any("pixel_values" in features for features in seen)
    for features in seen:
        (moved,), _ = _to_kwargs((features,), {}, torch.device("meta"), False)
        assert moved[0] is features
        (moved,), _ = _to_kwargs((dict(features),), {}, torch.device("meta"), False)
        assert moved[0]["input_ids"].is_meta  # what a dict would undergo
