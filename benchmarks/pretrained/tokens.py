"""What the Bottleneck Tokens of a model hold: how alike their states are, and what can be decoded from them.

    python -m benchmarks.pretrained.tokens runs/btok-135m         # some minutes on one core

States: the cosine between the K states of one item, MRR of term → definition with their mean (the embedding), with
each state alone, and with late interaction (MaxSim, ColBERT, arXiv 2004.12832: for each state of the query the nearest
state of the candidate). Decoding: text generated from the states of a definition alone. It is right if it is the term;
it is scored by the round trip too: embedded as a term, does it find the definition it came from?
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from benchmarks import RESULTS
from benchmarks.pretrained.tasks import positions, tasks
from btok_hf import BTokSentenceTransformer

TASK = "term → definition"


def states(model: SentenceTransformer, texts: list[str], prompt: str | None, count: int) -> np.ndarray:
    """Unit last hidden states of the Bottleneck Tokens, shape `(texts, K, hidden)`."""
    found = model.encode(
        [{"text": text} for text in texts], prompt=prompt, output_value="token_embeddings", batch_size=32
    )
    last = torch.stack([states[-count:] for states in found]).float()
    return torch.nn.functional.normalize(last, dim=-1).cpu().numpy()


def mrr(scores: np.ndarray) -> float:
    """Mean reciprocal rank in percent, where candidate i is the answer of query i."""
    return round(100 * float(np.mean(1 / np.array(positions(scores, list(range(len(scores))))))), 1)


def of_states(queries: np.ndarray, candidates: np.ndarray) -> dict[str, float | list[float]]:
    """The figures on states of shape `(items, K, hidden)`."""
    pairs = np.triu_indices(queries.shape[1], 1)

    def unit(vectors: np.ndarray) -> np.ndarray:
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    within = np.concatenate([(part @ part.transpose(0, 2, 1))[:, *pairs] for part in (queries, candidates)])
    # One state of an item and the same one of the next item: how alike states are that have nothing in common.
    between = np.concatenate([(part * np.roll(part, 1, axis=0)).sum(-1) for part in (queries, candidates)])
    each = np.einsum("qih,cjh->qcij", queries, candidates)
    return {
        "cosine between the states of an item": round(float(within.mean()), 3),
        "cosine between the same state of two items": round(float(between.mean()), 3),
        "MRR of the mean": mrr(unit(queries.mean(1)) @ unit(candidates.mean(1)).T),
        "MRR of each state alone": [mrr(each[:, :, i, i]) for i in range(queries.shape[1])],
        "MRR of MaxSim": mrr(each.max(-1).sum(-1)),
        "MRR of all states side by side": mrr(np.einsum("qcii->qc", each)),
    }


def words(text: str) -> set[str]:
    """The words of a text."""
    return set(re.findall(r"\w+", text.casefold()))


def shared(text: str, right: str) -> float:
    """The share of the words of `text` that are in `right`."""
    return len(words(text) & words(right)) / max(1, len(words(text)))


def of_decoded(
    model: BTokSentenceTransformer,
    terms: list[str],
    definitions: list[str],
    asking: str | None,
    answering: str | None,
    max_new_tokens: int = 10,
) -> tuple[dict[str, float], list[str]]:
    """The figures on texts decoded from definitions, and the texts.

    `asking` and `answering` are the prompts of terms and of definitions.
    """
    decoded = []
    for start in range(0, len(definitions), 32):
        rows = [{"text": text} for text in definitions[start : start + 32]]
        decoded += model.reconstruct(rows, prompt=answering, max_new_tokens=max_new_tokens)

    def embed(texts: list[str], prompt: str | None) -> np.ndarray:
        return model.encode([{"text": text if text.strip() else "nothing"} for text in texts], prompt=prompt)

    candidates = embed(definitions, answering)
    others = [shared(text, term) for i, text in enumerate(decoded) for j, term in enumerate(terms) if i != j]
    return {
        "the term itself, %": round(100 * float(np.mean([words(a) == words(b) for a, b in zip(decoded, terms)])), 1),
        "words in the term, %": round(100 * float(np.mean(list(map(shared, decoded, terms)))), 1),
        "words in another term, %": round(100 * float(np.mean(others)), 1),
        "words in the definition, %": round(100 * float(np.mean(list(map(shared, decoded, definitions)))), 1),
        "round trip, MRR": mrr(embed(decoded, asking) @ candidates.T),
        "the true term, MRR": mrr(embed(terms, asking) @ candidates.T),
    }, decoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of an exported repository")
    parser.add_argument("--states", type=int, default=300, help="terms to compare, drawn from all books")
    parser.add_argument("--decoded", type=int, default=256, help="definitions to decode, the first of those")
    parser.add_argument("--output", type=Path, default=RESULTS / "pretrained" / "tokens.json")
    options = parser.parse_args()
    task = tasks()[TASK]
    drawn = np.random.default_rng(0).permutation(len(task.queries))  # the first rows are of one book
    terms, definitions = ([texts[index] for index in drawn] for texts in (task.queries, task.candidates))
    stock = SentenceTransformer(options.model, device="cpu")
    prompts = {kind: stock.prompts.get(kind) for kind in ("term", "definition")}
    count = stock[0].auto_model.config.btok_num_tokens
    result = of_states(
        states(stock, terms[: options.states], prompts["term"], count),
        states(stock, definitions[: options.states], prompts["definition"], count),
    )
    model = BTokSentenceTransformer(options.model, device="cpu")
    few = terms[: options.decoded], definitions[: options.decoded]
    figures, decoded = of_decoded(model, *few, prompts["term"], prompts["definition"])
    for name, value in (result | figures).items():
        print(f"{name}: {value}")
    for text, term, definition in list(zip(decoded, *few))[:20]:
        print(f"    {definition[:90]} ({term}) → {text}")
    options.output.write_text(
        json.dumps(
            {
                "command": f"python -m benchmarks.pretrained.tokens {' '.join(sys.argv[1:])}",
                "terms": options.states,
                **result,
                "definitions": options.decoded,
                **figures,
                "decoded": list(zip(few[1], few[0], decoded)),
            },
            indent=1,
            ensure_ascii=False,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
