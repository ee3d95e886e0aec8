"""`SentenceTransformerTrainer` with condensation: collator, loss, adapters, logging."""

import time
from dataclasses import dataclass

import torch
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from btok_hf.condensation import IGNORED
from btok_hf.media import is_media_path
from btok_hf.modeling.modeling_btok import bottleneck_token_ids
from btok_hf.sentence_transformer import BTokSentenceTransformer
from btok_hf.training.condensation_config import CONDENSE, CondensationConfig
from btok_hf.training.condensation_loss import CondensationLoss

# The language model's projections: what LoRA adapts unless the user names modules.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def text_of(value):
    """The text of one side of a pair: a string, or the text in an input dict or chat messages; `None` without any."""
    if isinstance(value, str):
        return None if is_media_path(value) else value.strip() or None
    if isinstance(value, dict):
        value = value.get("content", value.get("text"))
    if isinstance(value, (list, tuple)):
        texts = [text_of(part) for part in value if not isinstance(part, dict) or part.get("type", "text") == "text"]
        return " ".join(text for text in texts if text) or None
    return text_of(value) if isinstance(value, str) else None


def check_columns(columns, dataset_name=None):
    """Refuse columns that training would not know how to use; returns those to embed, in their order."""
    where = "The dataset" if dataset_name is None else f"Dataset {dataset_name!r}"
    embedded = [column for column in columns if column not in ("target", "group", "dataset_name")]
    negatives = [column for column in embedded if column == "negative" or column.startswith("negative_")]
    unknown = sorted(set(embedded) - {"query", "positive", *negatives})
    missing = sorted({"query", "positive"} - set(embedded))
    if unknown or missing:
        raise ValueError(
            f"{where} has the columns {sorted(columns)}: "
            + "; ".join(filter(None, [missing and f"missing {missing}", unknown and f"unknown {unknown}"]))
            + ". Training takes query, positive, negative or negative_1, negative_2, … (each a text, an image, or a "
            "dict with image, video and text), target (a text to generate instead of the other side's own) and group "
            "(rows of one group answer each other's queries). "
            "Rename the columns with dataset.rename_column and drop the rest with dataset.remove_columns."
        )
    return ["query", "positive", *negatives]


@dataclass
class CondensationCollator(SentenceTransformerDataCollator):
    """Batches rows with `query`, `positive`, negatives and, for the side to generate, target tokens.

    A target is `<|im_start|>assistant\\n` (unsupervised) + text + `<|im_end|>` (supervised), as in arXiv 2604.11095.
    """

    tokenizer: object = None
    args: CondensationConfig = None

    def __call__(self, features):
        dataset_name = features[0].get("dataset_name")
        columns = check_columns(features[0], dataset_name)
        names = {"negative": "negative_0"}  # a bare "negative_" would be a prefix of the keys of "negative_1_"
        rows = [{names.get(column, column): row[column] for column in columns} for row in features]
        if dataset_name is not None:
            rows = [{**row, "dataset_name": dataset_name} for row in rows]
        batch = super().__call__(rows)
        if self.args.condensation_weight:
            for encoded, generated in CONDENSE[self.args.condense_for(dataset_name)]:
                texts = [self._target_text(row, generated, dataset_name) for row in features]
                batch[f"{encoded}_target_ids"], batch[f"{encoded}_target_labels"] = self._tokenize(texts)
        return batch

    def _target_text(self, row, generated, dataset_name):
        text = text_of(row["target"] if row.get("target") is not None else row[generated])
        if text is None:
            raise ValueError(
                f"Condensation generates the text of {generated!r}, but a row of "
                f"{'the dataset' if dataset_name is None else repr(dataset_name)} has none there (it holds "
                f"{type(row[generated]).__name__}). Set condense to the other side or to 'none' for this dataset, or "
                "add a text column 'target'."
            )
        return text

    def _tokenize(self, texts):
        """Target ids and labels, each (batch, 1, length).

        The middle axis is there because GradCache cuts the padding off every tensor whose second axis is as long as
        the rows of the encoded side, and target lengths have nothing to do with those.
        """
        # As in the embedding chat template: no text may become a special token.
        texts = [text.replace("<|", "< |") for text in texts]
        prompt = self.tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        limit = self.args.max_target_length
        bodies = [[*self.tokenizer(text, add_special_tokens=False)["input_ids"][:limit], end] for text in texts]
        pad = {"batch_first": True, "padding_side": "right"}
        ids = [torch.tensor(prompt + body) for body in bodies]
        labels = [torch.tensor([IGNORED] * len(prompt) + body) for body in bodies]
        ids = torch.nn.utils.rnn.pad_sequence(ids, padding_value=end, **pad)
        labels = torch.nn.utils.rnn.pad_sequence(labels, padding_value=IGNORED, **pad)
        return ids[:, None], labels[:, None]


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
        self._tokens, self._samples, self._since = 0, 0, None
        super().__init__(model=model, args=args, **kwargs)
        self.data_collator.tokenizer = model.tokenizer
        self.data_collator.args = self.args
        self._check_datasets()

    def _check_datasets(self):
        """Collate one row of each dataset, so that a wrong column or side shows before training starts."""
        for part in (self.train_dataset, self.eval_dataset):
            datasets = part if isinstance(part, dict) else {None: part}
            for name, dataset in datasets.items():
                if dataset is None:
                    continue
                check_columns(dataset.column_names, name)
                row = dict(next(iter(dataset)))
                if name is not None:
                    row.setdefault("dataset_name", name)
                self.data_collator([row])

    def get_default_loss(self, model):
        return CondensationLoss(
            model,
            temperature=self.args.temperature,
            symmetric=self.args.symmetric,
            mini_batch_size=self.args.mini_batch_size,
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
        no_duplicates = self.args.batch_sampler in (BatchSamplers.NO_DUPLICATES, BatchSamplers.NO_DUPLICATES_HASHED)
        if no_duplicates and "group" in (dataset.column_names or []):
            dataset = dataset.select_columns(["group"])
        return super().get_batch_sampler(dataset, *args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        over = self.args.condensation_steps is not None and self.state.global_step >= self.args.condensation_steps
        self.loss.condensation_weight = 0.0 if over else self.args.condensation_weight
        if self._since is None:
            self._since = time.perf_counter()
        masks = [value for key, value in inputs.items() if key.endswith("_attention_mask")]
        targets = [value != IGNORED for key, value in inputs.items() if key.endswith("_target_labels")]
        self._samples += len(masks[0]) * self.args.world_size
        self._tokens += sum(counted.sum() for counted in masks + targets) * self.args.world_size
        loss = super().training_step(model, inputs, num_items_in_batch)
        # The second GradCache pass, in which the condensation loss is computed, happened in the backward pass.
        self._track()
        if self.loss.condensation is not None and len(masks[0]) > self.loss.mini_batch_size:
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
                "tokens_per_second": round(int(self._tokens) / seconds),
            }
            self._tokens, self._samples, self._since = 0, 0, None
        super().log(logs, start_time)

    def _load_from_checkpoint(self, checkpoint_path):
        loaded = BTokSentenceTransformer(checkpoint_path, device="cpu")
        self.model.load_state_dict(loaded.state_dict())


def add_adapters(model, peft_config):
    """Add LoRA adapters to the language model, the Bottleneck Tokens' embedding rows trained along with them.

    Raises:
        ValueError: Dropout above 0, or token rows already named in `peft_config`.
    """
    dropout = getattr(peft_config, "lora_dropout", 0.0)
    if dropout > 0:
        raise ValueError(
            f"lora_dropout must be 0, got {dropout}: GradCache embeds each row twice, and with dropout the cached "
            "gradients would belong to other embeddings than those of the second pass. Set lora_dropout=0.0."
        )
    if peft_config.target_modules is None:
        peft_config.target_modules = LORA_TARGETS
    if peft_config.trainable_token_indices is not None:
        raise ValueError("Leave trainable_token_indices unset: the Bottleneck Tokens' rows are added to it.")
    if model.config.btok_num_tokens:
        peft_config.trainable_token_indices = {"embed_tokens": list(bottleneck_token_ids(model.config))}
    model.add_adapter(peft_config)
    if model[0].lm_head is not None:  # an untied head, outside the backbone that PEFT froze
        model[0].lm_head.requires_grad_(False)
