"""The Sentence-Transformers module and model that are trained, with checks of every input.

An exported repository does not need them. `SentenceTransformer(path)` loads it with stock modules and gives the same
vectors. These classes add packed encoding without padding, the condensation loss in the same forward, and errors for
inputs that would get wrong vectors.

The forward is in `btok_hf/condensation.py`, checks of inputs in `btok_hf/inputs.py`, and saving in
`btok_hf/export.py`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from torch import Tensor, distributed
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from btok_hf.adapters import has_adapters, load_adapters, merge_adapters
from btok_hf.condensation import condense, reconstruct
from btok_hf.export import stock_model, untied_head, write_repository
from btok_hf.features import IGNORED, PIXEL_KEYS
from btok_hf.inputs import ImageLimits, Input, check_input, estimate_tokens, is_messages
from btok_hf.modeling.modeling_btok import (
    LOADING,
    Backbone,
    StockModel,
    bottleneck_token_ids,
    last_positions,
    load_stock_model,
)

# Tokens per row of `encode`'s batch_size. The default of 32 rows is 2,048 tokens on a CPU, where larger batches exceed
# the caches, and 16,384 tokens on other devices.
CPU_ROW_TOKENS, ROW_TOKENS = 64, 512

Item = TypeVar("Item")
Result = TypeVar("Result")


class BottleneckTransformer(Transformer):
    """Sentence-Transformers input module: any input → row that ends in K Bottleneck Tokens → embedding.

    It adds `sentence_embedding` (fp32, L2-normalised, shape `(batch, hidden)`) to the features. If they contain
    `target_ids` and `target_labels` (shape `(batch, 1, target_length)`), the same forward also adds
    `condensation_loss`, the summed cross-entropy of each row's supervised target tokens, shape `(batch,)`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_template()

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
            from peft import PeftConfig

            # The revision belongs to the adapters, not to the base model.
            hub = ("revision", "token", "cache_dir", "local_files_only")
            adapter_kwargs = {key: model_kwargs[key] for key in hub if key in model_kwargs}
            model_kwargs.pop("revision", None)
            source = PeftConfig.from_pretrained(model_name_or_path, **adapter_kwargs).base_model_name_or_path
        with LOADING:
            model, _ = load_stock_model(source, config, **model_kwargs)
            self.lm_head = untied_head(model)
            self.generation_config = model.generation_config
            backbone = model.model
            if is_peft_model:
                load_adapters(backbone, model_name_or_path, **adapter_kwargs)
        return backbone

    def _check_template(self) -> None:
        row = self.processor.apply_chat_template([{"role": "user", "content": "text"}], tokenize=False)
        assert self.tokenizer is not None  # every Qwen-VL processor has one
        tail = self.tokenizer(row, add_special_tokens=False)["input_ids"]
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
                chat messages. A row starts with the media in the given order, then the prompt, then the texts.
            prompt (`str`, *optional*): Instruction for every input.
            positions (`Sequence[int]`, *optional*): Where each input stands in the user's list, for errors. Default:
                in `inputs`.

        Returns:
            `dict[str, Any]`: The features, on the CPU.

        Raises:
            FileNotFoundError: A file of an input does not exist.
            ValueError: An input that cannot be embedded correctly. The message has its position and shows it in short.
        """
        limits = ImageLimits(self.processor.image_processor.size["longest_edge"], self.config.vision_config.patch_size)
        places = range(len(inputs)) if positions is None else positions
        checked = [check_input(item, limits, place) for item, place in zip(inputs, places)]
        messages = sum(map(is_messages, checked))
        if 0 < messages < len(checked):
            raise ValueError(
                f"Inputs must be all chat messages or none, got {messages} of {len(checked)}: Sentence-Transformers "
                "cannot put both in one batch. Encode them in two calls."
            )
        try:
            features = super().preprocess(checked, prompt=prompt, **kwargs)
        except ValueError as error:
            if "Likely due to `truncation" not in str(error):
                raise
            raise ValueError(
                f"An input with images or video is longer than max_seq_length={self.max_seq_length} tokens, and media "
                "are never truncated. Raise max_seq_length, lower max_pixels (processor_kwargs={'max_pixels': …}), or "
                "shorten the text."
            ) from error
        if not checked:
            return features
        token_ids = torch.tensor(bottleneck_token_ids(self.config))
        columns = last_positions(features["attention_mask"], len(token_ids))
        if (columns < 0).any() or (features["input_ids"].gather(1, columns) != token_ids).any():
            raise ValueError(
                f"A row does not end in the {len(token_ids)} Bottleneck Tokens: max_seq_length={self.max_seq_length} "
                "is too small, or the chat template was changed. Raise max_seq_length, or restore "
                "chat_template.jinja."
            )
        return features

    def forward(self, features: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Embed a mini-batch and, if it has targets, predict them. The features stay on the host."""
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
            rows = (labels[:, 0] != IGNORED).nonzero()[:, 0].to(condensed.token_losses.device)
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
        if not shared or any(features.get(key) is not None for key in PIXEL_KEYS):
            return zero
        parameters = cast(Backbone, self.model).visual.parameters()
        return sum((p.flatten()[:0].sum() for p in parameters if p.requires_grad), zero)

    def merged(self) -> StockModel:
        """The stock model to publish. Adapters are merged into a copy of the weights."""
        backbone = merge_adapters(self.model) if has_adapters(self.model) else self.model
        return stock_model(cast(Backbone, backbone), self.lm_head, self.generation_config)


class BTokSentenceTransformer(SentenceTransformer):
    """A `SentenceTransformer` with one `BottleneckTransformer`: the model that `CondensationTrainer` trains.

    `encode` has the arguments and results of Sentence-Transformers. Batches are limited by tokens instead of rows, so
    that a batch has many short inputs or few long ones. `batch_size` counts rows of 64 tokens on a CPU and of 512
    tokens on other devices. An input longer than this limit has its own batch. With a GPU, a thread preprocesses the
    next batch during the computation.

    Args:
        model_name_or_path (`str` or `Path`): Local folder or Hub id of a repository with Bottleneck Tokens, as written
            by `add_bottleneck_tokens` or `export_model`, or of a checkpoint with only adapters.
        model_kwargs, processor_kwargs (`dict`, *optional*): For the model (`dtype`, `device_map`) and the processor
            (`max_pixels`).
        max_seq_length (`int`, *optional*): Maximum row length in tokens, including the K Bottleneck Tokens. Longer
            texts are truncated at the start. Longer rows with media are refused.
        device, prompts, default_prompt_name, similarity_fn_name, truncate_dim: As in `SentenceTransformer`.
        trust_remote_code (`bool`): Accepted as in `SentenceTransformer`, and not needed: no remote code is run.
        hub_kwargs: `revision`, `token`, `cache_folder`, `local_files_only`.
    """

    def __init__(
        self,
        model_name_or_path: str | Path,
        *,
        device: str | None = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        similarity_fn_name: Literal["cosine", "dot", "euclidean", "manhattan"] | None = None,
        truncate_dim: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        max_seq_length: int | None = None,
        trust_remote_code: bool = False,
        **hub_kwargs: Any,
    ) -> None:
        model_name_or_path = str(model_name_or_path)
        module = BottleneckTransformer.load(
            model_name_or_path, model_kwargs=model_kwargs, processor_kwargs=processor_kwargs, **hub_kwargs
        )
        if max_seq_length is not None:
            module.max_seq_length = max_seq_length
        saved = BottleneckTransformer.load_config(
            model_name_or_path, config_filename="config_sentence_transformers.json", **hub_kwargs
        )
        super().__init__(
            modules=[module],
            device=device,
            prompts={**saved.get("prompts", {}), **(prompts or {})},
            default_prompt_name=default_prompt_name or saved.get("default_prompt_name"),
            similarity_fn_name=similarity_fn_name or saved.get("similarity_fn_name"),
            truncate_dim=truncate_dim or saved.get("truncate_dim"),
        )

    @property
    def transformer(self) -> BottleneckTransformer:
        """The module that computes the embeddings."""
        return cast(BottleneckTransformer, self[0])

    def preprocess(self, inputs: Sequence[Input], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Check inputs and turn them into features, as `BottleneckTransformer.preprocess` does.

        Sentence-Transformers would first guess what each input is, and answer a `TypeError` by leaving the prompt out.
        """
        return self.transformer.preprocess(inputs, prompt=prompt, **kwargs)

    # As in SentenceTransformer, the superclass names fewer arguments.
    @torch.inference_mode()
    def _inference(  # type: ignore[override]
        self,
        inputs: list,
        *,
        prompt: str | None,
        batch_size: int,
        show_progress_bar: bool,
        output_value: str | None,
        save_to_cpu: bool,
        normalize_embeddings: bool,
        truncate_dim: int | None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> list[Tensor] | Tensor | list[dict[str, Any]]:
        """Embed inputs in batches of similar length. `encode` calls this after checking its arguments."""
        if output_value not in ("sentence_embedding", None):
            raise ValueError(
                f"output_value must be 'sentence_embedding', or None for all features, got {output_value!r}: packed "
                "encoding gives no states of single tokens. Load the repository with SentenceTransformer for them."
            )
        if output_value is None:  # all features of each row, padded
            return super()._inference(
                inputs,
                prompt=prompt,
                batch_size=batch_size,
                show_progress_bar=show_progress_bar,
                output_value=output_value,
                save_to_cpu=save_to_cpu,
                normalize_embeddings=normalize_embeddings,
                truncate_dim=truncate_dim,
                device=device,
                **kwargs,
            )
        device = self._resolve_inference_device(device)
        self.eval()
        if not inputs:
            return torch.tensor([], device=device)
        around = estimate_tokens(prompt or "", self.processor) + len(bottleneck_token_ids(self.transformer.config)) + 4
        longest = self.max_seq_length or math.inf
        tokens = [min(around + estimate_tokens(item, self.processor), longest) for item in inputs]
        batches = _batches(tokens, batch_size * (CPU_ROW_TOKENS if device.type == "cpu" else ROW_TOKENS))

        def preprocess(batch: list[int]) -> dict[str, Any]:
            return self.preprocess([inputs[index] for index in batch], prompt=prompt, positions=batch, **kwargs)

        results = []
        # Leaving the block, also through an error, waits for the batch in the thread.
        with ThreadPoolExecutor(1) as thread:
            # On a CPU a thread does not help: resizing in another thread starts a second pool of OpenMP threads, which
            # competes for the same cores.
            prepared = map(preprocess, batches) if device.type == "cpu" else _ahead(thread, preprocess, batches)
            # Features stay on the CPU: `condense` copies them to the device after its checks.
            for features in tqdm(prepared, "Batches", len(batches), disable=not show_progress_bar):
                rows = self(features, **kwargs)["sentence_embedding"][:, :truncate_dim]
                rows = F.normalize(rows, dim=1) if normalize_embeddings else rows
                results.append(rows.cpu() if save_to_cpu else rows)
        order = torch.tensor([index for batch in batches for index in batch])
        embeddings = torch.cat(results)
        return embeddings[order.argsort().to(embeddings.device)]

    def reconstruct(
        self, inputs: Sequence[Input], *, prompt: str | None = None, max_new_tokens: int = 32
    ) -> list[str]:
        """Decode the text that the Bottleneck Tokens of each input encode (`btok_hf.condensation.reconstruct`).

        Args:
            inputs (`Sequence[Input]`): As in `encode`. They run as one batch.
            prompt (`str`, *optional*): As in `encode`.
            max_new_tokens (`int`): Maximum number of tokens per text.

        Returns:
            `list[str]`
        """
        module, tokenizer = self.transformer, self.tokenizer
        ids = reconstruct(
            module.model,
            module.preprocess(inputs, prompt=prompt),
            tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"],
            tokenizer.convert_tokens_to_ids("<|im_end|>"),
            max_new_tokens=max_new_tokens,
            lm_head=None if module.lm_head is None else module.lm_head.weight,
        )
        return tokenizer.batch_decode(ids)

    def save(
        self,
        path: str | Path,
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: list[str] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Save a repository that stock Sentence-Transformers loads without trust_remote_code.

        If the model has adapters, only they and a reference to the base are saved, as in Sentence-Transformers.
        Training resumes from them. To publish, use `btok_hf.export_model`, which writes the merged model.
        """
        if not safe_serialization:
            raise ValueError(
                "Weights are saved only as safetensors, got safe_serialization=False. Leave safe_serialization out."
            )
        module = self.transformer
        weights = module.model if has_adapters(module.model) else module.merged()
        write_repository(path, weights, self.processor, model=self)


def _ahead(thread: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map(function, items)`, but the executor `thread` computes the next result while one is used."""
    ahead: Future[Result] | None = None
    for item in items:
        ready, ahead = ahead, thread.submit(function, item)
        if ready:
            yield ready.result()
    if ahead:
        yield ahead.result()


def _batches(tokens: Sequence[float], budget: int) -> list[list[int]]:
    """Batches of input indices with at most `budget` tokens, longest inputs first. A longer input is alone."""
    batches: list[list[int]] = []
    room = 0.0
    for index in sorted(range(len(tokens)), key=tokens.__getitem__, reverse=True):
        if not batches or tokens[index] > room:
            batches.append([])
            room = budget
        batches[-1].append(index)
        room -= tokens[index]
    return batches
