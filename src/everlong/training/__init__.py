"""Training: a recipe becomes a `transformers.Trainer` run and a folder that loads as a model."""

from .checkpoint import last_checkpoint
from .guards import NonFiniteError
from .recipe import Recipe, known_recipes, load_recipe
from .train import TrainingInterrupted, resume, train

__all__ = [
    "NonFiniteError",
    "Recipe",
    "TrainingInterrupted",
    "known_recipes",
    "last_checkpoint",
    "load_recipe",
    "resume",
    "train",
]
