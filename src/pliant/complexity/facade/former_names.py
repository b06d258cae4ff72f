"""The names that these had while they served Mistral alone; code that uses them goes on working."""

from pliant.complexity.config import CPXConfig
from pliant.complexity.facade.tokenizer import CPXTokenizer
from pliant.complexity.training.config import CPXDatasetConfig, CPXTrainingConfig

CPXMistralTokenizer = CPXTokenizer
CPXMistralConfig = CPXConfig
MistralTrainingConfig = CPXTrainingConfig
CPXMistralDatasetConfig = CPXDatasetConfig
