"""CLIP: models in OpenAI's layout, their tokenizer, and the loading of their weights."""

from clip.convert import build_model
from clip.files import read_checkpoint
from clip.loading import available_models, load, validate_name
from clip.model import CLIP
from clip.preprocess import OPENAI_MEAN, OPENAI_STD, image_transform
from clip.simple_tokenizer import tokenize

__all__ = [
    "CLIP", "OPENAI_MEAN", "OPENAI_STD", "available_models", "build_model", "image_transform",
    "load", "read_checkpoint", "tokenize", "validate_name",
]  # fmt: skip
