"""CLIP: models in OpenAI's layout, their tokenizer, and what brings their weights."""

from clip.convert import build_model
from clip.files import read_checkpoint
from clip.loading import available_models, load, resolve_checkpoint, validate_name
from clip.model import CLIP
from clip.preprocess import OPENAI_MEAN, OPENAI_STD, convert_image_to_rgb, image_transform
from clip.simple_tokenizer import SimpleTokenizer, default_bpe, tokenize

__all__ = [
    "CLIP",
    "OPENAI_MEAN",
    "OPENAI_STD",
    "SimpleTokenizer",
    "available_models",
    "build_model",
    "validate_name",
    "default_bpe",
    "load",
    "resolve_checkpoint",
    "image_transform",
    "read_checkpoint",
    "convert_image_to_rgb",
    "tokenize",
]
