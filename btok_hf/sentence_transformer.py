"""The Sentence-Transformers model that is trained: it encodes without padding, decodes, saves and loads adapters.

An exported repository does not need it. `SentenceTransformer(path)` loads it with stock modules and gives the same
vectors. Its one module is in `btok_hf/transformer.py`, `encode` in `btok_hf/encoding.py`, saving in
`btok_hf/export.py`.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

from btok_hf.adapters import add_adapters, has_adapters
from btok_hf.arguments import check_loading, check_truncate_dim, named_damage
from btok_hf.condensation import reconstruct
from btok_hf.encoding import PackedEncoder
from btok_hf.export import export_model, write_repository
from btok_hf.hub import MESSAGE, push
from btok_hf.hub_card.kept import Described, LoadedCard
from btok_hf.input_kinds import Input
from btok_hf.inputs import shown
from btok_hf.modeling.modeling_btok import bottleneck_token_ids
from btok_hf.transformer import BottleneckTransformer

if TYPE_CHECKING:
    from peft import LoraConfig


class BTokSentenceTransformer(PackedEncoder):
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
            texts are truncated at the start. Longer rows are refused if media would be cut.
        device, prompts, default_prompt_name, similarity_fn_name, truncate_dim: As in `SentenceTransformer`.
        trust_remote_code (`bool`): Accepted as in `SentenceTransformer`, and not needed: no remote code is run.
        hub_kwargs: `revision`, `token`, `cache_folder`, `local_files_only`, `subfolder`.
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
        check_loading(prompts, hub_kwargs)
        check_truncate_dim(truncate_dim)
        subfolder = hub_kwargs.pop("subfolder", None)
        if subfolder and Path(model_name_or_path).is_dir():  # what is saved names the folder itself
            model_name_or_path = os.path.join(model_name_or_path, subfolder)
            if not Path(model_name_or_path).is_dir():
                raise FileNotFoundError(f"There is no folder {model_name_or_path}. Correct subfolder.")
        elif subfolder:
            hub_kwargs["subfolder"] = subfolder
        with named_damage(model_name_or_path):
            module = BottleneckTransformer.load(
                model_name_or_path, model_kwargs=model_kwargs, processor_kwargs=processor_kwargs, **hub_kwargs
            )
            saved = BottleneckTransformer.load_config(
                model_name_or_path, config_filename="config_sentence_transformers.json", **hub_kwargs
            )
            if sizes := saved.get("matryoshka_dimensions"):  # of adapters, which have no configuration of their own
                module.config.matryoshka_dimensions = sizes
            if module.model.get_input_embeddings().weight.is_meta:
                raise ValueError(
                    f"The embedding table of {model_name_or_path!r} is offloaded to disk, where the rows of the "
                    "Bottleneck Tokens cannot be read. Keep it in memory (device_map), or use SentenceTransformer."
                )
            longest = module.max_seq_length
            if max_seq_length is not None:
                module.max_seq_length = max_seq_length
            super().__init__(
                modules=[module],
                device=device,
                prompts={**saved.get("prompts", {}), **(prompts or {})},
                default_prompt_name=default_prompt_name or saved.get("default_prompt_name"),
                similarity_fn_name=similarity_fn_name or saved.get("similarity_fn_name"),
                truncate_dim=truncate_dim or saved.get("truncate_dim"),
            )
        # What the card describes. With other options of the processor, images may have other limits than there.
        described = Described(
            {name: text or "" for name, text in {**self._default_prompts, **saved.get("prompts", {})}.items()},
            saved.get("default_prompt_name"),
            saved.get("truncate_dim"),
            longest,
            module.image_limits.max_pixels,
        )
        self._loaded_card: LoadedCard | None = None
        self._loaded_values: list[Tensor] | None = None
        if not has_adapters(module.model):  # their card tells how to load adapters
            self._loaded_values = self._values()
            self._loaded_card = LoadedCard(model_name_or_path, hub_kwargs, None if processor_kwargs else described)
            self._model_card_text = self._loaded_card.text  # type: ignore[assignment]  # declared without a type there

    @property
    def transformer(self) -> BottleneckTransformer:
        """The module that computes the embeddings."""
        return cast(BottleneckTransformer, self[0])

    def preprocess(self, inputs: Sequence[Input], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Check inputs and turn them into features, as `BottleneckTransformer.preprocess` does.

        Sentence-Transformers would first guess what each input is, and answer a `TypeError` by leaving the prompt out.
        """
        return self.transformer.preprocess(inputs, prompt=prompt, **kwargs)

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
        if self.is_singular_input(inputs):
            raise ValueError(f"reconstruct takes a list of inputs, got {shown(inputs)}. Put it into a list.")
        if not inputs:
            return []
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

    def add_adapter(self, adapter_config: "LoraConfig", adapter_name: str | None = None) -> None:
        """Add LoRA adapters, as `peft_config` of `CondensationTrainer` does: the Bottleneck Tokens' rows learn too.

        Args:
            adapter_config (`LoraConfig`): As in `peft.LoraConfig`.
            adapter_name (`str`, *optional*): `default`, the one that is saved.

        Raises:
            ValueError: Another name, adapters that cannot be exported, or a model of a subfolder.
        """
        if adapter_name not in (None, "default"):
            raise ValueError(
                f"Adapters are trained and saved by the name 'default', got adapter_name={adapter_name!r}. Leave it "
                "out."
            )
        if self.transformer.subfolder:
            raise ValueError(
                f"The model is from the subfolder {self.transformer.subfolder} of a repository, which checkpoints of "
                "adapters cannot name as their base. Download it (huggingface_hub.snapshot_download), and load the "
                "folder."
            )
        add_adapters(self.transformer.model, self.transformer.lm_head, adapter_config)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        token: str | None = None,
        private: bool | None = None,
        *,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = MESSAGE,
        exist_ok: bool = True,
        safe_serialization: bool = True,
        files: Mapping[str, str | bytes] | None = None,
        **others: Any,
    ) -> str:
        """Upload the merged model, with golden vectors, in one commit.

        After `CondensationTrainer`, its `push_to_hub` writes a card that describes the training.

        Args:
            repo_id (`str`): Hub id, e.g. `org/btok-2b`. The repository is created if it does not exist.
            token, private, revision, create_pr, commit_message: As in `btok_hf.push`.
            exist_ok, safe_serialization (`bool`): Accepted as in Sentence-Transformers: a repository that exists gets
                a commit, and weights are safetensors.
            files (`dict[str, str | bytes]`, *optional*): As in `export_model`, e.g. a README.md of your own.

        Returns:
            `str`: URL of the commit or of the pull request.

        Raises:
            RuntimeError: The upload failed. The message says where the export is and how to go on.
            TypeError: Another argument of Sentence-Transformers.
            ValueError: As in `btok_hf.push`, or `safe_serialization=False`.
        """
        if others:
            raise TypeError(
                f"BTokSentenceTransformer.push_to_hub has no argument {', '.join(map(repr, others))}. Leave it out: a "
                "card goes in files={'README.md': …}, and a folder is pushed by btok_hf.push(folder, repo_id)."
            )
        _check_safe(safe_serialization)
        validate_repo_id(repo_id)
        folder, failed = Path(tempfile.mkdtemp(prefix="btok-push-"), repo_id.rpartition("/")[2]), False
        options: dict[str, Any] = {"private": private, "revision": revision, "create_pr": create_pr}
        try:
            export_model(self, folder, files=files)
            try:
                return push(folder, repo_id, token=token, commit_message=commit_message, **options)
            except RuntimeError:
                failed = True  # the upload goes on from there
                raise
        finally:
            if not failed:
                shutil.rmtree(folder.parent)

    def _values(self) -> list[Tensor]:
        """Some values of every parameter, and the rows of the Bottleneck Tokens: what training changes."""
        table = cast(Tensor, self.transformer.model.get_input_embeddings().weight)
        rows = table[bottleneck_token_ids(self.transformer.config)]
        parameters = [parameter.detach().reshape(-1) for parameter in self.parameters() if not parameter.is_meta]
        return [rows.detach().cpu(), *(flat[:: len(flat) // 64 + 1].clone().cpu() for flat in parameters)]

    def was_trained(self) -> bool:
        """Whether the weights are others than those that were loaded, or adapters change them. For the card."""
        model = self.transformer.model
        if has_adapters(model):  # the second matrix is zero until it is trained
            return any(bool(values.any()) for name, values in model.named_parameters() if "lora_B" in name)
        before, now = self._loaded_values, self._values()  # not the same after a loop of one's own, or a merge
        return before is None or len(before) != len(now) or not all(map(_same, before, now))

    def kept_card(self) -> dict[str, str | bytes] | None:
        """The card that the model was loaded with, its licence and its pictures, to be saved with it again.

        As in Sentence-Transformers, a model that was not trained keeps its card: results, licence and languages hold.

        Returns:
            `dict[str, str | bytes]`, *optional*: Content by path. `None` if there is no card, or if it does not
            describe the model any more: it was trained, has adapters, other prompts or dimensions, or reads longer,
            shorter, larger or smaller inputs.
        """
        trained = not self._model_card_text or "generated_from_trainer" in self.model_card_data.tags
        if self._loaded_card is None or trained or has_adapters(self.transformer.model):
            return None
        limits = self.max_seq_length, self.transformer.image_limits.max_pixels
        described = Described(self.prompts, self.default_prompt_name, self.truncate_dim, *limits)
        return self._loaded_card.files(None if self.was_trained() else described)

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
        _check_safe(safe_serialization)
        module = self.transformer
        write_repository(
            path,
            module.model,
            module.processor,
            lm_head=module.lm_head,
            generation_config=module.generation_config,
            adapters_only=has_adapters(module.model),
            model=self,
            files=self.kept_card() if create_model_card else {},  # a card that exists stays
        )


def _check_safe(safe_serialization: bool) -> None:
    if not safe_serialization:
        raise ValueError(
            "Weights are saved only as safetensors, got safe_serialization=False. Leave safe_serialization out."
        )


def _same(before: Tensor, now: Tensor) -> bool:
    """Whether values are the same in the precision that they have now."""
    return before.shape == now.shape and torch.equal(before.to(now.dtype), now)
