"""`SentenceTransformerTrainer` with condensation: collator, loss, adapters, checkpoints, export.

What is computed in a step is in `condensation_loss.py`, what is logged in `condensation_log.py`; checkpoint files are
handled in `checkpoints.py`.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.sampler import BatchSamplers
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader
from transformers.trainer_utils import HubStrategy, TrainOutput, set_seed
from transformers.utils import logging

from btok_hf.adapters import has_adapters
from btok_hf.condensation import check_head
from btok_hf.features import PIXEL_KEYS
from btok_hf.files import check_writable, nearest_existing
from btok_hf.sentence_transformer import BTokSentenceTransformer
from btok_hf.training.cells import NumberedRows
from btok_hf.training.checkpoints import (
    all_finite,
    check_disk_space,
    check_same_adapters,
    check_same_metric,
    check_same_rows,
    check_unfinished,
    checkpoint_to_resume,
    delete,
    mark_complete,
    newest_complete,
    rotate,
    row_order,
)
from btok_hf.training.checks import check_columns, check_model, checked_datasets, first_rows
from btok_hf.training.condensation_collator import CondensationCollator
from btok_hf.training.condensation_config import CondensationConfig
from btok_hf.training.condensation_log import REMEDY
from btok_hf.training.condensation_loss import CondensationLoss
from btok_hf.training.parallel import check_parallelism
from btok_hf.training.prompts import training_prompts
from btok_hf.training.publishing import PublishingTrainer, choose_best_metric
from btok_hf.training.sampler import GroupBatchSampler, MixtureBatchSampler, check_batches

if TYPE_CHECKING:  # slow to import, or imported where it is used
    from peft import LoraConfig


logger = logging.get_logger(__name__)


class CondensationTrainer(PublishingTrainer):
    """Trains a `BTokSentenceTransformer` with InfoNCE and Generative Information Condensation.

    Takes the arguments of `SentenceTransformerTrainer`, with three differences. Datasets have the columns `query`,
    `positive` and optionally `negative…`, `target` and `group`. The loss is a `CondensationLoss`; one that is given
    keeps its own settings, in place of those of `args`. Adapters are passed as `peft_config`.

    Logs `loss` (the total), `infonce`, `condensation`, `condensation_weight` (λ), `samples_per_second` and
    `tokens_per_second` (rows and targets of all processes).

    Args:
        model (`BTokSentenceTransformer`): The model.
        args (`CondensationConfig`): The arguments.
        peft_config (`LoraConfig`, *optional*): Adapters to add. The Bottleneck Tokens' embedding rows are trained with
            them. Without `target_modules`, the projections of the language model are adapted.
        kwargs: `train_dataset`, `eval_dataset` (a dataset or a dict of them), `evaluator`, `callbacks`, …
    """

    training_args_class = CondensationConfig  # type: ignore[assignment]  # its output_dir is never None
    data_collator_class = CondensationCollator
    model: BTokSentenceTransformer
    args: CondensationConfig
    data_collator: CondensationCollator

    def __init__(
        self,
        model: BTokSentenceTransformer | None = None,
        args: CondensationConfig | None = None,
        *,
        peft_config: "LoraConfig | None" = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("model_init") is not None:
            raise ValueError(
                "model_init cannot be used, got one: adapters and the loss belong to the model that is given. Make a "
                "trainer for each trial, with the trial's settings in its args."
            )
        args = CondensationConfig("tmp_trainer") if args is None else args  # as in Sentence-Transformers
        model = check_model(model, kwargs.get("loss"), args)
        if args.push_to_hub and args.hub_strategy != HubStrategy.END:
            raise ValueError(
                f"hub_strategy must be end, got {HubStrategy(args.hub_strategy).value}: checkpoints are not complete "
                "repositories. Call trainer.push_to_hub() after training; `btok train` has every_save too."
            )
        choose_best_metric(args, kwargs.get("evaluator"), model, kwargs.get("eval_dataset"))
        if peft_config is not None:
            set_seed(args.seed)  # the Trainer sets it later, and adapters start with random numbers
            model.add_adapter(peft_config)
        elif any(p.requires_grad and p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
            logger.warning(
                "The trained weights have half precision, which rounds most optimizer steps to zero. Load the model "
                "in fp32 and set bf16=True, or train adapters with peft_config."
            )
        for part in ("train_dataset", "eval_dataset"):
            kwargs[part] = checked_datasets(part, kwargs.get(part), args)
        self._media = False  # since the last step of the optimizer
        super().__init__(model=model, args=args, **kwargs)
        names = {name for part in (self.train_dataset, self.eval_dataset) if isinstance(part, dict) for name in part}
        self.data_collator.prompts = training_prompts(self.args.prompts, model, names)
        check_parallelism(self, self.args)
        self.data_collator.tokenizer = model.tokenizer
        self.data_collator.args = self.args
        self.data_collator.deduplicate = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        self._check_datasets()
        # Of args, unless a loss was given.
        self._weight = 0.0 if self.args.condensation_steps == 0 else self.loss.condensation_weight

    def _check_datasets(self) -> None:
        """Collate one row of each dataset, so that a wrong column or side is found before training starts."""
        if self.args.dataset_weights and not isinstance(self.train_dataset, dict):
            raise ValueError(
                "dataset_weights name datasets, but there is only one. Give a dict of them, or no weights."
            )
        if self.args.block_size and not self.args.dataset_weights:
            raise ValueError("block_size is used with dataset_weights only. Give weights, or leave block_size out.")
        for part in (self.train_dataset, self.eval_dataset):
            for row in first_rows(part):
                # The row's own columns: a transform may change those of the dataset.
                check_columns(row, row.get("dataset_name"))
                self.data_collator([{**row, "row": 0}])
        check_batches(self, self.args, self._weights(), self._num_batches())

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        loader.device = None  # a batch stays on the host
        # Among several processes, accelerate shares out the batches of a sampler, and does not tell it the epoch. A
        # resumed run would go on in the order of the first epoch.
        shared = getattr(loader.batch_sampler, "batch_sampler", None)
        if hasattr(shared, "set_epoch"):
            loader.batch_sampler.set_epoch = shared.set_epoch  # type: ignore[union-attr]
        return loader

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        loader = super().get_eval_dataloader(*args, **kwargs)
        loader.device = None
        return loader

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Leave the batch on the host: `condense` copies what a mini-batch needs to the device."""
        return inputs

    def get_default_loss(self, model: BaseModel) -> CondensationLoss:
        assert isinstance(model, BTokSentenceTransformer)  # checked in __init__
        if self.args.condensation_weight:
            check_head(model.transformer.model, model.transformer.lm_head)
        return CondensationLoss(
            model,
            temperature=self.args.temperature,
            symmetric=self.args.symmetric,
            matryoshka_dims=self.args.matryoshka_dims,
            mini_batch_size=self.args.mini_batch_size,
            mini_batch_num_tokens=self.args.mini_batch_num_tokens,
            gather_across_devices=self.args.gather_across_devices and self.args.world_size > 1,
            condensation_weight=self.args.condensation_weight,
            condensation_mask=self.args.condensation_mask,
        )

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add none: the callback of Sentence-Transformers fails on images. `export` writes the model card."""
        self.model.model_card_data.add_tags("generated_from_trainer")  # as it does: what was loaded is no longer true

    def should_dataset_name_column_be_added(self, dataset: Any, args: Any, loss: Any) -> bool:
        # The collator needs the name to look up `condense`.
        return isinstance(dataset, dict) or super().should_dataset_name_column_be_added(dataset, args, loss)

    def get_batch_sampler(self, dataset: Dataset, *args: Any, **kwargs: Any) -> BatchSampler | None:
        """With `no_duplicates`, a batch holds one row per `group`: others would be false negatives."""
        kwargs["seed"] = self._data_seed()
        sampler = self.args.batch_sampler
        if sampler in (BatchSamplers.NO_DUPLICATES, BatchSamplers.NO_DUPLICATES_HASHED):
            complete = self._builds_training and not self.args.dataset_weights  # with weights, rows are read again
            return GroupBatchSampler(dataset, *args, **kwargs, complete=complete)
        return super().get_batch_sampler(dataset, *args, **kwargs)

    def _data_seed(self) -> int:
        """The seed of the order of rows. Sentence-Transformers passes its samplers `seed` alone."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _build_dataloader(self, dataset: Any, batch_size: int, dataset_kind: str) -> DataLoader:
        """As in Sentence-Transformers, with numbered rows, which errors of the collator name."""
        self._builds_training = dataset_kind == "train"  # the same rows may also be evaluated
        loader = super()._build_dataloader(dataset, batch_size, dataset_kind)
        return DataLoader(
            NumberedRows(cast(Any, loader.dataset)),
            batch_sampler=loader.batch_sampler,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            persistent_workers=loader.persistent_workers,
            prefetch_factor=loader.prefetch_factor,
        )

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        over = self.args.condensation_steps is not None and self.state.global_step >= self.args.condensation_steps
        self.loss.condensation_weight = 0.0 if over else self._weight
        self._count(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._media |= any(key.endswith(PIXEL_KEYS) for key in inputs)
        if self.accelerator.sync_gradients:
            self._drop_empty_gradients()
        # The condensation loss is computed in GradCache's second pass, which is part of the backward pass above.
        self._track()
        if self.loss.condensation is not None and self.loss.cached:
            weighted = self.loss.condensation_weight * self.loss.condensation
            loss = loss + weighted.to(loss.device) / self.current_gradient_accumulation_steps
        return loss

    def _drop_empty_gradients(self) -> None:
        """Without media in any process, remove the vision tower's zero gradients, so that its weights do not decay.

        Only several processes have them (`BottleneckTransformer.forward`). DeepSpeed steps earlier and is not covered.
        """
        media, self._media = torch.tensor(int(self._media), device=self.args.device), False
        if self.args.world_size > 1 and not self.accelerator.reduce(media).item():
            for parameter in self.model.transformer.vision_tower.parameters():
                parameter.grad = None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
        if not self.model.training:  # the same at each step, so that losses can be compared
            self.loss.condensation_weight = self._weight
        output = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            self._track(self._rows(inputs))  # the Trainer averages eval_loss over rows
        return output

    def train(
        self,
        resume_from_checkpoint: bool | str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, or resume from a checkpoint.

        Args:
            resume_from_checkpoint (`bool` or `str`, *optional*): A checkpoint; `True` for the newest complete one in
                `args.output_dir`; `"auto"` for the newest complete one if there is one, and otherwise the start.
            trial, ignore_keys_for_eval: As in `Trainer.train`.

        Returns:
            `TrainOutput`: As in `Trainer.train`.

        Raises:
            ValueError: There is no complete checkpoint to resume from; it was trained with other data or batches; a
                training that starts anew would mix its checkpoints with those of an earlier run; or there is too
                little disk space.
        """
        resume = self.check_start(resume_from_checkpoint)
        return super().train(resume, trial, ignore_keys_for_eval)

    def check_start(self, resume_from_checkpoint: bool | str | None, export: bool = False) -> str | None:
        """Check what `train` needs, before work is done.

        Args:
            resume_from_checkpoint (`bool` or `str`, *optional*): As in `train`.
            export (`bool`): Whether the disk must also have space for an export.

        Returns:
            `str`, *optional*: The checkpoint to resume from.

        Raises:
            OSError, ValueError: As in `train`.
        """
        saves = self.args.save_strategy != "no" or self.args.enable_jit_checkpoint
        own = self.state.global_step > 0  # checkpoints that this trainer has written
        resume = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir, saves and not own)
        if len(chosen := {path and Path(path).name for path in gather_object([resume])}) > 1:
            raise ValueError(
                f"The processes would resume from different checkpoints ({', '.join(map(str, chosen))}). Give all of "
                "them the same output_dir, on a shared file system, or the path of a checkpoint that all have."
            )
        if resume:
            check_unfinished(resume, self.args)
            check_same_metric(resume, self.args.metric_for_best_model)
        if resume and not self.args.ignore_data_skip:
            check_same_rows(resume, row_order(self.args, self.train_dataset))
        check_writable(self.args.output_dir)
        check_disk_space(self.model, self.args, has_adapters(self.model.transformer.model), export)
        return resume

    def _check_weights(self) -> None:
        """Refuse to save weights that are not finite: the next log, which would find them, may be many steps away."""
        broken = torch.tensor(int(not all_finite(self.model)), device=self.args.device)
        if self.accelerator.reduce(broken).item():  # of shards, one process alone may have the broken part
            newest = newest_complete(self.args.output_dir)
            raise ValueError(
                f"Trained weights are not finite at step {self.state.global_step}, so no checkpoint is written; the "
                f"newest complete one is {newest}. {REMEDY}"
            )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a checkpoint, write its manifest, then delete the oldest ones."""
        self._check_weights()
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save and folder.exists():
            delete(folder)  # of an earlier run; with its manifest, the new one would look complete too early
        self.accelerator.wait_for_everyone()
        # The Trainer would delete older checkpoints before this one has its manifest.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with self._paused():
                super()._save_checkpoint(model, trial)
        except Exception as error:
            free = shutil.disk_usage(nearest_existing(folder)).free / 1e9
            raise RuntimeError(
                f"{folder} could not be written ({type(error).__name__}: {error}; {free:.1f} GB are free there). The "
                f"newest complete checkpoint is {newest_complete(folder.parent)}. Free space or name another "
                "output_dir, then continue with resume_from_checkpoint."
            ) from error
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            metric, only_model = self.args.metric_for_best_model, self.args.save_only_model
            mark_complete(folder, row_order(self.args, self.train_dataset), only_model, metric)
            if limit is not None and limit > 0:
                rotate(folder.parent, limit, self.state.best_model_checkpoint)

    def get_multi_dataset_batch_sampler(
        self,
        dataset: ConcatDataset,
        batch_samplers: list[BatchSampler],
        generator: torch.Generator | None = None,
        seed: int | None = 0,
    ) -> BatchSampler:
        """For training with `dataset_weights`, batches drawn by these weights."""
        seed = self._data_seed()
        weights, datasets = self.args.dataset_weights, self.train_dataset
        # The method is also called for evaluation datasets.
        if not (
            weights
            and isinstance(datasets, dict)
            and all(part is ours for part, ours in zip(dataset.datasets, datasets.values()))
        ):
            return super().get_multi_dataset_batch_sampler(dataset, batch_samplers, generator, seed)
        assert generator is not None  # Sentence-Transformers passes it
        return MixtureBatchSampler(
            dataset,
            batch_samplers,
            generator,
            seed,
            names=list(datasets),
            weights=self._weights(),
            num_batches=self._num_batches(),
            block_size=self.args.block_size,
        )

    def _weights(self) -> dict[str, float]:
        return cast(dict[str, float], self.args.dataset_weights)  # JSON was read in __post_init__

    def _num_batches(self) -> int:
        return self.args.max_steps * self.args.gradient_accumulation_steps * self.args.world_size

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        saved = BTokSentenceTransformer(checkpoint_path, device="cpu")
        check_same_adapters(checkpoint_path, saved.transformer.model, self.model.transformer.model)
        state_dict = saved.state_dict()
        if self._is_sharded():
            set_model_state_dict(self.model, state_dict, options=StateDictOptions(full_state_dict=True))
        else:
            self.model.load_state_dict(state_dict)

    def _load_best_model(self) -> None:
        # Sentence-Transformers logs an error and goes on with the last weights.
        self._load_from_checkpoint(cast(str, self.state.best_model_checkpoint))
