"""`SentenceTransformerTrainer` with condensation: collator, loss, adapters, logging."""

import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.sampler import BatchSamplers
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from btok_hf.adapters import add_adapters, has_adapters
from btok_hf.export import export_model
from btok_hf.features import IGNORED
from btok_hf.files import check_writable, nearest_existing, write_files
from btok_hf.sentence_transformer import BTokSentenceTransformer
from btok_hf.training.checkpoints import (
    checkpoint_to_resume,
    delete,
    full_parameters,
    mark_complete,
    newest_complete,
    rotate,
)
from btok_hf.training.condensation_collator import CondensationCollator
from btok_hf.training.condensation_config import CondensationConfig
from btok_hf.training.condensation_loss import CondensationLoss
from btok_hf.training.data import check_columns
from btok_hf.training.sampler import MixtureBatchSampler

logger = logging.get_logger(__name__)


class CondensationTrainer(SentenceTransformerTrainer):
    """Trains a `BTokSentenceTransformer` with InfoNCE and Generative Information Condensation.

    Takes what `SentenceTransformerTrainer` takes, except that datasets have the columns `query`, `positive` and
    optionally `negative…`, `target` and `group`, the loss is `CondensationLoss`, and adapters come as `peft_config`.
    Logs `loss` (the total), `infonce`, `condensation`, `condensation_weight` (λ), `samples_per_second` and
    `tokens_per_second` (all rows and targets of all processes).

    Args:
        model (`BTokSentenceTransformer`): The model.
        args (`CondensationConfig`): The arguments.
        peft_config (`LoraConfig`, *optional*): Adapters to add. The Bottleneck Tokens' rows are always trained with
            them; the language model's projections are adapted where it names no `target_modules`.
        kwargs: `train_dataset`, `eval_dataset` (a dataset or a dict of them), `evaluator`, `callbacks`, …
    """

    training_args_class = CondensationConfig
    data_collator_class = CondensationCollator

    def __init__(self, model=None, args=None, *, peft_config=None, **kwargs):
        if not isinstance(model, BTokSentenceTransformer):
            raise ValueError(
                f"CondensationTrainer trains a BTokSentenceTransformer, got {type(model).__name__}. "
                "Load the model with btok_hf.BTokSentenceTransformer(path)."
            )
        if kwargs.get("loss") is not None and not isinstance(kwargs["loss"], CondensationLoss):
            raise ValueError(f"loss must be a CondensationLoss, got {type(kwargs['loss']).__name__}.")
        if peft_config is not None:
            add_adapters(model, peft_config)
        elif any(p.requires_grad and p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
            logger.warning(
                "Half-precision weights are trained: most steps of a usual learning rate are rounded away. Load the "
                "model in fp32 and set bf16=True, or train adapters with peft_config."
            )
        self._tokens, self._samples, self._since = 0, 0, None
        super().__init__(model=model, args=args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process sees {self.args.n_gpu} GPUs, which would split rows apart from their images. Start a "
                "process for each with `accelerate launch`, or show it one with CUDA_VISIBLE_DEVICES=0."
            )
        self.data_collator.tokenizer = model.tokenizer
        self.data_collator.args = self.args
        self.data_collator.deduplicate = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        self._check_datasets()
        if self.is_deepspeed_enabled:
            self._check_deepspeed()

    def _check_datasets(self):
        """Collate one row of each dataset, so that a wrong column or side shows before training starts."""
        for part in (self.train_dataset, self.eval_dataset):
            for row in _first_rows(part):
                # Not the dataset's column_names, which a transform may change.
                check_columns(row, row.get("dataset_name"))
                self.data_collator([row])

    def _check_deepspeed(self):
        """DeepSpeed's engine refuses GradCache's backward passes (0.19.8); a batch in one mini-batch has only one."""
        rows = self.args.per_device_train_batch_size * max(
            len(row.get("negatives") or []) + sum(name == "negative" or name.startswith("negative_") for name in row)
            for row in [{"negative": None}, *_first_rows(self.train_dataset)]
        )
        if self.args.mini_batch_num_tokens or self.args.mini_batch_size < rows:
            raise ValueError(
                f"DeepSpeed cannot run GradCache: {rows} rows must fit one mini-batch, but mini_batch_size is "
                f"{self.args.mini_batch_size}. Set mini_batch_size={rows} and no mini_batch_num_tokens, or train with "
                "FSDP2 (training/accelerate/fsdp2.yaml) or DDP."
            )

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        loader.device = None  # a batch stays on the host
        return loader

    def get_eval_dataloader(self, *args, **kwargs):
        loader = super().get_eval_dataloader(*args, **kwargs)
        loader.device = None
        return loader

    def _prepare_inputs(self, inputs):
        """Nothing is moved: a batch stays on the host, and `condense` copies what a mini-batch needs to the device."""
        return inputs

    def get_default_loss(self, model):
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

    def add_model_card_callback(self, default_args_dict):
        """None: that of Sentence-Transformers samples texts and fails on images. `export_model` writes ours."""

    def should_dataset_name_column_be_added(self, dataset, args, loss):
        # The collator needs the name to look up `condense`.
        return isinstance(dataset, dict) or super().should_dataset_name_column_be_added(dataset, args, loss)

    def get_batch_sampler(self, dataset, *args, **kwargs):
        """`no_duplicates` keeps rows of one `group` apart, which would be false negatives of each other."""
        if self.args.batch_sampler in (BatchSamplers.NO_DUPLICATES, BatchSamplers.NO_DUPLICATES_HASHED):
            if "group" not in dataset.column_names:
                raise ValueError(
                    f"batch_sampler={self.args.batch_sampler.value} compares rows by the column group, but there are "
                    f"only {dataset.column_names}. Add group (rows of one group answer each other's queries), or "
                    "leave batch_sampler out: mask_false_negatives already keeps copies of an answer from being "
                    "negatives."
                )
            if None in dataset["group"]:
                raise ValueError(
                    f"batch_sampler={self.args.batch_sampler.value} takes rows without a group for rows of one group: "
                    "a batch would hold one of them. Give each row a group, or leave batch_sampler out."
                )
            dataset = dataset.select_columns(["group"])
        return super().get_batch_sampler(dataset, *args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        over = self.args.condensation_steps is not None and self.state.global_step >= self.args.condensation_steps
        self.loss.condensation_weight = 0.0 if over else self.args.condensation_weight
        if self._since is None:
            self._since = time.perf_counter()
        masks = [value for key, value in inputs.items() if key.endswith("_attention_mask")]
        targets = [value != IGNORED for key, value in inputs.items() if key.endswith("_target_labels")]
        self._samples += len(inputs.get("query_rows", masks[0])) * self.args.world_size
        self._tokens += sum(int(counted.sum()) for counted in masks + targets) * self.args.world_size
        loss = super().training_step(model, inputs, num_items_in_batch)
        # The second GradCache pass, in which the condensation loss is computed, happened in the backward pass.
        self._track()
        if self.loss.condensation is not None and self.loss.cached:
            weighted = self.loss.condensation_weight * self.loss.condensation
            loss = loss + weighted.to(loss.device) / self.current_gradient_accumulation_steps
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            self._track()
        return output

    def _track(self):
        infonce = self.loss.infonce
        parts = {"infonce": infonce, "condensation_weight": infonce.new_tensor(self.loss.condensation_weight)}
        if self.loss.condensation is not None:
            parts["condensation"] = self.loss.condensation
        self.track_loss_components(parts)

    def log(self, logs, start_time=None):
        if "loss" in logs and self._since is not None:
            seconds = time.perf_counter() - self._since
            logs = {
                **logs,
                "samples_per_second": round(self._samples / seconds, 1),
                "tokens_per_second": round(self._tokens / seconds),
            }
            self._tokens, self._samples, self._since = 0, 0, None
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train, or go on from a checkpoint.

        Args:
            resume_from_checkpoint (`bool` or `str`, *optional*): A checkpoint, or `True` for the newest whole one in
                `args.output_dir`. Ones that were not written to their end are never loaded.
            kwargs: As in `Trainer.train`.

        Raises:
            ValueError: No whole checkpoint to go on from, or too little disk space to save.
        """
        resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        if resume_from_checkpoint:
            logger.info(f"Resuming from {resume_from_checkpoint}")
        check_writable(self.args.output_dir)
        self._check_disk_space()
        return super().train(resume_from_checkpoint, **kwargs)

    def _check_disk_space(self):
        """Refuse to start what could not be saved: one checkpoint with AdamW's two fp32 moments."""
        if self.args.save_strategy == "no":
            return
        trained = [p for p in self.model.parameters() if p.requires_grad]
        saved = trained if has_adapters(self.model[0].model) else self.model.parameters()
        needed = sum(p.numel() * p.element_size() for p in saved) + sum(8 * p.numel() for p in trained)
        # The main process makes the folder, perhaps after another one gets here.
        free = shutil.disk_usage(nearest_existing(self.args.output_dir)).free
        if free < needed:
            raise ValueError(
                f"A checkpoint needs about {needed / 1e9:.1f} GB, but {self.args.output_dir!r} has "
                f"{free / 1e9:.1f} GB free. Free space, or name another output_dir."
            )

    def _save_checkpoint(self, model, trial):
        """Save a checkpoint that is whole or known not to be, then delete the oldest ones."""
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save and folder.exists():
            delete(folder)  # of an earlier run; with its manifest, a half-written new one would look whole
        self.accelerator.wait_for_everyone()
        # The Trainer would delete the older checkpoints before this one has its manifest.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            free = shutil.disk_usage(nearest_existing(folder)).free / 1e9
            raise RuntimeError(
                f"{folder} could not be written ({type(error).__name__}: {error}; {free:.1f} GB are free there). The "
                f"newest complete checkpoint is {newest_complete(folder.parent)}. Free space or name another "
                "output_dir, then go on with resume_from_checkpoint."
            ) from error
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
            if limit is not None and limit > 0:
                rotate(folder.parent, limit, self.state.best_model_checkpoint)

    def evaluate_retrieval(self):
        """The metrics of the evaluator, by their own names; empty without one. All processes take part."""
        if self.evaluator is None:
            return {}
        own = f"{self.evaluator.name}_"
        # The Trainer puts "eval_" in front of names that do not begin with it.
        metrics = {k if k.startswith(own) else k.removeprefix("eval_"): v for k, v in self.evaluate().items()}
        return {key: value for key, value in metrics.items() if key.startswith(own)}

    def export(self, output_dir, card=None, **details):
        """Write the repository to publish, as `btok_hf.export_model` does, with a card that describes this training.

        All processes must call it.

        Args:
            output_dir (`str`): Folder to write.
            card (`CardArguments`, *optional*): Licences and languages, which the card calls unknown otherwise.
            details: What else the card can tell: see `btok_hf.hub_card.training_run.card_files`.
        """
        from btok_hf.hub_card.training_run import card_files

        sharded = any(isinstance(p, DTensor) for p in self.model.parameters())
        state_dict = self.accelerator.get_state_dict(self.model) if sharded else None
        if self.is_world_process_zero():
            with full_parameters(self.model, state_dict) if sharded else nullcontext():
                export_model(self.model, output_dir)
        # After the model, so that nothing can keep it from being written; by all processes, because of sharded ones
        # none can encode the card's examples alone.
        files = card_files(self, card, **details)
        if self.is_world_process_zero():
            write_files(output_dir, files)
        self.accelerator.wait_for_everyone()

    def get_multi_dataset_batch_sampler(self, dataset, batch_samplers, generator=None, seed=0):
        """Batches drawn by `dataset_weights`, if they are set; never for evaluation."""
        training = isinstance(self.train_dataset, dict) and all(
            part is ours for part, ours in zip(dataset.datasets, self.train_dataset.values())
        )
        if not (training and self.args.dataset_weights):
            return super().get_multi_dataset_batch_sampler(dataset, batch_samplers, generator, seed)
        return MixtureBatchSampler(
            dataset,
            batch_samplers,
            generator,
            seed,
            names=list(self.train_dataset),
            weights=self.args.dataset_weights,
            num_batches=self.args.max_steps * self.args.gradient_accumulation_steps * self.args.world_size,
            block_size=self.args.block_size,
        )

    def _save(self, output_dir=None, state_dict=None):
        # The Trainer calls this in every process, and Sentence-Transformers writes in every process.
        if self.args.should_save:
            sharded = any(isinstance(p, DTensor) for p in self.model.parameters())
            with full_parameters(self.model, state_dict) if sharded else nullcontext():
                super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, checkpoint_path):
        loaded = BTokSentenceTransformer(checkpoint_path, device="cpu")
        self.model.load_state_dict(loaded.state_dict())


def _first_rows(datasets):
    """The first row of a dataset, or of each in a dict, with its name."""
    if datasets is None:
        return []
    rows = []
    for name, dataset in (datasets if isinstance(datasets, dict) else {None: datasets}).items():
        if len(dataset) == 0:
            raise ValueError(f"{'The dataset' if name is None else f'Dataset {name!r}'} has no rows.")
        rows.append({**({} if name is None else {"dataset_name": name}), **dataset[0]})
    return rows
