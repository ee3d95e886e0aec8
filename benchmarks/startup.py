"""Start-up times: imports, and loading an exported repository of Qwen2-VL against the stock load of the same files.

    python -m benchmarks.startup    # 5 minutes on one CPU core with --rounds 3

It writes benchmarks/results/startup.json.

Every time is measured inside a fresh process. The processes alternate. Files are in the page cache.
"""

import subprocess
import sys

from benchmarks import ROOT
from benchmarks.bench import arguments, record, repository, show, summary
from btok_hf import BTokSentenceTransformer, export_model
from btok_hf.modeling.modeling_btok import STOCK_CLASSES

IMPORTS = {
    "torch": "import torch",
    "torch, btok_hf": "import torch, btok_hf",
    "sentence_transformers": "from sentence_transformers import SentenceTransformer",
    "BTokSentenceTransformer": "from btok_hf import BTokSentenceTransformer",
    "PreTrainedModel": "from transformers import PreTrainedModel",
    "all backbones": f"from transformers import {', '.join(STOCK_CLASSES.values())}",
    "BTokForEmbedding": "from btok_hf import BTokForEmbedding",
}
LOADS = {
    "AutoModel": "AutoModel.from_pretrained(path)",
    "AutoModel, trust_remote_code": "AutoModel.from_pretrained(path, trust_remote_code=True)",
    "BTokForEmbedding": "BTokForEmbedding.from_pretrained(path)",
    "SentenceTransformer": "SentenceTransformer(path, device='cpu')",
    "BTokSentenceTransformer": "BTokSentenceTransformer(path, device='cpu')",
}
EVERYTHING = (
    "import os; os.environ['HF_HUB_OFFLINE'] = '1'; from transformers import AutoModel, Qwen2VLModel; "
    "from sentence_transformers import SentenceTransformer; from btok_hf import *; "
)


def seconds(statement, setup=""):
    """Seconds that a statement takes in a fresh process."""
    code = f"{setup}\nimport time\nstart = time.perf_counter()\n{statement}\nprint(time.perf_counter() - start)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def table(name, statements, rounds, setup, pairs):
    found = {key: [] for key in statements}
    for turn in range(rounds + 1):
        for key in list(statements)[:: 1 if turn % 2 else -1]:
            value = seconds(statements[key], setup)
            if turn:  # the first round fills the page cache
                found[key].append(value)
    rows = []
    for key, reference in pairs:
        part = summary({reference: found[reference], key: found[key]}, reference)
        rows.append(
            show(
                {
                    "table": name,
                    "what": key,
                    "against": reference,
                    "median_s": part[key]["median_s"],
                    "against_s": part[reference]["median_s"],
                    "more_s": round(part[key]["median_s"] - part[reference]["median_s"], 3),
                    "times": round(1 / part[key]["speed_ratio"], 3),
                }
            )
        )
    return rows


def main():
    options = arguments(__doc__)
    path = ROOT / "runs" / "bench" / options.size / "exported"
    if not (path / "golden.json").exists():
        export_model(BTokSentenceTransformer(repository(options.size, 4), device="cpu"), path)
    rows = table(
        "import",
        IMPORTS,
        options.rounds,
        "",
        [
            ("torch, btok_hf", "torch"),
            ("BTokSentenceTransformer", "sentence_transformers"),
            ("BTokForEmbedding", "PreTrainedModel"),  # the class of a family is imported when a model of it is loaded
            ("BTokForEmbedding", "all backbones"),
        ],
    )
    rows += table(
        "load",
        LOADS,
        options.rounds,
        EVERYTHING + f"path = {str(path)!r}",
        [
            ("AutoModel, trust_remote_code", "AutoModel"),
            ("BTokForEmbedding", "AutoModel"),
            ("BTokSentenceTransformer", "SentenceTransformer"),
        ],
    )
    record("startup", rows, size=options.size)


if __name__ == "__main__":
    main()
