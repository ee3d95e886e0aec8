"""The model in mteb: metadata, a local task, videos, and mteb's mock tasks."""

from types import SimpleNamespace

import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.mocks import ALL_MOCK_TASK_TEST_GRID
from support.media import image, video

from btok_hf import BTokSentenceTransformer
from btok_hf.evaluation.mteb import _Model, mteb_meta


@pytest.fixture(scope="module")
def in_mteb(repos):
    """The model as mteb loads it, and a list of the batches that it gets."""
    wrapper = mteb_meta(repos["qwen3_vl"]).load_model(device="cpu")
    module, forward = wrapper.model[0], []
    module.register_forward_pre_hook(lambda _, inputs: forward.append(inputs[0]))
    return wrapper, forward


def test_metadata_for_mteb(repos, bases, monkeypatch):
    meta = mteb_meta(repos["qwen3_vl"])
    assert meta.modalities == ["text", "image", "video"] and meta.name == repos["qwen3_vl"]
    assert meta.embed_dim == 64 and meta.use_instructions and meta.similarity_fn_name == "cosine"
    with pytest.raises(ValueError, match="has no Bottleneck Tokens"):
        mteb_meta(bases["qwen3_vl"])
    asked = {}
    monkeypatch.setattr("btok_hf.evaluation.mteb._Model", lambda name, **options: asked.update(options, name=name))
    monkeypatch.setattr(
        "btok_hf.evaluation.mteb.SentenceTransformerEncoderWrapper", lambda *_, **__: SimpleNamespace()
    )
    meta = mteb_meta(repos["qwen3_vl"], revision="v1")
    assert meta.revision == "v1" and meta.load_model(device="cpu").mteb_model_meta.revision == "v1"
    assert asked == {"name": repos["qwen3_vl"], "revision": "v1", "device": "cpu"}


def test_mteb_evaluates_a_local_task_with_its_images(in_mteb):
    wrapper, forward = in_mteb
    texts, images = [f"text {row}" for row in range(6)], [image(60, 60 + 20 * row, row) for row in range(6)]
    similarity = wrapper.model.encode_query(texts) @ wrapper.model.encode_document([{"image": x} for x in images]).T
    best = similarity.argmax(1)

    class Pages(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Pages",
            type="Any2AnyRetrieval",
            description="Pages that the model finds best itself.",
            dataset={"path": "local", "revision": "1"},
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_1",
            modalities=["text", "image"],
            category="t2i",
        )

        def load_data(self, **kwargs):
            queries = Dataset.from_dict({"id": [f"q{row}" for row in range(6)], "text": texts})
            corpus = Dataset.from_dict({"id": [f"d{row}" for row in range(6)], "image": images})
            gold = {f"q{row}": {f"d{best[row]}": 1} for row in range(6)}
            split = RetrievalSplitData(queries=queries, corpus=corpus, relevant_docs=gold, top_ranked=None)
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    forward.clear()
    result = mteb.evaluate(wrapper, [Pages()], cache=None, show_progress_bar=False)
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
