"""Train language models on preference pairs, and see how each behavior drives the model."""

__version__ = "0.1.0"
