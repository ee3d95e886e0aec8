"""Small parts of a pretrained base: a Llama in a GGUF file and a vision tower."""

import json

import gguf
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import InternVLVisionConfig, InternVLVisionModel, LlamaConfig, LlamaForCausalLM

from benchmarks.pretrained import base

LAYERS, HEADS, KEY_VALUE_HEADS, HIDDEN = 2, 4, 2, 64
# Names that llama.cpp gives to the tensors of a layer.
PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_llama(folder):
    """A random Llama as a GGUF file with a tokenizer of its own: the file, and the Llama."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        ["the cell is the unit of life", "a wave moves energy, not matter"] * 3,
        vocab_size=300,
        special_tokens=[*base.TEXT_TOKENS, "<repo_name>"],
        show_progress=False,
    )
    vocabulary = sorted(bpe.get_vocab(), key=bpe.get_vocab().get)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        initializer_range=0.2,
    )
    llama = LlamaForCausalLM(config).eval()
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<") and token.endswith(">") else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    weights = llama.model.state_dict()
    writer.add_tensor("token_embd.weight", weights["embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["norm.weight"].numpy())
    for layer in range(LAYERS):
        for short, name in PARTS.items():
            tensor = weights[f"layers.{layer}.{name}.weight"]
            if short in ("attn_q", "attn_k"):  # llama.cpp interleaves the halves of each head
                heads = HEADS if short == "attn_q" else KEY_VALUE_HEADS
                tensor = tensor.view(heads, 2, -1, HIDDEN).transpose(1, 2).reshape(tensor.shape)
            writer.add_tensor(f"blk.{layer}.{short}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, llama


def random_tower():
    """A random vision tower whose tile of 112 x 112 pixels is 4 tokens."""
    torch.manual_seed(0)
    config = InternVLVisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        attention_bias=True,
        image_size=[112, 112],
        use_mean_pooling=False,
    )
    model = InternVLVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
