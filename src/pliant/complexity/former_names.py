"""The names that these had while they served Mistral alone; code that uses them goes on working."""

from pliant.complexity.config import CPXConfig
from pliant.complexity.tokenizer import CPXTokenizer

CPXMistralTokenizer = CPXTokenizer
CPXMistralConfig = CPXConfig
