"""Fixtures that several test files share."""

import os

# Set before any Hugging Face import: tests never use the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and processes share the cores

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from support import tiny
from support.hub_server import HubServer
from support.mmeb_tree import write_dataset
from support.repositories import TEXTS, contents
from transformers import AutoModel, AutoProcessor

from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, export_model
from btok_hf.evaluation.tasks import TASKS


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of `datasets` that is empty."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Plain random checkpoints, by backbone."""
    folder = tmp_path_factory.mktemp("bases")
    return {backbone: tiny.build(backbone, folder / backbone) for backbone in tiny.BACKBONES}


@pytest.fixture(scope="session")
def repos(bases, tmp_path_factory):
    """The bases with K = 4 Bottleneck Tokens. Noise makes the token rows differ, so that mix-ups show."""
    folder = tmp_path_factory.mktemp("repos")
    return {
        backbone: str(add_bottleneck_tokens(base, folder / backbone, noise_std=1.0, prompts={"query": "Find it."}))
        for backbone, base in bases.items()
    }


@pytest.fixture(scope="session")
def repo(repos):
    return repos["qwen2_vl"]


@pytest.fixture(params=["qwen2_vl", "qwen3_5", "idefics3", "lfm2_vl"])
def either(repos, request):
    """A repository with positions in time and space, one with recurrent layers, one with padded tiles, one with
    convolutions and tiles of several sizes."""
    return repos[request.param]


@pytest.fixture(scope="session")
def model(repo):
    """The loaded repository. Tests must not change it."""
    return BTokSentenceTransformer(repo, device="cpu")


@pytest.fixture(scope="module", params=tiny.BACKBONES)
def loaded(repos, request):
    """One repository in every loader: ours, stock Sentence-Transformers without and with trust, AutoModel."""
    repo = repos[request.param]
    return {
        "wrapper": BTokSentenceTransformer(repo, device="cpu"),
        "stock": SentenceTransformer(repo, device="cpu"),
        "trusted": SentenceTransformer(repo, device="cpu", trust_remote_code=True),
        "auto": (AutoModel.from_pretrained(repo, trust_remote_code=True), AutoProcessor.from_pretrained(repo)),
    }


@pytest.fixture(scope="session")
def mp4(tmp_path_factory):
    """A two-second clip of a square that moves, written with PyAV."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for index in range(20):
            frame = np.zeros((64, 64, 3), np.uint8)
            frame[16:32, index * 2 : index * 2 + 16] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return str(path)


@pytest.fixture(scope="session")
def exported(repo, tmp_path_factory):
    """An exported repository. Tests must not change it."""
    folder = export_model(BTokSentenceTransformer(repo, device="cpu"), tmp_path_factory.mktemp("exported") / "model")
    before = contents(folder)
    yield folder
    assert contents(folder) == before


@pytest.fixture
def copied(exported, tmp_path):
    """A copy of `exported` that a test may change."""
    return Path(shutil.copytree(exported, tmp_path / "copied"))


@pytest.fixture(scope="session")
def with_adapters(exported):
    """The exported model with adapters and token rows that move its vectors."""
    torch.manual_seed(0)
    model = BTokSentenceTransformer(exported, device="cpu")
    config = LoraConfig(
        r=2,
        init_lora_weights=False,
        task_type="FEATURE_EXTRACTION",
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        trainable_token_indices={"embed_tokens": list(model.config.btok_token_ids)},
    )
    before = model.encode(TEXTS)
    model[0].model.add_adapter(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))
    assert np.abs(model.encode(TEXTS) - before).max() > 0.01
    return model


@pytest.fixture(scope="module")
def hub():
    """A Hub on this machine."""
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def mmeb_root(tmp_path_factory):
    """All datasets of MMEB-V2, with a few rows each."""
    folder = tmp_path_factory.mktemp("mmeb")
    for name in TASKS:
        write_dataset(folder, name)
    return folder


@pytest.fixture(scope="session")
def trained(repo, tmp_path_factory):
    """A short run with its model card. Tests must not change it."""
    from support.cards import train_with_card  # here, because training takes seconds to import

    return train_with_card(repo, tmp_path_factory.mktemp("run"))
