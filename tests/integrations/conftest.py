"""The tiny models of the trainer's tests, for trainers of others."""

from tests.g2rl.conftest import tiny_model, untied_model

__all__ = ["tiny_model", "untied_model"]
