"""Condensation training on top of Sentence-Transformers; installed as `btok_hf.training`.

`train.py` is the command, `condensation_trainer.py` the trainer, `condensation_loss.py` the loss. Data comes from
`data.py` (pair files), `sources.py` (the paper's data) and `mixture.py` (several datasets).
"""

from .condensation_config import CondensationConfig
from .condensation_loss import CondensationLoss
from .condensation_trainer import CondensationTrainer

__all__ = ["CondensationConfig", "CondensationLoss", "CondensationTrainer"]
