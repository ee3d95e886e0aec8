"""Evaluate a model on MMEB-V2: encode every input once, rank, score, report.

- An input is known by its text and by the path, size and time of its files. Its embedding is kept on disk under a
  fingerprint of the model, so datasets share what they have in common, and no model gets another one's embeddings.
- Embeddings are written 256 at a time, each file in one step. After a kill, the same command goes on from there; a
  dataset with a score is not read again.
- Started with `accelerate launch`, every process encodes its share. All must see the same `output_dir`.
- Candidates are read back in blocks: memory does not grow with a corpus.

The command line is `python -m btok_hf.evaluation.mmeb`.
"""

import argparse
import json
import os
import re
import sys
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from hashlib import blake2b
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from sentence_transformers import SentenceTransformer
from tqdm import tqdm
from transformers.utils import cached_file

from btok_hf.evaluation import report
from btok_hf.evaluation.metrics import check_embeddings, rank, score
from btok_hf.evaluation.tasks import TASKS, load_task, read_input
from btok_hf.golden import versions
from btok_hf.media import estimate_tokens
from btok_hf.sentence_transformer import BTokSentenceTransformer

ROWS_PER_FILE = 256
# Whole rankings are kept up to so many candidates, beyond that the first 100: metrics look at 10, and whole ones of
# 10⁵ pages for thousands of queries are gigabytes.
WHOLE_RANKING, RANKING_DEPTH = 2000, 100
BLOCK = 2048
# Media that are decoded ahead of the model.
DECODED_AHEAD = 8


def evaluate(
    model,
    root,
    output_dir,
    *,
    datasets=None,
    modalities=None,
    limit=None,
    batch_tokens=16384,
    prompt=None,
    name=None,
    cache_dir=None,
    metadata=None,
    eval_task=None,
):
    """Score a model on datasets of MMEB-V2, and write a report.

    A dataset that is absent or malformed, or that the model fails on, is named in the report; the others go on.
    A script of several processes should end with `accelerate.PartialState().destroy_process_group()`, because torch
    aborts some processes at their exit otherwise.

    Args:
        model (`SentenceTransformer` or `Callable`): Anything with Sentence-Transformers' `encode`, or a function from
            a list of inputs (dicts of `text`, `image`, `video`, decoded) to an array of shape `(inputs, dimension)`.
        root (`str` or `Path`): Where the datasets are, as `load_task` takes it.
        output_dir (`str` or `Path`): For `{modality}/{dataset}_score.json` and `_pred.jsonl` (a line per query: the
            names of its candidates, best first, the relevant names and their grades; of a query with more than 2,000
            candidates only the first 100), `report.md`, `report.png`, `leaderboard/{name}.json` and
            `.eval_results/mmeb-v2.yaml`. Belongs to one model and `limit`; the report covers earlier runs in it too.
        datasets, modalities (`list[str]`, *optional*): Which of the 78 datasets. Default: all.
        limit (`int`, *optional*): Only the first queries of each dataset, to try things out.
        batch_tokens (`int`): About how many tokens a forward pass may take, padding included.
        prompt (`str`, *optional*): Instruction for every input, besides those that MMEB-V2 puts into the texts.
            Default: what the model itself uses by default.
        name (`str`, *optional*): Of the model, in the report. Default: its repository's. A callable needs one: its
            embeddings are kept under this name, so change it whenever the function changes.
        cache_dir (`str` or `Path`, *optional*): Where embeddings are kept, for any number of models. Default:
            `embeddings` in `output_dir`.
        metadata (`dict`, *optional*): For the leaderboard, beside what is known: see `report.leaderboard`.
        eval_task (`str`, *optional*): Id of the benchmark's task on the Hub, from the `eval.yaml` of its dataset: once
            all 78 are scored, writes the `.eval_results` to put into the model's repository.

    Returns:
        `tuple[dict[str, dict[str, float]], dict[str, str]]`: Scores and errors by dataset.

    Raises:
        ValueError: Unknown datasets, a callable without a name, or an `output_dir` of another model.
    """
    names = _chosen(datasets, modalities)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more, got {limit}. Leave it out to score every query.")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be 1 or more, got {batch_tokens}.")
    is_function = not hasattr(model, "encode")
    if is_function and not name:
        raise ValueError("A function cannot be told from another one: pass name, and change it with the function.")
    name = name or _name(model)
    state = _processes()
    output_dir, root = Path(output_dir), Path(root)
    if not is_function and prompt is None:
        prompt = model.prompts.get(model.default_prompt_name)
    key = _hash("function", name, prompt) if is_function else fingerprint(model, prompt)
    if state.is_main_process:
        _claim(output_dir / "run.json", {"model": name, "fingerprint": key, "prompt": prompt, "limit": limit})
    state.wait_for_everyone()
    store = EmbeddingStore(Path(cache_dir or output_dir / "embeddings") / key)
    encoder = _Encoder(model, prompt, batch_tokens, store, state)

    scores, errors = {}, {}
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
        except Exception as error:  # the other processes wait for this one
            problem = _explain(dataset, error)
        problems = [text for text in gather_object([problem]) if text]  # after which everything is on disk
        store.refresh()
        if not problems and state.is_main_process:
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
        known = {"model_name": name.rsplit("/", 1)[-1], "embedding_dimension": store.dimension}
        known |= {} if is_function else _metadata(model)
        _report(output_dir, errors, known | (metadata or {}), limit, eval_task)
    return scores, errors


def _processes():
    """The processes that share the work. They wait for each other as long as it takes."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


def _chosen(datasets, modalities):
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
        raise ValueError(f"Of datasets {datasets} and modalities {modalities} none is left. Leave out one, or both.")
    return chosen


def _claim(path, run):
    """Write down whose results a folder holds; refuse another's."""
    if path.is_file():
        before = json.loads(path.read_text("utf-8"))
        differing = [f"{key} {before.get(key)!r} (now {run[key]!r})" for key in run if before.get(key) != run[key]]
        if differing:
            raise ValueError(
                f"{path.parent} holds results of another run: {', '.join(differing)}. The fingerprint stands for "
                "weights, settings and library versions. Name another output folder."
            )
    with _replacing(path) as file:
        file.write(json.dumps(run, indent=2).encode())


def _explain(dataset, error):
    text = str(error)
    if not isinstance(error, (ValueError, OSError)):  # not of the data: show where
        traceback.print_exception(error)
        advice = ". Lower batch_tokens." if isinstance(error, torch.OutOfMemoryError) else ""
        text = f"{type(error).__name__}: {error}{advice}"
    return text if text.startswith(dataset) else f"{dataset}: {text}"


def _check(task):
    """Refuse what could only be scored wrongly."""
    if not task.queries:
        raise ValueError(f"{task.name} has no queries.")
    for row, query in enumerate(task.queries):
        where = f"{task.name}, query {row} ({query.id!r})"
        if not query.relevance:
            raise ValueError(f"{where} has no relevant candidate: no ranking of it could be scored.")
        names, own = query.candidates, task.candidates
        if names is not None:
            own = set(names)
            if len(own) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise ValueError(f"{where} lists the candidate {twice!r} more than once.")
        absent = [name for name in query.relevance if name not in own]
        if absent := absent or [name for name in names or () if name not in task.candidates]:
            raise ValueError(f"{where} refers to {absent[0]!r}, which is not among its {len(own)} candidates.")


# ---------------------------------------------------------------- embeddings


def fingerprint(model, prompt=None):
    """What embeddings depend on besides the input, as a short text: never the same for two models.

    It covers weights, modules, configuration, tokenizer, chat template, pixel settings, prompt, and the versions of
    torch, torchvision, transformers and sentence-transformers. Hashing takes about a second per gigabyte.

    Args:
        model (`SentenceTransformer`): The model.
        prompt (`str`, *optional*): Put before every input.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    first = model[0]
    processor, tokenizer = getattr(first, "processor", None), getattr(first, "tokenizer", None)
    config = getattr(model, "config", None)
    config = config.to_dict() if config is not None else {}
    settings = {
        "versions": versions(),
        "modules": [(type(module).__module__, type(module).__qualname__, _options(module)) for module in model],
        "config": {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")},
        "max_seq_length": model.max_seq_length,
        "truncate_dim": model.truncate_dim,
        "prompt": prompt,
        "template": [getattr(part, "chat_template", None) for part in (processor, tokenizer)],
        "pixels": [
            part.to_dict()
            for part in (getattr(processor, kind, None) for kind in ("image_processor", "video_processor"))
            if part is not None
        ],
    }
    if hasattr(tokenizer, "backend_tokenizer"):
        settings["tokenizer"] = json.loads(tokenizer.backend_tokenizer.to_str())
        # Set anew by every call.
        settings["tokenizer"] |= {"padding": None, "truncation": tokenizer.truncation_side}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _options(module):
    return module.get_config_dict() if hasattr(module, "get_config_dict") else None


def _hash(*parts):
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _inputs(task):
    """Everything that is encoded for a task, queries first, as (key, what it is, input)."""
    rows = ((f"query {row} ({query.id!r})", query.input) for row, query in enumerate(task.queries))
    for label, item in chain(rows, ((f"candidate {name!r}", item) for name, item in task.candidates.items())):
        try:
            yield _key(item, task.num_frames), label, item
        except OSError as error:  # it was there when the task was loaded
            raise OSError(f"{task.name}, {label}: {error}. Put it back and start again.") from error


def _key(item, num_frames):
    """What an input is known by: text, and where its files are, how large and how old."""
    parts = {"text": item.get("text")}
    if "image" in item:
        parts["image"] = _known_by(item["image"])
    if "video" in item:
        frames = sorted(entry.path for entry in os.scandir(item["video"]))
        parts |= {"video": [_known_by(path) for path in frames], "num_frames": num_frames}
    return bytes.fromhex(_hash(parts))


def _known_by(path):
    stat = os.stat(path)
    return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]


@contextmanager
def _replacing(path):
    """A file to write that takes its place at once when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # of its own: two runs may share a cache
    with open(draft, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


class EmbeddingStore:
    """Embeddings of one model on disk, by the key of their input.

    Args:
        folder (`Path`): One per model.
    """

    def __init__(self, folder):
        self.folder, self.dimension = folder, None
        self._files, self._places = [], {}
        folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __contains__(self, key):
        return key in self._places

    def refresh(self):
        """Take in what other processes wrote."""
        for path in sorted(set(self.folder.glob("*.embeddings")) - set(self._files)):
            with self._open(path) as (keys, vectors):
                self.dimension = self.dimension or vectors().shape[1]
            self._places |= {key.tobytes(): (len(self._files), row) for row, key in enumerate(keys)}
            self._files.append(path)

    def add(self, keys, vectors):
        """Write the embeddings, an array of shape `(keys, dimension)`, as one file."""
        keys = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
        with _replacing(self.folder / f"{blake2b(keys.tobytes(), digest_size=16).hexdigest()}.embeddings") as file:
            np.save(file, keys)
            np.save(file, vectors)

    def vectors(self, keys):
        """The embeddings as an array of shape `(keys, dimension)`; each file is read once."""
        places = np.array([self._places[key] for key in keys])
        result = np.empty((len(keys), self.dimension), np.float32)
        for number in np.unique(places[:, 0]):
            chosen = np.flatnonzero(places[:, 0] == number)
            with self._open(self._files[number]) as (_, vectors):
                result[chosen] = vectors()[places[chosen, 1]]
        return result

    @contextmanager
    def _open(self, path):
        try:
            with open(path, "rb") as file:
                yield np.load(file), lambda: np.load(file)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"The file of embeddings {path} is damaged ({error}). Delete it and start again."
            ) from error


class _Encoder:
    """Fills the store with the inputs of a task: those that it lacks, and this process's share of them."""

    def __init__(self, model, prompt, batch_tokens, store, state):
        self.model, self.prompt, self.batch_tokens = model, prompt, batch_tokens
        self.store, self.state = store, state
        self.tokenize = getattr(getattr(model, "tokenizer", None), "tokenize", None)
        self.processor = getattr(model, "processor", None)

    def encode(self, task):
        """Encode what is missing of a task. Every process must call it, and then synchronise and refresh the store."""
        missing = {}
        for key, label, item in _inputs(task):
            if key not in self.store:
                missing.setdefault(key, (key, label, item))
        # Every other row, so that each process gets equally many images, videos and texts.
        share = [*missing.values()][self.state.process_index :: self.state.num_processes]
        bar = tqdm(total=len(share), desc=task.name, unit="row", disable=not (share and self.state.is_main_process))
        with bar, ThreadPoolExecutor(DECODED_AHEAD) as pool:
            for start in range(0, len(share), ROWS_PER_FILE):
                part = share[start : start + ROWS_PER_FILE]
                # Like inputs together: less padding, and many models take no batch of several kinds.
                part.sort(key=lambda row: (sorted(row[2]), len(row[2].get("text") or "")))
                vectors = []
                for batch in self._batches(part, task, pool):
                    labels, items = zip(*batch)
                    try:
                        vectors.append(check_embeddings(self._call(list(items)), labels, self.store.dimension))
                    except ValueError as error:
                        raise ValueError(f"{task.name}, {labels[0]} to {labels[-1]}: {error}") from error
                    self.store.dimension = vectors[-1].shape[1]
                    bar.update(len(batch))
                self.store.add([key for key, *_ in part], np.concatenate(vectors))

    def _call(self, items):
        if not hasattr(self.model, "encode"):
            return self.model(items)
        # Never below encode's own 32: stock models take the rows as one batch either way, and BTokSentenceTransformer,
        # which counts tokens by batch_size, would cut a batch of few long rows in parts.
        return self.model.encode(items, batch_size=max(len(items), 32), prompt=self.prompt, show_progress_bar=False)

    def _batches(self, part, task, pool):
        """Lists of (label, decoded input) of one kind within the budget of tokens."""
        batch, longest = [], 0
        for label, item in self._decoded(part, task, pool):
            tokens = self._tokens(item)
            if batch and (
                item.keys() != batch[0][1].keys() or max(longest, tokens) * (len(batch) + 1) > self.batch_tokens
            ):
                yield batch
                batch, longest = [], 0
            batch.append((label, item))
            longest = max(longest, tokens)
        yield batch

    def _decoded(self, part, task, pool):
        """Labels and inputs, with media decoded by threads a little ahead of the model."""
        ahead = deque()
        for _, label, item in part:
            ahead.append((label, pool.submit(read_input, item, task.num_frames)))
            if len(ahead) > DECODED_AHEAD:
                yield self._result(task, *ahead.popleft())
        while ahead:
            yield self._result(task, *ahead.popleft())

    def _result(self, task, label, future):
        try:
            return label, future.result()
        except (ValueError, OSError) as error:
            raise ValueError(f"{task.name}, {label}: {error}") from error

    def _tokens(self, item):
        """About how many tokens an input takes, with the 16 around the text and the media."""
        return 16 + estimate_tokens([self.prompt, item], self.processor, self.tokenize)


# ---------------------------------------------------------------- results


def _score(task, store, folder):
    """Rank the candidates of each query, and write rankings and scores."""
    keys = [key for key, *_ in _inputs(task)]
    queries, keys = store.vectors(keys[: len(task.queries)]), keys[len(task.queries) :]
    names = list(task.candidates)
    if all(query.candidates is None for query in task.queries):
        blocks = (store.vectors(keys[start : start + BLOCK]) for start in range(0, len(keys), BLOCK))
        rankings = [[names[position] for position in row] for row in rank(queries, blocks, _depth(names))]
    else:
        vectors, places = store.vectors(keys), {name: place for place, name in enumerate(names)}
        rankings = []
        for vector, query in zip(queries, task.queries):
            own = names if query.candidates is None else query.candidates
            best = rank(vector[None], [vectors[[places[name] for name in own]]], _depth(own))[0]
            rankings.append([own[position] for position in best])
    scores = score(rankings, [query.relevance for query in task.queries])
    with _replacing(folder / f"{task.name}_pred.jsonl") as file:
        for ranking, query in zip(rankings, task.queries):
            graded = sorted(query.relevance.items(), key=lambda pair: -pair[1])
            line = {"prediction": ranking, "label": [n for n, _ in graded], "rel_scores": [g for _, g in graded]}
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    # Last: a dataset with a score is done.
    with _replacing(folder / f"{task.name}_score.json") as file:
        file.write(json.dumps(scores, indent=4).encode())


def _depth(candidates):
    return len(candidates) if len(candidates) <= WHOLE_RANKING else RANKING_DEPTH


def _name(model):
    return re.sub(r".*/(?=.)", "", str(model.config.name_or_path).rstrip("/")) if model.config is not None else "model"


def _metadata(model):
    """What the leaderboard asks for and a model knows."""
    return {
        "model_backbone": getattr(model.config, "btok_base_model", None) or getattr(model.config, "model_type", None),
        "model_size": round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2),
        "max_length_tokens": model.max_seq_length,
    }


def _report(output_dir, errors, metadata, limit, eval_task):
    """Report on everything that was scored, in this run and before."""
    name = metadata["model_name"]
    files = {dataset: output_dir / task.modality / f"{dataset}_score.json" for dataset, task in TASKS.items()}
    scores = {dataset: json.loads(file.read_text("utf-8")) for dataset, file in files.items() if file.is_file()}
    text = report.markdown(scores, name=name, errors=errors, limit=limit)
    with _replacing(output_dir / "report.md") as file:
        file.write(text.encode())
    print(f"\n{text}")
    if limit is not None:
        return  # nothing of this compares with published scores
    summary = report.summarise(scores)
    if any(average is not None for average in summary.modalities.values()):
        with _replacing(output_dir / "leaderboard" / f"{name}.json") as file:
            file.write(json.dumps(report.leaderboard(scores, metadata), indent=4).encode())
        with _replacing(output_dir / "report.png") as file:
            file.write(report.picture(scores, name=name))
    if eval_task and summary.overall is not None:
        with _replacing(output_dir / ".eval_results" / "mmeb-v2.yaml") as file:
            file.write(report.eval_results(scores, task_id=eval_task).encode())


# ---------------------------------------------------------------- command line


def load_model(repo, *, revision=None, dtype="auto", max_pixels=None, device=None):
    """Load a model to evaluate: with this library's wrapper, which neither pads nor cuts, if it has Bottleneck Tokens.

    Args:
        repo (`str`): Folder or Hub id of any Sentence-Transformers model.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        dtype (`str`): Precision to load in. Default: the checkpoint's.
        max_pixels (`int`, *optional*): Larger images and frames are reduced to this many pixels. Default: the model's.
        device (`str`, *optional*): Default: what Sentence-Transformers finds.

    Returns:
        `SentenceTransformer`
    """
    config = cached_file(repo, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    with_tokens = config is not None and "btok_token_ids" in json.loads(Path(config).read_text("utf-8"))
    Model = BTokSentenceTransformer if with_tokens else SentenceTransformer
    return Model(
        repo,
        revision=revision,
        device=device,
        model_kwargs={"dtype": dtype},
        processor_kwargs={} if max_pixels is None else {"max_pixels": max_pixels},
    )


def main(arguments=None):
    """The command line; returns the exit status: 1 if a dataset failed."""
    parser = argparse.ArgumentParser(
        prog="python -m btok_hf.evaluation.mmeb",
        description="Evaluate a Sentence-Transformers model on MMEB-V2. After a kill the same command goes on. "
        "Several processes share the work: accelerate launch -m btok_hf.evaluation.mmeb …",
        epilog="example: python -m btok_hf.evaluation.mmeb --model org/btok-2b --data MMEB-V2 --modality image,visdoc "
        "--output results/btok-2b",
    )
    names = {"type": lambda text: [name.strip() for name in text.split(",") if name.strip()]}
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--data", required=True, help="folder of the benchmark (see btok_hf/evaluation/tasks.py)")
    parser.add_argument("--output", required=True, help="folder for scores, rankings and report")
    parser.add_argument("--modality", **names, help="image, video, visdoc, separated by commas (default: all)")
    parser.add_argument("--datasets", **names, help="names of datasets, separated by commas (default: all)")
    parser.add_argument("--limit", type=int, help="only the first queries of each dataset, to try things out")
    parser.add_argument(
        "--batch-tokens", type=int, default=16384, help="tokens of a forward pass, about (default: %(default)s)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--dtype", default="auto", help="precision to load in (default: the checkpoint's)")
    parser.add_argument("--max-pixels", type=int, help="reduce larger images and frames to this many pixels")
    parser.add_argument("--prompt", help="instruction for every input (default: the model's default)")
    parser.add_argument("--eval-task", help="id in eval.yaml of the benchmark on the Hub: writes .eval_results")
    parser.add_argument("--cache", help="folder for embeddings (default: embeddings in the output folder)")
    args = parser.parse_args(arguments)
    try:
        model = load_model(
            args.model,
            revision=args.revision,
            dtype=args.dtype,
            max_pixels=args.max_pixels,
            device=str(_processes().device),
        )
        _, errors = evaluate(
            model,
            args.data,
            args.output,
            datasets=args.datasets,
            modalities=args.modality,
            limit=args.limit,
            batch_tokens=args.batch_tokens,
            prompt=args.prompt,
            name=Path(args.model).name,
            cache_dir=args.cache,
            eval_task=args.eval_task,
        )
        PartialState().destroy_process_group()  # torch aborts some processes at their exit otherwise
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
