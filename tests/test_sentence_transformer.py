"""Every loader gives the same vectors; options of `encode`, batches, saving, and length limits."""

import shutil
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from support import tiny
from support.inputs import TOLERANCE, as_messages, process
from support.media import image, video
from support.training import config, text_pairs
from transformers import AutoModel

from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, export_model, read_video
from btok_hf.backbones import family_of
from btok_hf.training import CondensationTrainer


def executor_threads():
    """Threads of executors; progress bars have one of their own."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")}


@pytest.fixture(scope="module")
def inputs(mp4, tmp_path_factory):
    """Every kind of input."""
    path = tmp_path_factory.mktemp("images") / "photo.png"
    image(70, 50).save(path)
    return {
        "text": "a red car",
        "typed tokens": "a <|btok_0|> and <|image_pad|> or <image> b",
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


@pytest.fixture
def taken(loaded, inputs):
    """The inputs that the backbone takes."""
    takes_video = loaded["wrapper"].transformer.image_limits.takes_video
    return {name: item for name, item in inputs.items() if takes_video or "video" not in name}


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
def test_every_loader_gives_the_same_vectors_for_every_input(loaded, taken, prompt):
    expected = np.concatenate([loaded["wrapper"].encode([item], prompt=prompt) for item in taken.values()])
    assert np.abs(expected @ expected.T - np.eye(len(expected))).max() < 0.9999  # the inputs do differ
    for name in ("stock", "trusted"):
        actual = np.concatenate([loaded[name].encode([item], prompt=prompt) for item in taken.values()])
        assert np.abs(actual - expected).max() <= TOLERANCE, name
    # A mixed batch gives the same vectors. Messages (the last input) share a batch only with messages.
    *others, messages = taken.values()
    for name in ("wrapper", "stock", "trusted"):
        kept = range(len(others))
        if name != "wrapper" and family_of(loaded[name][0].config).equal_videos:
            with pytest.raises(ValueError, match="stack expects each tensor to be equal size"):
                loaded[name].encode(others, prompt=prompt, batch_size=len(taken))
            kept = [index for index in kept if list(taken)[index] not in ("video and text", "video file")]
        mixed = loaded[name].encode([others[index] for index in kept], prompt=prompt, batch_size=len(taken))
        assert np.abs(mixed - expected[kept]).max() <= TOLERANCE, name
        several = loaded[name].encode([messages, messages], prompt=prompt)
        assert np.abs(several - expected[-1:]).max() <= TOLERANCE, name
    mixed = loaded["wrapper"].encode([*others, messages], prompt=prompt)
    assert np.abs(mixed - expected).max() <= TOLERANCE


def test_auto_model_and_processor_give_the_same_vectors(loaded, inputs):
    model, processor = loaded["auto"]
    for name, item in inputs.items():
        if "video" in name:
            continue  # needs metadata: see the next test
        with torch.no_grad():
            embedding = model(**process(processor, [as_messages(item)])).pooler_output.numpy()
        assert np.abs(embedding - loaded["wrapper"].encode([item])).max() <= TOLERANCE, name


def test_auto_model_and_processor_give_the_same_vectors_for_video(loaded, inputs, taken):
    if "video" not in taken:
        pytest.skip("It takes no video")
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


def test_threads_encode_at_once(repo):
    """The tokenizer has state of its own for truncation and padding, which every call sets."""
    model = BTokSentenceTransformer(repo, device="cpu", max_seq_length=100)
    items = [
        {"image": image(56, 56, number), "text": f"p {number}"}
        if number % 4 == 0
        else {"text": f"row {number} " * number}
        for number in range(1, 33)
    ]
    alone = np.concatenate([model.encode([item]) for item in items])
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda index: model.encode([items[index % 32]])[0], range(160)))
    finally:
        sys.setswitchinterval(interval)
    assert np.abs(np.stack(together) - np.tile(alone, (5, 1))).max() < TOLERANCE


def test_multi_process_pool(repos):
    """After an image, for which transformers observes the vision tower of this family."""
    model = BTokSentenceTransformer(repos["internvl"], device="cpu")
    texts = [*(f"text number {i}" for i in range(5)), image(40, 40)]
    model.encode(texts)
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


def test_a_card_that_exists_can_be_kept(repo, tmp_path):
    """`push_to_hub` of Sentence-Transformers asks for it where a repository has a card."""
    model = BTokSentenceTransformer(repo, device="cpu")
    (tmp_path / "README.md").write_text("measured")
    model.save_pretrained(str(tmp_path), create_model_card=False)
    assert (tmp_path / "README.md").read_text() == "measured"
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_text() != "measured"


def test_a_backbone_that_was_saved_without_its_head_embeds(tmp_path):
    """`AutoModel` and stock Sentence-Transformers save no untied head. Nothing takes a random one."""
    base = tiny.build("qwen2_vl", tmp_path / "base", tied=False)
    repo = add_bottleneck_tokens(base, tmp_path / "start", 4, noise_std=1.0)
    expected = BTokSentenceTransformer(repo, device="cpu").encode(["a b"])
    AutoModel.from_pretrained(repo, trust_remote_code=True).save_pretrained(tmp_path / "auto")
    for file in Path(repo).iterdir():
        if not (tmp_path / "auto" / file.name).exists():
            (shutil.copytree if file.is_dir() else shutil.copyfile)(file, tmp_path / "auto" / file.name)
    model = BTokSentenceTransformer(tmp_path / "auto", device="cpu")
    assert model[0].lm_head is None
    np.testing.assert_allclose(model.encode(["a b"]), expected, atol=TOLERANCE)
    with pytest.raises(ValueError, match="no language-modelling head"):
        model.reconstruct(["a b"])
    with pytest.raises(ValueError, match="has lost its head: use the one that it was loaded from"):
        CondensationTrainer(model=model, args=config(tmp_path), train_dataset=text_pairs(4))
    CondensationTrainer(model=model, args=config(tmp_path, condensation_weight=0.0), train_dataset=text_pairs(4))
    again = BTokSentenceTransformer(export_model(model, tmp_path / "export"), device="cpu")
    assert again[0].lm_head is None
    np.testing.assert_allclose(again.encode(["a b"]), expected, atol=TOLERANCE)


def test_what_stock_drops_when_it_saves_without_trust(repo, tmp_path):
    """The vectors stay and the remote code is lost, as the card says."""
    stock = SentenceTransformer(repo, device="cpu")
    stock.save_pretrained(str(tmp_path))
    np.testing.assert_allclose(
        SentenceTransformer(str(tmp_path), device="cpu").encode("a"), stock.encode("a"), atol=1e-6
    )
    assert not (tmp_path / "modeling_btok.py").exists()
    with pytest.raises(OSError, match="modeling_btok"):
        AutoModel.from_pretrained(tmp_path, trust_remote_code=True)


def watched(model, monkeypatch):
    """Lists of the rows and tokens of each forward."""
    rows, tokens, forward = [], [], model.forward

    def count(features, **kwargs):
        rows.append(len(features["input_ids"]))
        tokens.append(int(features["attention_mask"].sum()))
        return forward(features, **kwargs)

    monkeypatch.setattr(model, "forward", count)
    return rows, tokens


def test_ragged_mixture_is_batched_by_tokens_and_comes_back_in_order(loaded, taken, mp4, monkeypatch):
    """The vectors are those of inputs encoded alone."""
    model = loaded["wrapper"]
    mixture = ["a", "several words " * 60, "a longer text " * 20, image(300, 200)]
    mixture += [{"video": video(6, 64)}, mp4] if "video" in taken else []
    mixture += [f"word {index}" for index in range(12)] + [image(30 + 20 * index, 60) for index in range(4)]
    mixture += [{"image": [image(40, 60), image(120, 56)], "text": "which"}, "middling text " * 5]
    expected = np.concatenate([model.encode([item]) for item in mixture])
    rows, tokens = watched(model, monkeypatch)
    for batch_size in (1, 4, 32):
        del rows[:], tokens[:]
        assert np.abs(model.encode(mixture, batch_size=batch_size) - expected).max() <= TOLERANCE
        assert sum(rows) == len(mixture)
        budget = 64 * batch_size
        # This tokenizer has one token per byte, three times the estimate.
        assert all(count <= 3 * budget for row, count in zip(rows, tokens) if row > 1)
        if batch_size == 1:
            assert rows[0] == 1 and max(rows) > 1  # long ones are alone, and short ones together
    assert len(rows) == 1
    tensor = model.encode(mixture, convert_to_tensor=True, batch_size=4)
    assert torch.is_tensor(tensor) and np.abs(tensor.numpy() - expected).max() <= TOLERANCE
    assert model.encode([]).shape == (0,) and model.encode("a").shape == (64,)


@pytest.fixture
def beside_gpu(repo, monkeypatch):
    """A model whose `encode` works as with a GPU, but on the CPU."""
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

    last, threads = [False], executor_threads()
    monkeypatch.setattr(model, "forward", waits)
    monkeypatch.setattr(model, "preprocess", tells)
    assert np.abs(model.encode(texts, batch_size=1) - expected).max() <= TOLERANCE
    assert executor_threads() == threads


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_failures_leave_no_thread_behind(beside_gpu, monkeypatch, error):
    model = beside_gpu
    threads = executor_threads()
    # Errors in a later batch, which a thread preprocesses, read like those in the first.
    with pytest.raises(FileNotFoundError, match=r"Input 1 'missing.png': .*does not exist"):
        model.encode(["long " * 350, "missing.png"], batch_size=1)
    with pytest.raises(ValueError, match=r"Input 1 \{'picture': 'x'\}: unknown keys"):
        model.encode(["long " * 350, {"picture": "x"}], batch_size=1)

    def fails(features, **kwargs):
        raise error("stop")

    monkeypatch.setattr(model, "forward", fails)
    with pytest.raises(error, match="stop"):
        model.encode(["long " * 350, "middling " * 150, "short"], batch_size=1)
    assert executor_threads() == threads


def test_output_values_that_packed_encoding_has(repo):
    model = BTokSentenceTransformer(repo, device="cpu")
    with pytest.raises(ValueError, match=r"'sentence_embedding', or None .*got 'token_embeddings'"):
        model.encode(["a"], output_value="token_embeddings")
    (features,) = model.encode(["a"], output_value=None)
    assert np.abs(features["sentence_embedding"].numpy() - model.encode(["a"])[0]).max() <= TOLERANCE


def test_trust_remote_code_is_accepted_and_not_needed(repo):
    trusting = BTokSentenceTransformer(repo, device="cpu", trust_remote_code=True)
    assert np.array_equal(trusting.encode(["a"]), BTokSentenceTransformer(repo, device="cpu").encode(["a"]))


@pytest.mark.parametrize(
    "name, content",
    [
        ("chat_template.jinja", "{% if %}"),
        ("config.json", "{"),
        ("tokenizer.json", '{"version": 3}'),
        ("processor_config.json", '{"image_processor": 3}'),
        ("config_sentence_transformers.json", "[]"),
    ],
)
def test_damaged_repositories_are_named(repo, tmp_path, name, content):
    shutil.copytree(repo, tmp_path / "damaged")
    (tmp_path / "damaged" / name).write_text(content)
    with pytest.raises((ValueError, OSError), match=r"damaged"):
        BTokSentenceTransformer(tmp_path / "damaged", device="cpu")
