"""The arms of the paper's claims on a pretrained base: what is run, what is skipped, and what the tables say."""

import json
from unittest.mock import patch

import pytest
import torch

from benchmarks.pretrained import base, claims
from benchmarks.pretrained.run import ARMS, add_tokens, arguments, condense_by
from benchmarks.pretrained.tasks import tasks
from benchmarks.pretrained.tokens import of_decoded
from btok_hf import BTokSentenceTransformer
from tests.support.pretrained import random_tower, write_llama

TASK = "title → text"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The tiny base."""
    folder = tmp_path_factory.mktemp("base")
    base.build(write_llama(tmp_path_factory.mktemp("gguf"))[0], random_tower(), folder)
    return folder


def options(tmp_path, words=""):
    return claims.arguments(
        [*words.split(), "--results", str(tmp_path / "results"), "--output", str(tmp_path / "runs")]
    )


def write(folder, arm, seed, ranks, steps=300, **more):
    """A result as `run.py` writes it, as far as the tables read it."""
    folder.mkdir(exist_ok=True)
    settings = {"max_steps": steps, "per_device_train_batch_size": 64, "learning_rate": 5e-4, "temperature": 0.05}
    result = {
        "arm": arm,
        "seed": seed,
        "passage": [40, 160],
        "settings": settings,
        "machine": "a GPU",
        "ranks": {TASK: ranks},
        **more,
    }
    (folder / f"{arm}-s{seed}.json").write_text(json.dumps(result))


def test_arms_are_run_seed_by_seed_and_what_has_a_result_is_not_run_again(built, tmp_path, capsys, monkeypatch):
    arms = dict.fromkeys(("last-token", "mean", "btok-condensation-early"), "")
    monkeypatch.setattr(claims, "TABLES", {"arms": arms, "again": arms})
    write(tmp_path / "results", "last-token", 0, [1])
    given = f"--seeds 0 --minutes 5 --steps 5 --batch 4 --only title --passage 4 8 --decoded 2 --base {built}"
    assert claims.run_all(options(tmp_path, given)) == []
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" {'title → text': ")[0] for line in lines] == ["mean-s0", "btok-condensation-early-s0"]
    result = json.loads((tmp_path / "results" / "btok-condensation-early-s0.json").read_text())
    assert result["settings"]["condensation_steps"] == 2 and result["passage"] == [4, 8]
    assert len(result["ranks"][TASK]) == len(tasks()[TASK].queries)
    assert result["decoded"]["definitions"] == 2 and "round trip, MRR" in result["decoded"]
    assert json.loads((tmp_path / "results" / "mean-s0.json").read_text())["decoded"] is None  # it has no BToks


def test_what_the_time_ends_in_and_what_fails_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(claims, "TABLES", {"arms": {"btok": ""}})
    assert claims.run_all(options(tmp_path, "--seeds 7 --minutes 0.001 --base nowhere")) == ["btok-s7"]
    assert "btok, seed 7: the time is over" in capsys.readouterr().out
    assert claims.run_all(options(tmp_path, "--seeds 7 --base nowhere")) == ["btok-s7"]
    assert "btok, seed 7 failed with 1: " in capsys.readouterr().out
    assert "There is no base at nowhere." in (tmp_path / "runs" / "btok-s7.log").read_text()
    assert claims.run_all(options(tmp_path, "--seeds 7 8 --minutes 0")) == ["btok-s7", "btok-s8"]
    monkeypatch.setattr("sys.argv", ["claims", "--minutes", "0", "--seeds", "7", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"missing: btok-s7\. Give the command again\."):
        claims.main()


def test_the_table_has_scores_and_differences_of_the_seeds_that_both_have(tmp_path):
    labels = {"last-token": "last token", "btok": "BToks"}
    count = len(tasks()[TASK].queries)
    for seed, rank in ((0, 2), (1, 4)):
        write(tmp_path, "last-token", seed, [rank] * count, precision="bf16")
        write(tmp_path, "btok", seed, [1] * count, precision="fp32")
    write(tmp_path, "btok", 2, [9] * count)  # has no partner: (100 + 100 + 100 / 9) / 3
    found = claims.results(tmp_path, [*labels, "mean"])
    assert {arm: list(parts) for arm, parts in found.items()} == {"last-token": [0, 1], "btok": [0, 1, 2]}
    text = claims.table(found, labels)
    assert f"| {TASK} | 37.5 ± 0.0 | 70.4 ± 0.0 |" in text and "| seeds | 0, 1 | 0, 1, 2 |" in text
    # The gains are 50 and 75. Student's t of one degree of freedom is 12.706, times 12.5, their standard error.
    assert "| BToks − last token | 0, 1 | +62.5 ± 0.0 | +62.50 | 158.83 | 0.00 |" in text
    assert "300 steps of 64 rows; a GPU; bf16 (last token), fp32 (BToks), precision not recorded (BToks)." in text


def test_runs_of_different_settings_are_not_compared(tmp_path):
    write(tmp_path, "last-token", 0, [1])
    write(tmp_path, "btok", 0, [1], steps=2)
    with pytest.raises(ValueError, match=r"mixes runs with other passages, settings or tasks: .*\[2, 64.*\[300, 64"):
        claims.results(tmp_path, ["last-token", "btok"])


def test_a_table_has_the_arms_that_were_run_and_names_the_others(tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.md"
    names = (*claims.TABLES, "decoded")
    marks = "".join(f"<!-- claims-2 {name} -->\nold\n<!-- end of claims-2 {name} -->\n" for name in names)
    page.write_text(marks + "<!-- claims tokens -->\nold\n<!-- end of claims tokens -->\n")
    monkeypatch.setattr(claims, "PAGE", page)
    count = len(tasks()[TASK].queries)
    for seed, arm in enumerate(list(claims.TABLES["tokens"])[:3]):
        write(tmp_path / "claims-2", arm, seed % 2, [1] * count)
    claims.report(tmp_path / "claims-2")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["arms", "weights"] and "has results of 1 arms" in lines[0]
    arms, tokens, _, texts, other = page.read_text().split("<!-- end of claims-2 ")
    assert arms.endswith("\nold\n") and texts.endswith("\nold\n")
    assert "<!-- claims tokens -->\nold\n" in other  # of another folder
    assert "| K = 8 − K = 4 | 0 | +0.0 ± 0.0 | +0.00 | – | 0.00 | – |" in tokens and "K = 1 −" not in tokens
    assert "Not run yet: K = 16." in tokens


def test_the_table_of_what_is_decoded_has_the_means_of_the_arms_that_decode(tmp_path):
    assert claims.decoded(tmp_path) == ""
    for seed, share in ((0, 10.0), (1, 20.0), (2, 99.0)):
        texts = {"definitions": 8, "the term itself, %": share, "round trip, MRR": 5.0}
        write(tmp_path, "btok-condensation", seed, [1], decoded=texts)
        write(tmp_path, "btok-condensation-k1", seed, [1], decoded={**texts, "the term itself, %": 1.0})
        write(tmp_path, "btok-unmasked", seed, [1], decoded=texts if seed < 2 else None)
    write(tmp_path, "mean", 0, [1], decoded=None)
    assert claims.decoded(tmp_path).splitlines() == [
        "| arm | the term itself, % | round trip, MRR |",
        "|---|---|---|",
        "| BToks + condensation, no mask | 15.0 | 5.0 |",
        "| BToks + condensation | 15.0 | 5.0 |",
        "| K = 1 | 1.0 | 5.0 |",
        "",
        "8 definitions; seeds 0, 1.",
    ]
    write(tmp_path, "btok", 0, [1], decoded={"definitions": 9, "the term itself, %": 1.0, "round trip, MRR": 2.0})
    with pytest.raises(ValueError, match=r"mixes runs with \[8, 9\] decoded definitions"):
        claims.decoded(tmp_path)


@pytest.mark.parametrize("name", ["mean", "last-word"])
def test_arms_that_pool_otherwise(built, tmp_path, capsys, name):
    add_tokens(built, tmp_path, ARMS[name], seed=0)
    model = BTokSentenceTransformer(str(tmp_path), device="cpu")
    texts = ["the cell", "a wave moves energy, not matter"]
    with patch("btok_hf.transformer.condense", condense_by(ARMS[name].pooling)):
        found = model.encode(texts, convert_to_tensor=True)
    for text, vector in zip(texts, found):
        with torch.no_grad():
            batch = model.preprocess([text])
            ids, mask = batch["input_ids"], batch["attention_mask"]
            states = model[0].model(input_ids=ids, attention_mask=mask).last_hidden_state[0]
        assert model.tokenizer.decode(ids[0]).endswith(' means in one word: "' + model.tokenizer.eos_token)
        right = states.mean(0) if name == "mean" else states[-2]
        torch.testing.assert_close(vector, torch.nn.functional.normalize(right, dim=0), atol=1e-5, rtol=1e-5)
    with pytest.raises(SystemExit):
        arguments(["--arm", name, "--save"])
    assert f"--save cannot export {name}" in capsys.readouterr().err


def test_every_arm_of_a_table_can_be_run(capsys):
    for arms in claims.TABLES.values():
        assert set(arms) <= ARMS.keys()
    assert arguments(["--arm", "btok", "--passage", "3", "5"]).passage == [3, 5]
    with pytest.raises(SystemExit):
        arguments(["--arm", "btok", "--passage", "5", "3"])
    assert "--passage takes the fewest and the most words, got 5 3" in capsys.readouterr().err


def test_decoded_white_space_is_scored(repo, monkeypatch):
    """Trained without the mask, a model may decode line breaks alone, which are no input to embed."""
    model = BTokSentenceTransformer(repo, device="cpu")
    monkeypatch.setattr(model, "reconstruct", lambda rows, **_: ["\n\n", "", "a heavy stone"])
    terms, definitions = ["cat", "dog", "stone"], ["it purrs", "it barks", "it lies"]
    figures, _ = of_decoded(model, terms, definitions, None, None)
    assert figures["words in the term, %"] == 11.1 and 0 < figures["round trip, MRR"] <= 100
