"""Rows of pairs → a batch of features: sides, negatives, target tokens, hashes of content.

What the keys of a batch hold is listed in `btok_hf/features.py`; what a cell may hold, in `cells.py`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, cast

import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from btok_hf.bottleneck import escapes
from btok_hf.content import content_hash
from btok_hf.features import IGNORED, PIXEL_KEYS
from btok_hf.training.cells import as_input
from btok_hf.training.checks import check_columns, check_negatives, group_hash, target_text
from btok_hf.training.condensation_config import CONDENSE, CondensationConfig
from btok_hf.training.prompts import COLUMNS


@dataclass
class CondensationCollator(SentenceTransformerDataCollator):
    """Batches rows with `query`, `positive`, negatives and, for the side to generate, target tokens.

    A target is `<|im_start|>assistant\\n` (unsupervised) + text + `<|im_end|>` (supervised), as in arXiv 2604.11095.
    A text that is cut has no end.

    A batch may hold the same value more than once, as label datasets do with their labels. Equal values with equal
    targets are preprocessed and encoded once. `…_rows`, int64 of shape `(batch,)`, then gives the encoded row of each
    row of the batch. With sharded parameters this is off, because processes must encode equally many rows.

    `CondensationTrainer` sets the fields below:

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer of the model, for targets.
        args (`CondensationConfig`): The arguments of the run.
        deduplicate (`bool`): Whether equal values are encoded once.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    args: CondensationConfig | None = None
    deduplicate: bool = True
    prompt = "<|im_start|>assistant\n"

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        args = self.args
        assert args is not None
        dataset_name = features[0].get("dataset_name")
        columns = check_columns([column for column in features[0] if column != "row"], dataset_name)
        name = {} if dataset_name is None else {"dataset_name": dataset_name}
        where = "the dataset" if dataset_name is None else repr(dataset_name)
        # The number of a row comes from `NumberedRows`, if the trainer made the batch.
        rows = [f"Row {row['row']} of {where}" if "row" in row else f"A row of {where}" for row in features]
        # Every query is compared with every negative of the batch. So negatives of all columns form one side, and
        # rows may have different numbers of them.
        sides: dict[str, list[Any]] = {side: [as_input(row[side]) for row in features] for side in columns[:2]}
        places = {side: [f"{row}, its {side}" for row in rows] for side in sides}  # for errors
        negatives, of_negatives, groups = [], [], []
        for column in columns[2:]:
            for row, place in zip(features, rows):
                cells, of_row = [row[column]], None
                if column == "negatives":
                    cells, of_row = row[column], row.get("negative_groups")
                    check_negatives(cells, of_row, place)
                for cell, group in zip(cells or (), of_row or repeat(None)):
                    if cell is not None:
                        negatives.append(as_input(cell))
                        of_negatives.append(f"{place}, its {column}")
                        groups.append(group)
        if negatives:
            sides["negative"], places["negative"] = negatives, of_negatives
        targets = {}
        if args.condensation_weight:
            for encoded, generated in CONDENSE[args.condense_for(dataset_name)]:
                targets[encoded] = [
                    target_text(row[generated], row.get("target"), generated, place)
                    for row, place in zip(features, rows)
                ]
        batch: dict[str, Any] = {}
        for side, values in sides.items():
            hashes = [content_hash(value) for value in values]
            texts = targets.get(side)
            kept = list(range(len(values)))
            if self.deduplicate:
                first: dict[tuple, int] = {}
                # The type is part of the key: "photo.png" is read as a file, {"text": "photo.png"} is a text. So is
                # the order of a dict's keys, which may be that of the row.
                kinds = [tuple(value) if isinstance(value, dict) else type(value) for value in values]
                keys = list(zip(hashes, kinds, texts or hashes))
                kept = [index for index, key in enumerate(keys) if first.setdefault(key, index) == index]
                if len(kept) < len(values):
                    number_of = {keys[index]: number for number, index in enumerate(kept)}
                    batch[f"{side}_rows"] = torch.tensor([number_of[key] for key in keys])
            try:
                batch.update(super().__call__([{side: values[index], **name} for index in kept]))
            except (ValueError, OSError) as error:
                found = re.match(r"Input (\d+)", str(error))  # its place among those that were kept
                if found is None:
                    raise
                raise ValueError(f"{places[side][kept[int(found[1])]]}{str(error)[found.end() :]}") from error
            for key in (f"{side}_{pixels}" for pixels in PIXEL_KEYS):
                if args.bf16 and key in batch:  # the vision tower would convert them anyway
                    batch[key] = batch[key].to(torch.bfloat16)
            if f"{side}_pixel_attention_mask" in batch:  # it has eight bytes for a pixel
                batch[f"{side}_pixel_attention_mask"] = batch[f"{side}_pixel_attention_mask"].bool()
            if texts:
                texts = [texts[index] for index in kept]
                batch[f"{side}_target_ids"], batch[f"{side}_target_labels"] = self._tokenize(texts)
            if args.mask_false_negatives:
                batch[f"{side}_hashes"] = torch.tensor([[value] * 2 for value in hashes])
        if args.mask_false_negatives:
            # A query is its text and its prompt: with another prompt, the same text asks for something else.
            prompt = self._get_prompt_for_column(self._resolve_prompts(name) or "", "query")
            for hashed in batch["query_hashes"]:
                hashed[1] = content_hash({"prompt": prompt or "", "query": str(hashed[0].item())})
            for side, of_side in (("positive", [row.get("group") for row in features]), ("negative", groups)):
                for hashed, group in zip(batch.get(f"{side}_hashes", ()), of_side):
                    if group is not None:
                        hashed[1] = group_hash(group)
        return batch

    def _resolve_prompts(self, batch: dict[str, Any]) -> Any:
        """As in Sentence-Transformers, which gives no prompt to a dataset that prompts by dataset do not name."""
        name, given = batch.get("dataset_name"), cast(Any, self.prompts)
        if not isinstance(given, dict) or not (datasets := set(given) - {*COLUMNS, None}):
            return super()._resolve_prompts(batch)
        if name not in given and None not in given:
            raise ValueError(
                f"prompts are given for the datasets {sorted(datasets)}, got {name or 'one without a name'!r}. "
                "Give rows in a dict, {name: dataset}, under one of these names, or give prompts for all others."
            )
        return given[name if name in given else None]

    def maybe_warn_about_column_order(self, column_names: list[str]) -> None:
        """Does nothing: `__call__` puts the columns in order."""

    def _tokenize(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Target ids and labels, each of shape `(rows, 1, length)`.

        The middle axis is needed because GradCache trims every tensor whose second axis is as long as the rows of the
        encoded side. Targets have lengths of their own.
        """
        assert self.args is not None and self.tokenizer is not None
        # As in the embedding chat template: no text may become a special token.
        for token, instead in escapes(self.tokenizer):
            texts = [text.replace(token, instead) for text in texts]
        prompt = self.tokenizer(self.prompt, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert isinstance(end, int)  # one token, one id
        limit = self.args.max_target_length
        # Not verbose: it would warn that texts are longer than a row of the model, before they are cut.
        whole = [self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
        # A text that goes on does not end where it is cut.
        bodies = [[*body, end] if len(body) <= limit else body[:limit] for body in whole]
        ids = pad_sequence([torch.tensor(prompt + body) for body in bodies], batch_first=True, padding_value=end)
        labels = pad_sequence(
            [torch.tensor([IGNORED] * len(prompt) + body) for body in bodies], batch_first=True, padding_value=IGNORED
        )
        return ids[:, None], labels[:, None]
