"""The interface of the CPX wrapper, and its names from when it served Mistral alone."""

from pliant.complexity.config import CPXConfig as CPXMistralConfig
from pliant.complexity.tokenizer import CPXTokenizer as CPXMistralTokenizer
from pliant.complexity.training.config import CPXDatasetConfig as CPXMistralDatasetConfig
from pliant.complexity.training.config import CPXTrainingConfig as MistralTrainingConfig

__all__ = [
    "CPXMistralConfig",
    "CPXMistralDatasetConfig",
    "CPXMistralTokenizer",
    "MistralTrainingConfig",
]
