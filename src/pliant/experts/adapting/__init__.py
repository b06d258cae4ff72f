"""Adapting at inference: which expert, or which mixture of experts, answers a prompt?

    strategy = ByPrompt(model, tokenizer, labels)               # the model classifies the question
    strategy = ByClassifier.fit(model, tokenizer, prompts, experts)      # a head on its prefill
    strategy = FewShot.fit(model, tokenizer, shots)             # coefficients from a few examples
    answers = strategy.answer(prompts)

Each has `adapt(prompts)`, the mixture for each prompt, `choose(prompts)`, which says why, and
`answer(prompts)`, in which every row of a batch has its own mixture.
"""

from pliant.experts.adapting.by_prompt import ByPrompt, PromptConfig
from pliant.experts.adapting.cem import CEMConfig, CEMResult, Scores, search
from pliant.experts.adapting.classifier import ByClassifier, ClassifierConfig
from pliant.experts.adapting.few_shot import FewShot, FewShotConfig
from pliant.experts.adapting.folders import load_experts, save_mixture
from pliant.experts.adapting.prompts import generate
from pliant.experts.adapting.shots import Shot, check_split, shots_of, split_shots
from pliant.experts.adapting.strategy import Answer, Choice, Strategy

__all__ = [
    "Answer",
    "ByClassifier",
    "ByPrompt",
    "CEMConfig",
    "CEMResult",
    "Choice",
    "ClassifierConfig",
    "FewShot",
    "FewShotConfig",
    "PromptConfig",
    "Scores",
    "Shot",
    "Strategy",
    "check_split",
    "generate",
    "load_experts",
    "save_mixture",
    "search",
    "shots_of",
    "split_shots",
]
