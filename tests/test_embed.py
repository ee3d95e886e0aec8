"""Embedding units: vectors, failed rows, equal content, bounded memory."""

import shutil
import time
from concurrent.futures import Future

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support.corpus import embed, pdf, picture, read, write_files

from btok_hf import read_video
from btok_hf.corpus import embed as module
from btok_hf.corpus.embed import Counts, Embedder, _ahead, _Memory
from btok_hf.corpus.job import Options, make_plan
from btok_hf.corpus.rows import Known


@pytest.fixture
def folder(tmp_path, mp4):
    folder = write_files(tmp_path / "in")
    shutil.copy(mp4, folder / "clip.mp4")
    (folder / "book.pdf").write_bytes(pdf("first", "second"))
    return folder


def test_vectors_are_those_of_encode_document(folder, tmp_path, repo, model):
    embed(folder, tmp_path / "out", repo)
    rows = read(tmp_path / "out")
    assert list(rows) == [
        "book.pdf#page=1",
        "book.pdf#page=2",
        "clip.mp4",
        *(f"pictures/deep/{index}.png" for index in range(4)),
        *(f"texts/{index}.txt" for index in range(4)),
    ]
    inputs = {
        "clip.mp4": {"video": read_video(folder / "clip.mp4")},
        **{f"pictures/deep/{index}.png": folder / f"pictures/deep/{index}.png" for index in range(4)},
        **{f"texts/{index}.txt": {"text": f"text {index}"} for index in range(4)},
    }
    expected = dict(zip(inputs, model.encode_document(list(inputs.values()))))
    for id, vector in expected.items():
        assert np.allclose(rows[id]["embedding"], vector, atol=1e-5)
    page, clip, text = rows["book.pdf#page=2"], rows["clip.mp4"], rows["texts/1.txt"]
    assert (page["kind"], page["source"], page["page"], page["text"].strip()) == ("page", "book.pdf", 2, "second")
    assert (clip["kind"], clip["source"], clip["page"], clip["text"]) == ("video", "clip.mp4", None, None)
    assert (text["kind"], text["text"], text["thumbnail"]) == ("text", "text 1", None)
    assert all(row["error"] is None and np.isclose(np.linalg.norm(row["embedding"]), 1) for row in rows.values())


def test_settings_reach_the_model(folder, tmp_path, repo, model):
    embed(folder, tmp_path / "out", repo, prompt="Find it.", max_pixels=28 * 28 * 4, max_seq_length=40)
    rows = read(tmp_path / "out")
    expected = model.encode([{"text": "text 0"}], prompt="Find it.")[0]
    assert np.allclose(rows["texts/0.txt"]["embedding"], expected, atol=1e-5)
    plain = model.encode([{"text": "text 0"}])[0]
    assert not np.allclose(rows["texts/0.txt"]["embedding"], plain, atol=1e-3)
    embedder = Embedder(make_plan(str(folder), str(tmp_path / "out2"), Options(repo, max_seq_length=40)).job)
    assert embedder.model.max_seq_length == 40


def test_failed_rows_are_kept_with_their_reason(folder, tmp_path, repo):
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "empty.txt").write_text(" ")
    (folder / "latin.txt").write_bytes("\xe4".encode("latin-1"))
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    (folder / "empty.pdf").write_bytes(b"")
    (folder / "broken.mp4").write_bytes(b"no video")
    Image.new("RGB", (4, 4)).save(folder / "small.png")
    errors = embed(folder, tmp_path / "out", repo)
    rows = read(tmp_path / "out")
    failed = {id: row["error"] for id, row in rows.items() if row["error"]}
    assert failed == errors and all(rows[id]["embedding"] is None for id in failed)
    broken = {"broken.png", "empty.txt", "latin.txt", "broken.pdf", "empty.pdf", "broken.mp4", "small.png"}
    assert failed.keys() == broken and failed["empty.pdf"] == "the file is empty"
    assert failed["small.png"].startswith("image of 4 x 4 pixels is smaller than one patch")  # no place of a call
    assert "not UTF-8" in failed["latin.txt"] and "PDF cannot be read" in failed["broken.pdf"]
    assert sum(row["embedding"] is not None for row in rows.values()) == 11


def test_a_vector_that_is_not_finite_is_an_error_of_its_row(tmp_path, repo):
    """As fp16 overflows for some rows. If no row works, the weights are to blame, and the run ends."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, text in {"0": "aaaa", "1": "z", "2": "bb"}.items():
        (folder / f"{name}.txt").write_text(text)

    def spoilt(out, weights, row, **options):
        plan = make_plan(str(folder), str(tmp_path / out), Options(repo, device="cpu", **options))
        embedder = Embedder(plan.job)
        with torch.no_grad():
            weights(embedder.model[0].model)[row] = torch.nan
        return embedder.embed(plan.missing)

    assert spoilt("out", lambda model: model.get_input_embeddings().weight, ord("z") - ord("!")) == Counts(3, 1, 0)
    failed = {id: row["error"] for id, row in read(tmp_path / "out").items() if row["error"]}
    assert failed.keys() == {"1.txt"} and failed["1.txt"].startswith("The embedding is not finite. The weights are")
    # Alone in its unit, when others were embedded before it: in this run or in an earlier one.
    broken = lambda model: model.get_input_embeddings().weight  # noqa: E731
    assert spoilt("alone", broken, ord("z") - ord("!"), unit_rows=1) == Counts(3, 1, 0)
    (folder / "3.txt").write_text("zz")
    assert spoilt("alone", broken, ord("z") - ord("!"), unit_rows=1) == Counts(1, 1, 0)
    failed = {id: row["error"] for id, row in read(tmp_path / "alone").items() if row["error"]}
    assert failed.keys() == {"1.txt", "3.txt"} and failed["3.txt"] == failed["1.txt"]
    with pytest.raises(ValueError, match=r"No row of '0\.txt' and those after it could be embedded\. .*not finite"):
        spoilt("other", lambda model: model.language_model.norm.weight, 0)


def test_equal_content_is_embedded_once(tmp_path, repo, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(12):
        picture(index % 3).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("the same")
    seen = []
    encode = module.BTokSentenceTransformer.encode_document
    monkeypatch.setattr(
        module.BTokSentenceTransformer,
        "encode_document",
        lambda self, inputs, **options: seen.extend(inputs) or encode(self, inputs, **options),
    )
    embed(folder, tmp_path / "out", repo, unit_rows=5)
    rows = read(tmp_path / "out")
    assert len(seen) == 4 and len(rows) == 24
    assert len({row["content_hash"] for row in rows.values()}) == 4
    assert rows["0.png"]["embedding"] == rows["9.png"]["embedding"] != rows["1.png"]["embedding"]
    assert rows["0.png"]["thumbnail"] == rows["9.png"]["thumbnail"] is not None
    assert rows["4.txt"]["embedding"] == rows["11.txt"]["embedding"]


def test_equal_content_that_fails_has_the_reason_everywhere(tmp_path, repo):
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (4, 4)).save(folder / f"{index}.png")
    errors = embed(folder, tmp_path / "out", repo)
    assert len(errors) == 3 and len(set(errors.values())) == 1


def test_chunks_are_bounded(folder, tmp_path, repo, monkeypatch):
    job = make_plan(str(folder), str(tmp_path / "out"), Options(repo, device="cpu")).job
    embedder, (unit, *rest) = Embedder(job), make_plan(str(folder), str(tmp_path / "out"), Options(repo)).units
    assert not rest and [len(rows) for _, rows, _ in embedder._chunks([unit])] == [11]
    monkeypatch.setattr(module, "CHUNK_ROWS", 4)
    assert [(len(rows), last) for _, rows, last in embedder._chunks([unit])] == [(4, False), (4, False), (3, True)]
    monkeypatch.setattr(module, "CHUNK_ROWS", 256)
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 56 * 56 * 2)  # two pictures; pages and clip are larger
    sizes = [len(rows) for _, rows, _ in embedder._chunks([unit])]
    assert sum(sizes) == 11 and sizes[:3] == [1, 1, 1] and 2 in sizes
    assert embedder.embed([unit]) == Counts(11, 0, 0) and len(read(tmp_path / "out")) == 11


@pytest.mark.parametrize(("most", "ahead"), [(3 * 56 * 56 * 2, 3), (10**9, 5)])
def test_what_is_read_ahead_is_bounded(tmp_path, repo, monkeypatch, most, ahead):
    """By rows, and by their bytes: three pictures are more than two."""

    class AtOnce:
        submitted = 0

        def submit(self, function, *arguments):
            self.submitted += 1
            future = Future()
            future.set_result(function(*arguments))
            return future

    folder = write_files(tmp_path / "in", texts=0, pictures=12)
    plan = make_plan(str(folder), str(tmp_path / "out"), Options(repo, device="cpu", threads=2))
    embedder, pool = Embedder(plan.job), AtOnce()
    monkeypatch.setattr(module, "CHUNK_BYTES", most)
    held = [pool.submitted - place for place, _ in enumerate(embedder._rows(plan.units[0], pool))]
    assert len(held) == 12 and max(held) == ahead


def test_a_unit_that_another_process_wrote_is_left_out(folder, tmp_path, repo):
    plan = make_plan(str(folder), str(tmp_path / "out"), Options(repo, device="cpu", unit_rows=3))
    embedder, reports = Embedder(plan.job), []
    embedder.embed(plan.units[:1])
    counts = embedder.embed(plan.units, lambda *report: reports.append(report))
    assert reports[0] == (plan.units[0], 0, True)
    assert counts.rows == 11 - sum(rows for unit, rows, _ in reports if unit == plan.units[0]) - len(
        [id for id in read(tmp_path / "out") if id.startswith(plan.units[0].files)]
    )


def test_what_no_row_is_to_blame_for_ends_the_run(folder, tmp_path, repo, monkeypatch):
    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    plan = make_plan(str(folder), str(tmp_path / "out"), Options(repo, device="cpu"))
    monkeypatch.setattr(module.Corpus, "write", full)
    with pytest.raises(OSError, match="No space left"):
        Embedder(plan.job).embed(plan.units)
    assert read(tmp_path / "out") == {}


def test_names_that_parquet_cannot_hold_are_failed_rows(tmp_path, repo):
    """A row with another name could never say where its file is."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a\udcff.txt").write_text("a text")  # a name whose bytes are no UTF-8
    (folder / "b.txt").write_text("a text")
    errors = embed(folder, tmp_path / "out", repo)
    assert errors == {"a\\udcff.txt": "the name of the file is not UTF-8; rename it"}
    found = read(tmp_path / "out")
    assert found["a\\udcff.txt"]["embedding"] is None and found["b.txt"]["embedding"]


def test_memory_of_results_is_bounded_and_keeps_the_last(repo):
    known = {name: Known(np.zeros(4, np.float32), bytes(84)) for name in "abcd"}  # 300 bytes each
    memory = _Memory(900)
    for name in "abc":
        memory.put(name, known[name])
    assert memory.get("a") is known["a"]
    memory.put("d", known["d"])
    assert memory.get("b") is None and all(memory.get(name) is known[name] for name in "acd")
    memory.put("d", known["a"])
    assert memory.get("d") is known["d"]


def test_ahead_overlaps_and_passes_errors_on():
    def items():
        for index in range(4):
            time.sleep(0.05)
            yield index
        raise ValueError("the end")

    seen, start = [], time.perf_counter()
    with pytest.raises(ValueError, match="the end"):
        for item in _ahead(items()):
            seen.append(item)
            time.sleep(0.05)
    assert seen == [0, 1, 2, 3] and time.perf_counter() - start < 0.35


def test_units_hold_the_schema_of_the_job(tmp_path, repo):
    table = pa.table({"words": ["a", "b"], "when": pa.array([1, None], pa.timestamp("ns")), "tags": [["x"], None]})
    pq.write_table(table, tmp_path / "rows.parquet")
    from btok_hf.corpus.tables import Columns

    embed(tmp_path / "rows.parquet", tmp_path / "out", repo, columns=Columns("words", metadata=("when", "tags")))
    (unit,) = (tmp_path / "out" / "units").iterdir()
    written = pq.read_table(unit)
    assert written.schema.field("when").type == pa.timestamp("ns") and written["tags"].to_pylist() == [["x"], None]
    assert written.schema.field("embedding").type == pa.list_(pa.float32(), 64)
