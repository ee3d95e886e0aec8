"""One child process of the fuzzer: makes inputs, hands them over, and judges what comes back.

Its standard output is a line of JSON for each batch that is begun or done, so that a crash or a hang has a place.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from benchmarks.fuzz import files, inputs, media
from btok_hf import BTokSentenceTransformer
from btok_hf.inputs import ImageLimits, check_input

# Rows of `encode` in one call. Files are handed over one by one.
ROWS = {"texts": 32, "junk": 32, "arrays": 16, "images": 16, "videos": 8, "dicts": 16, "messages": 16}
FILES = ("pairs", "recipes", "repositories")
FORMS = ("pictures", "clips")
KINDS = (*ROWS, *FORMS, *FILES)
MAKE = {
    "texts": lambda rng, folder: inputs.text(rng),
    "junk": lambda rng, folder: inputs.junk(rng),
    "arrays": lambda rng, folder: media.array(rng),
    "images": lambda rng, folder: media.image_forms(rng, media.image_bytes(rng), folder),
    "videos": media.video,
    "dicts": inputs.mapping,
    "messages": inputs.messages,
    "pictures": media.same_picture,
    "clips": media.same_video,
}


class Fuzzer:
    """Hands over inputs of one kind. Input `index` depends on the seed, the kind and the index alone."""

    def __init__(self, kind, seed, model_path):
        self.kind, self.seed = kind, seed
        self.root = Path(tempfile.mkdtemp(prefix="btok-fuzz-"))
        os.chdir(self.root)
        self.model = BTokSentenceTransformer(model_path, device="cpu", max_seq_length=256)
        processor = self.model.processor.image_processor
        self.limits = ImageLimits(processor.size["longest_edge"], processor.patch_size)
        self.special = set(self.model.tokenizer.added_tokens_decoder)
        self.counts, self.warnings, self.findings = Counter(), Counter(), []

    def make(self, index):
        rng = np.random.default_rng([self.seed, KINDS.index(self.kind), index])
        folder = self.root / str(index)
        folder.mkdir(exist_ok=True)
        with warnings.catch_warnings():  # of the generators
            warnings.simplefilter("ignore")
            item = MAKE[self.kind](rng, folder)
        # A list that begins with a message is one conversation and not a list of inputs.
        return [item] if isinstance(item, Mapping) and "role" in item else item

    def find(self, index, what, error=None):
        """Note that input `index` was answered wrongly."""
        place = ""
        if error is not None:
            frames = traceback.extract_tb(error.__traceback__)
            place = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[::-1][:4])
            what = f"{what}: {type(error).__name__}: {str(error)[:300]}"
        self.counts["findings"] += 1
        self.findings.append({"input": f"{self.kind}:{index}", "what": what, "place": place})

    def run(self, indices):
        """One batch of inputs."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if self.kind in ROWS:
                self.encode(indices)
            else:
                for index in indices:
                    rng = np.random.default_rng([self.seed, KINDS.index(self.kind), index])
                    folder = self.root / str(index)
                    folder.mkdir()
                    getattr(self, self.kind)(index, rng, folder)
        for warning in caught:
            self.warnings[f"{warning.category.__name__}: {str(warning.message)[:80]}"] += 1
        for index in indices:
            shutil.rmtree(self.root / str(index), ignore_errors=True)

    def encode(self, indices):
        items = [self.make(index) for index in indices]
        try:
            vectors, kept, errors = self.model.encode(items, on_error="skip")
        except Exception as error:
            if len(indices) == 1:
                self.find(indices[0], "not a ValueError or OSError of this input", error)
            else:
                for index in indices:
                    self.encode([index])
            return
        lengths = np.linalg.norm(vectors, axis=1)
        for place, length in zip(kept, lengths):
            self.counts["vectors"] += 1
            if not np.isfinite(length) or abs(length - 1) > 1e-3:
                self.find(indices[place], f"a vector of length {length}")
        for place, message in errors.items():
            self.counts["refused"] += 1
            if not message.startswith(f"Input {place} "):
                self.find(indices[place], f"the message does not name the input: {message[:200]}")
        for place in kept:
            if indices[place] % (4 if self.kind == "texts" else 10):
                continue
            with contextlib.suppress(OSError, ValueError):  # iterators are read once, closed files stay closed
                self.reread(indices[place], self.make(indices[place]))

    def reread(self, index, item):
        """Checking twice changes nothing, and texts give no special tokens."""
        once = check_input(item, self.limits)
        if not equal(once, check_input(once, self.limits)):
            self.find(index, "checked twice, it is another input")
        if self.kind == "texts":
            ids = self.model.preprocess([once])["input_ids"][0].tolist()
            typed = [token for token in ids if token in self.special]
            if len(typed) != len(self.model.config.btok_token_ids):
                self.find(index, f"a text gives the special tokens {typed}")

    def same(self, index, forms):
        first = None
        for number, form in enumerate(forms):
            try:
                checked = check_input(form, self.limits, index)
            except Exception as error:
                self.find(index, f"form {number} is refused", error)
                continue
            if isinstance(checked, list):  # messages
                (part,) = checked[0]["content"]
                checked = {part["type"]: part[part["type"]]}
            checked = {key: value[0] if isinstance(value, list) else value for key, value in checked.items()}
            first = checked if first is None else first
            self.counts["forms"] += 1
            if not equal(first, checked):
                self.find(index, f"form {number} gives another input")
        self.counts["vectors"] += 1

    def pictures(self, index, rng, folder):
        self.same(index, media.same_picture(rng, folder))

    def clips(self, index, rng, folder):
        self.same(index, media.same_video(rng, folder))

    def judge(self, index, name, function):
        """Call a function on a file: it works, or names the file."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                result = function()
        except (ValueError, OSError) as error:
            self.counts["refused"] += 1
            if not str(error).strip() or str(name) not in f"{error}":
                self.find(index, f"the message does not name {name}", error)
            return None
        except Exception as error:
            self.find(index, "not a ValueError or OSError", error)
            return None
        self.counts["vectors"] += 1
        return result

    def pairs(self, index, rng, folder):
        from btok_hf.training.cells import decode_cell
        from btok_hf.training.data import load_pairs

        path = files.pairs(rng, folder)
        rows = self.judge(index, path.name, lambda: load_pairs(str(path)))
        if rows is None:
            return
        try:
            cells = [decode_cell(row[side]) for row in rows for side in ("query", "positive")]
            self.model.encode(cells, on_error="skip")
        except (ValueError, OSError) as error:
            self.find(index, "a cell is refused by decode_cell", error)
        except Exception as error:
            self.find(index, "a cell", error)

    def recipes(self, index, rng, folder):
        from trl import TrlParser

        from btok_hf.hub_card.card import CardArguments
        from btok_hf.training import CondensationConfig
        from btok_hf.training.train import ModelArguments, ScriptArguments, set_up

        parser = TrlParser((ScriptArguments, CondensationConfig, ModelArguments, CardArguments))
        fields = [action.dest for action in parser._actions if action.dest not in ("help", "config")]
        harmless = [name for name in fields if "hub" not in name and "push" not in name and "dispatch" not in name]
        path = files.recipe(rng, folder, harmless)

        def call():
            with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
                try:
                    return set_up(["--config", str(path)])
                except SystemExit as error:
                    if error.code != 2:
                        raise RuntimeError(f"exit status {error.code}") from error
                    raise ValueError("refused by the parser") from error

        self.judge(index, "", call)

    def repositories(self, index, rng, folder):
        from btok_hf.golden import read_golden

        path, name = files.repository(rng, folder)

        def call():
            read_golden(path / "golden.json")
            return BTokSentenceTransformer(str(path), device="cpu", local_files_only=True).encode(["a text"])

        vector = self.judge(index, "", call)
        if vector is not None and not np.isfinite(vector).all():
            self.find(index, f"a vector that is not finite, by {name}")


def equal(one, other):
    """Whether two checked inputs are the same."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return np.array_equal(np.asarray(one), np.asarray(other))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--start", type=int, required=True)
    parser.add_argument("--stop", type=int, required=True)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--model", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    fuzzer = Fuzzer(arguments.kind, arguments.seed, arguments.model)
    rows = arguments.rows or ROWS.get(arguments.kind, 1)
    for start in range(arguments.start, arguments.stop, rows):
        stop = min(start + rows, arguments.stop)
        print(json.dumps({"begun": start, "stop": stop}), flush=True)
        fuzzer.run(list(range(start, stop)))
        done = {"done": stop, "counts": fuzzer.counts, "warnings": fuzzer.warnings, "findings": fuzzer.findings}
        print(json.dumps(done), flush=True)
        fuzzer.counts, fuzzer.warnings, fuzzer.findings = Counter(), Counter(), []
    shutil.rmtree(fuzzer.root, ignore_errors=True)


if __name__ == "__main__":
    main()
