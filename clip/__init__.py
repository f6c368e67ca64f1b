"""CLIP: models in OpenAI's layout, their tokenizer, and what brings their weights."""

from .impostor import impostor
from .loading import (
    MEAN,
    STD,
    available_models,
    load,
    make_preprocess,
    read_checkpoint,
    to_rgb,
)
from .model import CLIP, build_model
from .tokenizer import Tokenizer, find_merges, tokenize

__all__ = [
    "CLIP",
    "MEAN",
    "STD",
    "Tokenizer",
    "available_models",
    "build_model",
    "find_merges",
    "impostor",
    "load",
    "make_preprocess",
    "read_checkpoint",
    "to_rgb",
    "tokenize",
]
