"""What a trainer publishes: its export, merged, with the card of the training, in one commit."""

import json

import pytest
from support.hub_server import STRANGER_TOKEN
from support.publishing import head, served
from support.training import checkpointed_trainer, config, text_pairs

from btok_hf import BTokSentenceTransformer
from btok_hf.hub_card.card import CardArguments
from btok_hf.training import CondensationTrainer
from btok_hf.training.checkpoints import newest_complete
from btok_hf.training.publishing import PushEverySave

TRAIN = """
import sys
from pathlib import Path
from peft import LoraConfig
from support.training import config, text_pairs
from btok_hf import BTokSentenceTransformer
from btok_hf.training import CondensationTrainer

model = BTokSentenceTransformer(sys.argv[1], device="cpu")
options = {"push_to_hub": True, "hub_model_id": "org/by-trainer", "hub_private_repo": True, "save_strategy": "steps"}
args = config(Path(sys.argv[2]), per_device_train_batch_size=6, max_steps=2, save_steps=1, **options)
try:
    wrong = config(Path(sys.argv[2]), **options, hub_strategy="every_save", save_steps=1)
    CondensationTrainer(model=model, args=wrong, train_dataset=text_pairs(6))
except ValueError as error:
    assert "hub_strategy must be end, got every_save" in str(error), error
else:
    raise SystemExit("checkpoints would be pushed")
trainer = CondensationTrainer(model=model, args=args, train_dataset=text_pairs(6), peft_config=LoraConfig(r=2))
trainer.train()
print(trainer.push_to_hub())
"""


def test_push_to_hub_of_the_trainer(hub, repo, tmp_path):
    tests = str(__file__).rpartition("/")[0]
    run = hub.run("-c", TRAIN, repo, tmp_path, home=tmp_path / "home", PYTHONPATH=tests)
    commit = head(hub, "org/by-trainer")
    assert run.stdout.split()[-1] == f"{hub.endpoint}/org/by-trainer/commit/{commit}"
    files = served(hub, "org/by-trainer")
    assert {"model.safetensors", "golden.json", "config.json", "modeling_btok.py"} <= files.keys()
    assert not [name for name in files if name.startswith(("checkpoint", "adapter")) or name.endswith(".bin")]
    card = files["README.md"].decode()
    assert "No training is recorded" not in card and "org/by-trainer" in card and str(tmp_path) not in card


def test_the_repository_has_a_name(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")
    trainer = CondensationTrainer(model=model, args=config(tmp_path), train_dataset=text_pairs(6))
    with pytest.raises(TypeError, match="tags"):
        trainer.push_to_hub(tags=["a"])
    with pytest.raises(ValueError, match=r"set hub_model_id, e\.g\."):
        trainer.push_to_hub()


CHECK = """
import json, sys
from pathlib import Path
from support.training import config
from btok_hf.training.publishing import check_push

for options in json.loads(sys.argv[1]):
    try:
        print(check_push(config(Path(sys.argv[2]), push_to_hub=True, **options)))
    except ValueError as error:
        print(error)
"""


def test_a_push_that_cannot_work_is_refused_before_training(hub, tmp_path):
    tests = str(__file__).rpartition("/")[0]

    def check(*options, **variables):
        home, wanted = tmp_path / "home", json.dumps([{"hub_model_id": "org/new", **part} for part in options])
        return hub.run("-c", CHECK, wanted, tmp_path, home=home, PYTHONPATH=tests, **variables).stdout.splitlines()

    wrong = [{"hub_private_repo": False}, {"hub_model_id": "other/new"}, {"hub_model_id": "a/b/c"}]
    created, again, visible, foreign, invalid = check({"hub_private_repo": True}, {}, *wrong)
    assert created == again == "None" and hub.repositories["org/new"].private
    assert "org/new exists and is private, and hub_private_repo is False" in visible
    assert "right to write to other/new" in foreign and "You have no right to create a model under other" in foreign
    assert "a/b/c" in invalid and "other/new" not in hub.repositories
    hub.repositories["org/new"].private = False
    (refused,) = check({}, token=STRANGER_TOKEN)
    assert "right to write to org/new" in refused and "You have no write access" in refused


def test_an_export_that_fails_at_a_save_does_not_end_the_training(repo, tmp_path, caplog):
    trainer = checkpointed_trainer(repo, tmp_path, hub_model_id="org/any")
    trainer.add_callback(PushEverySave(trainer, CardArguments()))
    out = tmp_path / "out"
    (out / "README.md").mkdir(parents=True)  # where the card is to be written
    trainer.train()
    assert newest_complete(out).name == "checkpoint-6"
    failed = [text for text in caplog.messages if "failed (IsADirectoryError" in text]
    assert len(failed) == 3 and "export after step 2" in failed[0] and "`btok export` makes" in failed[0]

    waited = []
    trainer.accelerator.wait_for_everyone = lambda: waited.append(True)  # the other processes do
    with pytest.raises(IsADirectoryError):
        trainer.export(out)
    assert waited
