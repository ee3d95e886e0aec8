"""What a trainer publishes: its export, merged, with the card of the training, in one commit."""

import pytest
from support.publishing import head, served
from support.training import config, text_pairs

from btok_hf import BTokSentenceTransformer
from btok_hf.training import CondensationTrainer

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
