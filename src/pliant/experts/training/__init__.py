"""How an expert learns: by reward, on trl's trainers and the life that every training run shares.

`run` is the whole training, `trainer` what is ours in trl's trainers, `prompts` which prompts a
step takes, `answers` how they are answered, `task` the rows, and `config` what a user may set.
"""

from pliant.experts.training.config import ExpertTrainingConfig
from pliant.experts.training.prompts import PromptSampler

__all__ = ["ExpertTrainingConfig", "PromptSampler"]
