"""Training: a recipe becomes a `transformers.Trainer` run and a folder that loads as a model."""

from .checkpoint import last_checkpoint
from .guards import NonFiniteError
from .processes import ProcessLost
from .recipe import Recipe, known_recipes, load_recipe
from .sharding import shard
from .train import TrainingInterrupted, resume, train

__all__ = [
    "NonFiniteError",
    "ProcessLost",
    "Recipe",
    "TrainingInterrupted",
    "known_recipes",
    "last_checkpoint",
    "load_recipe",
    "resume",
    "shard",
    "train",
]
