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

# Not logged themselves: the weight of the steps since the last log, and of those that had a condensation loss.
COUNTED, CONDENSED = "counted", "condensed"


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
        self._samples += self._rows(inputs) * self.args.world_size
        self._tokens += sum(int(counted.sum()) for counted in masks + targets) * self.args.world_size

    @staticmethod
    def _rows(inputs: Mapping[str, Any]) -> int:
        """Rows of a batch."""
        return len(inputs.get("query_rows", inputs.get("query_attention_mask")))

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
            self.accum_loss_components["eval"].clear()
            return super().evaluate(*args, **kwargs)

    def _track(self, weight: int = 1) -> None:
        """Count the parts of a step's loss for the next log.

        Args:
            weight (`int`): How much the step counts in the averages.
        """
        infonce, condensation = cast(torch.Tensor, self.loss.infonce), self.loss.condensation  # the loss was called
        parts = {  # filled on the device: copying a number to it would wait for the step
            "infonce": infonce,
            "condensation_weight": infonce.new_full((), self.loss.condensation_weight),
            "condensation": infonce.new_zeros(()) if condensation is None else condensation,
            COUNTED: infonce.new_ones(()),
            CONDENSED: infonce.new_full((), condensation is not None),
        }
        self.track_loss_components({name: weight * part for name, part in parts.items()})

    def _average(self, kind: str) -> None:
        """Weigh the steps, and average the condensation loss over those that have one; without any, a log has none."""
        parts = self.accum_loss_components[kind]
        if CONDENSED not in parts:
            return
        sums = [parts["steps"].float(), *(parts.pop(name).to(parts["steps"].device) for name in (COUNTED, CONDENSED))]
        steps, counted, condensed = self.accelerator.reduce(torch.stack(sums)).tolist()
        if not condensed:
            del parts["condensation"]
        for name in set(parts) - {"steps"}:
            # The superclass divides by all steps.
            parts[name] = parts[name] * (steps / (condensed if name == "condensation" else counted))

    def _with_parts(self, logs: dict[str, float]) -> dict[str, float]:
        """The log of one of several evaluation datasets, or of another prefix than `eval`, with the parts of its loss.

        The superclass adds none.
        """
        named = next((key for key in logs if key.endswith("_loss") and key != "train_loss"), None)
        parts = self.accum_loss_components["eval"]
        if named is None or not int(parts.get("steps", 0)):
            return logs
        self._average("eval")
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
            self._average("train" if "loss" in logs else "eval")
        else:
            logs = self._with_parts(logs)
        super().log(logs, start_time)
        if not torch.tensor(logs.get("loss", 0.0)).isfinite():
            raise ValueError(f"The loss is {logs['loss']} at step {self.state.global_step}. {REMEDY}")
