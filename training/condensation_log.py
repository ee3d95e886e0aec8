"""What a training logs: losses averaged over the steps that have them, rows and tokens a second."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from sentence_transformers import SentenceTransformerTrainer

from btok_hf.features import IGNORED
from btok_hf.training.condensation_loss import CondensationLoss

# Resuming would bring back the learning rate, which is in the checkpoint.
REMEDY = (
    "Start a new training from the newest complete checkpoint as the model (`btok export CHECKPOINT FOLDER` makes one "
    "of adapters) at a lower learning_rate, or with bf16 in place of fp16."
)

CONDENSED = "condensed"  # steps with a condensation loss since the last log; not logged itself


class LoggingTrainer(SentenceTransformerTrainer):
    """The part of `CondensationTrainer` that counts and logs."""

    loss: CondensationLoss  # type: ignore[assignment]  # annotated there as dict, which is one form of several
    # Since the last log.
    _tokens, _samples = 0, 0
    _since: float | None = None

    def _count(self, inputs: Mapping[str, Any]) -> None:
        """Count the rows and tokens of a batch; in all processes, as many as in this one."""
        if self._since is None:
            self._since = time.perf_counter()
        # Masks of pixels are masks of attention, too.
        names = [key for key in inputs if key.endswith("_attention_mask") and "_pixel_" not in key]
        masks = [inputs[key] for key in names]
        targets = [value != IGNORED for key, value in inputs.items() if key.endswith("_target_labels")]
        self._samples += len(inputs.get("query_rows", masks[0])) * self.args.world_size
        self._tokens += sum(int(counted.sum()) for counted in masks + targets) * self.args.world_size

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Time that is no training: it does not count in the speed that is logged."""
        begin, since = time.perf_counter(), self._since
        try:
            yield
        finally:
            if since is not None:  # from before, because evaluating several datasets pauses in a pause
                self._since = since + time.perf_counter() - begin

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in the superclass."""
        with self._paused():
            return super().evaluate(*args, **kwargs)

    def _track(self) -> None:
        infonce, condensation = cast(torch.Tensor, self.loss.infonce), self.loss.condensation  # the loss was called
        parts = {  # filled on the device: copying a number to it would wait for the step
            "infonce": infonce,
            "condensation_weight": infonce.new_full((), self.loss.condensation_weight),
            "condensation": infonce.new_zeros(()) if condensation is None else condensation,
            CONDENSED: infonce.new_full((), condensation is not None),
        }
        self.track_loss_components(parts)

    def _average_condensation(self, kind: str) -> None:
        """Average the condensation loss over the steps that have one; a log without such a step has none."""
        parts = self.accum_loss_components[kind]
        if CONDENSED not in parts:
            return
        counts = torch.stack([parts["steps"].float(), parts.pop(CONDENSED).to(parts["steps"].device)])
        steps, condensed = self.accelerator.reduce(counts).tolist()
        if condensed:
            # The superclass divides by all steps.
            parts["condensation"] = parts["condensation"] * (steps / condensed)
        else:
            del parts["condensation"]

    def _with_parts(self, logs: dict[str, float]) -> dict[str, float]:
        """The log of one of several evaluation datasets, with the parts of its loss: the superclass adds none.

        It would also average them into those of the next evaluation.
        """
        named = next((key for key in logs if key.startswith("eval_") and key.endswith("_loss")), None)
        parts = self.accum_loss_components["eval"]
        if named is None or not int(parts.get("steps", 0)):
            return logs
        self._average_condensation("eval")
        sums: Any = self.accelerator.reduce(parts)
        steps = sums.pop("steps").item()
        parts.clear()
        return {**logs, **{named[:-4] + key: round(value.item() / steps, 4) for key, value in sums.items()}}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._since is not None:
            seconds = time.perf_counter() - self._since
            logs = {**logs, "samples_per_second": round(self._samples / seconds, 1)}
            logs["tokens_per_second"] = round(self._tokens / seconds)
            self._tokens, self._samples, self._since = 0, 0, None
        if "loss" in logs or "eval_loss" in logs:
            self._average_condensation("train" if "loss" in logs else "eval")
        else:
            logs = self._with_parts(logs)
        super().log(logs, start_time)
        if not torch.tensor(logs.get("loss", 0.0)).isfinite():
            raise ValueError(f"The loss is {logs['loss']} at step {self.state.global_step}. {REMEDY}")
