"""What a training gives: its scores, the repository to publish, and its upload."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import DatasetDict
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from sentence_transformers.util.distributed import distributed_evaluation
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy, SchedulerType
from transformers.utils import logging

from btok_hf.export import export_model
from btok_hf.hub import MESSAGE, push
from btok_hf.sentence_transformer import BTokSentenceTransformer
from btok_hf.training.checkpoints import full_parameters
from btok_hf.training.checks import checked_datasets
from btok_hf.training.condensation_config import CondensationConfig
from btok_hf.training.condensation_log import LoggingTrainer
from btok_hf.training.evaluator import PairEvaluator, metric_names

if TYPE_CHECKING:  # slow to import, or imported where it is used
    from btok_hf.hub_card.card import CardArguments

logger = logging.get_logger(__name__)


class PublishingTrainer(LoggingTrainer):
    """The part of `CondensationTrainer` that evaluates, exports and pushes."""

    model: BTokSentenceTransformer
    args: CondensationConfig

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in `SentenceTransformerTrainer`; what is given is checked first, like the datasets of the trainer.

        Args:
            eval_dataset (`Dataset`, `dict[str, Dataset]` or `str`, *optional*): What to evaluate instead of the
                trainer's own, or the name of one of those.
            ignore_keys, metric_key_prefix: As in `Trainer.evaluate`.

        Returns:
            `dict[str, float]`: The metrics.

        Raises:
            ValueError: As in `checked_datasets`.
        """
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            # A copy: Sentence-Transformers changes formats, and it takes a dict only as its class.
            eval_dataset = checked_datasets("eval_dataset", eval_dataset, self.args)
            eval_dataset = DatasetDict(eval_dataset) if isinstance(eval_dataset, dict) else eval_dataset
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluate_retrieval(self) -> dict[str, float]:
        """The metrics of the evaluator by the evaluator's names; empty without one. All processes must call it.

        They are logged as the Trainer logs them, with `eval_` in front.
        """
        if self.evaluator is None:
            return {}
        # `evaluate` would run an evaluator once for each dataset of a dict, and shard a model for FSDP, which
        # accelerate refuses without an optimizer: before training.
        alone = not self.is_fsdp_enabled and not self.is_deepspeed_enabled  # as the Trainer calls it
        if not alone and not self._is_sharded():  # the Trainer has not placed it yet
            self.model.to(self.args.device)
        folder = Path(self.args.output_dir, "eval") if self.is_world_process_zero() else None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        at: Any = {"output_path": folder and str(folder), "epoch": self.state.epoch, "steps": self.state.global_step}
        with distributed_evaluation(self.model, enabled=alone) as runs:
            found: Any = self.evaluator(self.model, **at) if runs else {}
        found = broadcast_object_list([found])[0]
        metrics = found if isinstance(found, dict) else {"evaluator": found}
        self.log({name if name.startswith("eval_") else f"eval_{name}": value for name, value in metrics.items()})
        return dict(metrics)

    def export(self, output_dir: Path | str, card: "CardArguments | None" = None, **details: Any) -> None:
        """Write the repository to publish, as `btok_hf.export_model` does, with a card that describes this training.

        All processes must call it.

        Args:
            output_dir (`str` or `Path`): Folder to write.
            card (`CardArguments`, *optional*): Card facts that cannot be read from the run; omitted ones show as
                unknown.
            details: More for the card: see `btok_hf.hub_card.training_run.card_files`.
        """
        from btok_hf.hub_card.training_run import card_files

        state_dict = self.accelerator.get_state_dict(self.model) if self._is_sharded() else None
        files, failure = None, None
        try:
            # By all processes, because encoding the card's examples with sharded parameters needs all of them.
            files = card_files(self, card, **details)
        except Exception as error:  # the model is written all the same, with a card that knows no training
            failure = error
        if self.is_world_process_zero():
            try:
                with self._unsharded(state_dict):
                    export_model(self.model, output_dir, files=files)
            except Exception as error:  # raised after the other processes, which wait, have gone on
                failure = failure or error
        self.accelerator.wait_for_everyone()
        if failure is not None:
            raise failure

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str = MESSAGE,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        *,
        private: bool | None = None,
        create_pr: bool = False,
    ) -> str | None:
        """Export to `output_dir`, merged and with a card, and push that to `hub_model_id` in one commit.

        All processes must call it. Checkpoints and arguments are not uploaded.

        Args:
            commit_message (`str`): First line of the commit message.
            blocking (`bool`): Accepted as in `Trainer`; it always waits.
            token, revision, private: In place of those of `args`.
            create_pr (`bool`): Open a pull request instead of committing.

        Returns:
            `str`, *optional*: URL of the commit, in the main process.

        Raises:
            ValueError: No `hub_model_id`.
            RuntimeError: The upload failed. The export is kept, and the message says how to go on.
        """
        given = {"token": token, "revision": revision, "private": private}
        self._hub_id()
        self.export(self.args.output_dir)
        if not self.is_world_process_zero():
            return None
        return self.push_export(commit_message, create_pr, **{key: v for key, v in given.items() if v is not None})

    def push_export(self, commit_message: str = MESSAGE, create_pr: bool = False, **given: Any) -> str:
        """Push the export that lies in `output_dir` (`btok_hf.push`). Arguments and errors as in `push_to_hub`."""
        args = self.args
        own: dict[str, Any] = {
            "token": args.hub_token,
            "revision": args.hub_revision,
            "private": args.hub_private_repo,
        }
        own |= {"commit_message": commit_message, "create_pr": create_pr}
        return push(args.output_dir, self._hub_id(), **own | given)

    def _hub_id(self) -> str:
        """The repository to push to. The Trainer names one after the folder if it is to push."""
        name = self.args.hub_model_id or getattr(self, "hub_model_id", None)
        if name is None:
            raise ValueError("push_to_hub needs the repository's id: set hub_model_id, e.g. 'org/btok-2b'.")
        return name

    def _is_sharded(self) -> bool:
        return any(isinstance(p, DTensor) for p in self.model.parameters())

    def _unsharded(self, state_dict: Mapping[str, torch.Tensor] | None) -> AbstractContextManager[None]:
        """The model with full parameters from `state_dict`; nothing to do if it is not sharded."""
        if not self._is_sharded():
            return nullcontext()
        assert state_dict is not None
        return full_parameters(self.model, state_dict)

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        # The Trainer calls this in every process, and Sentence-Transformers writes in every process.
        if self.args.should_save:
            with self._unsharded(state_dict):
                super()._save(output_dir, state_dict)


def check_push(args: CondensationConfig) -> None:
    """Before training, refuse a push that cannot work. A repository that does not exist is created.

    Raises:
        ValueError: No or no valid id of a repository, a `hub_strategy` that would push checkpoints, no login, no right
            to write, or a repository of another visibility.
    """
    if not args.push_to_hub:
        return
    if args.hub_model_id is None:
        raise ValueError("push_to_hub needs the repository's id, e.g. --hub_model_id org/btok-2b.")
    validate_repo_id(args.hub_model_id)
    if args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
        raise ValueError(
            f"hub_strategy must be end or every_save, got {HubStrategy(args.hub_strategy).value}: only complete "
            "repositories are pushed, checkpoints stay on disk. Set it to one of these."
        )
    if args.process_index > 0:
        return
    api, private = HfApi(token=args.hub_token), args.hub_private_repo
    try:
        api.whoami()
    except Exception as error:
        # Not chained, here and below: the original may hold the token.
        raise ValueError(
            f"push_to_hub needs a Hub login, but the Hub did not confirm one ({type(error).__name__}). Run `hf auth "
            "login`, or set HF_TOKEN to a token with write access."
        ) from None
    try:
        name = api.create_repo(args.hub_model_id, private=private, exist_ok=True).repo_id
        api.auth_check(name, write=True)
        is_private = api.model_info(name).private
    except Exception as error:
        answer = getattr(error, "server_message", None)
        raise ValueError(
            f"push_to_hub needs the right to write to {args.hub_model_id}, which the Hub did not confirm "
            f"({type(error).__name__}{f': {answer}' if answer else ''}). Log in with a token that has it, or name "
            "another hub_model_id."
        ) from None
    if private is not None and is_private != private:
        kinds = ("public", "private")
        raise ValueError(
            f"{name} exists and is {kinds[not private]}, and hub_private_repo is {private}. Leave it out, or change "
            "the repository's settings."
        )


class PushEverySave(TrainerCallback):
    """Exports the model after every checkpoint and pushes it in the background, unless the last push still runs."""

    def __init__(self, trainer: PublishingTrainer, card: "CardArguments") -> None:
        self.trainer, self.card = trainer, card
        self.executor = ThreadPoolExecutor(1)
        self.running: Future | None = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # All processes must export, or none: the main process decides.
        if broadcast_object_list([self.running is not None and not self.running.done()])[0]:
            return
        try:
            self.trainer.export(self.trainer.args.output_dir, self.card)
        except Exception as error:  # the export at the end of the training raises its error
            logger.error(
                f"The export after step {state.global_step} failed ({type(error).__name__}: {error}), and is not "
                "pushed. Training goes on; the checkpoint is complete, and `btok export` makes a repository of it."
            )
            return
        if state.is_world_process_zero:
            self.running = self.executor.submit(self._push)

    def _push(self) -> None:
        try:
            logger.warning(f"Pushed to {self.trainer.push_export()}")
        except Exception as error:  # training continues; the final push raises its error
            logger.error(str(error))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.executor.shutdown()  # waits for the push, because the final export writes the same folder


def choose_best_metric(
    args: CondensationConfig, evaluator: Any, model: BTokSentenceTransformer, evaluated: Any
) -> None:
    """Settle `metric_for_best_model`: nDCG@10 of `retrieval_evaluator` by default, where only an evaluator measures.

    A scheduler that waits for a plateau is told whether the metric rises or falls as a model gets better.

    Args:
        args (`CondensationConfig`): Arguments, which are changed in place.
        evaluator: That of the trainer, if it has one.
        model (`BTokSentenceTransformer`): The model.
        evaluated (`Dataset` or `dict[str, Dataset]`, *optional*): The `eval_dataset`.

    Raises:
        ValueError: A metric that is not measured; or none is named, and it cannot be chosen.
    """
    best = args.metric_for_best_model
    if not best or (evaluator is None and evaluated is None):
        return
    names = metric_names(evaluator, model) if isinstance(evaluator, PairEvaluator) else []
    losses = [f"{name}_loss" for name in evaluated] if isinstance(evaluated, dict) else ["loss"]
    losses = losses if evaluated is not None else []
    if best == "loss" and names and not losses:  # the Trainer's default with load_best_model_at_end
        args.metric_for_best_model = next(name for name in names if name.endswith("ndcg@10"))
        args.greater_is_better = True
    elif best == "loss" and not losses:
        raise ValueError(
            "metric_for_best_model is the loss, as by default, but there is no eval_dataset to measure it on. Name a "
            "metric of the evaluator."
        )
    elif (evaluator is None or names) and not {best, best.removeprefix("eval_")} & {*names, *losses}:
        raise ValueError(
            f"metric_for_best_model must be one of {', '.join([*losses, *names])}, got {best!r}. Set it to one of "
            "them."
        )
    if args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU:
        # torch's default is "min", also for a metric that rises.
        given: Any = args.lr_scheduler_kwargs or {}  # a dict by now, also if it was given as JSON
        args.lr_scheduler_kwargs = {"mode": "max" if args.greater_is_better else "min", **given}
