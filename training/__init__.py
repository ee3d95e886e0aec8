"""Condensation training on top of Sentence-Transformers; installed as `btok_hf.training`."""

from .condensation_config import CondensationConfig
from .condensation_loss import CondensationLoss
from .condensation_trainer import CondensationTrainer

__all__ = ["CondensationConfig", "CondensationLoss", "CondensationTrainer"]
