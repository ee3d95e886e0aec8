"""Golden vectors: a few inputs and the embeddings that a model gave for them in memory, when it was exported.

`golden.json` carries them with the repository, so that anyone can tell whether what was loaded is what was exported.
Run as a script, in a fresh process, this file checks a repository with stock loaders (`btok verify` does so). It
imports nothing of btok_hf: what passes is the repository alone.
"""

import base64
import io
import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

FILE_NAME = "golden.json"
# Largest allowed difference of an embedding's component. Measured in fp32: loaders and batching move a component by at
# most 7e-7, and a random Qwen2-VL of 28 layers differs from itself in float64 by 1.7e-5, which is what another device
# or torch release may do. A ten-thousandth of noise on its weights moves every golden vector by 7e-4 or more.
TOLERANCE = 1e-4
# Golden inputs whose embeddings are not further apart than this many tolerances prove nothing.
DISTINCT = 10
PACKAGES = ("torch", "torchvision", "transformers", "sentence-transformers")

TEXTS = {
    "short text": "A red bicycle leans against a wall.",
    "long text": "The invoice lists four items. Two of them were delivered in March, one is late, and the last was "
    "returned because its case was cracked. What is still owed, after the discount of 7.5 %, is 1,204.30 euros.",
    "other scripts": "靠墙的自行车 · велосипед · دراجة حمراء · ποδήλατο · साइकिल · 🚲 · typed: <|image_pad|>",
}


def golden_inputs(prompts):
    """The inputs, by name: dicts of `text`, `image` and `video`, as Sentence-Transformers takes them.

    Args:
        prompts (`dict[str, str]`): The model's instructions by name; a text is embedded with each that is not empty.

    Returns:
        `dict[str, tuple[dict, str | None]]`: Input and name of its prompt.
    """
    inputs = {name: ({"text": text}, None) for name, text in TEXTS.items()}
    for prompt in sorted(name for name, text in prompts.items() if text):
        inputs[f"prompt {prompt}"] = ({"text": TEXTS["short text"]}, prompt)
    inputs["image"] = ({"image": _tiles(224, 224)}, None)
    inputs["image and text"] = ({"image": _tiles(448, 224, 5), "text": TEXTS["short text"]}, None)
    frames = np.stack([np.asarray(_tiles(224, 224, 3 * index)) for index in range(4)])
    metadata = {"fps": 2.0, "total_num_frames": 4, "duration": 2.0, "frames_indices": [0, 1, 2, 3]}
    inputs["video"] = ({"video": {"array": frames, "video_metadata": metadata}}, None)
    return inputs


def _tiles(width, height, shift=0):
    """Coloured squares by formula. Sides are multiples of 28 and 32 pixels, so that no processor resizes them: where
    releases differ, it is in resizing."""
    y, x = np.mgrid[:height, :width] // 32
    x = x + shift
    return Image.fromarray(np.stack([x * 37 % 256, y * 59 % 256, (x + y) * 83 % 256], -1).astype(np.uint8))


def write_golden(path, inputs, prompts, embeddings):
    """Write the file.

    Args:
        path (`Path`): File to write.
        inputs (`dict[str, tuple[dict, str | None]]`): As from `golden_inputs`.
        prompts (`dict[str, str]`): The model's instructions by name.
        embeddings (`numpy.ndarray` of shape `(inputs, hidden)`): What the model gave, fp32.

    Returns:
        `float`: The largest component difference of the two most similar embeddings.
    """
    apart = np.abs(embeddings[:, None] - embeddings).max(-1)
    closest = float(apart[~np.eye(len(apart), dtype=bool)].min())
    rows = []
    for (name, (item, prompt)), embedding in zip(inputs.items(), embeddings):
        row = {"name": name, **item}
        if prompt is not None:
            row |= {"prompt_name": prompt, "prompt": prompts[prompt]}
        if "image" in item:
            row["image"] = _encode_image(item["image"])
        if "video" in item:
            frames = [_encode_image(Image.fromarray(frame)) for frame in item["video"]["array"]]
            row["video"] = {**item["video"], "array": frames}
        rows.append({**row, "embedding": base64.b64encode(embedding.astype("<f4").tobytes()).decode()})
    content = {
        "about": "Inputs and their embeddings, computed at export in fp32 on the CPU from the weights in memory. "
        "Check them with: btok verify PATH_OR_REPO. Images and frames are PNG, embeddings little-endian "
        "float32, in base64. tolerance: largest allowed difference of a component; closest: that of the two most "
        "similar embeddings.",
        "tolerance": TOLERANCE,
        "closest": closest,
        "versions": versions(),
        "inputs": rows,
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return closest


def read_golden(path):
    """The file's content, with images, frames and embeddings decoded."""
    golden = json.loads(Path(path).read_text("utf-8"))
    for row in golden["inputs"]:
        row["embedding"] = np.frombuffer(base64.b64decode(row["embedding"]), "<f4")
        if "image" in row:
            row["image"] = _decode_image(row["image"])
        if "video" in row:
            frames = np.stack([np.asarray(_decode_image(frame)) for frame in row["video"]["array"]])
            row["video"] = {**row["video"], "array": frames}
    return golden


def _encode_image(image):
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _decode_image(text):
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return image.convert("RGB")


def versions():
    """What embeddings depend on besides the repository."""
    return {name: version(name) for name in PACKAGES}


# ---------------------------------------------------------------- in the fresh process


def check(source, golden, revision, device):
    """Embed the golden inputs with each loader, one by one and in a batch.

    Returns:
        `dict[str, dict[str, list[float]] | str]`: By loader and input, the largest component difference alone and in
        a batch; a text instead of the inputs is the error that the loader raised.
    """
    rows = read_golden(golden)["inputs"]
    results = {}
    for name, load in (("SentenceTransformer", _sentence_transformer), ("AutoModel", _auto_model)):
        try:
            encode = load(source, revision, device)
            alone = np.concatenate([encode([row]) for row in rows])
            results[name] = {
                row["name"]: [_difference(row["embedding"], actual) for actual in pair]
                for row, *pair in zip(rows, alone, encode(rows))
            }
        except Exception as error:  # whatever it is, it is the answer
            results[name] = f"{type(error).__name__}: {error}"
    return results


def _difference(expected, actual):
    return float(np.abs(expected - actual).max()) if expected.shape == actual.shape else float("inf")


def _sentence_transformer(source, revision, device):
    """Stock modules, no remote code."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(source, revision=revision, device=device, model_kwargs={"dtype": "float32"})
    model.truncate_dim = None

    def encode(rows):
        embeddings = [None] * len(rows)
        for prompt_name in {row.get("prompt_name") for row in rows}:  # one prompt a call
            chosen = [index for index, row in enumerate(rows) if row.get("prompt_name") == prompt_name]
            items = [
                {key: rows[index][key] for key in ("image", "video", "text") if key in rows[index]} for index in chosen
            ]
            # An empty prompt keeps the repository's default prompt away.
            prompt = {"prompt": ""} if prompt_name is None else {"prompt_name": prompt_name}
            for index, embedding in zip(chosen, model.encode(items, batch_size=len(rows), **prompt)):
                embeddings[index] = embedding
        return np.stack(embeddings)

    return encode


def _auto_model(source, revision, device):
    """The repository's own code, as in the card's example."""
    import torch
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(source, revision=revision, trust_remote_code=True, dtype=torch.float32)
    model = model.to(device).eval()
    processor = AutoProcessor.from_pretrained(source, revision=revision)

    def encode(rows):
        conversations, metadata = [], []
        for row in rows:
            content = []
            for key in ("image", "video", "text"):
                if key == "video" and key in row:
                    metadata.append(row[key]["video_metadata"])
                    content.append({"type": key, key: row[key]["array"]})
                elif key in row:
                    content.append({"type": key, key: row[key]})
            system = [{"role": "system", "content": row["prompt"]}] if "prompt" in row else []
            conversations.append([*system, {"role": "user", "content": content}])
        features = processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, **({"video_metadata": metadata} if metadata else {})},
        ).to(device)
        with torch.no_grad():
            return model(**features).pooler_output.cpu().numpy()

    return encode


if __name__ == "__main__":
    import torch

    # TF32 has ten bits of mantissa: the convolution of the patch embedding would use it by default.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    # The last line of the output, since anything imported may print too.
    print("\n" + json.dumps({"results": check(**json.load(sys.stdin)), "versions": versions()}))
