"""Arguments of condensation training."""

import json
from dataclasses import dataclass, field
from typing import Union

from sentence_transformers import SentenceTransformerTrainingArguments
from transformers.trainer_utils import HubStrategy

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

    Defaults are the setting of arXiv 2604.11095 where one exists. Memory is set by `mini_batch_size` or
    `mini_batch_num_tokens`, the length of rows (`max_pixels` of the processor, `max_seq_length` of the model) and
    `gradient_checkpointing`, not by the batch size: of a batch, the device holds token ids and embeddings, and the
    host the pixels, 24 bytes each (12 with `bf16`).

    Args:
        mini_batch_size (`int`): Rows whose activations are alive at once (GradCache). It changes memory and speed,
            never the loss.
        mini_batch_num_tokens (`int`, *optional*): Tokens (those of targets counted) alive at once instead of rows.
            Bounds memory where lengths differ; a longer row is still embedded, alone.
        temperature (`float`): Of InfoNCE over cosine similarities.
        symmetric (`bool`): Average the query → positive and positive → query losses.
        gather_across_devices (`bool`): Use the other processes' candidates as negatives too.
        mask_false_negatives (`bool`): Leave a candidate out of a query's negatives if it equals the query's positive
            in content or `group`, or answers an equal query.
        matryoshka_dims (`list[int]`, *optional*): Also train the embedding's first dimensions, as many as each number
            says, to be embeddings of their own; InfoNCE is the mean over them. Name the whole size too.
        dataset_weights (`dict[str, float]`, *optional*): Draw the dataset of each block of batches by these weights,
            until `max_steps`. Default: every dataset once an epoch, in proportion to its size.
        block_size (`int`, *optional*): Rows of the global batch that come from one dataset, with `dataset_weights`.
            Default: those of one process's batch.
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
    hub_strategy: Union[HubStrategy, str] = field(  # noqa: UP007 (see condense)
        default="end",
        metadata={"help": "When train.py pushes: end, or every_save (in the background, after every checkpoint)."},
    )
    mini_batch_size: int = field(
        default=8, metadata={"help": "Rows whose activations are alive at once (GradCache): the memory knob."}
    )
    mini_batch_num_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens alive at once instead of rows, targets counted: the other memory knob."},
    )
    temperature: float = field(default=0.02, metadata={"help": "Temperature of InfoNCE."})
    symmetric: bool = field(default=False, metadata={"help": "Average both directions of InfoNCE."})
    gather_across_devices: bool = field(
        default=True, metadata={"help": "Use the candidates of all processes as negatives."}
    )
    mask_false_negatives: bool = field(
        default=True, metadata={"help": "Leave copies of the right answer out of a query's negatives."}
    )
    matryoshka_dims: list[int] | None = field(
        default=None, metadata={"help": "Sizes at which the cut embedding is trained too, the whole one included."}
    )
    dataset_weights: Union[str, None, dict[str, float]] = field(  # noqa: UP007, RUF036 (see condense)
        default=None, metadata={"help": "Mapping (in JSON) from dataset name to the weight it is drawn with."}
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Rows of the global batch from one dataset, with dataset_weights."}
    )
    condense: Union[str, None, dict[str, str]] = field(  # noqa: UP007, RUF036 (what HfArgumentParser can read)
        default="positive",
        metadata={
            "help": "Side whose text is generated: positive, query, both or none. One value, or a mapping (in JSON) "
            "from dataset name to value. The sources of training/sources.py bring their own where it is positive or "
            "a mapping that does not name them."
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
        for name in ("condense", "dataset_weights"):
            value = getattr(self, name)
            if isinstance(value, str) and value.lstrip().startswith("{"):
                setattr(self, name, json.loads(value))
        values = self.condense.values() if isinstance(self.condense, dict) else [self.condense]
        for value in values:
            if value not in CONDENSE:
                raise ValueError(f"condense must be one of {', '.join(CONDENSE)}, got {value!r}.")
        for name in ("mini_batch_size", "mini_batch_num_tokens", "temperature", "max_target_length", "block_size"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}.")
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
