"""Stored embeddings: keys of inputs and models, batches, damaged files."""

import inspect
import json
import os
import re
import shutil
from importlib.metadata import version

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router
from support.evaluation import LETTERS, by_hand, counted, refuse
from support.media import image, video
from support.mmeb_tree import frames, looks, picture, write_dataset
from tokenizers.normalizers import Lowercase

from btok_hf import BTokSentenceTransformer
from btok_hf.evaluation.embeddings import EmbeddingStore, Encoder, fingerprint, task_inputs
from btok_hf.evaluation.loading import load_task
from btok_hf.evaluation.mmeb import evaluate


def test_every_input_is_encoded_once(mmeb_root, tmp_path):
    tasks = [load_task(name, mmeb_root) for name in ("ViDoRe_arxivqa", "OK-VQA")]
    inputs = [item for task in tasks for item in [q.input for q in task.queries] + list(task.candidates.values())]
    distinct = {json.dumps(item, sort_keys=True) for item in inputs}
    counting, batches = counted(looks)
    evaluate(counting, mmeb_root, tmp_path / "a", datasets=[task.name for task in tasks], name="looks")
    assert sum(map(len, batches)) == len(distinct)
    # Many models cannot embed several kinds of input in one batch.
    assert all(len({frozenset(item) for item in batch}) == 1 for batch in batches)
    # Another evaluation of the same model uses the stored embeddings.
    evaluate(
        refuse, mmeb_root, tmp_path / "b", datasets=["OK-VQA"], name="looks", cache_dir=tmp_path / "a" / "embeddings"
    )


def test_batches_stay_within_their_tokens(mmeb_root, tmp_path, repo):
    sizes = []

    class Watched(BTokSentenceTransformer):
        def encode(self, inputs, **kwargs):
            sizes.append((len(inputs), self.preprocess(inputs)["attention_mask"].numel()))
            return super().encode(inputs, **kwargs)

    largest = []
    for budget in (200, 2000):
        sizes.clear()
        watched = Watched(repo, device="cpu")
        evaluate(watched, mmeb_root, tmp_path / str(budget), datasets=["ViDoRe_arxivqa"], batch_tokens=budget)
        assert all(rows == 1 or tokens <= budget for rows, tokens in sizes)
        largest.append(max(rows for rows, _ in sizes))
    assert largest[0] < largest[1]


def test_tokens_of_an_input(model):
    estimate, prompted = (Encoder(model, prompt, 1, None, None)._tokens for prompt in (None, "Find it."))
    assert prompted({"text": "a"}) == estimate({"text": "a"}) + len("Find it.")  # bytes are tokens here
    pictures = [{"image": image(side, side)} for side in (56, 90, 400)]
    for item in [{}, *pictures, *({"video": video(count)} for count in (2, 8))]:
        for text in ("a", "a longer text"):
            exact = model.preprocess([{**item, "text": text}])["attention_mask"].sum()
            assert exact <= estimate({**item, "text": text}) <= exact + 12


def test_all_frames_reach_the_model(tmp_path):
    for name in ("MSVD", "MomentSeeker"):
        write_dataset(tmp_path, name)
    for first in tmp_path.glob("video-tasks/frames/**/*_0000.jpg"):
        frames(first.parent, 12)
    counting, batches = counted(looks)
    evaluate(counting, tmp_path, tmp_path / "out", modalities=["video"], datasets=["MSVD", "MomentSeeker"], name="a")
    # MSVD's clip is first; a query of MomentSeeker is a video too.
    counts = [len(item["video"]["array"]) for batch in batches for item in batch if "video" in item]
    assert counts == [8] * 3 + [12] * 10


def test_fingerprints_tell_models_apart(repo, repos, model, monkeypatch, tmp_path):
    known = {fingerprint(model)}
    evaluate_again = BTokSentenceTransformer(repo, device="cpu")
    evaluate_again.encode(["a text", "a longer text"])
    assert fingerprint(evaluate_again) in known
    copy = shutil.copytree(repo, tmp_path / "copy")
    assert fingerprint(BTokSentenceTransformer(str(copy), device="cpu")) in known

    def add(changed, prompt=None):
        found = fingerprint(changed, prompt)
        assert found not in known
        known.add(found)

    class Lower(BTokSentenceTransformer):
        def encode(self, inputs, **kwargs):
            return super().encode([text.lower() for text in inputs], **kwargs)

    class LowerStill(Lower):
        pass

    add(Lower(repo, device="cpu"))
    add(LowerStill(repo, device="cpu"))
    monkeypatch.setattr(inspect, "getsource", lambda kind: kind.__name__ + " was edited" * (kind is Lower))
    add(LowerStill(repo, device="cpu"))
    add(model, "Find it.")
    stock = SentenceTransformer(repo, device="cpu")
    add(stock)
    stock[2].pooling_mode = "cls"
    add(stock)
    add(BTokSentenceTransformer(repos["qwen2_5_vl"], device="cpu"))
    add(BTokSentenceTransformer(repo, device="cpu", processor_kwargs={"max_pixels": 28 * 28 * 8}))
    add(BTokSentenceTransformer(repo, device="cpu", max_seq_length=512))
    add(BTokSentenceTransformer(repo, device="cpu", truncate_dim=32))
    add(BTokSentenceTransformer(repo, device="cpu", model_kwargs={"dtype": torch.bfloat16}))
    changed = BTokSentenceTransformer(repo, device="cpu")
    changed[0].processor.chat_template += " "
    add(changed)
    changed = BTokSentenceTransformer(repo, device="cpu")
    weights = sorted(changed.state_dict().items())
    for _, tensor in weights[::-8]:
        tensor.view(-1)[-1] *= -1  # one bit, of the last byte
        add(changed)
    parameter = next(changed.parameters())
    parameter.data = parameter.data.flatten()  # the same bytes
    add(changed)
    for kind in ("image_processor", "video_processor"):
        getattr(changed[0].processor, kind).size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 9}
        add(changed)
    changed[0].tokenizer.backend_tokenizer.normalizer = Lowercase()
    add(changed)
    changed[0].tokenizer.truncation_side = "right"
    add(changed)
    changed.config.text_config.rms_norm_eps *= 2
    add(changed)
    adapted = BTokSentenceTransformer(repo, device="cpu")
    adapted.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]))
    add(adapted)
    layers = [layer for layer in adapted.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        layer.scale_layer(8)
    add(adapted)
    adapted.transformer.model.disable_adapters()
    add(adapted)
    adapted.transformer.model.enable_adapters()
    for layer in layers:
        layer.merge()  # of random weights and zeros: the weights stay the same
    add(adapted)
    for package in ("btok-hf", "pillow", "torch"):  # images are decoded by the first two
        with monkeypatch.context() as patch:
            for module in ("btok_hf.evaluation.embeddings", "btok_hf.golden"):
                patch.setattr(f"{module}.version", _other(package))
            add(model)
    assert fingerprint(model) in known


def test_fingerprints_of_a_router(repo):
    """All of its routes count: their pixels, and the tuples that are keys of its mappings."""

    def routed(route="one", **options):
        modules = list(BTokSentenceTransformer(repo, device="cpu", **options))
        mappings = {(None, "text"): route, (None, ("image", "text")): "one"}
        router = Router({"one": modules, "two": list(model)}, route_mappings=mappings, default_route="one")
        return SentenceTransformer(modules=[router], device="cpu")

    model = BTokSentenceTransformer(repo, device="cpu")
    found = fingerprint(routed())
    assert fingerprint(routed()) == found
    assert fingerprint(routed(processor_kwargs={"max_pixels": 28 * 28 * 8})) != found
    assert fingerprint(routed("two")) != found


def _other(package):
    """`version` with another release of a package."""
    return lambda name: "0" if name == package else version(name)


def test_no_model_gets_the_embeddings_of_another(mmeb_root, tmp_path, model, repo):
    cache, scores = tmp_path / "cache", {}
    changed = BTokSentenceTransformer(repo, device="cpu")
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for name, one in (("first", model), ("second", changed)):
        result = evaluate(one, mmeb_root, tmp_path / name, datasets=["ViDoRe_arxivqa"], cache_dir=cache)
        scores[name] = result[0]["ViDoRe_arxivqa"]
        assert scores[name] == pytest.approx(by_hand(one.encode, load_task("ViDoRe_arxivqa", mmeb_root))[0])
    assert scores["first"] != scores["second"] and len(list(cache.iterdir())) == 2
    with pytest.raises(ValueError, match="holds results of another run: fingerprint"):
        evaluate(changed, mmeb_root, tmp_path / "first", datasets=["ViDoRe_arxivqa"], cache_dir=cache)
    with pytest.raises(ValueError, match=r"another run: .*prompt None"):
        evaluate(model, mmeb_root, tmp_path / "first", datasets=["ViDoRe_arxivqa"], prompt="Find it.")


def test_a_function_is_known_by_its_name(mmeb_root, tmp_path):
    arguments = {"datasets": ["OK-VQA"], "cache_dir": tmp_path / "cache"}
    for name in ("one", "two"):
        counting, batches = counted(looks)
        evaluate(counting, mmeb_root, tmp_path / name, name=name, **arguments)
        assert sum(map(len, batches)) == 6
    evaluate(refuse, mmeb_root, tmp_path / "three", name="two", **arguments)


def test_what_an_input_is_known_by(tmp_path):
    write_dataset(tmp_path, "MSVD")
    task, frame = load_task("MSVD", tmp_path), next(tmp_path.glob("video-tasks/frames/*/MSVD/v_1/*1.jpg"))

    def keys(task):
        return {label: key for key, label, _ in task_inputs(task)}

    def differing(changed):
        found = keys(changed)
        return [label for label in first if found[label] != first[label]]

    first, times = keys(task), (frame.stat().st_atime_ns, frame.stat().st_mtime_ns)
    assert len(first) == 6 == len(set(first.values())) and differing(load_task("MSVD", tmp_path)) == []
    videos = [f"candidate 'v_{number}'" for number in range(3)]
    assert differing(task._replace(num_frames=4)) == videos
    told = [task.queries[0]._replace(input={"text": "another"}), *task.queries[1:]]
    assert differing(task._replace(queries=told)) == ["query 0 ('0')"]
    content = frame.read_bytes()
    frame.write_bytes(content + b" ")  # another size
    os.utime(frame, ns=times)
    assert differing(task) == videos[1:2]
    frame.write_bytes(content)
    os.utime(frame, ns=(times[0], times[1] + 1))  # another time
    assert differing(task) == videos[1:2]
    os.utime(frame, ns=times)
    assert differing(task) == []
    copy = shutil.copytree(frame.parent, tmp_path / "copy")  # another place
    elsewhere = task.candidates | {"v_1": {**task.candidates["v_1"], "video": str(copy)}}
    assert differing(task._replace(candidates=elsewhere)) == videos[1:2]


def test_a_replaced_image_is_encoded_anew(tmp_path):
    write_dataset(tmp_path, "ViDoRe_arxivqa")
    arguments = {"datasets": ["ViDoRe_arxivqa"], "name": "looks", "cache_dir": tmp_path / "cache"}
    evaluate(looks, tmp_path, tmp_path / "a", **arguments)
    picture(tmp_path / "visdoc-tasks/images/ViDoRe_arxivqa/1.png", (61, 80))
    counting, batches = counted(looks)
    evaluate(counting, tmp_path, tmp_path / "b", **arguments)
    assert [item["image"].size for batch in batches for item in batch] == [(61, 80)]


def test_a_replaced_frame_is_encoded_anew(tmp_path):
    write_dataset(tmp_path, "MSVD")
    arguments = {"datasets": ["MSVD"], "name": "looks", "cache_dir": tmp_path / "cache"}
    evaluate(looks, tmp_path, tmp_path / "a", **arguments)
    (frame,) = tmp_path.glob("video-tasks/frames/video_ret/MSVD/v_1/frame_0001.jpg")
    folder = os.stat(frame.parent).st_mtime_ns
    image(40, 40, seed=9).save(frame)
    assert os.stat(frame.parent).st_mtime_ns == folder  # the folder's time does not show the change
    counting, batches = counted(looks)
    evaluate(counting, tmp_path, tmp_path / "b", **arguments)
    assert [item.keys() for batch in batches for item in batch] == [{"video", "text"}]


def test_damaged_embeddings_are_named(tmp_path):
    store = EmbeddingStore(tmp_path / "key")
    keys = [letter.encode() * 16 for letter in LETTERS]
    vectors = np.random.default_rng(0).normal(size=(len(keys), 5)).astype(np.float32)
    store.add(keys[:4], vectors[:4])
    store.add(keys[4:], vectors[4:])
    store.refresh()
    mixed = [7, 0, 15, 3, 0]
    assert (store.vectors([keys[place] for place in mixed]) == vectors[mixed]).all()
    assert keys[0] in store and b"?" * 16 not in store and EmbeddingStore(tmp_path / "key").dimension == 5
    for path in (tmp_path / "key").iterdir():
        os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"file of embeddings .*\.embeddings is damaged .* Delete it"):
        store.vectors(keys)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda v: v * np.nan, r"OK-VQA, .*The embedding of .*holds NaN or infinite values"),
        (lambda v: v * 0, r"OK-VQA, .*holds nothing but zeros"),
        (lambda v: v[:-1], r"OK-VQA, .*returned an array of shape"),
        (lambda v: v[0], r"OK-VQA, .*returned an array of shape \(300,\)"),
        (lambda v: np.pad(v, ((0, 0), (0, len(v)))), r"OK-VQA, .*of one dimension"),
        (lambda v: 1 / 0, r"OK-VQA: ZeroDivisionError: division by zero"),
    ],
)
def test_embeddings_that_cannot_be_scored(mmeb_root, tmp_path, damage, message, capsys):
    arguments = {"datasets": ["OK-VQA"], "name": "looks", "batch_tokens": 40}
    scores, errors = evaluate(lambda inputs: damage(looks(inputs)), mmeb_root, tmp_path, **arguments)
    assert scores == {} and re.match(message, errors["OK-VQA"])
    # No embedding of the failed run was stored.
    assert evaluate(looks, mmeb_root, tmp_path, **arguments)[1] == {}
