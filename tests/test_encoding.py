"""The loop of `encode`: skipping unreadable inputs, mixed batches, and vectors that are not finite."""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image as PILImage
from support.inputs import TOLERANCE
from support.media import image, video
from support.pictures import MEDIA

from btok_hf import BTokSentenceTransformer
from btok_hf.encoding import embed_batches, token_batches


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Inputs of which every second cannot be read, and the reasons."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "cut.png").write_bytes((MEDIA / "rgba_magenta.png").read_bytes()[:300])
    message = [{"role": "user", "content": [{"type": "image", "image": image(60, 60)}]}]
    bad = {
        1: (folder / "cut.png", "cut.png' cannot be decoded"),
        3: (None, "type NoneType"),
        5: (str(folder / "missing.mp4"), "does not exist"),
        7: ({"text": "half \ud800"}, "lone surrogate"),
        9: (image(4, 4), "smaller than one patch"),
    }
    good = [
        "a text",
        image(60, 80),
        {"video": video(4)},
        message,
        {"text": ["two", "texts"]},
        "a much longer text" * 9,
    ]
    inputs = [good[place // 2] if place % 2 == 0 else bad[place][0] for place in range(11)]
    return inputs, {place: reason for place, (_, reason) in bad.items()}


@pytest.mark.parametrize("batch_size", [1, 32])
def test_unreadable_inputs_are_skipped_and_named(model, mixed, batch_size, caplog):
    inputs, reasons = mixed
    with caplog.at_level(logging.WARNING):
        embeddings, kept, errors = model.encode(inputs, batch_size=batch_size, on_error="skip")
    assert kept.tolist() == [0, 2, 4, 6, 8, 10] and list(errors) == [1, 3, 5, 7, 9]
    for place, reason in reasons.items():
        assert errors[place].startswith(f"Input {place} ") and reason in errors[place]
    expected = model.encode([inputs[place] for place in kept])
    assert np.abs(embeddings - expected).max() <= TOLERANCE
    assert "5 of 11 inputs were skipped. The first: Input 1 " in caplog.text
    with pytest.raises((ValueError, OSError), match=r"^Input \d "):
        model.encode(inputs)


def test_results_have_the_form_that_is_asked_for(model):
    rows = ["a", None, "b"]
    tensor = model.encode(rows, on_error="skip", convert_to_tensor=True).embeddings
    assert isinstance(tensor, torch.Tensor) and tensor.shape == (2, 64)
    as_list = model.encode(rows, on_error="skip", convert_to_numpy=False).embeddings
    assert isinstance(as_list, list) and len(as_list) == 2
    assert model.encode(rows, on_error="skip", truncate_dim=16).embeddings.shape == (2, 16)
    query = model.encode_query(rows, on_error="skip")
    np.testing.assert_allclose(query.embeddings, model.encode_query(["a", "b"]), atol=TOLERANCE)
    nothing = model.encode_document([None, 3], on_error="skip")
    assert nothing.embeddings.shape == (0, 64) and nothing.embeddings.dtype == np.float32
    assert nothing.kept.shape == (0,) and list(nothing.errors) == [0, 1]
    everything = model.encode(["a"], on_error="skip")
    assert everything.kept.tolist() == [0] and everything.errors == {}
    assert model.encode([], on_error="skip").embeddings.shape == (0, 64)


def test_rows_that_are_too_long_are_found_among_others(repo, tmp_path):
    """They are refused by the processor, after the check."""
    model = BTokSentenceTransformer(repo, device="cpu", max_seq_length=16)
    image(112, 112).save(tmp_path / "large.png")
    inputs = ["a", image(30, 30), str(tmp_path / "large.png"), "b", image(112, 110), "c"]
    embeddings, kept, errors = model.encode(inputs, on_error="skip")
    assert kept.tolist() == [0, 1, 3, 5] and list(errors) == [2, 4]
    assert errors[2].startswith("Input 2 ") and "large.png" in errors[2] and "max_seq_length=16" in errors[2]
    assert np.abs(embeddings - model.encode([inputs[place] for place in kept])).max() <= TOLERANCE
    with pytest.raises(ValueError, match=r"^Input 2 .*large.png.* longer than max_seq_length=16 tokens"):
        model.encode(inputs[:4])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"on_error": "ignore"}, "must be 'raise' or 'skip', got 'ignore'"),
        ({"on_error": "skip", "output_value": None}, "Leave output_value out"),
        ({"on_error": "skip", "pool": {}}, "works in one process"),
        ({"on_error": "skip", "device": ["cpu", "cpu"]}, "works in one process"),
    ],
)
def test_what_cannot_be_skipped_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.encode(["a"], **options)
    for single in ("a", {"text": "a"}, [{"role": "user", "content": "a"}]):
        with pytest.raises(ValueError, match="needs a list of inputs"):
            model.encode(single, on_error="skip")


def test_errors_of_all_features_name_the_place_too(model):
    """Sentence-Transformers sorts the inputs, and gives batches without their places."""
    inputs = ["a text of some length", "a text that is longer than the first", "missing.png", "a"]
    for batch_size in (1, 4):
        with pytest.raises((ValueError, OSError), match=r"^Input 2 'missing\.png'"):
            model.encode(inputs, output_value=None, batch_size=batch_size)


def test_running_out_of_memory_is_no_fault_of_a_row(model, monkeypatch):
    def load(image):
        raise MemoryError

    monkeypatch.setattr(PILImage.Image, "load", load)
    with pytest.raises(MemoryError):
        model.encode(["a", image(60, 60)], on_error="skip")


@pytest.mark.parametrize("batch_size", [1, 32])
def test_a_vector_that_is_not_finite_is_an_error_or_skipped(repo, batch_size):
    """As fp16 overflows for some inputs. If all are skipped, the weights are to blame."""
    model = BTokSentenceTransformer(repo, device="cpu")
    with torch.no_grad():
        model[0].model.get_input_embeddings().weight[ord("z") - ord("!")] = torch.nan
    inputs = ["aaaa", "z", "bb", "zzzzzz"]
    with pytest.raises(ValueError, match=r"The embedding of input [13] is not finite"):
        model.encode(inputs, batch_size=batch_size)
    encoded = model.encode(inputs, batch_size=batch_size, on_error="skip")
    assert encoded.kept.tolist() == [0, 2] and encoded.errors.keys() == {1, 3}
    assert "embedding of input 3 is not finite" in encoded.errors[3]
    np.testing.assert_allclose(encoded.embeddings, model.encode(["aaaa", "bb"]), atol=TOLERANCE)
    with pytest.raises(ValueError, match=r"The embedding of input 1 is not finite"):
        model.encode([None, "z", "zz"], batch_size=batch_size, on_error="skip")


def test_a_batch_is_read_when_the_next_one_is_queued():
    """So a GPU has work while the host waits for embeddings. An error ends the loop one batch later."""
    queued = []

    def embed(features):
        queued.append(features)
        return torch.full((1, 2), torch.nan if features["row"] == broken else float(features["row"]))

    def run():
        queued.clear()
        rows = embed_batches([0, 1, 2, 3], [1] * 4, 1, None, prepare, embed, save_to_cpu=True, ahead=False)
        return rows.tolist()

    def prepare(items, positions):
        return {"row": items[0]}

    broken = None
    assert run() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    order = [features["row"] for features in queued]
    for broken, count in ((order[0], 2), (order[-1], 4)):
        with pytest.raises(ValueError, match=f"The embedding of input {broken} is not finite"):
            run()
        assert len(queued) == count


def test_batches_are_filled_longest_first():
    assert token_batches([1, 9, 3, 3, 2], 6) == [[1], [2, 3], [4, 0]]


def test_messages_among_other_inputs_may_come_first(model):
    message = {"role": "user", "content": "hello"}
    texts = model.encode(["hello", "a text"])
    np.testing.assert_allclose(model.encode([message, "a text"]), texts, atol=TOLERANCE)
    np.testing.assert_allclose(
        model.encode([[message], [{"role": "user", "content": "a text"}]]), texts, atol=TOLERANCE
    )
    assert model.encode([message, message]).shape == (64,)  # one chat of two messages
    for several in ([[message, message], message], [message, [message, message]]):
        assert model.encode(several).shape == (2, 64)


def test_what_holds_inputs_and_is_no_list_is_refused(model):
    data = Dataset.from_dict({"text": ["a", "b"]})
    for given in ((text for text in "ab"), {"a", "b"}, data, data.to_pandas(), data.to_pandas()["text"]):
        with pytest.raises(ValueError, match=f"list of inputs or one input, got {type(given).__name__}. Give a list"):
            model.encode(given)
    assert (
        model.encode(data["text"]).shape == model.encode(np.array(["a", "b"])).shape == model.encode(["a"] * 2).shape
    )
    with pytest.raises(ValueError, match=r"'image' is None; leave the key out.*`datasets` fills in keys"):
        model.encode([{"image": None, "text": "a"}])


def test_vectors_are_cut_to_a_size_above_0(model):
    assert model.encode(["a"], truncate_dim=8).shape == (1, 8)
    for size in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"truncate_dim must be a number of dimensions above 0, got {size}"):
            model.encode(["a"], truncate_dim=size)


def test_the_old_name_of_inputs(model):
    np.testing.assert_allclose(model.encode(sentences=["a"]), model.encode(["a"]), atol=TOLERANCE)


def test_an_instruction_is_no_file(model, tmp_path, monkeypatch):
    """Clients of a server choose it."""
    image(60, 60).save(tmp_path / "a.png")
    monkeypatch.setattr("btok_hf.lengths._file_tokens", lambda *given: pytest.fail("a file was opened"))
    model.encode(["a"], prompt=str(tmp_path / "a.png"))
