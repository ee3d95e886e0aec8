"""One repository, every loader, the same vectors; and inputs that are refused."""

import os
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from conftest import image, video
from packaging.version import Version
from PIL import Image
from sentence_transformers import SentenceTransformer
from test_condensation import process
from transformers import AutoModel, AutoProcessor

from btok_hf import BTokSentenceTransformer, export_model, read_video
from btok_hf.inputs import ImageLimits, check_input, estimate_tokens

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def inputs(mp4, tmp_path_factory):
    """Every kind of input."""
    path = tmp_path_factory.mktemp("images") / "photo.png"
    image(70, 50).save(path)
    return {
        "text": "a red car",
        "typed tokens": "a <|btok_0|> and <|image_pad|> b",
        "picture": image(60, 80),
        "path": str(path),
        "image and text": {"image": image(40, 40), "text": "what is it"},
        "text and image": {"text": "order of keys", "image": image(40, 60)},
        "image path and text": {"image": str(path), "text": "from a file"},
        "two images": {"image": [image(40, 60), image(56, 56)], "text": "which"},
        "video": {"video": video()},
        "video and text": {"video": video(6, 64), "text": "what moves"},
        "video file": {"video": read_video(mp4), "text": "a clip"},
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Find it."}]},
            {
                "role": "user",
                "content": [{"type": "text", "text": "in messages"}, {"type": "image", "image": image(50, 50)}],
            },
        ],
    }


@pytest.fixture(scope="module", params=tiny.BACKBONES)
def loaded(repos, request):
    """The wrapper, stock Sentence-Transformers without and with trust, and the AutoModel class, of one repository."""
    repo = repos[request.param]
    return {
        "wrapper": BTokSentenceTransformer(repo, device="cpu"),
        "stock": SentenceTransformer(repo, device="cpu"),
        "trusted": SentenceTransformer(repo, device="cpu", trust_remote_code=True),
        "auto": (AutoModel.from_pretrained(repo, trust_remote_code=True), AutoProcessor.from_pretrained(repo)),
    }


def test_stock_loads_stock_modules(loaded):
    assert [type(module).__name__ for module in loaded["stock"]] == [
        "Transformer",
        "WordWeights",
        "Pooling",
        "Normalize",
    ]
    assert type(loaded["stock"][0].model).__module__.startswith("transformers.")
    assert type(loaded["trusted"][0].model).__name__ == "BTokForEmbedding"


@pytest.mark.parametrize("prompt", [None, "Represent it for retrieval."])
def test_every_loader_gives_the_same_vectors_for_every_input(loaded, inputs, prompt):
    expected = np.concatenate([loaded["wrapper"].encode([item], prompt=prompt) for item in inputs.values()])
    assert np.abs(expected @ expected.T - np.eye(len(expected))).max() < 0.9999  # the inputs do differ
    for name in ("stock", "trusted"):
        actual = np.concatenate([loaded[name].encode([item], prompt=prompt) for item in inputs.values()])
        assert np.abs(actual - expected).max() <= TOLERANCE, name
    # One mixed batch is the same as one by one. Messages (the last input) share a batch with messages only.
    *others, messages = inputs.values()
    for name in ("wrapper", "stock", "trusted"):
        mixed = loaded[name].encode(others, prompt=prompt, batch_size=len(inputs))
        assert np.abs(mixed - expected[:-1]).max() <= TOLERANCE, name
        several = loaded[name].encode([messages, messages], prompt=prompt)
        assert np.abs(several - expected[-1:]).max() <= TOLERANCE, name
    with pytest.raises(ValueError, match="Some inputs are chat messages"):
        loaded["wrapper"].encode(["text", messages])


def as_messages(item, prompt=None):
    """What a user of AutoProcessor would write for an input."""
    if isinstance(item, list):
        return item
    if isinstance(item, str) and not os.path.isfile(item):
        item = {"text": item}
    elif not isinstance(item, dict):
        item = {"image": Image.open(item) if isinstance(item, str) else item}
    content = []
    for key in ("image", "video", "text"):
        values = item.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            content.append({"type": key, key: value})
    system = [{"role": "system", "content": prompt}] if prompt else []
    return [*system, {"role": "user", "content": content}]


def test_auto_model_and_processor_give_the_same_vectors(loaded, inputs):
    model, processor = loaded["auto"]
    for name, item in inputs.items():
        if "video" in name:
            continue  # metadata go to the processor beside the messages: below
        with torch.no_grad():
            embedding = model(**process(processor, [as_messages(item)])).pooler_output.numpy()
        assert np.abs(embedding - loaded["wrapper"].encode([item])).max() <= TOLERANCE, name


def test_auto_model_and_processor_give_the_same_vectors_for_video(loaded, inputs):
    model, processor = loaded["auto"]
    clip = inputs["video and text"]["video"]
    features = processor.apply_chat_template(
        [
            [
                {
                    "role": "user",
                    "content": [{"type": "video", "video": clip["array"]}, {"type": "text", "text": "what moves"}],
                }
            ]
        ],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"video_metadata": [clip["video_metadata"]]},
    )
    with torch.no_grad():
        embedding = model(**features).pooler_output.numpy()
    assert np.abs(embedding - loaded["wrapper"].encode([inputs["video and text"]])).max() <= TOLERANCE


def test_an_mp4_path_is_read_through_pyav(loaded, mp4):
    model = loaded["wrapper"]
    expected = model.encode([{"video": read_video(mp4)}])
    assert np.abs(model.encode([{"video": mp4}]) - expected).max() <= TOLERANCE
    assert np.abs(model.encode([mp4]) - expected).max() <= TOLERANCE
    clip = read_video(mp4, num_frames=5)
    assert clip["array"].shape == (5, 64, 64, 3)
    assert clip["video_metadata"]["duration"] == pytest.approx(2.0)
    left_edges = [np.argmax(frame[24].max(axis=1) > 128) for frame in clip["array"]]
    assert left_edges == sorted(left_edges) and left_edges[-1] > left_edges[0] + 20  # first to last frame


def test_encode_options(repo):
    wrapper, stock = BTokSentenceTransformer(repo, device="cpu"), SentenceTransformer(repo, device="cpu")
    texts = ["one", "two words", "three more words"]
    for model in (wrapper, stock):
        assert model.prompts["query"] == "Find it."
        np.testing.assert_allclose(model.encode_query(texts), model.encode(texts, prompt="Find it."), atol=TOLERANCE)
        np.testing.assert_allclose(model.encode_document(texts), model.encode(texts), atol=TOLERANCE)
        assert not np.allclose(model.encode_query(texts), model.encode_document(texts), atol=1e-3)
        full = model.encode(texts)
        short = model.encode(texts, truncate_dim=16, normalize_embeddings=True)
        np.testing.assert_allclose(
            short, full[:, :16] / np.linalg.norm(full[:, :16], axis=1, keepdims=True), atol=1e-6
        )
        assert model.similarity_fn_name == "cosine" and model.get_embedding_dimension() == 64
        assert model.encode(texts, show_progress_bar=True).shape == (3, 64)
    for precision in ("int8", "binary"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours, theirs = (model.encode(texts, precision=precision).astype(int) for model in (wrapper, stock))
        assert np.abs(ours - theirs).max() <= (1 if precision == "int8" else 0)  # a bucket's edge may fall between


def test_multi_process_pool(repo):
    model = BTokSentenceTransformer(repo, device="cpu")
    texts = [f"text number {i}" for i in range(6)]
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        embeddings = model.encode(texts, pool=pool, chunk_size=2)
    finally:
        model.stop_multi_process_pool(pool)
    np.testing.assert_allclose(embeddings, model.encode(texts), atol=TOLERANCE)


def test_saving_again_keeps_a_loadable_repository(repo, tmp_path, inputs):
    items = [inputs["text"], inputs["picture"]]
    expected = SentenceTransformer(repo, device="cpu").encode(items)
    wrapper = BTokSentenceTransformer(repo, device="cpu")
    wrapper.encode(items)  # switches the attention implementations, which must not reach the repository
    wrapper.save_pretrained(str(tmp_path / "wrapper"))
    SentenceTransformer(repo, device="cpu", trust_remote_code=True).save_pretrained(str(tmp_path / "trusted"))
    for name in ("wrapper", "trusted"):
        again = tmp_path / name
        assert (again / "modeling_btok.py").is_file()
        for trust in (False, True):
            model = SentenceTransformer(str(again), device="cpu", trust_remote_code=trust)
            np.testing.assert_allclose(model.encode(items), expected, atol=TOLERANCE)
            assert model.prompts["query"] == "Find it." and model.tokenizer.truncation_side == "left"
        np.testing.assert_allclose(
            BTokSentenceTransformer(again, device="cpu").encode(items), expected, atol=TOLERANCE
        )
        assert type(AutoModel.from_pretrained(again, trust_remote_code=True)).__name__ == "BTokForEmbedding"


def test_what_stock_drops_when_it_saves_without_trust(repo, tmp_path):
    """Documented in the card: the vectors stay, the remote code goes."""
    stock = SentenceTransformer(repo, device="cpu")
    stock.save_pretrained(str(tmp_path))
    np.testing.assert_allclose(
        SentenceTransformer(str(tmp_path), device="cpu").encode("a"), stock.encode("a"), atol=1e-6
    )
    assert not (tmp_path / "modeling_btok.py").exists()
    with pytest.raises(OSError, match="modeling_btok"):
        AutoModel.from_pretrained(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize("untied", [False, True])
def test_export_keeps_the_head_and_every_tensor(tmp_path, untied):
    from transformers import AutoModelForImageTextToText

    from btok_hf import add_bottleneck_tokens

    base = tiny.build("qwen2_vl", tmp_path / "base", tied=not untied)
    repo = add_bottleneck_tokens(base, tmp_path / "repo")
    export_model(BTokSentenceTransformer(repo, device="cpu"), tmp_path / "export")
    before, after = (AutoModelForImageTextToText.from_pretrained(path) for path in (repo, tmp_path / "export"))
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name


def test_large_jpegs_are_decoded_at_a_reduced_size(loaded, tmp_path):
    """With at least four times the pixels that the model takes, and next to the same vector."""
    model = loaded["wrapper"]
    limit = model[0].processor.image_processor.size["longest_edge"]
    page = image(20, 15).resize((1600, 1200), Image.Resampling.BICUBIC)
    page.save(tmp_path / "large.jpg", quality=95)
    page.save(tmp_path / "large.png")
    page.resize((170, 128)).save(tmp_path / "small.jpg")
    image_processor = model.processor.image_processor
    limits = ImageLimits(image_processor.size["longest_edge"], image_processor.patch_size)
    sizes = {name: check_input(str(tmp_path / name), limits).size for name in ("large.jpg", "large.png", "small.jpg")}
    assert sizes == {"large.jpg": (400, 300), "large.png": (1600, 1200), "small.jpg": (170, 128)}
    assert 400 * 300 >= 4 * limit > 200 * 150
    assert check_input({"image": tmp_path / "large.jpg"}, limits)["image"].size == (400, 300)
    reduced, whole = model.encode([str(tmp_path / "large.jpg"), Image.open(tmp_path / "large.jpg")])
    assert reduced @ whole > 0.999


def test_photographs_are_upright(loaded, tmp_path):
    """As transformers and datasets turn them, by their EXIF tag."""
    picture = image(112, 56)
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for name in ("photo.jpg", "photo.png"):
        picture.save(tmp_path / name, exif=exif)
        upright = loaded["wrapper"].encode([{"image": str(tmp_path / name)}])
        if Version(transformers.__version__) >= Version("5.23"):  # stock 5.17 leaves them lying
            stock = loaded["stock"].encode([{"image": str(tmp_path / name)}])
            assert np.abs(stock - upright).max() <= TOLERANCE
    turned = picture.transpose(Image.Transpose.ROTATE_270)
    assert np.abs(loaded["wrapper"].encode([turned]) - upright).max() <= TOLERANCE


# ---------------------------------------------------------------- batches


def watched(model, monkeypatch):
    """Lists that grow with each forward: its number of rows, and its number of tokens."""
    rows, tokens, forward = [], [], model.forward

    def count(features, **kwargs):
        rows.append(len(features["input_ids"]))
        tokens.append(int(features["attention_mask"].sum()))
        return forward(features, **kwargs)

    monkeypatch.setattr(model, "forward", count)
    return rows, tokens


def test_ragged_mixture_is_batched_by_tokens_and_comes_back_in_order(loaded, mp4, monkeypatch):
    """Whatever the batches, the vectors are those of inputs encoded alone."""
    model = loaded["wrapper"]
    mixture = ["a", "several words " * 60, "a longer text " * 20, image(300, 200), {"video": video(6, 64)}]
    mixture += [f"word {index}" for index in range(12)] + [image(30 + 20 * index, 60) for index in range(4)]
    mixture += [{"image": [image(40, 60), image(120, 56)], "text": "which"}, mp4, "middling text " * 5]
    expected = np.concatenate([model.encode([item]) for item in mixture])
    rows, tokens = watched(model, monkeypatch)
    for batch_size in (1, 4, 32):
        del rows[:], tokens[:]
        assert np.abs(model.encode(mixture, batch_size=batch_size) - expected).max() <= TOLERANCE
        assert sum(rows) == len(mixture)
        budget = 64 * batch_size
        # The tokenizer makes a token of each byte, three times what is estimated.
        assert all(count <= 3 * budget for row, count in zip(rows, tokens) if row > 1)
        if batch_size == 1:
            assert rows[0] == 1 and max(rows) > 1  # long ones are alone, and short ones together
    assert len(rows) == 1
    tensor = model.encode(mixture, convert_to_tensor=True, batch_size=4)
    assert torch.is_tensor(tensor) and np.abs(tensor.numpy() - expected).max() <= TOLERANCE
    assert model.encode([]).shape == (0,) and model.encode("a").shape == (64,)


def test_estimated_tokens_of_media_are_those_of_the_processor(repo, tmp_path):
    processor = BTokSentenceTransformer(repo, device="cpu").processor
    image(300, 100).save(tmp_path / "wide.png")
    clip = video(6, 64)
    for item, size in (
        (image(10, 10), 1),
        (image(56, 84), 6),
        (str(tmp_path / "wide.png"), 16),
        ({"image": [image(56, 84), np.zeros((84, 56, 3))], "text": "nine letters"}, 16),
        ([{"role": "user", "content": [{"type": "image", "image": image(56, 84)}]}], 6),
        ({"video": clip}, 3 * (64 * 64 // 28**2)),
    ):
        assert estimate_tokens(item, processor) == size
    assert estimate_tokens("missing.png", processor) == estimate_tokens(image(1000, 1000), processor) == 16
    for wrong in (None, 3, "", {}):
        assert estimate_tokens(wrong, processor) == 0


@pytest.fixture
def beside_gpu(repo, monkeypatch):
    """A model whose `encode` goes the way it goes beside a GPU, although everything lies on the CPU."""
    model = BTokSentenceTransformer(repo, device="cpu")
    monkeypatch.setattr(model, "_resolve_inference_device", lambda device: torch.device("cuda"))
    return model


def test_next_batch_is_preprocessed_while_one_is_computed(beside_gpu, monkeypatch):
    model = beside_gpu
    texts = ["long " * 350, "shorter " * 200, "short " * 20]  # a batch each
    expected = np.concatenate([model.encode([text]) for text in texts])
    started, forward, preprocess = threading.Event(), model.forward, model.preprocess

    def waits(features, **kwargs):
        assert last[0] or started.wait(60), "nothing was preprocessed meanwhile"
        started.clear()
        return forward(features, **kwargs)

    def tells(inputs, **kwargs):
        last[0] = texts[-1] in inputs
        if inputs != texts[:1]:
            started.set()
        return preprocess(inputs, **kwargs)

    last, threads = [False], threading.active_count()
    monkeypatch.setattr(model, "forward", waits)
    monkeypatch.setattr(model, "preprocess", tells)
    assert np.abs(model.encode(texts, batch_size=1) - expected).max() <= TOLERANCE
    assert threading.active_count() == threads


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_failures_leave_no_thread_behind(beside_gpu, monkeypatch, error):
    model = beside_gpu
    threads = threading.active_count()
    # In a later batch, which the thread preprocesses: the words are those of the first.
    with pytest.raises(FileNotFoundError, match=r"Input 'missing.png': .*does not exist"):
        model.encode(["long " * 350, "missing.png"], batch_size=1)
    with pytest.raises(ValueError, match=r"Input \{'picture': 'x'\}: unknown keys"):
        model.encode(["long " * 350, {"picture": "x"}], batch_size=1)

    def fails(features, **kwargs):
        raise error("stop")

    monkeypatch.setattr(model, "forward", fails)
    with pytest.raises(error, match="stop"):
        model.encode(["long " * 350, "middling " * 150, "short"], batch_size=1)
    assert threading.active_count() == threads


# ---------------------------------------------------------------- too long


def test_long_text_is_cut_and_keeps_its_bottleneck_tokens(repo):
    wrapper, stock = (cls(repo, device="cpu") for cls in (BTokSentenceTransformer, SentenceTransformer))
    long = "beginning " * 50 + "the end of it"
    for model in (wrapper, stock):
        model.max_seq_length = 20
        ids = model.preprocess([long, "short"])["input_ids"]
        assert ids.shape[1] == 20 and ids[0, -4:].tolist() == [264, 265, 266, 267]
    embedding = wrapper.encode([long])
    np.testing.assert_allclose(stock.encode([long]), embedding, atol=TOLERANCE)
    np.testing.assert_allclose(wrapper.encode([long[-16:]]), embedding, atol=TOLERANCE)
    assert BTokSentenceTransformer(repo, device="cpu", max_seq_length=20).max_seq_length == 20


def test_max_pixels_is_the_memory_knob(repo):
    item = {"image": image(400, 400), "text": "large"}
    for loader in (BTokSentenceTransformer, SentenceTransformer):
        lengths = [
            loader(repo, device="cpu", processor_kwargs=kwargs).preprocess([item])["input_ids"].shape[1]
            for kwargs in ({}, {"max_pixels": 28 * 28 * 4})
        ]
        assert lengths[1] == lengths[0] - 16 + 4


def test_media_are_never_cut(repo):
    wrapper, stock = (cls(repo, device="cpu") for cls in (BTokSentenceTransformer, SentenceTransformer))
    item = {"image": image(100, 100), "text": "a rather long question about this picture"}
    wrapper.max_seq_length = stock.max_seq_length = 20
    with pytest.raises(ValueError, match=r"max_seq_length=20.*max_pixels"):
        wrapper.encode([item])
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):  # stock words, but never a wrong vector
        stock.encode([item])
    wrapper.max_seq_length = 3
    with pytest.raises(ValueError, match="4 Bottleneck Tokens: max_seq_length=3"):
        wrapper.encode(["text"])


# ---------------------------------------------------------------- bad input


def test_bad_inputs_are_refused_and_shown(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG not really")
    nan = np.full((3, 60, 60), np.nan, np.float32)
    cases = [
        ({"image": str(tmp_path / "missing.png")}, FileNotFoundError, "missing.png' does not exist"),
        (str(tmp_path / "missing.png"), FileNotFoundError, "missing.png' does not exist"),
        ({"video": str(tmp_path / "missing.mp4")}, FileNotFoundError, "missing.mp4' does not exist"),
        ({"image": str(broken)}, ValueError, "cannot be decoded"),
        (str(broken), ValueError, "cannot be decoded"),
        (image(10, 60), ValueError, "10 x 60 pixels is smaller than one patch of 14"),
        ({"image": [image(60, 60), image(60, 5)], "text": "x"}, ValueError, "smaller than one patch"),
        ({"image": nan}, ValueError, "NaN"),
        ({"picture": image(60, 60)}, ValueError, r"unknown keys \['picture'\]"),
        ({"image": None, "text": "x"}, ValueError, "'image' is None"),
        ({"text": 3}, ValueError, "'text' must be a string"),
        ({}, ValueError, "unknown keys"),
    ]
    for item, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            model.encode(["fine", item])
        assert "Input " in str(caught.value)
    for empty in ("", "  ", {"text": ""}):
        for loader in (model, SentenceTransformer(repo, device="cpu")):
            with pytest.raises(Exception, match="An input is empty"):
                loader.encode(["fine", empty])
    broken_clip = tmp_path / "broken.mp4"
    broken_clip.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be decoded"):
        model.encode([{"video": str(broken_clip)}])


def test_a_sentence_that_ends_like_a_file_is_a_sentence(repo):
    model = BTokSentenceTransformer(repo, device="cpu")
    assert model.encode(["how do I open photo.png"]).shape == (1, 64)
    stock = SentenceTransformer(repo, device="cpu")
    np.testing.assert_allclose(model.encode("open a.png please"), stock.encode("open a.png please"), atol=TOLERANCE)


def test_changed_template_is_refused(repo, tmp_path):
    import shutil

    shutil.copytree(repo, tmp_path / "repo")
    template = Path(repo, "chat_template.jinja").read_text().replace("<|btok_3|>", "")
    Path(tmp_path, "repo", "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="K disagrees"):
        BTokSentenceTransformer(tmp_path / "repo", device="cpu")
