"""Tiny random checkpoints of every family, made on the spot: byte-level tokenizer, two layers, a few kilobytes."""

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5Tokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
)

from btok_hf.backbones import FAMILIES
from btok_hf.family import REQUIRED_TOKENS

BACKBONES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl", "idefics3", "smolvlm", "lfm2_vl")
WITH_VIDEO = tuple(name for name in BACKBONES if FAMILIES[name].video)
SPECIAL = ["<|endoftext|>", *REQUIRED_TOKENS, "<|vision_pad|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Other markers of tiles are words: SmolVLM-2.2B has none of them as tokens, smaller ones have all.
SMOLVLM_SPECIAL = ["<|endoftext|>", *FAMILIES["smolvlm"].required_tokens, "<global-img>", "<row_1_col_1>"]
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}: "
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}<image>{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


INTERNVL = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


LFM2VL = {"image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>"}
LFM2VL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<image>{% elif content['type'] == 'text' %}{{ content['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(kind=Qwen2Tokenizer, special=SPECIAL, pad="<|endoftext|>", eos="<|im_end|>", **named):
    tokenizer = kind(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[], **named)
    tokenizer.add_tokens([*special, eos], special_tokens=True)
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.model_max_length = pad, eos, 4096
    return tokenizer


def hybrid(text, linear_dim):
    """What the text configuration of a Qwen3.5 has besides: attention between two recurrent layers."""
    sections = [text["head_dim"] // 8, *[text["head_dim"] // 16] * 2]
    return {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": linear_dim,
        "linear_value_head_dim": linear_dim,
        "rope_parameters": {**text["rope_parameters"], "partial_rotary_factor": 0.5, "mrope_section": sections},
    }


def smolvlm(backbone, vocab_size, tied, head_dim):
    """A random SmolVLM with its processor: tiles of 28 x 28 pixels, 4 tokens each, up to 2 x 2 and the whole."""
    tok = tokenizer(special=SMOLVLM_SPECIAL, pad="<|im_end|>", eos="<end_of_utterance>")
    config, model, images = {
        "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessor),
        "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessor),
    }[backbone]
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 64 // head_dim,
        "num_key_value_heads": 32 // head_dim,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "bos_token_id": tok.convert_tokens_to_ids("<|im_start|>"),
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
        "tie_word_embeddings": tied,
    }
    model = model(
        config(
            text_config=text,
            vision_config={**vision, "image_size": 28, "patch_size": 7},
            image_token_id=tok.convert_tokens_to_ids("<image>"),
            scale_factor=2,
            tie_word_embeddings=tied,
        )
    )
    pixels = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    return model, Idefics3Processor(images(**pixels), tok, image_seq_len=4)


def internvl(text, tied, text_model, head_dim):
    """An InternVL with tiles of 56 x 56 pixels, which are 4 tokens each."""
    tok = tokenizer(
        special=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<box>"], extra_special_tokens=dict(INTERNVL)
    )
    ids = {name: tok.convert_tokens_to_ids(f"<|{name}|>") for name in ("endoftext", "im_end")}
    text = {
        **text,
        "model_type": text_model,
        "head_dim": head_dim,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
        "bos_token_id": ids["endoftext"],
        "eos_token_id": ids["im_end"],
        "pad_token_id": ids["endoftext"],
    }
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": [56, 56],
        "patch_size": [14, 14],
        "attention_bias": True,
    }
    config = InternVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    size = {"height": 56, "width": 56}
    images = GotOcr2ImageProcessor(size=size, max_patches=4)
    processor = InternVLProcessor(images, tok, InternVLVideoProcessor(size=size), image_seq_length=4)
    return InternVLForConditionalGeneration(config), processor


def lfm2vl(vocab_size, tied, head_dim):
    """An LFM2-VL of convolutions before and after attention. Images have up to 16 tokens, and tiles 4."""
    tiles = [f"<|img_row_{row}_col_{col}|>" for row in range(1, 5) for col in range(1, 4 // row + 1)]
    tok = tokenizer(
        special=["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", *tiles, "<|img_thumbnail|>"],
        pad="<|pad|>",
        bos_token="<|startoftext|>",
        extra_special_tokens=dict(LFM2VL),
    )
    # As published: the tokenizer alone begins every text with this token.
    bos = tok.convert_tokens_to_ids("<|startoftext|>")
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|startoftext|> $A", special_tokens=[("<|startoftext|>", bos)]
    )
    text = {
        "model_type": "lfm2",
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_attention_heads": 64 // head_dim,
        "num_key_value_heads": 32 // head_dim,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "bos_token_id": bos,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
        "tie_word_embeddings": tied,
    }
    vision = {
        "model_type": "siglip2_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 14,
        "num_patches": 16,
        "vision_use_head": False,
    }
    config = Lfm2VlConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        projector_hidden_size=48,
        tie_word_embeddings=tied,
    )
    pixels = {"encoder_patch_size": 14, "tile_size": 56, "min_image_tokens": 2, "max_image_tokens": 6, "max_tiles": 4}
    return Lfm2VlForConditionalGeneration(config), Lfm2VlProcessor(Lfm2VlImageProcessor(**pixels), tok)


def build(
    backbone,
    path,
    vocab_size=320,
    tied=True,
    seed=0,
    chat_template=CHAT_TEMPLATE,
    head_dim=16,
    linear_dim=16,
    text_model="qwen2",
):
    """Write a random base checkpoint with its processor to `path`. 264 of its rows are taken, 273 of an LFM2-VL's."""
    tok = tokenizer(Qwen3_5Tokenizer if backbone == "qwen3_5" else Qwen2Tokenizer)
    ids = dict(zip(SPECIAL, tok.convert_tokens_to_ids(SPECIAL)))
    special = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": tied,
    }
    sections = [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16]
    text = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 64 // head_dim,
        "num_key_value_heads": 32 // head_dim,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": tied,
    }
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
    torch.manual_seed(seed)
    if backbone in ("idefics3", "smolvlm"):
        model, processor = smolvlm(backbone, vocab_size, tied, head_dim)
        chat_template = SMOLVLM_TEMPLATE if chat_template == CHAT_TEMPLATE else chat_template
    elif backbone == "lfm2_vl":
        model, processor = lfm2vl(vocab_size, tied, head_dim)
        chat_template = LFM2VL_TEMPLATE if chat_template == CHAT_TEMPLATE else chat_template
    elif backbone == "internvl":
        model, processor = internvl(text, tied, text_model, head_dim)
        for kind, own in (("image", FAMILIES[backbone].image), ("video", FAMILIES[backbone].video)):
            stock = f"<|vision_start|><|{kind}_pad|><|vision_end|>"
            chat_template = chat_template and chat_template.replace(stock, own)
    elif backbone == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14}
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **special))
        processor = Qwen2VLProcessor(Qwen2VLImageProcessor(size=pixels), tok, Qwen2VLVideoProcessor(size=pixels))
    elif backbone == "qwen2_5_vl":
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "num_heads": 2,
            "patch_size": 14,
            "fullatt_block_indexes": [1],
            "window_size": 112,
        }
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special))
        processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(size=pixels), tok, Qwen2VLVideoProcessor(size=pixels))
    else:
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "num_heads": 2,
            "patch_size": 16,
            "num_position_embeddings": 64,
        }
        text = {**text, "head_dim": head_dim}
        text["rope_parameters"] = {**text["rope_parameters"], "mrope_interleaved": True}
        if backbone == "qwen3_vl":
            vision["deepstack_visual_indexes"] = [0, 1]
            model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **special))
        else:
            model = Qwen3_5ForConditionalGeneration(
                Qwen3_5Config(text_config=text | hybrid(text, linear_dim), vision_config=vision, **special)
            )
        pixels = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 16}
        processor = Qwen3VLProcessor(
            Qwen2VLImageProcessor(patch_size=16, size=pixels, image_mean=[0.5] * 3, image_std=[0.5] * 3),
            tok,
            Qwen3VLVideoProcessor(size={"shortest_edge": 32 * 32 * 2, "longest_edge": 32 * 32 * 64}),
        )
    processor.chat_template = chat_template
    # The default initialisation (std 0.02) gives nearly constant hidden states. Make tokens differ more.
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=0.5)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(5)
            # Recurrent layers that remember, as trained ones do: their random heads forget within a token or two.
            if name.endswith("A_log"):
                parameter.copy_(torch.linspace(-5, 0, len(parameter)))
            elif "conv1d" in name or name.endswith(("conv.conv.weight", "position_embeddings", "cls_token")):
                parameter.normal_(std=0.5)
            elif "lambda_" in name:
                parameter.fill_(1.0)
        model.tie_weights()
    model.save_pretrained(path)
    processor.save_pretrained(path)
    if backbone == "smolvlm":  # as published: a processor that needs num2words, and reads videos
        config = Path(path, "processor_config.json")
        config.write_text(config.read_text().replace("Idefics3Processor", "SmolVLMProcessor"))
    return str(path)
