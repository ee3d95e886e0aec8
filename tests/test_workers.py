"""Who embeds what: a process that is killed, ranks beside each other, workers of Ray that are killed."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections import namedtuple
from itertools import chain
from pathlib import Path

import pytest
from support.corpus import embed, read, same, write_files, write_texts
from support.forks import Fork

from btok_hf.corpus import workers
from btok_hf.corpus.embed import Counts
from btok_hf.corpus.listing import Unit
from btok_hf.corpus.rows import _reason
from btok_hf.corpus.workers import Rank, grouped, in_order, rank

UNITS = [Unit(f"{index * 2654435761 % 2**32:08x}", 1, (f"{index}.txt",)) for index in range(50)]


def start(given, out, repo, *flags, **variables):
    command = ["-m", "btok_hf", "embed", given, out, "--model", repo, "--device", "cpu", *flags]
    return Fork(command, {**os.environ, **variables})


def wait_for_units(out, count, seconds=120):
    folder, end = Path(out) / "units", time.monotonic() + seconds
    while not folder.is_dir() or len(list(folder.glob("*.parquet"))) < count:
        assert time.monotonic() < end, "no units were written"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("corpus") / "in", 160)


@pytest.fixture(scope="module")
def whole(texts, repo, tmp_path_factory):
    """The corpus that one process makes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    embed(texts, out, repo, unit_rows=4)
    return read(out)


def test_a_killed_run_goes_on_where_it_was(texts, whole, repo, tmp_path, capfd):
    out = tmp_path / "out"
    process = start(texts, out, repo, "--unit-rows", "4")
    wait_for_units(out, 3)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    written = {path: path.stat().st_mtime_ns for path in (out / "units").glob("*.parquet")}
    assert len(written) >= 3 and len(read(out)) < len(whole)
    embed(texts, out, repo, unit_rows=4)
    assert same(read(out), whole)
    assert {path: path.stat().st_mtime_ns for path in written} == written  # finished units are not touched


def test_ranks_beside_each_other_give_what_one_process_gives(texts, whole, repo, tmp_path, monkeypatch):
    out = tmp_path / "out"
    other = start(texts, out, repo, "--unit-rows", "4", RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    wait_for_units(out, 1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    embed(texts, out, repo, unit_rows=4)
    assert same(read(out), whole)  # whoever is done first has seen to all units
    assert other.wait(120) == 0
    assert same(read(out), whole)


def test_a_rank_does_the_work_of_those_that_died(texts, whole, repo, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    embed(texts, tmp_path / "out", repo, unit_rows=4)
    assert same(read(tmp_path / "out"), whole)
    with pytest.raises(ValueError, match="--retry-failed embeds units that are there"):
        embed(texts, tmp_path / "out", repo, retry_failed=True)


def test_ranks():
    assert rank({}) == Rank(0, 1, 0)
    assert rank({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "0"}) == Rank(3, 8, 1)
    assert rank({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "2"}) == Rank(5, 8, 2)
    assert rank({"WORLD_SIZE": "8"}) == Rank()


def test_each_rank_begins_with_units_of_its_own():
    def order_of(own, written=()):
        return list(in_order(UNITS, own, lambda: set(written)))

    orders = [order_of(Rank(index, 3, 0)) for index in range(3)]
    assert all(sorted(order) == sorted(UNITS) for order in orders)
    shares = [[unit for unit in order if workers.owner(unit, 3) == index] for index, order in enumerate(orders)]
    assert all(order[: len(share)] == share for order, share in zip(orders, shares))  # own units first, in order
    assert sorted(chain(*shares)) == sorted(UNITS) and min(map(len, shares)) > 8
    assert orders[0][len(shares[0]) :] != [unit for unit in UNITS if unit not in shares[0]]
    assert order_of(Rank()) == UNITS
    # What others have written is asked for once, when the own units are done, and not unit by unit.
    left = order_of(Rank(0, 3, 0), {unit.name for unit in shares[1]})
    assert left[: len(shares[0])] == shares[0] and sorted(left) == sorted(set(UNITS) - set(shares[1]))
    later = in_order(UNITS, Rank(0, 3, 0), lambda: pytest.fail("too early"))
    assert [next(later) for _ in shares[0]] == shares[0]


def test_the_summary_groups_errors(tmp_path, repo, capsys):
    folder = write_files(tmp_path / "in", texts=3, pictures=0)
    for index in range(3):
        (folder / f"{index}.png").write_bytes(b"no picture %d" % index)
    (folder / "latin.txt").write_bytes("\xe4".encode("latin-1"))
    (folder / ".hidden").write_text("x")
    embed(folder, tmp_path / "out", repo)
    printed = capsys.readouterr().out
    assert "1 units, 0 of them written; 7 files to embed" in printed and "left out: 1 hidden" in printed
    assert "embedded 7 rows in " in printed and "4 rows failed:\n  3 × The image is not an image" in printed
    assert "(e.g. 0.png)" in printed and "1 × the text is not UTF-8" in printed


def test_a_try_that_fails_before_its_first_unit_claims_nothing(texts, repo, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(workers, "Embedder", None)  # as a model that is too large for the memory
        embed(texts, tmp_path / "out", repo, prompt="a typo")
    embed(texts, tmp_path / "out", repo)
    with pytest.raises(ValueError, match="holds a corpus with other settings"):
        embed(texts, tmp_path / "out", repo, prompt="a typo")


def test_missing_files_are_one_reason():
    errors = (FileNotFoundError(2, "No such file or directory", f"/x/{name}.png") for name in ("cat", "dog", "it's"))
    assert len(grouped({str(index): _reason(error) for index, error in enumerate(errors)})) == 1


def test_reasons():
    errors = {"a": "image of 4 x 5 pixels 'x'", "b": "image of 40 x 50 pixels 'y'", "c": "other"}
    assert grouped(errors) == [("image of 4 x 5 pixels 'x'", 2, "a"), ("other", 1, "c")]


# ---------------------------------------------------------------- Ray


def processes(name):
    """Ids of running processes with this title."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found += [int(path.parent.name)] if path.read_bytes().startswith(name) else []
    return found


@pytest.fixture(scope="module")
def ray():
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")  # by default workers wait for every other job of the machine
    ray.init(num_cpus=2, object_store_memory=workers.LOCAL_OBJECTS, include_dashboard=False)
    yield ray
    ray.shutdown()


def test_workers_of_ray_that_are_killed(ray, texts, whole, repo, tmp_path):
    """Nothing is lost and nothing doubled."""
    out, killed = tmp_path / "out", []

    def kill():
        wait_for_units(out, 2)
        for process in processes(b"ray::Embedder")[:1]:
            os.kill(process, signal.SIGKILL)
            killed.append(process)

    thread = threading.Thread(target=kill)
    thread.start()
    embed(texts, out, repo, unit_rows=4, ray="local", workers=2)
    thread.join()
    assert len(killed) == 1 and same(read(out), whole)


def test_a_unit_that_kills_its_workers_costs_no_other(ray):
    # Types of this function, so that workers need not import the library.
    unit_of, counts_of = namedtuple("Unit", ("name", "rows")), namedtuple("Counts", ("rows", "failed", "reused"))
    units = [unit_of(f"{index:08x}", 1) for index in range(6)]

    class Worker:
        def embed(self, given):
            if given[0].name == "00000002":
                os.kill(os.getpid(), signal.SIGKILL)
            return counts_of(1, 0, 0)

    remote = ray.remote(max_restarts=-1, max_task_retries=1)(Worker)
    with workers._Bar(units, Rank()) as bar:
        counts, lost = workers._deal(ray, [remote.remote(), remote.remote()], units, bar)
    assert lost == [units[2]] and counts == Counts(5, 0, 0)


@pytest.mark.parametrize("broken", [1, 2])
def test_a_worker_that_cannot_start_costs_no_unit(ray, tmp_path, broken):
    unit_of, counts_of = namedtuple("Unit", ("name", "rows")), namedtuple("Counts", ("rows", "failed", "reused"))
    units = [unit_of(f"{index:08x}", 1) for index in range(6)]

    class Worker:
        def __init__(self, number):
            if number < broken:
                raise ValueError("the model here is another one")

        def embed(self, given):
            return counts_of(1, 0, 0)

    remote = ray.remote(max_restarts=-1, max_task_retries=1)(Worker)
    with workers._Bar(units, Rank()) as bar:
        if broken == 2:
            with pytest.raises(RuntimeError, match=r"(?s)No worker of Ray could start\..*the model here"):
                workers._deal(ray, [remote.remote(0), remote.remote(1)], units, bar)
        else:
            assert workers._deal(ray, [remote.remote(0), remote.remote(1)], units, bar) == (Counts(6, 0, 0), [])


def test_a_unit_whose_node_is_gone_is_given_to_another_worker():
    now = time.monotonic()
    running = [("a", UNITS[0], now - 70), ("b", UNITS[1], now - 50)]
    waiting = {unit.name: unit for unit in UNITS}
    assert workers._straggler(running, waiting, 1.0) == UNITS[0]
    assert workers._straggler(running, waiting, 40.0) is None  # others took nearly as long
    assert workers._straggler([*running, ("c", UNITS[0], now)], waiting, 1.0) is None  # it runs twice already
    assert workers._straggler(running, {}, 1.0) is None


def test_ray_that_is_not_installed_is_named(texts, repo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'btok-hf\[ray\]'"):
        embed(texts, tmp_path / "out", repo, ray="local")
    with pytest.raises(ValueError, match="--workers counts workers of Ray"):
        embed(texts, tmp_path / "out", repo, workers=2)
