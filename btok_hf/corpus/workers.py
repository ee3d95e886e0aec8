"""Who embeds which units: one process, ranks of a launcher, or workers of Ray. `run` is `btok embed`."""

import os
import random
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from btok_hf.corpus.embed import Counts, Embedder
from btok_hf.corpus.job import Job, Options, Plan, make_plan
from btok_hf.corpus.listing import Unit
from btok_hf.corpus.units import Corpus

# A worker that is killed is started again, and its unit tried as often.
RETRIES = 3
# Ray: an idle worker repeats a unit that takes longer than this and twice as long as any before: its node may be gone.
STRAGGLER_SECONDS = 60.0
LOCAL_OBJECTS = 100 * 2**20  # bytes; only counts and names travel
SHOWN_REASONS = 10


class Rank(NamedTuple):
    """A process among several that run the same command.

    Args:
        number (`int`): From 0.
        total (`int`): Processes in all.
        local (`int`): Number on its machine.
    """

    number: int = 0
    total: int = 1
    local: int = 0


def rank(environment: Mapping[str, str] = os.environ) -> Rank:
    """The rank that accelerate and torchrun (`RANK`, `WORLD_SIZE`) or Slurm (`SLURM_PROCID`, `SLURM_NTASKS`) give."""
    for number, total, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ):
        if number in environment and total in environment:
            return Rank(int(environment[number]), int(environment[total]), int(environment.get(local, 0)))
    return Rank()


def in_order(units: Sequence[Unit], own: Rank, written: Callable[[], Collection[str]]) -> Iterator[Unit]:
    """All units: those of a rank, then those of the others, in an order of its own.

    Units are dealt by their names, so that ranks that list the input a moment apart agree. A rank that is done helps
    the others, or does the work of one that died: `Embedder` leaves out what is written. At the end, two may embed the
    same unit at once; what they write is equal.

    Args:
        units (`Sequence[Unit]`): Units.
        own (`Rank`): The rank.
        written (`Callable`): Gives the names of the units that are there, in one request. It is called when the own
            units are done, and others that are there are left out.

    Returns:
        Iterator of `Unit`
    """
    yield from (unit for unit in units if owner(unit, own.total) == own.number)
    others = [unit for unit in units if owner(unit, own.total) != own.number]
    there = written() if others else ()
    others = [unit for unit in others if unit.name not in there]
    random.Random(own.number).shuffle(others)
    yield from others


def owner(unit: Unit, total: int) -> int:
    """The number of the rank, of this many, that a unit is dealt to."""
    return int(unit.name[:8], 16) % total


class _Bar:
    """Progress in rows, with rows per second and the time left."""

    def __init__(self, units: Sequence[Unit], own: Rank) -> None:
        name = "embed" if own.total == 1 else f"rank {own.number} of {own.total}"
        self._own = own
        self._total = sum(unit.rows for unit in units if owner(unit, own.total) == own.number)
        self._bar = tqdm(total=self._total, desc=name, unit="row", disable=own.number > 0, smoothing=0.05)
        self._seen: Counter[str] = Counter()

    def report(self, unit: Unit, rows: int, done: bool) -> None:
        self._seen[unit.name] += rows
        self._bar.update(rows)
        if done:  # A PDF has more pages than the list of files told. What others wrote has no rows here.
            expected = unit.rows if owner(unit, self._own.total) == self._own.number else 0
            self._total += self._seen.pop(unit.name) - expected
            self._bar.total = self._total
            self._bar.refresh()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()


def run(
    given: str,
    out: str,
    options: Options,
    *,
    retry_failed: bool = False,
    ray: str | None = None,
    workers: int | None = None,
) -> dict[str, str]:
    """Embed what is missing of a corpus. The same call goes on after a kill.

    Args:
        given (`str`): INPUT: a folder or file, a pattern, an address that fsspec knows, or the id of a dataset.
        out (`str`): OUT: a folder, or an address that fsspec knows.
        options (`Options`): How.
        retry_failed (`bool`): Embed units with failed rows again.
        ray (`str`, *optional*): Use Ray: `local` starts it here, `auto` joins the cluster of this machine, else its
            address. Default: this process, which may be one of several.
        workers (`int`, *optional*): Workers of Ray. Default: one a GPU, without any one a CPU core.

    Returns:
        `dict[str, str]`: Why rows failed, by id; all rows of the corpus count.

    Raises:
        ImportError, OSError, RuntimeError, ValueError: As in `make_plan` and `Embedder.embed`. With Ray, units that
            killed their workers.
    """
    own = rank() if ray is None else Rank()
    if retry_failed and own.total > 1:
        raise ValueError("--retry-failed embeds units that are there, so run it in one process, or with --ray.")
    if workers is not None and ray is None:
        raise ValueError("--workers counts workers of Ray. Add --ray, or start several processes with torchrun.")
    plan = make_plan(given, out, options, clean=own.number == 0, retry_failed=retry_failed)
    if own.number == 0:
        _say_plan(plan)
    start = time.perf_counter()
    counts = Counts()
    lost: list[Unit] = []
    try:
        if plan.missing and ray is not None:
            with _Bar(plan.missing, own) as bar:
                counts, lost = _run_on_ray(plan.job, plan.missing, ray, workers, bar)
        elif plan.missing:
            with _Bar(plan.missing, own) as bar:
                units = in_order(plan.missing, own, Corpus(out).written)
                counts = Embedder(_on_own_device(plan.job, own)).embed(units, bar.report)
    except BaseException:
        if plan.is_new:  # what was wrong may be a setting
            Corpus(out).release()
        raise
    errors = Corpus(out).errors(unit.name for unit in plan.units)
    name = "" if own.total == 1 else f"rank {own.number} of {own.total}: "
    print(f"{name}{_words(counts, time.perf_counter() - start)}", flush=True)
    if own.number == 0:
        _say_errors(errors)
    if lost:
        raise RuntimeError(
            f"{len(lost)} units killed their workers {RETRIES + 1} times each, and the others are written. One of the "
            f"files {', '.join(lost[0].files[:3])}, … may be damaged, or the memory too small. Run the command again, "
            "with fewer workers or a smaller --batch-size."
        )
    return errors


def _on_own_device(job: Job, own: Rank) -> Job:
    """A job for the GPU of a rank: each takes one of its machine."""
    import torch

    if job.options.device is None and own.total > 1 and torch.cuda.is_available():
        device = f"cuda:{own.local % torch.cuda.device_count()}"
        return job._replace(options=job.options.replace(device=device))
    return job


def _run_on_ray(
    job: Job, units: Sequence[Unit], address: str, workers: int | None, bar: _Bar
) -> tuple[Counts, list[Unit]]:
    """Embed units with workers of Ray, each with a model: what was done, and units that killed their workers."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("--ray needs the package ray: pip install 'btok-hf[ray]'.") from error
    started = ray.is_initialized()  # by the program that calls this
    if not started and address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would send statistics to its makers
        ray.init(num_cpus=workers or os.cpu_count(), object_store_memory=LOCAL_OBJECTS, include_dashboard=False)
    elif not started:
        ray.init(address)
    try:
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0))
        number = min(workers or gpus or int(there.get("CPU", 1)), len(units))
        worker = ray.remote(
            num_cpus=1,
            num_gpus=1 if gpus and job.options.device is None else 0,
            max_restarts=-1,
            max_task_retries=RETRIES,
            runtime_env={"env_vars": {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}},
        )(Embedder)
        return _deal(ray, [worker.remote(job) for _ in range(number)], units, bar)
    finally:
        if not started:
            ray.shutdown()


def _deal(ray: Any, workers: Iterable[Any], units: Sequence[Unit], bar: _Bar) -> tuple[Counts, list[Unit]]:
    """Give each idle worker the next unit, until all are written.

    Raises:
        RuntimeError: No worker could be made.
    """
    queue, idle = deque(units), deque(workers)
    running: dict[Any, tuple[Any, Unit, float]] = {}  # by the result to come: worker, unit, start
    counts, lost, slowest = Counts(), [], 0.0
    waiting = {unit.name: unit for unit in units}
    while waiting:
        while idle and (unit := queue.popleft() if queue else _straggler(running.values(), waiting, slowest)):
            at = idle.popleft()
            running[at.embed.remote([unit])] = (at, unit, time.monotonic())
        ready, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
        for result in ready:
            at, unit, start = running.pop(result)
            try:
                of_unit = ray.get(result)
            except ray.exceptions.RayActorError as error:
                if error.actor_init_failed:  # for instance without a model: its unit is not to blame
                    queue.appendleft(unit)
                    if not idle and not running:
                        raise RuntimeError(f"No worker of Ray could start. {error}") from error
                    continue
                idle.append(at)
                if waiting.pop(unit.name, None):
                    lost.append(unit)
                    bar.report(unit, 0, True)
                continue
            idle.append(at)
            slowest = max(slowest, time.monotonic() - start)
            if waiting.pop(unit.name, None):
                counts = counts.plus(of_unit)
                bar.report(unit, of_unit.rows, True)
    return counts, lost


def _straggler(running: Iterable[tuple[Any, Unit, float]], waiting: Mapping[str, Unit], slowest: float) -> Unit | None:
    """A unit that runs in one place, and for too long."""
    places = Counter(unit.name for _, unit, _ in running)
    limit = time.monotonic() - max(STRAGGLER_SECONDS, 2 * slowest)
    late = (unit for _, unit, start in running if start < limit and unit.name in waiting and places[unit.name] == 1)
    return next(late, None)


def _say_plan(plan: Plan) -> None:
    done = len(plan.units) - len(plan.missing)
    rows = sum(unit.rows for unit in plan.missing)
    what = "rows" if plan.job.options.columns.parts() else "files"
    print(f"{len(plan.units):,} units, {done:,} of them written; {rows:,} {what} to embed", flush=True)
    if plan.removed:
        print(f"removed {plan.removed:,} units of changed or removed input", flush=True)
    for reason, count in plan.skipped.items():
        print(f"left out: {count:,} {reason}", flush=True)


def _words(counts: Counts, seconds: float) -> str:
    reused = f", {counts.reused:,} of them equal to others," if counts.reused else ""
    return f"embedded {counts.rows:,} rows{reused} in {seconds:.1f} s ({counts.rows / max(seconds, 1e-9):,.1f} rows/s)"


def _say_errors(errors: Mapping[str, str]) -> None:
    groups = grouped(errors)
    if groups:
        print(f"{len(errors):,} rows failed:", flush=True)
    for reason, count, row in groups[:SHOWN_REASONS]:
        print(f"  {count:,} × {reason} (e.g. {row})", flush=True)
    if len(groups) > SHOWN_REASONS:
        print(f"  and {len(groups) - SHOWN_REASONS:,} other reasons: the folder errors of OUT has all", flush=True)


def grouped(errors: Mapping[str, str]) -> list[tuple[str, int, str]]:
    """Errors by reason.

    Args:
        errors (`Mapping[str, str]`): Reasons by id. Numbers and quoted names in them do not count.

    Returns:
        `list` of reason, count and the id of one row, the most frequent first.
    """
    groups = Counter[str]()
    first: dict[str, tuple[str, str]] = {}
    for row, reason in errors.items():
        key = re.sub(r"""'[^']*'|"[^"]*"|\d+""", "…", reason)
        groups[key] += 1
        first.setdefault(key, (reason, row))
    return [(first[key][0], count, first[key][1]) for key, count in groups.most_common()]
