"""Arguments of condensation training.

Every field is a flag of `btok train` and a key of a recipe. Arguments about data and model are in `train.py`.
"""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Union

from sentence_transformers import SentenceTransformerTrainingArguments
from transformers.trainer_utils import HubStrategy

# condense value -> (encoded side, generated side) pairs
CONDENSE = {
    "positive": [("query", "positive")],
    "query": [("positive", "query")],
    "both": [("query", "positive"), ("positive", "query")],
    "none": [],
}

WARM_UP = 0.1  # of all steps; the paper's recipe has 100 of its own

# Arguments of transformers that cannot hold here: the only value that they may have, and why.
LEFT_OUT = {
    "neftune_noise_alpha": (None, "the two passes of GradCache would see different noise"),
    "auto_find_batch_size": (
        False,
        "a smaller batch would have fewer negatives. Memory is bounded by mini_batch_size, which changes no result",
    ),
    "train_sampling_strategy": ("random", "batches are drawn by batch_sampler, which does not use it"),
    "label_smoothing_factor": (0.0, "neither part of the loss uses it"),
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        (False, "an evaluation before training would leave the weights rounded. With bf16, evaluation has it too"),
    ),
    "include_num_input_tokens_seen": ("no", "it would count nothing. tokens_per_second is logged"),
}


@dataclass
class CondensationConfig(SentenceTransformerTrainingArguments):
    """`SentenceTransformerTrainingArguments` plus the arguments of Generative Information Condensation.

    Defaults are the setting of arXiv 2604.11095 where one exists.

    Device memory depends on `mini_batch_size` or `mini_batch_num_tokens`, on the length of rows (`max_pixels` of the
    processor, `max_seq_length` of the model) and on `gradient_checkpointing`. It does not depend on the batch size: of
    the complete batch, the device holds only the embeddings. The host holds the pixels, 24 bytes each (12 with
    `bf16`).

    Args:
        logging_nan_inf_filter (`bool`): As in transformers: log an average in place of a loss that is not finite, and
            train on. Here the default is `False`: such a loss ends the training when it is logged.
        save_total_limit (`int`, *optional*): As in transformers, but with `load_best_model_at_end` at least 2: the
            newest checkpoint is kept beside the best, because a training that is resumed goes on from it.
        mini_batch_size (`int`): Rows per forward pass (GradCache). It changes memory and speed, not the loss.
        mini_batch_num_tokens (`int`, *optional*): Tokens per forward pass, target tokens included, instead of rows.
            Bounds memory where lengths differ. A row that is longer is embedded alone.
        temperature (`float`): Temperature of InfoNCE over cosine similarities.
        symmetric (`bool`): Average the query → positive and positive → query losses.
        gather_across_devices (`bool`): Use the candidates of all processes as negatives.
        mask_false_negatives (`bool`): Mask in-batch false negatives: candidates with the same content or `group` as
            the positive, positives of an identical query, negatives with the content of one of these, and the query
            itself.
        matryoshka_dims (`list[int]`, *optional*): Matryoshka sizes, e.g. `[1536, 512]`; the full size must be among
            them. InfoNCE is the mean over the embeddings cut to these sizes.
        dataset_weights (`dict[str, float]`, *optional*): Sampling weight of each dataset. The dataset of each block of
            batches is drawn by it, until `max_steps`. Default: every dataset once per epoch, in proportion to size.
        block_size (`int`, *optional*): With `dataset_weights`, rows of the global batch that come from one dataset.
            Default: the batch of one process.
        condense (`str` or `dict[str, str]`): Which side is generated: `positive` (encode the query, generate the
            positive's text), `query` (the reverse), `both` or `none`. One value, or a mapping from dataset name to
            value.
        condensation_weight (`float`): λ, the weight of the condensation loss. 0 switches it off.
        condensation_steps (`int`, *optional*): Optimizer steps after which λ is 0. Default: never. Evaluation keeps λ,
            so that its losses can be compared.
        condensation_mask (`bool`): Hide the encoded side from the target. `False` is an ablation.
        max_target_length (`int`): Maximum length of a target text in tokens; longer texts are cut, and then
            have no end to learn.
    """

    if TYPE_CHECKING:
        output_dir: str  # TrainingArguments allows None, and replaces it in its __post_init__

    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: float = field(default=WARM_UP, metadata={"help": "Steps of linear warm-up; below 1: of all steps."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    hub_strategy: Union[HubStrategy, str] = field(  # noqa: UP007 (see condense)
        default="end",
        metadata={"help": "When to push: end, or every_save (in the background, after every checkpoint)."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Log an average in place of a loss that is not finite, and go on. False: training ends."},
    )
    mini_batch_size: int = field(
        default=8, metadata={"help": "Rows per forward pass (GradCache). Lower it to save memory."}
    )
    mini_batch_num_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens per forward pass, target tokens included, instead of rows."},
    )
    temperature: float = field(default=0.02, metadata={"help": "Temperature of InfoNCE."})
    symmetric: bool = field(default=False, metadata={"help": "Average both directions of InfoNCE."})
    gather_across_devices: bool = field(
        default=True, metadata={"help": "Use the candidates of all processes as negatives."}
    )
    mask_false_negatives: bool = field(
        default=True,
        metadata={"help": "Mask in-batch false negatives: same content or group, or an identical query."},
    )
    matryoshka_dims: list[int] | None = field(
        default=None, metadata={"help": "Matryoshka sizes, e.g. 1536 512; the full size must be among them."}
    )
    dataset_weights: Union[str, None, dict[str, float]] = field(  # noqa: UP007, RUF036 (see condense)
        default=None, metadata={"help": "Mapping (in JSON) from dataset name to sampling weight."}
    )
    block_size: int | None = field(
        default=None, metadata={"help": "With dataset_weights: rows of the global batch that come from one dataset."}
    )
    condense: Union[str, None, dict[str, str]] = field(  # noqa: UP007, RUF036 (HfArgumentParser reads no |)
        default="positive",
        metadata={
            "help": "Side whose text is generated: positive, query, both or none. One value, or a mapping (in JSON) "
            "from dataset name to value. Sources of training/sources.py have a value of their own, which is used "
            "where this is positive or a mapping that does not name them."
        },
    )
    condensation_weight: float = field(default=5.0, metadata={"help": "Weight λ of the condensation loss; 0: off."})
    condensation_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps after which λ is 0. Default: never."}
    )
    condensation_mask: bool = field(
        default=True, metadata={"help": "Hide the encoded side from the target. False is an ablation."}
    )
    max_target_length: int = field(default=256, metadata={"help": "Maximum length of a target text in tokens."})

    def __post_init__(self) -> None:
        if self.warmup_ratio is not None and self.warmup_steps == WARM_UP:
            self.warmup_steps = 0  # as Sentence-Transformers has it, where the ratio counts if the steps are 0
        super().__post_init__()
        if self.load_best_model_at_end and self.save_total_limit == 1:
            self.save_total_limit = 2  # with 1, the Trainer would delete the newest at its end, if it is not the best
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
        for name, (kept, reason) in LEFT_OUT.items():
            if ((value := getattr(self, name)) or kept) != kept:  # 0 and None are off too
                raise ValueError(f"{name} must be left out, got {value}: {reason}.")
        if self.condensation_weight < 0:
            raise ValueError(f"condensation_weight must be 0 or more, got {self.condensation_weight}.")
        if self.condensation_steps is not None and self.condensation_steps < 0:
            raise ValueError(f"condensation_steps must be 0 or more, got {self.condensation_steps}.")

    def condense_for(self, dataset_name: str | None) -> str:
        """The `condense` value of a dataset; `dataset_name` is `None` if there is only one."""
        if isinstance(self.condense, dict):
            if dataset_name is None or dataset_name not in self.condense:
                raise ValueError(
                    f"condense names the datasets {sorted(self.condense)} but not {dataset_name!r}. "
                    f"Add it with one of {', '.join(CONDENSE)}."
                )
            return self.condense[dataset_name]
        assert self.condense is not None  # checked in __post_init__
        return self.condense
