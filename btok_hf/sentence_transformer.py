"""The Sentence-Transformers side: the module and model that train, and that check every input before encoding it.

An exported repository needs none of this to be loaded: `SentenceTransformer(path)` builds it from stock modules and
returns the same vectors. The wrapper adds what stock modules cannot do: packed encoding without padding, the
condensation loss in the same forward, and errors instead of wrong vectors.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from torch import distributed
from torch.nn import functional as F
from tqdm import tqdm

from btok_hf.adapters import has_adapters, load_adapters, merge_adapters
from btok_hf.condensation import condense, reconstruct
from btok_hf.export import stock_model, untied_head, write_repository
from btok_hf.features import IGNORED, PIXEL_KEYS
from btok_hf.inputs import ImageLimits, check_input, estimate_tokens, is_messages
from btok_hf.modeling.modeling_btok import bottleneck_token_ids, last_positions, load_stock_model

# Tokens that one row of `encode`'s batch_size stands for. The default of 32 rows is 2,048 tokens on a CPU, where more
# only overrun its caches, and 16,384 elsewhere.
CPU_ROW_TOKENS, ROW_TOKENS = 64, 512


class BottleneckTransformer(Transformer):
    """Sentence-Transformers input module: any input → row ending in K Bottleneck Tokens → embedding.

    It writes `sentence_embedding` (fp32, L2-normalised, shape `(batch, hidden)`) into the features. If they hold
    `target_ids` and `target_labels` (shape `(batch, 1, target_length)`), the same forward also gives
    `condensation_loss`, the summed cross-entropy of each row's supervised target tokens, shape `(batch,)`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._check_template()

    def _load_model(self, model_name_or_path, transformer_task, config, backend, is_peft_model, **model_kwargs):
        """The stock backbone, loaded strictly; an untied head is kept for the condensation loss."""
        if backend != "torch":
            raise ValueError(f"BottleneckTransformer needs backend='torch', got {backend!r}.")
        bottleneck_token_ids(config)
        model_kwargs.pop("trust_remote_code", None)
        source, adapter_kwargs = model_name_or_path, {}
        if is_peft_model:
            from peft import PeftConfig

            # The revision is the adapters' own, not the base's.
            hub = ("revision", "token", "cache_dir", "local_files_only")
            adapter_kwargs = {key: model_kwargs[key] for key in hub if key in model_kwargs}
            model_kwargs.pop("revision", None)
            source = PeftConfig.from_pretrained(model_name_or_path, **adapter_kwargs).base_model_name_or_path
        model, _ = load_stock_model(source, config, **model_kwargs)
        self.lm_head = untied_head(model)
        self.generation_config = model.generation_config
        backbone = model.model
        if is_peft_model:
            load_adapters(backbone, model_name_or_path, **adapter_kwargs)
        return backbone

    def _check_template(self):
        row = self.processor.apply_chat_template([{"role": "user", "content": "text"}], tokenize=False)
        tail = self.tokenizer(row, add_special_tokens=False)["input_ids"]
        token_ids = bottleneck_token_ids(self.config)
        if tail[-len(token_ids) :] != token_ids or len(set(tail[: -len(token_ids)]) & set(token_ids)):
            raise ValueError(
                f"The chat template ends rows in the ids {tail[-len(token_ids) :]}, but config.btok_token_ids is "
                f"{token_ids}: K disagrees. Restore config.json and chat_template.jinja from the exported repository."
            )

    def preprocess(self, inputs, prompt=None, **kwargs):
        """Turn inputs into model features, as the stock module does, after checking each of them.

        Args:
            inputs (`list`): Each a text, image (PIL, array, file path), video (`{"array", "video_metadata"}`, file
                path), a dict of `text`, `image`, `video` (lists for several), or chat messages. In a row the media
                always come first, in the order given, then the prompt, then the texts.
            prompt (`str`, *optional*): Instruction for every input.

        Raises:
            FileNotFoundError, ValueError: An input that cannot be embedded faithfully, shown in short.
        """
        limits = ImageLimits(self.processor.image_processor.size["longest_edge"], self.config.vision_config.patch_size)
        inputs = [check_input(item, limits) for item in inputs]
        if 0 < sum(map(is_messages, inputs)) < len(inputs):
            raise ValueError(
                "Some inputs are chat messages and others are not, which Sentence-Transformers cannot put in one "
                "batch. Encode them in two calls."
            )
        try:
            features = super().preprocess(inputs, prompt=prompt, **kwargs)
        except ValueError as error:
            if "Likely due to `truncation" not in str(error):
                raise
            raise ValueError(
                f"An input with images or video is longer than max_seq_length={self.max_seq_length} tokens. Media are "
                "never cut: raise max_seq_length, lower max_pixels (processor_kwargs={'max_pixels': …}), or shorten "
                "the text."
            ) from error
        if not inputs:
            return features
        token_ids = torch.tensor(bottleneck_token_ids(self.config))
        columns = last_positions(features["attention_mask"], len(token_ids))
        if (columns < 0).any() or (features["input_ids"].gather(1, columns) != token_ids).any():
            raise ValueError(
                f"A row does not end in the {len(token_ids)} Bottleneck Tokens: max_seq_length={self.max_seq_length} "
                "leaves no room for them, or the processor's chat template was changed."
            )
        return features

    def forward(self, features, **kwargs):
        """Embed a mini-batch, and predict its targets if it has any. Features stay where they are, on the host."""
        target_ids, labels = features.get("target_ids"), features.get("target_labels")
        condensed = condense(
            self.model,
            features,
            None if target_ids is None else target_ids[:, 0],
            None if labels is None else labels[:, 0],
            condensation_mask=features.get("condensation_mask", True),
            lm_head=None if self.lm_head is None else self.lm_head.weight,
        )
        # A dict, because DDP and FSDP look for the outputs' tensors in it.
        outputs = {**features, "sentence_embedding": condensed.embeddings + self._tie_in_vision(features)}
        if target_ids is not None:
            rows = (labels[:, 0] != IGNORED).nonzero()[:, 0].to(condensed.token_losses.device)
            losses = condensed.token_losses.new_zeros(len(target_ids))
            outputs["condensation_loss"] = losses.index_add(0, rows, condensed.token_losses)
        return outputs

    def _tie_in_vision(self, features):
        """0, with zero gradients for the vision tower of a batch without media.

        Processes that shard or average gradients must all have the same ones, and another's batch may hold media.
        """
        zero = torch.zeros((), device=self.model.device)
        shared = distributed.is_available() and distributed.is_initialized()
        if not shared or any(features.get(key) is not None for key in PIXEL_KEYS):
            return zero
        return sum((p.flatten()[:0].sum() for p in self.model.visual.parameters() if p.requires_grad), zero)

    def merged(self):
        """The stock model to publish: adapters, if any, merged into a copy of the weights."""
        backbone = merge_adapters(self.model) if has_adapters(self.model) else self.model
        return stock_model(backbone, self.lm_head, self.generation_config)


class BTokSentenceTransformer(SentenceTransformer):
    """A `SentenceTransformer` made of one `BottleneckTransformer`: the model that `CondensationTrainer` trains.

    `encode` is that of Sentence-Transformers, with the same arguments and results, but batches are filled to a number
    of tokens and not of rows: many short inputs run together, and few long ones. `batch_size` is that number in rows
    of 64 tokens on a CPU and of 512 elsewhere; an input that is longer than all of them runs alone. Beside a GPU a
    thread preprocesses a batch while the one before it is computed.

    Args:
        model_name_or_path (`str`): Local folder or Hub id of a repository with Bottleneck Tokens, as written by
            `add_bottleneck_tokens` or `export_model`; also a checkpoint that holds only adapters.
        model_kwargs, processor_kwargs (`dict`, *optional*): For the model (`dtype`, `device_map`) and the processor
            (`max_pixels`).
        max_seq_length (`int`, *optional*): Longest row in tokens, the K Bottleneck Tokens included. Longer text
            keeps its end; longer rows with media are refused.
        device, prompts, default_prompt_name, similarity_fn_name, truncate_dim: As in `SentenceTransformer`.
        hub_kwargs: `revision`, `token`, `cache_folder`, `local_files_only`.
    """

    def __init__(
        self,
        model_name_or_path,
        *,
        device=None,
        prompts=None,
        default_prompt_name=None,
        similarity_fn_name=None,
        truncate_dim=None,
        model_kwargs=None,
        processor_kwargs=None,
        max_seq_length=None,
        **hub_kwargs,
    ):
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

    @torch.inference_mode()
    def _inference(
        self,
        inputs,
        *,
        prompt,
        batch_size,
        show_progress_bar,
        output_value,
        save_to_cpu,
        normalize_embeddings,
        truncate_dim,
        device=None,
        **kwargs,
    ):
        """What `encode` calls once its arguments are checked, in worker processes too."""
        if output_value != "sentence_embedding":  # all features of each row, padded
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
        around = estimate_tokens(prompt or "", self.processor) + len(bottleneck_token_ids(self[0].config)) + 4
        longest = self.max_seq_length or math.inf
        tokens = [min(around + estimate_tokens(item, self.processor), longest) for item in inputs]
        batches = _batches(tokens, batch_size * (CPU_ROW_TOKENS if device.type == "cpu" else ROW_TOKENS))

        def preprocess(batch):
            return self.preprocess([inputs[index] for index in batch], prompt=prompt, **kwargs)

        embeddings = []
        # At its end, in whatever way, the executor waits for the batch in work: no thread is left behind.
        with ThreadPoolExecutor(1) as thread:
            # Beside CPU cores that compute there is nothing to win, and much to lose: resizing in another thread opens
            # a second pool of OpenMP threads, and both wait for the same cores.
            prepared = map(preprocess, batches) if device.type == "cpu" else _ahead(thread, preprocess, batches)
            # Features stay on the CPU: `condense` moves what the device needs, once nothing is left to check.
            for features in tqdm(prepared, "Batches", len(batches), disable=not show_progress_bar):
                rows = self(features, **kwargs)["sentence_embedding"][:, :truncate_dim]
                rows = F.normalize(rows, dim=1) if normalize_embeddings else rows
                embeddings.append(rows.cpu() if save_to_cpu else rows)
        order = torch.tensor([index for batch in batches for index in batch])
        embeddings = torch.cat(embeddings)
        return embeddings[order.argsort().to(embeddings.device)]

    def reconstruct(self, inputs, *, prompt=None, max_new_tokens=32):
        """The text that each input's Bottleneck Tokens hold, decoded without a look at the input (`reconstruct`).

        Args:
            inputs (`list`), prompt (`str`, *optional*): As in `encode`; one batch.
            max_new_tokens (`int`): Where a text ends at the latest.

        Returns:
            `list[str]`
        """
        module, tokenizer = self[0], self.tokenizer
        ids = reconstruct(
            module.model,
            module.preprocess(inputs, prompt=prompt),
            tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"],
            tokenizer.convert_tokens_to_ids("<|im_end|>"),
            max_new_tokens=max_new_tokens,
            lm_head=None if module.lm_head is None else module.lm_head.weight,
        )
        return tokenizer.batch_decode(ids)

    def save(self, path, model_name=None, create_model_card=True, train_datasets=None, safe_serialization=True):
        """Save a repository that stock Sentence-Transformers loads without trust_remote_code.

        With adapters, as in Sentence-Transformers, only they are written, beside a reference to the base: what
        training resumes from. `btok_hf.export_model` writes the merged repository to publish, with golden vectors.
        """
        if not safe_serialization:
            raise ValueError("Weights are saved as safetensors only: leave safe_serialization at True.")
        weights = self[0].model if has_adapters(self[0].model) else self[0].merged()
        write_repository(path, weights, self[0].processor, model=self)


def _ahead(thread, function, items):
    """`map(function, items)`; the executor `thread` works on an item while the one before it is used."""
    ahead = None
    for item in items:
        ready, ahead = ahead, thread.submit(function, item)
        if ready:
            yield ready.result()
    yield ahead.result()


def _batches(tokens, budget):
    """Indices of inputs in batches of at most `budget` tokens, longest inputs first; one that is longer is alone."""
    batches, room = [], 0
    for index in sorted(range(len(tokens)), key=tokens.__getitem__, reverse=True):
        if not batches or tokens[index] > room:
            batches.append([])
            room = budget
        batches[-1].append(index)
        room -= tokens[index]
    return batches
