"""A tiny checkpoint in the layout of the public reproduction, and its vectors, without this library.

It runs with transformers 4.57.3 and PEFT 0.18.0 too, which the reproduction pins:
`python tests/support/reproduction.py FOLDER` writes `full`, `run/base_model`, `run/checkpoint-10` and `expected.npy`.
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    Qwen2TokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL = ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
SPECIAL = [f"<|{name}|>" for name in SPECIAL]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "k_proj", "q_proj", "out_proj", "v_proj"]
# How its data sets write media and words, and what to give to `encode` for it.
PICTURE = Image.fromarray((np.mgrid[:56, :84].sum(0)[..., None] * np.array([1, 2, 3]) % 256).astype(np.uint8))
ROWS = [
    ("a cat", None, {"text": "a cat"}),
    (IMAGE, PICTURE, {"image": PICTURE}),
    (f"{IMAGE}\nWhat is this?", PICTURE, {"image": PICTURE, "text": "What is this?"}),
]


class PipelineConfig(PretrainedConfig):
    model_type = "btoks"

    def __init__(self, modules=None, **kwargs):
        super().__init__(**kwargs)
        self.modules = modules or {}
        self._module_order = list(self.modules)  # JSON sorts the modules by name
        self.normalize_embeddings = True


class Pipeline(PreTrainedModel):
    """Named modules, of which only the wrapper of the backbone has weights."""

    config_class = PipelineConfig

    def __init__(self, config, stock):
        super().__init__(config)
        self._modules_dict = torch.nn.ModuleDict({name: torch.nn.Module() for name in config.modules})
        self._modules_dict["backbone"].model = stock
        self.post_init()

    def get_input_embeddings(self):
        return self._modules_dict["backbone"].model.get_input_embeddings()


def make_processor():
    vocabulary = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}
    words = Tokenizer(models.BPE(vocabulary, []))
    words.pre_tokenizer, words.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = Qwen2TokenizerFast(tokenizer_object=words, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.model_max_length = 4096
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
    parts = Qwen2VLImageProcessor(size=size), tokenizer, Qwen2VLVideoProcessor(size=size)
    return Qwen2VLProcessor(*parts, chat_template=CHAT)


def make_stock(tokenizer, rows=320):
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": rows,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "tie_word_embeddings": True,
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    stock = Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():  # the default initialisation gives nearly constant hidden states
        stock.get_input_embeddings().weight.normal_(std=0.5)
        for name, parameter in stock.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(5)
    return stock


@torch.no_grad()
def embed(stock, processor, ids):
    """The vectors of `ROWS`: the tokens appended to the ids of each row, their mean, divided by its length."""
    vectors = []
    for text, picture, _ in ROWS:
        features = dict(processor(text=[text], images=picture and [picture], return_tensors="pt"))
        features["input_ids"] = torch.cat([features["input_ids"], torch.tensor([ids])], 1)
        features["attention_mask"] = torch.ones_like(features["input_ids"])
        if "mm_token_type_ids" in features:  # transformers 5
            kinds = features["mm_token_type_ids"]
            features["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(1, len(ids))], 1)
        hidden = stock.model(**features).last_hidden_state[0, -len(ids) :].mean(0)
        vectors.append(hidden / hidden.norm())
    return torch.stack(vectors).numpy()


def build(folder):
    """Write a full checkpoint and one of adapters with their `base_model`; return the vectors of both."""
    folder = Path(folder)
    processor = make_processor()
    stock = make_stock(processor.tokenizer)
    stock.save_pretrained(folder / "base")
    names = [f"<|btok_{index}|>" for index in range(4)]
    processor.tokenizer.add_tokens(names, special_tokens=True)
    ids = processor.tokenizer.convert_tokens_to_ids(names)
    modules = {
        "injector": {"type": "BToksTokenInjector", "num_tokens": 4},
        "backbone": {
            "type": "Qwen2VLBackbone",
            "model_name_or_path": str(folder / "base"),
            "attn_implementation": "flash_attention_2",
            "backbone_config": stock.config.to_dict(),
        },
        "pooling": {"type": "BToksPooling"},
        "normalize": {"type": "Normalize"},
    }
    model = Pipeline(PipelineConfig(modules), stock)
    run = folder / "run"
    model.config.save_pretrained(run / "base_model")
    save_file({}, run / "base_model" / "model.safetensors")
    processor.save_pretrained(run / "base_model")
    adapted = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=True, trainable_token_indices=ids),
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.peft_config["default"].base_model_name_or_path = "elsewhere/base_model"  # the run was moved
    adapted.save_pretrained(run / "checkpoint-10")
    merged = adapted.merge_and_unload()
    del merged.config.modules["backbone"]["model_name_or_path"]
    merged.save_pretrained(folder / "full")
    processor.save_pretrained(folder / "full")
    return embed(merged._modules_dict["backbone"].model, processor, ids)


if __name__ == "__main__":
    np.save(Path(sys.argv[1], "expected.npy"), build(sys.argv[1]))
