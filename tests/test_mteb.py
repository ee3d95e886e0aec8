"""The model in mteb: metadata, a local task, videos, and mteb's mock tasks."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.cache import ResultCache
from mteb.mocks import ALL_MOCK_TASK_TEST_GRID
from support.media import image, video
from support.repositories import add_noise, edit

from btok_hf import BTokSentenceTransformer
from btok_hf.evaluation.mteb import _Model, mteb_meta


@pytest.fixture(scope="module")
def in_mteb(repos):
    """The model as mteb loads it, and a list of the batches that it gets."""
    wrapper = mteb_meta(repos["qwen3_vl"]).load_model(device="cpu")
    module, forward = wrapper.model[0], []
    module.register_forward_pre_hook(lambda _, inputs: forward.append(inputs[0]))
    return wrapper, forward


def test_metadata_for_mteb(repos, bases, tmp_path):
    meta = mteb_meta(repos["qwen3_vl"])
    assert meta.modalities == ["text", "image", "video"] and meta.name == repos["qwen3_vl"]
    assert meta.embed_dim == 64 and meta.use_instructions and meta.similarity_fn_name == "cosine"
    with pytest.raises(ValueError, match="has no Bottleneck Tokens"):
        mteb_meta(bases["qwen3_vl"])
    copy = shutil.copytree(repos["qwen3_vl"], tmp_path / "copy")
    saved = {"truncate_dim": 16, "similarity_fn_name": "euclidean"}
    edit(copy, "config_sentence_transformers.json", lambda config: config.update(saved))
    meta, model = mteb_meta(copy), BTokSentenceTransformer(copy, device="cpu")
    assert meta.embed_dim == model.get_embedding_dimension() == 16
    assert meta.similarity_fn_name == model.similarity_fn_name == "euclidean"


def test_arguments_of_load_model_reach_the_model(repos):
    """mteb labels results with them."""
    meta = mteb_meta(repos["qwen3_vl"])
    meta.embed_dim = [64, 16]
    options = {"model_kwargs": {"dtype": "bfloat16"}, "processor_kwargs": {"max_pixels": 28 * 28 * 8}}
    wrapper = meta.load_model(device="cpu", embed_dim=16, num_frames=4, model_prompts={"query": "Q"}, **options)
    model = wrapper.model
    assert wrapper.num_frames == 4 and model.prompts["query"] == "Q"
    assert model.encode(["a"]).shape == (1, 16) and wrapper.mteb_model_meta.embed_dim == 16
    assert model.dtype == torch.bfloat16 and model.transformer.image_limits.max_pixels == 28 * 28 * 8
    assert meta.load_model(device="cpu", truncate_dim=32).model.encode(["a"]).shape == (1, 32)
    with pytest.raises(TypeError, match="nonsense"):
        meta.load_model(device="cpu", nonsense=1)


def test_results_are_kept_by_the_content_of_a_folder(repo, tmp_path, monkeypatch):
    """mteb caches results by name and revision. A training writes other weights to the same folder."""
    encoded = []
    encode = _Model.encode
    monkeypatch.setattr(
        _Model, "encode", lambda self, inputs, *a, **k: encoded.extend(inputs) or encode(self, inputs, *a, **k)
    )
    texts = [f"text {row}" for row in range(6)]
    task = local_task({"text": texts}, {"text": texts[::-1]}, {f"q{row}": {f"d{row}": 1} for row in range(6)})
    folder, cache = Path(shutil.copytree(repo, tmp_path / "final")), ResultCache(tmp_path / "cache")

    def score(cache):
        result = mteb.evaluate(mteb_meta(folder), [task()], cache=cache, show_progress_bar=False)
        return result.task_results[0].scores["test"][0]["ndcg_at_10"]

    first, revision = score(cache), mteb_meta(folder).revision
    assert encoded
    encoded.clear()
    (folder / "README.md").write_text("another card")
    assert score(cache) == first and not encoded
    add_noise(folder, 0.5)
    again = score(cache)
    assert encoded and again == score(None) != first
    assert mteb_meta(folder).revision != revision == mteb_meta(repo).revision  # the same files in another folder


def test_results_of_a_repository_on_the_hub_belong_to_a_commit(hub, repo, tmp_path):
    hub.run("-m", "btok_hf", "push", repo, "org/mteb", "--revision", "v1", home=tmp_path)
    code = (
        "from btok_hf.evaluation import mteb_meta; meta = mteb_meta('org/mteb', 'v1'); print(meta.revision)\n"
        "assert meta.load_model(device='cpu').encode is not None and meta.reference.endswith('/org/mteb')"
    )
    commit = hub.repositories["org/mteb"].resolve("v1")
    assert hub.run("-c", code, home=tmp_path).stdout.split()[-1] == commit


def local_task(queries, corpus, gold, category="t2t", modalities=("text",)):
    """A task from columns of queries and of a corpus, and the grades of `d…` for each `q…`."""
    queries, corpus = (
        Dataset.from_dict({"id": [f"{letter}{row}" for row in range(len(next(iter(columns.values()))))], **columns})
        for letter, columns in (("q", queries), ("d", corpus))
    )

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Local",
            type="Retrieval" if category == "t2t" else "Any2AnyRetrieval",
            description="A task in memory.",
            dataset={"path": "local", "revision": "1"},
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_1",
            modalities=list(modalities),
            category=category,
        )

        def load_data(self, **kwargs):
            split = RetrievalSplitData(queries=queries, corpus=corpus, relevant_docs=gold, top_ranked=None)
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Local


def test_mteb_evaluates_a_local_task_with_its_images(in_mteb):
    wrapper, forward = in_mteb
    texts, images = [f"text {row}" for row in range(6)], [image(60, 60 + 20 * row, row) for row in range(6)]
    similarity = wrapper.model.encode_query(texts) @ wrapper.model.encode_document([{"image": x} for x in images]).T
    gold = {f"q{row}": {f"d{best}": 1} for row, best in enumerate(similarity.argmax(1))}
    task = local_task({"text": texts}, {"image": images}, gold, "t2i", ("text", "image"))
    forward.clear()
    result = mteb.evaluate(wrapper, [task()], cache=None, show_progress_bar=False)
    (scores,) = result.task_results[0].scores["test"]
    assert scores["main_score"] == 1.0
    assert sum(len(batch["image_grid_thw"]) for batch in forward if "image_grid_thw" in batch) == len(images)


class Clips(torch.utils.data.Dataset):
    """Videos in mteb. They stand in for torchcodec's decoder, which needs FFmpeg."""

    features = ("video", "text")

    def __init__(self, frames):
        self.frames = torch.tensor(frames).permute(0, 3, 1, 2)
        self.metadata = SimpleNamespace(num_frames=len(frames))

    def get_frames_at(self, places):
        return SimpleNamespace(data=self.frames[places])

    def __len__(self):
        return 2

    def __getitem__(self, row):
        return {"video": self, "text": f"text {row}"}


def test_mteb_encodes_videos(in_mteb):
    """The model sees eight frames of each video, and gives the same vectors as without mteb."""
    wrapper, forward = in_mteb
    taken = [0, 2, 4, 6, 9, 11, 13, 15]
    forward.clear()
    stored = video(16)["array"]
    found = wrapper.encode(
        torch.utils.data.DataLoader(Clips(stored), batch_size=2),
        task_metadata=mteb.get_task("STS12").metadata,
        hf_split="test",
        hf_subset="default",
    )
    assert [batch["video_grid_thw"][:, 0].tolist() for batch in forward] == [[4, 4]]  # two frames each
    clip = {**video(8), "array": stored[taken]}
    expected = wrapper.model.encode([{"video": clip, "text": f"text {row}"} for row in range(2)])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_mock_run_of_mteb(in_mteb):
    """Every mock task of texts, images and videos passes. Those of videos need FFmpeg's libraries."""
    wrapper, forward = in_mteb
    forward.clear()
    results = mteb.mock_run(wrapper)
    tasks = {task.metadata.name: set(task.metadata.modalities) for task in ALL_MOCK_TASK_TEST_GRID}
    failed = {
        name: getattr(results[name], "exception", "not run")
        for name, modalities in tasks.items()
        if "audio" not in modalities and not hasattr(results[name], "scores")
    }
    assert sum("pixel_values" in batch for batch in forward) >= 15
    without_ffmpeg = {name for name, reason in failed.items() if "Could not load libtorchcodec" in reason}
    if without_ffmpeg:
        assert without_ffmpeg == {name for name, kinds in tasks.items() if "video" in kinds and "audio" not in kinds}
    else:
        grids = [batch["video_grid_thw"] for batch in forward if "video_grid_thw" in batch]
        assert len(grids) >= 7 and {int(steps) for grid in grids for steps in grid[:, 0]} == {4}
    assert set(failed) == without_ffmpeg, failed


def test_texts_of_mteb_are_never_files(repo, tmp_path, monkeypatch):
    """Text-only benchmarks hold names of files, of which one may lie in the current folder."""
    monkeypatch.chdir(tmp_path)
    image(56, 56).save("photo.png")
    model = _Model(repo, device="cpu")
    texts = ["photo.png", "IMG_0012.jpg", "example.com/a.png", "https://example.com/a.png"]
    expected = BTokSentenceTransformer(repo, device="cpu").encode([{"text": text} for text in texts])
    np.testing.assert_allclose(model.encode(texts), expected, atol=1e-6)
