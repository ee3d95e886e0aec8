"""Remote code of a Bottleneck-Token model: the one Python file that travels to the Hub with the weights.

A Bottleneck-Token (BTok) model on disk is a stock Qwen-VL checkpoint whose vocabulary holds K more words. Every input
row ends in those K tokens, and the L2-normalised mean of their last hidden states is the embedding
(Bottleneck Tokens, arXiv 2604.11095). `BTokForEmbedding` is the stock backbone plus exactly that: it imports nothing
but torch and transformers, defines no parameter of its own, and reads and writes the stock checkpoint layout.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import normalize
from transformers import (
    AutoConfig,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.utils import ModelOutput

STOCK_CLASSES = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}


@dataclass
class BTokOutput(ModelOutput):
    """Output of `BTokForEmbedding`.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, length, hidden)`):
            Hidden states after the backbone's final norm. If the Bottleneck Tokens had to be appended, `length`
            covers them and every row starts at column 0.
        pooler_output (`torch.FloatTensor` of shape `(batch, hidden)` or `(batch, truncate_dim)`):
            The embedding: fp32, L2-normalised mean of the hidden states at the K Bottleneck Tokens.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): Per layer, with `output_hidden_states=True`.
        attentions (`tuple(torch.FloatTensor)`, *optional*): Per layer, with `output_attentions=True`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def stock_class(config):
    """The transformers class of the whole model behind `config`; raises if it is none of the Qwen-VL families."""
    if config.model_type not in STOCK_CLASSES:
        raise ValueError(
            f"Bottleneck Tokens support the backbones {sorted(STOCK_CLASSES)}, got model_type {config.model_type!r}. "
            "Start from a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint."
        )
    return STOCK_CLASSES[config.model_type]


def load_stock_model(source, config, *args, needs_head=True, **kwargs):
    """Load the stock model and its loading info; raise if any of its tensors is random or any tensor is left over.

    The whole `...ForConditionalGeneration` is loaded even where only its backbone is wanted: it reads every layout
    that Qwen-VL checkpoints come in, while the bare backbone class leaves the vision tower of one of them random.

    Args:
        source (`str` or `Path`): Local folder or Hub id.
        config (`PreTrainedConfig`): Its configuration.
        needs_head (`bool`): Whether an untied `lm_head.weight` must be there too.
        args, kwargs: For `from_pretrained`.
    """
    model, info = stock_class(config).from_pretrained(
        source, *args, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    missing = sorted(info["missing_keys"] - (set() if needs_head else {"lm_head.weight"}))
    mismatched = sorted(str(key) for key in info["mismatched_keys"])
    unexpected = sorted(info["unexpected_keys"])
    for kind, keys in (("misses", missing), ("has wrongly shaped", mismatched), ("has unexpected", unexpected)):
        if keys:
            raise ValueError(
                f"The checkpoint {source} {kind} {len(keys)} tensor(s): {', '.join(keys[:8])}"
                f"{', …' if len(keys) > 8 else ''}. It is not loaded, because random weights would give "
                "meaningless embeddings. Use the weights that belong to this config.json."
            )
    return model, info


def bottleneck_token_ids(config):
    """The K token ids that every row ends in, read from `config.btok_token_ids` and checked."""
    ids = getattr(config, "btok_token_ids", None)
    vocab_size = config.get_text_config().vocab_size
    if not ids:
        raise ValueError(
            "config.btok_token_ids is missing: this checkpoint has no Bottleneck Tokens. "
            "Make one that has them with btok_hf.add_bottleneck_tokens(base, output_dir)."
        )
    if len(set(ids)) != len(ids) or not all(isinstance(i, int) and 0 <= i < vocab_size for i in ids):
        raise ValueError(
            f"config.btok_token_ids must hold distinct ids below the vocabulary size {vocab_size}, got {ids}. "
            "Restore the config.json that the repository was exported with."
        )
    return ids


def last_positions(attention_mask, count):
    """Columns of the last `count` real tokens of each row, whichever side the padding is on. Shape (batch, count)."""
    last = attention_mask.shape[1] - 1 - attention_mask.long().flip(1).argmax(1)
    return last[:, None] - torch.arange(count - 1, -1, -1, device=attention_mask.device)


def append_bottleneck_tokens(input_ids, attention_mask, token_ids, mm_token_type_ids=None):
    """Make every row end in the Bottleneck Tokens.

    Rows that already end in them are left alone. If any row does not, all rows come back right-padded, the tokens
    appended where they were absent.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): Token ids, padded on either side.
        attention_mask (`torch.Tensor` of shape `(batch, length)` or `None`): 1 for real tokens; `None`: all are real.
        token_ids (`list[int]`): The K Bottleneck Token ids.
        mm_token_type_ids (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 text, 1 image, 2 video.

    Returns:
        `input_ids`, `attention_mask`, `mm_token_type_ids`, each of shape `(batch, length')` (the last one `None` if
        it was).

    Raises:
        ValueError: A row is empty, or holds a Bottleneck Token anywhere but at its end.
    """
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    real = attention_mask.bool()
    if not real.any(1).all():
        raise ValueError(f"Row {int((~real.any(1)).nonzero()[0])} of input_ids is empty: its attention_mask is all 0.")
    count = len(token_ids)
    tokens = torch.tensor(token_ids, device=input_ids.device)
    tail = input_ids.gather(1, last_positions(attention_mask, count).clamp(min=0))
    ends = (tail == tokens).all(1)
    held = (torch.isin(input_ids, tokens) & real).sum(1)
    wrong = held != ends * count
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"Row {row} holds {int(held[row])} Bottleneck Token(s) but must hold {count}, at its end only "
            f"(ids {token_ids}). Either the text contains such a token literally (render it with "
            "processor.apply_chat_template, which breaks it up) or config.btok_token_ids and the chat template "
            "disagree on K (restore both from the exported repository)."
        )
    if ends.all():
        return input_ids, attention_mask, mm_token_type_ids

    def append(values, tail):
        rows = [torch.cat([row[keep], tail[:0] if done else tail]) for row, keep, done in zip(values, real, ends)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    # 0 is a valid id and never read: attention_mask marks these columns as padding.
    if mm_token_type_ids is not None:
        mm_token_type_ids = append(mm_token_type_ids, mm_token_type_ids.new_zeros(count))
    return append(input_ids, tokens), append(attention_mask, attention_mask.new_ones(count)), mm_token_type_ids


def check_media(config, input_ids, features):
    """Raise if media placeholders and media do not match, or if pixels are not finite."""
    for kind, token_id, pixel_key, grid_key in (
        ("image", config.image_token_id, "pixel_values", "image_grid_thw"),
        ("video", config.video_token_id, "pixel_values_videos", "video_grid_thw"),
    ):
        pixels, grid = features.get(pixel_key), features.get(grid_key)
        placeholders = int((input_ids == token_id).sum())
        given = 0 if grid is None else int(grid.prod(1).sum()) // config.vision_config.spatial_merge_size**2
        if placeholders != given:
            raise ValueError(
                f"input_ids hold {placeholders} {kind} placeholder token(s), but the {kind}s given with them fill "
                f"{given}. Pass texts and {kind}s through the processor together, and everything it returns on."
            )
        if pixels is not None and not torch.isfinite(pixels).all():
            raise ValueError(
                f"{pixel_key} holds NaN or infinite values. Check the {kind} that the processor was given."
            )


class BTokForEmbedding(PreTrainedModel):
    """A Qwen-VL backbone that returns one embedding per row, pooled from its K Bottleneck Tokens.

    The configuration is the backbone's own plus `btok_token_ids`. Load it with
    `AutoModel.from_pretrained(repo, trust_remote_code=True)`, or without the flag to get the stock backbone.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    input_modalities = ("text", "image", "video")
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _auto_class = "AutoModel"

    def __init__(self, config, backbone=None):
        super().__init__(config)
        bottleneck_token_ids(config)
        self.model = stock_class(config)(config).model if backbone is None else backbone
        self._no_split_modules = self.model._no_split_modules
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """Load from a local folder or Hub id. Arguments are those of `PreTrainedModel.from_pretrained`.

        The stock class does the loading, so that transformers' own conversions of older checkpoint layouts apply
        (they are skipped for custom classes, which leaves tensors random).

        Raises:
            ValueError: Unsupported backbone, no Bottleneck Tokens in the config, or any missing, unexpected or
                wrongly shaped tensor.
        """
        kwargs.pop("trust_remote_code", None)
        # From AutoModel. In a repository of adapters it points at them: the missing weights are named below.
        kwargs.pop("adapter_kwargs", None)
        config = kwargs.pop("config", None)
        if config is None:
            hub = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            config = AutoConfig.from_pretrained(
                pretrained_model_name_or_path, **{key: kwargs[key] for key in hub if key in kwargs}
            )
        bottleneck_token_ids(config)
        stock, info = load_stock_model(pretrained_model_name_or_path, config, *args, needs_head=False, **kwargs)
        model = cls(stock.config, stock.model).eval()
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """Write a folder that every stock loader reads: stock weights and config, plus this file and its `auto_map`.

        Arguments are those of `PreTrainedModel.save_pretrained`; to upload, call `push_to_hub` instead.
        """
        if push_to_hub:
            raise ValueError("save_pretrained(push_to_hub=True) is not supported: call model.push_to_hub(repo_id).")
        self.model.save_pretrained(save_directory, **kwargs)
        path = Path(save_directory, "config.json")
        if path.exists():  # absent when only an adapter was saved
            path.write_text(json.dumps(with_auto_map(json.loads(path.read_text("utf-8"))), indent=2) + "\n", "utf-8")
        shutil.copyfile(__file__, Path(save_directory, "modeling_btok.py"))

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        mm_token_type_ids=None,
        truncate_dim=None,
        return_dict=None,
        **kwargs,
    ) -> BTokOutput:
        """Embed a batch.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Token ids as the processor returns them. The Bottleneck Tokens are appended where they are absent.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 1 for real tokens.
            mm_token_type_ids (`torch.Tensor` of shape `(batch, length)`, *optional*):
                0 text, 1 image, 2 video; required with images or video (the processor returns it).
            truncate_dim (`int`, *optional*):
                Keep only the first dimensions of the mean, then normalise (Matryoshka embeddings).
            return_dict (`bool`, *optional*): `False` returns a tuple.
            kwargs: Pixels, grids and anything else the backbone takes.

        Returns:
            [`BTokOutput`]

        Raises:
            ValueError: No `input_ids`, rows with misplaced Bottleneck Tokens, placeholders without media, pixels
                that are not finite, or a `truncate_dim` outside 1 … hidden size.
        """
        if input_ids is None:
            raise ValueError(
                "BTokForEmbedding needs input_ids: the Bottleneck Tokens and media placeholders are found by their "
                "ids. inputs_embeds alone are not supported."
            )
        hidden_size = self.config.get_text_config().hidden_size
        if truncate_dim is not None and not 1 <= truncate_dim <= hidden_size:
            raise ValueError(f"truncate_dim must be between 1 and the hidden size {hidden_size}, got {truncate_dim}.")
        token_ids = bottleneck_token_ids(self.config)
        check_media(self.config, input_ids, kwargs)
        input_ids, attention_mask, mm_token_type_ids = append_bottleneck_tokens(
            input_ids, attention_mask, token_ids, mm_token_type_ids
        )
        if mm_token_type_ids is not None:
            kwargs["mm_token_type_ids"] = mm_token_type_ids
        kwargs.setdefault("use_cache", False)
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        hidden = output.last_hidden_state
        positions = last_positions(attention_mask, len(token_ids)).to(hidden.device)
        mean = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1])).float().mean(1)
        output = BTokOutput(
            last_hidden_state=hidden,
            pooler_output=normalize(mean[:, :truncate_dim], dim=-1),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return output.to_tuple() if return_dict is False else output


class _NoConfigClass:
    """An absent attribute: transformers before 5.19 wants `config_class` to be that of the checkpoint, or not there.

    There are three: the class serves every backbone's own configuration.
    """

    def __get__(self, instance, owner=None):
        raise AttributeError("BTokForEmbedding has no config_class of its own.")


BTokForEmbedding.config_class = _NoConfigClass()


def with_auto_map(config):
    """The config.json content of an exported repository: stock architecture, and the class of this file."""
    return {
        **config,
        "architectures": [STOCK_CLASSES[config["model_type"]].__name__],
        "auto_map": {"AutoModel": "modeling_btok.BTokForEmbedding"},
    }
