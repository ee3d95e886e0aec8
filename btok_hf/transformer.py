"""The Sentence-Transformers module: any input becomes a row that ends in Bottleneck Tokens, and its embedding.

An exported repository does not need it: stock modules give the same vectors. It adds packed encoding without padding,
the condensation loss in the same forward, and errors for inputs that would get wrong vectors. The forward is in
`btok_hf/condensation.py`, checks of inputs in `btok_hf/inputs.py`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from sentence_transformers.base.modules import Transformer
from torch import Tensor, distributed
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from btok_hf.adapters import find_base, load_adapters
from btok_hf.arguments import check_pixels, check_prompt, check_row_length
from btok_hf.backbones import family_of
from btok_hf.compat import require_methods
from btok_hf.condensation import condense
from btok_hf.features import IGNORED, MEDIA_KEYS, joined, to_device
from btok_hf.input_kinds import Input
from btok_hf.inputs import ImageLimits, as_messages, check_input, shown
from btok_hf.lengths import suffix_ids, text_end
from btok_hf.media import VideoMetadata
from btok_hf.modeling.inputs_btok import last_positions
from btok_hf.modeling.modeling_btok import LOADING, bottleneck_token_ids, load_stock_model
from btok_hf.weights import untied_head

require_methods(Transformer, "_load_config", "_load_model")
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")


class BottleneckTransformer(Transformer):
    """Sentence-Transformers input module: any input → row that ends in K Bottleneck Tokens → embedding.

    It adds `sentence_embedding` (fp32, L2-normalised, shape `(batch, hidden)`) to the features. If they contain
    `target_ids` and `target_labels` (shape `(batch, 1, target_length)`), the same forward also adds
    `condensation_loss`, the summed cross-entropy of each row's supervised target tokens, shape `(batch,)`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("processor_kwargs") or {}
        check_pixels(given)
        super().__init__(*args, **kwargs)
        family = family_of(self.config)
        if not family.reads_pixels:
            family.limit_pixels(self.processor, given.get("min_pixels"), given.get("max_pixels"))
        self._check_template()

    def _load_config(
        self, model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]
    ) -> tuple[PreTrainedConfig, bool]:
        """The configuration, for adapters that of their base, and whether there are adapters."""
        hub = {key: value for key, value in config_kwargs.items() if key in HUB_ARGUMENTS and value is not None}
        self.adapters_from = self.subfolder = None
        if find_adapter_config_file(model_name_or_path, **hub) is None:
            self.base_revision = config_kwargs.get("revision")  # of what adapters are added to
            self.subfolder = config_kwargs.get("subfolder")
            return super()._load_config(model_name_or_path, backend, config_kwargs)
        from peft import PeftConfig

        saved = PeftConfig.from_pretrained(model_name_or_path, **hub)
        self.adapters_from = model_name_or_path
        self._base = find_base(model_name_or_path, saved.base_model_name_or_path)
        self.base_revision = saved.revision  # that of the call is one of the adapters
        of_base = {key: value for key, value in config_kwargs.items() if key != "subfolder"}
        return AutoConfig.from_pretrained(self._base, **of_base | {"revision": saved.revision}), True

    def _load_model(
        self,
        model_name_or_path: str,
        transformer_task: str,
        config: PreTrainedConfig,
        backend: str,
        is_peft_model: bool,
        **model_kwargs: Any,
    ) -> PreTrainedModel:
        """Load the stock backbone strictly. An untied head is kept for the condensation loss."""
        if backend != "torch":
            raise ValueError(f"BottleneckTransformer needs backend='torch', got {backend!r}. Leave backend out.")
        bottleneck_token_ids(config)
        model_kwargs.pop("trust_remote_code", None)
        source, adapter_kwargs = model_name_or_path, {}
        if is_peft_model:
            adapter_kwargs = {key: model_kwargs[key] for key in HUB_ARGUMENTS if model_kwargs.get(key) is not None}
            model_kwargs.pop("subfolder", None)
            model_kwargs["revision"] = self.base_revision
            source = self._base
        with LOADING:
            model, info = load_stock_model(source, config, needs_head=False, **model_kwargs)
            # Without a head, as AutoModel saves it, a model embeds, and targets cannot be predicted.
            self.lm_head = None if "lm_head.weight" in info["missing_keys"] else untied_head(model)
            self.generation_config = model.generation_config
            backbone = model.model
            if is_peft_model:
                load_adapters(backbone, model_name_or_path, **adapter_kwargs)
        return backbone

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        assert self.tokenizer is not None  # the processors of all families have one
        return self.tokenizer

    @property
    def max_seq_length(self) -> int:
        """The longest row in tokens, with all that it ends in."""
        return self._tokenizer.model_max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        end = [*suffix_ids(self._tokenizer, self.config), *bottleneck_token_ids(self.config)]
        check_row_length(value, len(end) + 1)
        self._tokenizer.model_max_length = int(value)

    @property
    def vision_tower(self) -> torch.nn.Module:
        """The part of the backbone that reads images and video."""
        return family_of(self.config).vision_tower(self.model)

    @property
    def image_limits(self) -> ImageLimits:
        """What images `check_input` lets pass."""
        return family_of(self.config).image_limits(self.config, self.processor)

    def _check_template(self) -> None:
        if "message" not in self.modalities:
            raise ValueError(
                "sentence_bert_config.json is missing, as AutoModel saves none: stock Sentence-Transformers would "
                "average all tokens. Load the repository it came from with BTokSentenceTransformer, and save that; or "
                "copy modules.json, the folders it names, and all *sentence*.json from there."
            )
        row = self.processor.apply_chat_template([{"role": "user", "content": "text"}], tokenize=False)
        tail = self._tokenizer(row, add_special_tokens=False)["input_ids"]
        token_ids = bottleneck_token_ids(self.config)
        if tail[-len(token_ids) :] != token_ids or len(set(tail[: -len(token_ids)]) & set(token_ids)):
            raise ValueError(
                f"The chat template ends rows in the ids {tail[-len(token_ids) :]}, but config.btok_token_ids is "
                f"{token_ids}: they disagree on K. Restore config.json and chat_template.jinja from the exported "
                "repository; give a base model its tokens with `btok add-tokens`."
            )

    # Unlike the superclass, it accepts paths and no audio. `kwargs` has the other arguments.
    def preprocess(  # type: ignore[override]
        self,
        inputs: Sequence[Input],
        prompt: str | None = None,
        positions: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Check the inputs and turn them into model features.

        Args:
            inputs (`Sequence[Input]`): Each is a text, an image (PIL, array, file path), a video
                (`{"array", "video_metadata"}`, file path), a dict of `text`, `image`, `video` (lists for several), or
                chat messages. A row has the media in the given order, then the prompt, then the texts; with the order
                `as_given` (`add_bottleneck_tokens`), the prompt and then all parts as they are given.
            prompt (`str`, *optional*): Instruction for every input.
            positions (`Sequence[int]`, *optional*): Where each input stands in the user's list, for errors. Default:
                in `inputs`.

        Returns:
            `dict[str, Any]`: The features, on the CPU.

        Raises:
            FileNotFoundError: A file of an input does not exist.
            ValueError: An input that cannot be embedded correctly. The message has its position and shows it in short.
        """
        check_prompt(prompt)
        places, limits = range(len(inputs)) if positions is None else positions, self.image_limits
        checked = [check_input(item, limits, place) for item, place in zip(inputs, places)]
        family = family_of(self.config)
        try:
            features = self._process([self._as_row(item) for item in checked], prompt and self._end(prompt), kwargs)
            ids = features.get("input_ids", torch.empty(0))
            before, after = map(self._tokenizer.convert_tokens_to_ids, family.media_bounds)
            if (ids == before).sum() != (ids == after).sum():
                # The processor misses only placeholders, and not the token before the first.
                raise ValueError(family.cut_error)
        except (ValueError, TypeError) as error:
            if len(checked) > 1:  # name the input
                for item, place in zip(inputs, places):
                    self.preprocess([item], prompt, [place], **kwargs)
                raise
            name = f"Input {places[0]} {shown(inputs[0])}"
            if family.cut_error not in str(error):
                raise ValueError(f"{name}: {error}") from error
            raise ValueError(
                f"{name}: it has images or video and is longer than max_seq_length={self.max_seq_length} tokens, and "
                "media are never truncated. Raise max_seq_length, lower max_pixels "
                f"(processor_kwargs={{'max_pixels': …}}), or shorten the text{_unless(kwargs)}."
            ) from error
        if not checked:
            return features
        token_ids = torch.tensor(bottleneck_token_ids(self.config))
        columns = last_positions(features["attention_mask"], len(token_ids))
        if (columns < 0).any() or (features["input_ids"].gather(1, columns) != token_ids).any():
            raise ValueError(
                f"A row does not end in the {len(token_ids)} Bottleneck Tokens: max_seq_length={self.max_seq_length} "
                "is too small, or the chat template was changed. Raise max_seq_length, or restore "
                f"chat_template.jinja{_unless(kwargs)}."
            )
        return features

    def _as_row(self, checked: Any) -> tuple[list[dict[str, Any]], list[VideoMetadata]]:
        """A checked input as messages, of long texts only what can be kept, and the metadata of its videos."""
        messages, videos = as_messages(checked)
        rows = [{**message, "content": [self._shortened(part) for part in message["content"]]} for message in messages]
        return rows, videos

    def _shortened(self, part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "text": self._end(part["text"])} if part["type"] == "text" else part

    def _end(self, text: str) -> str:
        """The end of a text that fills a row."""
        if not self.max_seq_length:
            return text
        # Not verbose: it would warn that the text is too long.
        tokenize = partial(self._tokenizer.encode, add_special_tokens=False, verbose=False)
        return text_end(text, self.max_seq_length, tokenize)

    def _process(
        self,
        rows: list[tuple[list[dict[str, Any]], list[VideoMetadata]]],
        prompt: str | None,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What the processor makes of rows of messages with the metadata of their videos."""
        metadata = [video for _, videos in rows for video in videos]
        lengths = sorted({video["total_num_frames"] for video in metadata})
        if len(lengths) > 1 and family_of(self.config).equal_videos:
            if len(rows) > 1:
                return joined([self._process([row], prompt, options) for row in rows], self._tokenizer)
            raise ValueError(
                f"its videos have {' and '.join(map(str, lengths))} frames, but this backbone takes videos of equally "
                "many frames in one input; sample as many of each (btok_hf.read_video), or give them as inputs of "
                "their own"
            )
        if metadata:
            given = options.get("processing_kwargs") or {}
            video = {**given.get("video", {}), "video_metadata": metadata}
            options = {**options, "processing_kwargs": {**given, "video": video}}
        conversations: list[Any] = [messages for messages, _ in rows]
        return super().preprocess(conversations, prompt=prompt, **options)

    def forward(self, features: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Embed a mini-batch and, if it has targets, predict them.

        Args:
            features (`dict[str, Any]`): From `preprocess`, on the CPU. With `target_ids` and `target_labels` of shape
                `(batch, 1, target_length)`, targets are predicted (`BatchFeatures` lists all keys).
            kwargs: Ignored; Sentence-Transformers passes arguments of other modules.

        Returns:
            `dict[str, Any]`: The features with `sentence_embedding` (fp32, L2-normalised, shape `(batch, hidden)`)
            and, with targets, `condensation_loss` (sum over each row's supervised tokens in nats, shape `(batch,)`).

        Raises:
            ValueError: As in `btok_hf.condense`: targets of another shape or for a model without a head, or media that
                do not match their placeholders.
        """
        target_ids, labels = features.get("target_ids"), features.get("target_labels")
        condensed = condense(
            self.model,
            features,
            None if target_ids is None else target_ids[:, 0],
            None if labels is None else labels[:, 0],
            condensation_mask=features.get("condensation_mask", True),
            lm_head=None if self.lm_head is None else self.lm_head.weight,
        )
        # A dict, because DDP and FSDP search it for output tensors.
        outputs = {**features, "sentence_embedding": condensed.embeddings + self._vision_gradients(features)}
        if target_ids is not None and labels is not None:
            rows = to_device((labels[:, 0] != IGNORED).nonzero()[:, 0], condensed.token_losses.device)
            losses = condensed.token_losses.new_zeros(len(target_ids))
            outputs["condensation_loss"] = losses.index_add(0, rows, condensed.token_losses)
        return outputs

    def _vision_gradients(self, features: Mapping[str, Any]) -> Tensor:
        """A zero that gives the vision tower zero gradients if the batch has no media.

        Processes that shard or average gradients must have gradients for the same parameters. The batch of another
        process may contain media.
        """
        zero = torch.zeros((), device=self.model.device)
        shared = distributed.is_available() and distributed.is_initialized()
        media = {key: features[key] for key in MEDIA_KEYS if features.get(key) is not None}
        if not shared or family_of(self.config).pixels(media):
            return zero
        return sum((p.flatten()[:0].sum() for p in self.vision_tower.parameters() if p.requires_grad), zero)


def _unless(options: Mapping[str, Any]) -> str:
    """What else may be wrong with a row if the call changes how it is made."""
    given = options.get("processing_kwargs")
    return f"; or leave out processing_kwargs={given}, which may change rows" if given else ""
