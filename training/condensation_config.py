"""Arguments of condensation training."""

import json
from dataclasses import dataclass, field
from typing import Union

from sentence_transformers import SentenceTransformerTrainingArguments

# condense value -> (encoded side, generated side) pairs
CONDENSE = {
    "positive": [("query", "positive")],
    "query": [("positive", "query")],
    "both": [("query", "positive"), ("positive", "query")],
    "none": [],
}


@dataclass
class CondensationConfig(SentenceTransformerTrainingArguments):
    """`SentenceTransformerTrainingArguments` plus what Generative Information Condensation adds.

    Defaults are the setting of arXiv 2604.11095 where one exists. Memory is set by `mini_batch_size`, the length of
    rows (`max_pixels` of the processor, `max_length`) and `gradient_checkpointing`, not by the batch size.

    Args:
        mini_batch_size (`int`): Rows whose activations are alive at once (GradCache). It changes memory and speed,
            never the loss.
        temperature (`float`): Of InfoNCE over cosine similarities.
        symmetric (`bool`): Average the query → positive and positive → query losses.
        gather_across_devices (`bool`): Use the other processes' candidates as negatives too.
        condense (`str` or `dict[str, str]`): Which side is generated: `positive` (encode the query, generate the
            positive's text), `query` (the reverse), `both` or `none`; one value, or one per dataset by its name.
        condensation_weight (`float`): λ, the weight of the condensation loss. 0 switches it off.
        condensation_steps (`int`, *optional*): Optimiser steps after which λ is 0. `None`: never.
        condensation_mask (`bool`): `False` is the ablation in which the target also sees the encoded side.
        max_target_length (`int`): Longest target text in tokens; longer text keeps its beginning.
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: float = field(default=100, metadata={"help": "Steps of linear warm-up."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    mini_batch_size: int = field(
        default=8, metadata={"help": "Rows whose activations are alive at once (GradCache): the memory knob."}
    )
    temperature: float = field(default=0.02, metadata={"help": "Temperature of InfoNCE."})
    symmetric: bool = field(default=False, metadata={"help": "Average both directions of InfoNCE."})
    gather_across_devices: bool = field(
        default=True, metadata={"help": "Use the candidates of all processes as negatives."}
    )
    condense: Union[str, None, dict[str, str]] = field(  # noqa: UP007, RUF036 (what HfArgumentParser can read)
        default="positive",
        metadata={
            "help": "Side whose text is generated: positive, query, both or none. One value, or a mapping (in JSON) "
            "from dataset name to value."
        },
    )
    condensation_weight: float = field(default=5.0, metadata={"help": "Weight λ of the condensation loss; 0: off."})
    condensation_steps: int | None = field(
        default=None, metadata={"help": "Optimiser steps after which λ is 0. Default: never."}
    )
    condensation_mask: bool = field(
        default=True, metadata={"help": "Hide the encoded side from the target. False is an ablation."}
    )
    max_target_length: int = field(default=256, metadata={"help": "Longest target text in tokens."})

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.condense, str) and self.condense.lstrip().startswith("{"):
            self.condense = json.loads(self.condense)
        values = self.condense.values() if isinstance(self.condense, dict) else [self.condense]
        for value in values:
            if value not in CONDENSE:
                raise ValueError(f"condense must be one of {', '.join(CONDENSE)}, got {value!r}.")
        for name in ("mini_batch_size", "temperature", "max_target_length"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        if self.condensation_weight < 0:
            raise ValueError(f"condensation_weight must be 0 or more, got {self.condensation_weight}.")
        if self.condensation_steps is not None and self.condensation_steps < 0:
            raise ValueError(f"condensation_steps must be 0 or more, got {self.condensation_steps}.")

    def condense_for(self, dataset_name):
        """The `condense` value of one dataset; `dataset_name` is `None` where there is a single one."""
        if not isinstance(self.condense, dict):
            return self.condense
        if dataset_name not in self.condense:
            raise ValueError(
                f"condense names the datasets {sorted(self.condense)} but not {dataset_name!r}. "
                f"Add it with one of {', '.join(CONDENSE)}."
            )
        return self.condense[dataset_name]
