"""Golden vectors: a few inputs, and their embeddings by the weights as they were exported.

They are published in `golden.json`. With them, anyone can check that a loaded model gives the embeddings of the
exported one. `btok verify` runs this file as a script in a fresh process, which loads the repository with stock
loaders. This file must not import btok_hf, so that only the repository is tested.
"""

import base64
import gc
import io
import json
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FILE_NAME = "golden.json"
# Largest allowed difference of a component of an embedding. Measured in fp32: loaders and batching change a component
# by at most 7e-7. A random Qwen2-VL of 28 layers differs by 1.7e-5 from the same model in float64; another device or
# torch release may do the same. Relative noise of 1e-4 on its weights changes every golden vector by at least 7e-4.
TOLERANCE = 1e-4
# The two most similar golden vectors must differ by more than this many tolerances. Otherwise they verify nothing.
DISTINCT = 10
PACKAGES = ("torch", "torchvision", "transformers", "sentence-transformers")

TEXTS = {
    "short text": "A red bicycle leans against a wall.",
    "long text": "The invoice lists four items. Two of them were delivered in March, one is late, and the last was "
    "returned because its case was cracked. What is still owed, after the discount of 7.5 %, is 1,204.30 euros.",
    "other scripts": "靠墙的自行车 · велосипед · دراجة حمراء · ποδήλατο · साइकिल · 🚲 · typed: <|image_pad|>",
}


def golden_inputs(
    prompts: Mapping[str, str | None],
    side: int | None = 56,
    order: str = "media_first",
    image: int = 224,
    takes_video: bool = True,
) -> dict[str, tuple[dict[str, Any], str | None]]:
    """The golden inputs: dicts of `text`, `image` and `video`, as in Sentence-Transformers, or of `messages`.

    Args:
        prompts (`dict[str, str]`): The model's instructions by name. One text is embedded with each non-empty prompt;
            of prompts with the same words, with one.
        side (`int`, *optional*): Side of a frame of the long video in pixels, two tokens: 56 or, with patches of 16
            pixels, 64. `None` leaves this video out.
        order (`str`): Order of content. With `as_given`, texts and images alternate in one input.
        image (`int`): Shorter side of an image in pixels; the longer is twice as long.
        takes_video (`bool`): `False` leaves all videos out.

    Returns:
        `dict[str, tuple[dict, str | None]]`: By name, the input and the name of its prompt.
    """
    short = TEXTS["short text"]
    inputs: dict[str, tuple[dict[str, Any], str | None]] = {
        name: ({"text": text}, None) for name, text in TEXTS.items()
    }
    # Prompts with the same words give the same vector: one of them is an input.
    names = {text: name for name, text in sorted(prompts.items(), reverse=True) if text}
    for prompt in sorted(names.values()):
        inputs[f"prompt {prompt}"] = ({"text": short}, prompt)
    inputs["image"] = ({"image": _tiles(image, image)}, None)
    inputs["image and text"] = ({"image": _tiles(2 * image, image, 5), "text": short}, None)
    inputs["two images"] = ({"image": [_tiles(image, image, 2), _tiles(2 * image, image, 11)], "text": short}, None)
    if takes_video:
        inputs["video"] = ({"video": _clip(image, 4)}, None)
    if side is not None:
        # The temporal positions exceed those of the frame. Releases differ in where the text after it goes on.
        inputs["long video"] = ({"video": _clip(side, 32), "text": short}, None)
    system = {"role": "system", "content": "Find a page that answers."}
    content = [_part(_tiles(image, image, 7)), _part(short)]
    inputs["system message"] = ({"messages": [system, {"role": "user", "content": content}]}, None)
    if order == "as_given":
        pictures = [_part(_tiles(image, image, shift)) for shift in (3, 9)]
        content = [_part("First:"), pictures[0], _part("then"), pictures[1], _part("!")]
        inputs["texts and images"] = ({"messages": [{"role": "user", "content": content}]}, None)
        inputs["text and image"] = ({"text": short, "image": _tiles(2 * image, image, 5)}, None)
    return inputs


def _part(value: str | Image.Image) -> dict[str, Any]:
    """One part of a message."""
    return {"type": "text", "text": value} if isinstance(value, str) else {"type": "image", "image": value}


def _clip(side: int, count: int) -> dict[str, Any]:
    """A video of computed frames at 2 frames per second."""
    frames = np.stack([np.asarray(_tiles(side, side, 3 * index)) for index in range(count)])
    metadata = {"fps": 2.0, "total_num_frames": count, "duration": count / 2, "frames_indices": list(range(count))}
    return {"array": frames, "video_metadata": metadata}


def _tiles(width: int, height: int, shift: int = 0) -> Image.Image:
    """Computed coloured squares. Sides are multiples of 28 and 32 pixels, so that no processor resizes the image:
    resizing differs between releases. (Processors that cut images into tiles resize their view of the whole.)"""
    y, x = np.mgrid[:height, :width] // 32
    x = x + shift
    return Image.fromarray(np.stack([x * 37 % 256, y * 59 % 256, (x + y) * 83 % 256], -1).astype(np.uint8))


def write_golden(
    path: Path,
    inputs: Mapping[str, tuple[dict[str, Any], str | None]],
    prompts: Mapping[str, str | None],
    embeddings: np.ndarray,
) -> float:
    """Write the golden vectors.

    Args:
        path (`Path`): File to write.
        inputs (`dict[str, tuple[dict, str | None]]`): From `golden_inputs`.
        prompts (`dict[str, str]`): The model's instructions by name.
        embeddings (`numpy.ndarray` of shape `(inputs, hidden)`): fp32 embeddings of the inputs.

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
        rows.append(
            {
                **_convert(row, _encode_image, _encode_video),
                "embedding": base64.b64encode(embedding.astype("<f4").tobytes()).decode(),
            }
        )
    content = {
        "about": "Inputs and their embeddings, computed at export in fp32 on the CPU from the written weights. "
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


def longest(config: Any) -> int:
    """The most tokens that a row of this model may have."""
    return config.get_text_config().max_position_embeddings


def read_golden(path: str | Path) -> dict[str, Any]:
    """The content of a golden file, with decoded images, frames and embeddings."""
    try:
        golden = json.loads(Path(path).read_text("utf-8"))
        absent = [key for key in ("inputs", "tolerance", "closest", "versions") if key not in golden]
        if absent:
            raise ValueError(f"it has no {', '.join(absent)}")
        for row in golden["inputs"]:
            row |= _convert(row, _decode_image, _decode_video)
            row["embedding"] = np.frombuffer(base64.b64decode(row["embedding"]), "<f4")
    except FileNotFoundError:
        raise
    except Exception as error:  # of JSON, base64 and image decoders
        raise ValueError(f"{path} is no file of golden vectors ({error}). Export the model again.") from error
    return golden


def _convert(value: Any, of_image: Callable, of_video: Callable, key: str | None = None) -> Any:
    """A copy of a row with its images and videos converted, wherever they are."""
    if key == "video":
        return of_video(value)
    if isinstance(value, dict):
        return {name: _convert(part, of_image, of_video, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_convert(part, of_image, of_video, key) for part in value]
    return of_image(value) if key == "image" else value


def _encode_image(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _decode_image(text: str) -> Image.Image:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return image.convert("RGB")


def _encode_video(video: dict[str, Any]) -> dict[str, Any]:
    return {**video, "array": [_encode_image(Image.fromarray(frame)) for frame in video["array"]]}


def _decode_video(video: dict[str, Any]) -> dict[str, Any]:
    return {**video, "array": np.stack([np.asarray(_decode_image(frame)) for frame in video["array"]])}


def versions() -> dict[str, str]:
    """Versions of the packages that embeddings depend on."""
    return {name: version(name) for name in PACKAGES}


def check(source: str, golden: str, revision: str | None, device: str) -> dict[str, dict[str, list[float]] | str]:
    """Embed the golden inputs with each loader, one by one and in a batch. Runs in the fresh process.

    Args:
        source (`str`): Folder or Hub id of the repository.
        golden (`str`): Path of its golden file.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        device (`str`): Device of the model.

    Returns:
        `dict[str, dict[str, list[float]] | str]`: By loader and input, the largest component differences: alone, and
        in a batch. If a loader fails, its error message instead of the inputs.
    """
    rows = read_golden(golden)["inputs"]
    results: dict[str, dict[str, list[float]] | str] = {}
    encode: Encode | None
    for name, load in (("SentenceTransformer", _sentence_transformer), ("AutoModel", _auto_model)):
        try:
            encode = load(source, revision, device)
            alone = np.concatenate([encode([row]) for row in rows])
            results[name] = {
                row["name"]: [difference(row["embedding"], actual) for actual in pair]
                for row, *pair in zip(rows, alone, encode(rows))
            }
        except Exception as error:  # any error of a loader is its result
            results[name] = f"{type(error).__name__}: {error}"
        encode = None  # frees the model, so that only one is in memory
        gc.collect()
    return results


def difference(expected: np.ndarray, actual: np.ndarray) -> float:
    """The largest difference of a component of two embeddings; infinite if they differ in shape."""
    return float(np.abs(expected - actual).max()) if expected.shape == actual.shape else float("inf")


def _content(row: dict[str, Any]) -> dict[str, Any]:
    """The parts of an input, in their order."""
    return {key: value for key, value in row.items() if key in ("image", "video", "text")}


Encode = Callable[[list[dict[str, Any]]], np.ndarray]  # embeds rows of a golden file


def _sentence_transformer(source: str, revision: str | None, device: str) -> Encode:
    """Sentence-Transformers with stock modules, without remote code."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(source, revision=revision, device=device, model_kwargs={"dtype": "float32"})
    model.truncate_dim = None
    model.max_seq_length = longest(model[0].config)

    def encode(rows: list[dict[str, Any]]) -> np.ndarray:
        embeddings: dict[int, np.ndarray] = {}
        # `encode` takes one prompt per call, and either messages or other inputs.
        kinds = [(row.get("prompt_name"), "messages" in row) for row in rows]
        for kind in dict.fromkeys(kinds):
            prompt_name = kind[0]
            chosen = [index for index, other in enumerate(kinds) if other == kind]
            items: list[Any] = [rows[index].get("messages") or _content(rows[index]) for index in chosen]
            # An empty prompt replaces the default prompt of the repository.
            prompt = {"prompt": ""} if prompt_name is None else {"prompt_name": prompt_name}
            for index, embedding in zip(chosen, model.encode(items, batch_size=len(rows), **prompt)):
                embeddings[index] = embedding
        return np.stack([embeddings[index] for index in range(len(rows))])

    return encode


def _auto_model(source: str, revision: str | None, device: str) -> Encode:
    """`AutoModel` with the code of the repository, as in the example of the card."""
    import torch
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(source, revision=revision, trust_remote_code=True, dtype=torch.float32)
    model = model.to(device).eval()
    processor = AutoProcessor.from_pretrained(source, revision=revision)

    def encode(rows: list[dict[str, Any]]) -> np.ndarray:
        conversations, metadata = [], []
        for row in rows:
            if "messages" in row:
                conversations.append(row["messages"])
                continue
            content = []
            for key, value in _content(row).items():
                for part in value if isinstance(value, list) else [value]:
                    if key == "video":
                        metadata.append(part["video_metadata"])
                    content.append({"type": key, key: part["array"] if key == "video" else part})
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

    # The convolution of the patch embedding would use TF32 by default, which has a mantissa of ten bits.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    # The caller reads only the last line, because imported packages may print too.
    print("\n" + json.dumps({"results": check(**json.load(sys.stdin)), "versions": versions()}))
