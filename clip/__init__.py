"""CLIP: models in OpenAI's layout, their tokenizer, and what brings their weights."""

from clip.convert import build_model
from clip.files import impostor, read_checkpoint
from clip.loading import available_models, check, load, locate
from clip.model import CLIP
from clip.preprocess import MEAN, STD, make_preprocess, to_rgb
from clip.simple_tokenizer import Tokenizer, find_merges, tokenize

__all__ = [
    "CLIP",
    "MEAN",
    "STD",
    "Tokenizer",
    "available_models",
    "build_model",
    "check",
    "find_merges",
    "impostor",
    "load",
    "locate",
    "make_preprocess",
    "read_checkpoint",
    "to_rgb",
    "tokenize",
]
