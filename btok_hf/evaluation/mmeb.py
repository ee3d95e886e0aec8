"""Evaluate a model on MMEB-V2: encode every input once, rank, score, report.

- An input is identified by its text and by the path, size and time of its files. Its embedding is kept on disk under a
  fingerprint of the model. So datasets share embeddings of common inputs, and models never do.
- Embeddings are written in files of 256, each in one step. After a kill, the same command continues from there. A
  dataset with a score is not read again.
- With `accelerate launch`, every process encodes its share. All processes must see the same `output_dir`.
- Candidates are read back in blocks, so memory does not grow with the corpus.

The command line is `btok mmeb`. Encoding is in `embeddings.py`, metrics in `metrics.py`, tables in `report.py`.
"""

import json
import logging
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Sized
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from btok_hf.evaluation import report
from btok_hf.evaluation.embeddings import EmbeddingStore, Encoder, fingerprint, hash_of, task_inputs
from btok_hf.evaluation.loading import load_task
from btok_hf.evaluation.metrics import rank, score
from btok_hf.evaluation.models import check_inputs, metadata_of, name_of, settings_of
from btok_hf.evaluation.tasks import TASKS, Task
from btok_hf.files import replacing

logger = logging.getLogger(__name__)

# Rankings of at most 2,000 candidates are written in full, longer ones only down to rank 100. Metrics look at 10, and
# full rankings of 100,000 pages for thousands of queries take gigabytes.
FULL_RANKING, RANKING_DEPTH = 2000, 100
BLOCK = 2048  # candidates that are ranked at once
POOL = 16384  # candidates of queries that have their own, whose vectors are in memory at once

Model = SentenceTransformer | Callable[[list[dict[str, Any]]], Any]


def evaluate(
    model: Model,
    root: Path | str,
    output_dir: Path | str,
    *,
    datasets: Collection[str] | None = None,
    modalities: Collection[str] | None = None,
    limit: int | None = None,
    batch_tokens: int = 16384,
    prompt: str | None = None,
    name: str | None = None,
    cache_dir: Path | str | None = None,
    metadata: Mapping[str, Any] | None = None,
    eval_task: str | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Score a model on datasets of MMEB-V2, and write a report.

    If a dataset is missing or malformed, or the model fails on it, the report says so, and the other datasets are
    evaluated. A script that runs in several processes should end with
    `accelerate.PartialState().destroy_process_group()`. Otherwise torch aborts some processes when they exit.

    Args:
        model (`SentenceTransformer` or `Callable`): A model that embeds a text together with an image or video, or a
            function from a list of inputs (dicts of `text`, `image`, `video`, decoded) to an array of shape `(inputs,
            dimension)`.
        root (`str` or `Path`): Folder of the benchmark, as for `load_task`.
        output_dir (`str` or `Path`): For `{modality}/{dataset}_score.json` and `_pred.jsonl`, `run.json`, `report.md`,
            `report.png`, `leaderboard/{name}.json` and `.eval_results/mmeb-v2.yaml`. A line of `_pred.jsonl` holds the
            names of a query's candidates, best first (only 100 if it has more than 2,000), the relevant names and
            their grades. The folder belongs to one model and `limit`; its report covers earlier runs too.
        datasets, modalities (`list[str]`, *optional*): Which of the 78 datasets to evaluate. Default: all.
        limit (`int`, *optional*): Only this many queries of each dataset, from the first, for a quick trial.
        batch_tokens (`int`): About how many tokens a forward pass may take, padding included.
        prompt (`str`, *optional*): Instruction before every input, in addition to those in the texts of MMEB-V2.
            Default: the model's default prompt.
        name (`str`, *optional*): Name of the model in the report. Default: that of its repository. Required for a
            function: its embeddings are kept under this name, so change it whenever the function changes.
        cache_dir (`str` or `Path`, *optional*): Folder for embeddings, which models may share. Default: `embeddings`
            in `output_dir`.
        metadata (`dict[str, Any]`, *optional*): More fields for the leaderboard: see `report.leaderboard`.
        eval_task (`str`, *optional*): Id of the benchmark's task on the Hub, from the `eval.yaml` of its dataset. When
            all 78 datasets are scored, `.eval_results` is written, to be put into the model's repository.

    Returns:
        `tuple[dict[str, dict[str, float]], dict[str, str]]`: Scores and errors, by dataset.

    Raises:
        ValueError: Unknown datasets, a function without a name, a model that cannot embed a text together with an
            image or video, or an `output_dir` of another model.
    """
    names = chosen(datasets, modalities)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more, got {limit}. Leave it out to score every query.")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be 1 or more, got {batch_tokens}.")
    encoder_model = model if isinstance(model, SentenceTransformer) else None  # None: a function
    if encoder_model is None and hasattr(model, "encode"):
        raise ValueError(
            f"The model must be a SentenceTransformer or a function, got {type(model).__name__}. Pass a function that "
            "calls its encode, with a name."
        )
    if encoder_model is None and not name:
        raise ValueError(
            "A function needs a name, under which its embeddings are kept: pass name, and change it whenever the "
            "function changes."
        )
    if encoder_model is None and prompt is not None:
        raise ValueError(f"A function gets no prompt, got {prompt!r}. Leave it out, and put it before texts yourself.")
    if encoder_model is not None:
        check_inputs(encoder_model, {TASKS[dataset].modality for dataset in names}, prompt)
    name = name or name_of(cast(SentenceTransformer, model))
    state = processes()
    output_dir, root = Path(output_dir), Path(root)
    if encoder_model is None:
        key = hash_of("function", name)
    else:
        if prompt is None and encoder_model.default_prompt_name is not None:
            prompt = encoder_model.prompts.get(encoder_model.default_prompt_name)
        key = fingerprint(encoder_model, prompt)
    if state.is_main_process:
        settings = {} if encoder_model is None else settings_of(encoder_model)
        identity = {"model": name, "fingerprint": key, "prompt": prompt, "limit": limit}
        _claim(output_dir / "run.json", identity, settings)
        unused = [] if encoder_model is None else [n for n in ("query", "document") if encoder_model.prompts.get(n)]
        if unused and prompt is None:
            logger.warning(
                f"The model's prompts for {' and '.join(unused)} are not used: the texts of MMEB-V2 have instructions "
                "of their own. To put one before every input, pass prompt."
            )
    state.wait_for_everyone()
    store = EmbeddingStore(Path(cache_dir or output_dir / "embeddings") / key)
    encoder = Encoder(model, prompt, batch_tokens, store, state)

    scores: dict[str, dict[str, float]] = {}
    errors: dict[str, str] = {}
    for number, dataset in enumerate(names, 1):
        folder = output_dir / TASKS[dataset].modality
        done = folder / f"{dataset}_score.json"
        if done.is_file():
            scores[dataset] = json.loads(done.read_text("utf-8"))
            continue
        task, problem = None, None
        try:
            task = load_task(dataset, root, limit)
            _check(task)
            encoder.encode(task)
        except Exception as error:  # reported below: the other processes wait for this one
            problem = _explain(dataset, error)
        # After this, all processes have written their embeddings.
        problems = [text for text in gather_object([problem]) if text]
        store.refresh()
        if not problems and state.is_main_process:
            assert task is not None  # there was no problem
            try:
                _score(task, store, folder)
            except Exception as error:
                problems = [_explain(dataset, error)]
        problems = [text for part in gather_object([problems]) for text in part]
        if problems:
            errors[dataset] = problems[0]
        else:
            scores[dataset] = json.loads(done.read_text("utf-8"))
        if state.is_main_process:
            metric = TASKS[dataset].metric
            result = errors.get(dataset) or f"{dataset}: {metric} {100 * scores[dataset][metric]:.1f}"
            if limit is None and dataset in (counts := report.other_counts(scores)):
                result += f" ({counts[dataset]})"
            tqdm.write(f"[{number}/{len(names)}] {result}")
    if state.is_main_process:
        dimension = _remembered(output_dir / "run.json", "embedding_dimension", store.dimension)
        known = {"model_name": name.rsplit("/", 1)[-1], "embedding_dimension": dimension}
        known |= {} if encoder_model is None else metadata_of(encoder_model)
        _report(output_dir, errors, known | dict(metadata or {}), limit, eval_task)
    return scores, errors


def processes() -> PartialState:
    """The processes that share the work. They wait up to a week for each other."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


def chosen(datasets: Collection[str] | None, modalities: Collection[str] | None) -> list[str]:
    """Names of the datasets that are both in `datasets` and of `modalities` (`None`: all). Refuses unknown names."""
    unknown = sorted({*(datasets or ())} - set(TASKS)) + sorted({*(modalities or ())} - set(report.MODALITIES))
    if unknown:
        raise ValueError(
            f"Unknown {', '.join(map(repr, unknown))}. Modalities are {', '.join(report.MODALITIES)}; datasets are "
            f"{', '.join(TASKS)}."
        )
    chosen = [
        name
        for name, task in TASKS.items()
        if (datasets is None or name in datasets) and (modalities is None or task.modality in modalities)
    ]
    if not chosen:
        raise ValueError(
            f"No dataset is both in {datasets} and of the modalities {modalities}. Leave out one of the two."
        )
    return chosen


def _claim(path: Path, run: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Record which model an output folder belongs to, with its settings. Refuse a folder of another `run`."""
    before = {}
    if path.is_file():
        before = json.loads(path.read_text("utf-8"))
        differing = [f"{key} {before.get(key)!r} (now {run[key]!r})" for key in run if before.get(key) != run[key]]
        if differing:
            raise ValueError(
                f"{path.parent} holds results of another run: {', '.join(differing)}. The fingerprint covers "
                "weights, settings and library versions. Name another output folder."
            )
    _write_json(path, {**before, **run, **settings})


def _remembered(path: Path, name: str, value: Any) -> Any:
    """The value, which is recorded with the run; `None`: that of an earlier run."""
    run = json.loads(path.read_text("utf-8"))
    if value is not None and run.get(name) != value:
        _write_json(path, {**run, name: value})
    return run.get(name) if value is None else value


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as file:
        file.write(json.dumps(content, indent=2).encode())


def _explain(dataset: str, error: Exception) -> str:
    text = str(error)
    if not isinstance(error, (ValueError, OSError)):  # not an error of the data
        traceback.print_exception(error)
        advice = ". Lower batch_tokens." if isinstance(error, torch.OutOfMemoryError) else ""
        text = f"{type(error).__name__}: {error}{advice}"
    return text if text.startswith(dataset) else f"{dataset}: {text}"


def _check(task: Task) -> None:
    """Refuse a task that would be scored wrongly."""
    if not task.queries:
        raise ValueError(f"{task.name} has no queries.")
    for row, query in enumerate(task.queries):
        where = f"{task.name}, query {row} ({query.id!r})"
        if not query.relevance:
            raise ValueError(f"{where} has no relevant candidate: no ranking of it could be scored.")
        names = query.candidates
        own: Collection[str] = task.candidates
        if names is not None:
            own = set(names)
            if len(own) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise ValueError(f"{where} lists the candidate {twice!r} more than once.")
        absent = [name for name in query.relevance if name not in own]
        if absent := absent or [name for name in names or () if name not in task.candidates]:
            raise ValueError(f"{where} refers to {absent[0]!r}, which is not among its {len(own)} candidates.")


def _score(task: Task, store: EmbeddingStore, folder: Path) -> None:
    """Rank the candidates of each query, and write rankings and scores."""
    keys = [row.key for row in task_inputs(task)]
    queries, keys = store.vectors(keys[: len(task.queries)]), keys[len(task.queries) :]
    names = list(task.candidates)
    if all(query.candidates is None for query in task.queries):
        blocks = (store.vectors(keys[start : start + BLOCK]) for start in range(0, len(keys), BLOCK))
        rankings = [[names[position] for position in row] for row in rank(queries, blocks, _depth(names))]
    else:
        # Candidates are ordered by a hash of their names: many datasets list the right one first, and of equally
        # similar candidates the first one ranks higher.
        order = {name: hash_of(name) for name in names}
        own = [names if query.candidates is None else query.candidates for query in task.queries]
        of_name, rankings = dict(zip(names, keys)), []
        for start, stop in _parts(own):
            places = {name: place for place, name in enumerate(dict.fromkeys(chain.from_iterable(own[start:stop])))}
            vectors = store.vectors([of_name[name] for name in places])
            for vector, candidates in zip(queries[start:stop], own[start:stop]):
                ordered = sorted(candidates, key=order.__getitem__)
                best = rank(vector[None], [vectors[[places[name] for name in ordered]]], _depth(ordered))[0]
                rankings.append([ordered[position] for position in best])
    scores = score(rankings, [query.relevance for query in task.queries])
    with replacing(folder / f"{task.name}_pred.jsonl") as file:
        for ranking, query in zip(rankings, task.queries):
            graded = sorted(query.relevance.items(), key=lambda pair: -pair[1])
            line = {"prediction": ranking, "label": [n for n, _ in graded], "rel_scores": [g for _, g in graded]}
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    # Written last, because a dataset with a score counts as done.
    with replacing(folder / f"{task.name}_score.json") as file:
        file.write(json.dumps(scores, indent=4).encode())


def _parts(candidates: Sequence[Collection[str]]) -> Iterator[tuple[int, int]]:
    """Starts and ends of parts of the queries that have at most `POOL` candidates together, or are one query."""
    start, pool = 0, set[str]()
    for stop, own in enumerate(candidates):
        grown = pool.union(own)
        if len(grown) > POOL and stop > start:
            yield start, stop
            start, grown = stop, set(own)
        pool = grown
    yield start, len(candidates)


def _depth(candidates: Sized) -> int:
    return len(candidates) if len(candidates) <= FULL_RANKING else RANKING_DEPTH


def _report(
    output_dir: Path, errors: Mapping[str, str], metadata: Mapping[str, Any], limit: int | None, eval_task: str | None
) -> None:
    """Write the report of all scores in the folder, of this run and earlier ones."""
    name = metadata["model_name"]
    files = {dataset: output_dir / task.modality / f"{dataset}_score.json" for dataset, task in TASKS.items()}
    scores = {dataset: json.loads(file.read_text("utf-8")) for dataset, file in files.items() if file.is_file()}
    run = json.loads((output_dir / "run.json").read_text("utf-8"))
    packages = run.pop("versions", {})
    settings = {key: value for key, value in run.items() if key not in ("model", "fingerprint", "limit")} | packages
    text = report.markdown(scores, name=name, errors=errors, limit=limit, settings=settings)
    with replacing(output_dir / "report.md") as file:
        file.write(text.encode())
    print(f"\n{text}")
    if limit is not None:
        return  # the scores are not comparable with published ones
    summary = report.summarise(scores)
    made = [output_dir / name for name in (f"leaderboard/{name}.json", "report.png", ".eval_results/mmeb-v2.yaml")]
    # Those of an earlier run, which may have had scores that are gone.
    for path in made if summary.overall is None else made[:2]:
        path.unlink(missing_ok=True)
    if any(average is not None for average in summary.modalities.values()):
        with replacing(made[0]) as file:
            file.write(json.dumps(report.leaderboard(scores, metadata), indent=4).encode())
        with replacing(made[1]) as file:
            file.write(report.picture(scores, name=name))
    if eval_task and summary.overall is not None:
        with replacing(made[2]) as file:
            file.write(report.eval_results(scores, task_id=eval_task).encode())
