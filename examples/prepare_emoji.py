"""Make what the emoji recipe needs from `data/emoji`: a base model and pair files. It takes less than a minute.

    python examples/prepare_emoji.py --output_dir runs/emoji

It writes under the output folder:
- `base/`: a Qwen2-VL with 1.6 million random parameters and a tokenizer trained on the data's words.
- `untrained/`: the same with K Bottleneck Tokens. Training starts from it.
- `pairs/`: `text_to_image`, `image_to_image` (training drawings only) and `eval_unseen_drawings` (parquet).
- `drawings/`: the candidates of `eval_unseen_drawings` as PNG files, for `search.py`.
"""

import argparse
import io
import json
import random
import re
import shutil
from pathlib import Path

import torch
from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as PILImage
from PIL import ImageEnhance, ImageOps
from tokenizers import ByteLevelBPETokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from btok_hf import add_bottleneck_tokens
from btok_hf.family import REQUIRED_TOKENS

DATA = Path(__file__).resolve().parents[1] / "data" / "emoji"
CATEGORIES = ("Animals & Nature", "Food & Drink")
LANGUAGES = ("en", "de", "fr")
SIZE = 48  # pixels a side: 4 x 4 patches of 12 pixels, merged to 4 tokens
SPECIAL_TOKENS = ["<|endoftext|>", *REQUIRED_TOKENS, "<|vision_pad|>"]
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text("utf-8")


def build_base(
    output_dir,
    texts,
    vocab_size=4096,
    hidden_size=128,
    num_layers=3,
    vision_size=64,
    patch_size=SIZE // 4,
    pixels=(SIZE * SIZE, SIZE * SIZE),
    max_length=512,
    text_config=None,
    vision_config=None,
    dtype=torch.float32,
    seed=0,
):
    """Write a random Qwen2-VL with a tokenizer trained on `texts`.

    `pixels` are the least and most pixels of an image. `text_config` and `vision_config` change or add entries of the
    two configurations.
    """
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    # Room for the special tokens and spare rows, as in the real checkpoints.
    bpe.train_from_iterator(texts, vocab_size=vocab_size - 64, min_frequency=2, show_progress=False)
    vocab = bpe.get_vocab()
    vocab.update({c: len(vocab) + i for i, c in enumerate(c for c in ByteLevel.alphabet() if c not in vocab)})
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.model_max_length = "<|endoftext|>", "<|im_end|>", max_length
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)))
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": hidden_size // 32,
            "num_key_value_heads": hidden_size // 64,
            "max_position_embeddings": max_length,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
            # 1 / sqrt(fan-in): with 0.02 a model this narrow learns nothing for many steps.
            "initializer_range": hidden_size**-0.5,
            **(text_config or {}),
        },
        vision_config={
            "depth": 2,
            "embed_dim": vision_size,
            "hidden_size": hidden_size,
            "num_heads": 4,
            "mlp_ratio": 3,
            "patch_size": patch_size,
            "initializer_range": vision_size**-0.5,
            **(vision_config or {}),
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        initializer_range=hidden_size**-0.5,
    )
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config).to(dtype)
    size = {"shortest_edge": pixels[0], "longest_edge": pixels[1]}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(patch_size=patch_size, size=size),
        tokenizer,
        Qwen2VLVideoProcessor(patch_size=patch_size, size=size),
        chat_template=CHAT_TEMPLATE,
    )
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    return sum(parameter.numel() for parameter in model.parameters())


def text_for(row, rng):
    """A name (85 %) or a list of keywords (15 %), in one of the languages."""
    language = rng.choice(LANGUAGES)
    name, keywords = row["names"][language], row["keywords"][language]
    if rng.random() < 0.85 or not keywords:
        return name
    return ", ".join(rng.sample(keywords, min(4, len(keywords))))


def draw(image, rng=None, size=SIZE):
    """The drawing on white, `size` pixels; with `rng`, moved, mirrored, recoloured, on a random background."""
    image = image.convert("RGBA")
    background = (255, 255, 255)
    if rng is not None:
        if rng.random() < 0.5:
            image = ImageOps.mirror(image)
        image = image.rotate(rng.uniform(-15, 15), PILImage.Resampling.BILINEAR)
        width, height = (round(96 * rng.uniform(0.75, 1.1)) for _ in range(2))
        canvas = PILImage.new("RGBA", (96, 96))
        place = (round((96 - width) / 2 + rng.uniform(-8, 8)), round((96 - height) / 2 + rng.uniform(-8, 8)))
        canvas.paste(image.resize((width, height)), place)
        image = canvas
        if rng.random() < 0.5:
            background = tuple(rng.randint(160, 255) for _ in range(3))
    flat = PILImage.new("RGB", image.size, background)
    flat.paste(image, mask=image.getchannel("A"))
    flat = flat.resize((size, size), PILImage.Resampling.BOX)
    if rng is not None:
        for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
            flat = enhance(flat).enhance(rng.uniform(0.65, 1.35))
    return flat


def png(image):
    """The image as `datasets` stores it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_pairs(folder, emoji, variants, seed):
    """Write `pairs/` and `drawings/` to the folder. Returns the number of rows of each pair file."""
    rng = random.Random(seed)
    rows = {"text_to_image": [], "image_to_image": [], "eval_unseen_drawings": []}
    seen = [row for row in emoji["train"] if row["category"] in CATEGORIES]
    by_concept = {}
    for row in seen:
        by_concept.setdefault(row["emoji"], []).append(row)
    for _ in range(variants):
        for row in seen:
            rows["text_to_image"].append(
                {"query": text_for(row, rng), "positive": png(draw(row["image"], rng)), "group": row["emoji"]}
            )
    # A quarter of all batches: the same concept drawn by both artists, or one drawing in two variants.
    for _ in range(variants // 2):
        for drawings in by_concept.values():
            first, second = rng.sample(drawings, 2) if len(drawings) == 2 else drawings * 2
            query, positive = png(draw(first["image"], rng)), png(draw(second["image"], rng))
            rows["image_to_image"].append({"query": query, "positive": positive, "group": first["emoji"]})
    # Candidates: one drawing of every concept. The held-out ones have queries, the others are distractors.
    unseen = [row for row in emoji["unseen_drawings"] if row["category"] in CATEGORIES]
    candidates = list(unseen)
    for row in unseen:
        for language in LANGUAGES:
            rows["eval_unseen_drawings"].append(
                {"query": row["names"][language], "positive": png(draw(row["image"])), "group": row["emoji"]}
            )
    held_out = {row["emoji"] for row in unseen}
    for concept, drawings in by_concept.items():
        if concept not in held_out:
            candidates.append(rng.choice(drawings))
            positive = png(draw(candidates[-1]["image"]))
            rows["eval_unseen_drawings"].append({"query": None, "positive": positive, "group": concept})
    for name in ("pairs", "drawings"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for row in candidates:
        name = re.sub(r"\W+", "-", row["names"]["en"])
        draw(row["image"]).save(folder / "drawings" / f"{name}.png")
    for name, part in rows.items():
        query = Image() if name == "image_to_image" else Value("string")
        features = Features({"query": query, "positive": Image(), "group": Value("string")})
        Dataset.from_list(part, features=features).to_parquet(folder / "pairs" / f"{name}.parquet")
    return {name: len(part) for name, part in rows.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/emoji"), help="folder to write")
    parser.add_argument("--num_tokens", type=int, default=4, help="K; 0 for last-token pooling")
    parser.add_argument("--variants", type=int, default=32, help="augmented copies of each training drawing")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    emoji = load_dataset(str(DATA))
    texts = [
        text
        for row in emoji["train"].remove_columns("image")
        if row["category"] in CATEGORIES
        for language in LANGUAGES
        for text in [row["names"][language], *row["keywords"][language]]
    ]
    for name in ("base", "untrained", "drawings"):
        shutil.rmtree(arguments.output_dir / name, ignore_errors=True)
    parameters = build_base(arguments.output_dir / "base", texts, seed=arguments.seed)
    print(f"base: a random Qwen2-VL with {parameters:,} parameters")
    add_bottleneck_tokens(
        arguments.output_dir / "base",
        arguments.output_dir / "untrained",
        num_tokens=arguments.num_tokens,
        noise_std=0.5,
        seed=arguments.seed,
    )
    counts = write_pairs(arguments.output_dir, emoji, arguments.variants, arguments.seed)
    print("pairs:", ", ".join(f"{name} {count:,}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
