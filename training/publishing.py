"""What a training gives: its scores, the repository to publish, and its upload."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from btok_hf.export import export_model
from btok_hf.hub import MESSAGE, push
from btok_hf.sentence_transformer import BTokSentenceTransformer
from btok_hf.training.checkpoints import full_parameters
from btok_hf.training.condensation_config import CondensationConfig
from btok_hf.training.condensation_log import LoggingTrainer

if TYPE_CHECKING:  # slow to import, or imported where it is used
    from btok_hf.hub_card.card import CardArguments

# What the Trainer adds to the metrics of an evaluator, whose name may be "eval".
OF_TRAINER = [
    f"eval_{name}" for name in ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
]


class PublishingTrainer(LoggingTrainer):
    """The part of `CondensationTrainer` that evaluates, exports and pushes."""

    model: BTokSentenceTransformer
    args: CondensationConfig

    def evaluate_retrieval(self) -> dict[str, float]:
        """The metrics of the evaluator by the evaluator's names; empty without one. All processes must call it."""
        if self.evaluator is None:
            return {}
        evaluator: Any = self.evaluator  # evaluators have a name, but not in the annotations of their base class
        if self.is_fsdp_enabled and not self._is_sharded():
            # Before training. The Trainer would shard the model, which accelerate refuses without an optimizer.
            return dict(evaluator(self.model.to(self.args.device)))
        own = tuple(f"{part.name}_" for part in getattr(evaluator, "evaluators", [evaluator]))
        found = {key: value for key, value in self.evaluate().items() if key not in OF_TRAINER}
        # The Trainer prefixes names with "eval_" unless they begin with it.
        metrics = {key if key.startswith(own) else key.removeprefix("eval_"): value for key, value in found.items()}
        return {key: value for key, value in metrics.items() if key.startswith(own)}

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
            with self._unsharded(state_dict):
                export_model(self.model, output_dir, files=files)
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
