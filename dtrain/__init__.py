"""dtrain: fine-tunes large language models in a chain of stages, from one recipe, on any engine."""

__version__ = "0.1.0"
