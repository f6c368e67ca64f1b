"""CLIP's tokenizer: byte-level BPE over lower-cased, cleaned text.

A vocabulary is 256 bytes, the same 256 at the end of a word (`</w>`), one token per merge and two
for the start and the end of a text. A model with V tokens uses the first V - 514 merges of
OpenAI's list; tokens beyond its 49,408, to which some models were padded, stand for nothing.
"""

import gzip
import html
import importlib.util
import os
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import ftfy
import regex
import torch
from torch import Tensor

from clip.download import cache_dir, download_url

MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
MERGES_URL = f"https://raw.githubusercontent.com/openai/CLIP/main/clip/{MERGES_FILE}"
VOCAB_SIZE = 49408  # of OpenAI's models
BYTE_VOCAB_SIZE = 514  # bytes, bytes that end a word, start and end of text
END_OF_WORD = "</w>"
START, END = "<start_of_text>", "<end_of_text>"
# The visible letter of each byte in merges files, in the vocabulary's order.
VISIBLE_BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN_BYTES = [byte for byte in range(256) if byte not in VISIBLE_BYTES]
BYTE_ENCODER = {byte: chr(byte) for byte in VISIBLE_BYTES}
BYTE_ENCODER |= {byte: chr(256 + number) for number, byte in enumerate(HIDDEN_BYTES)}
WORD = regex.compile(
    rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+",
    regex.IGNORECASE,
)


def tokenize(
    texts: str | Sequence[str],
    context_length: int = 77,
    truncate: bool = False,
    *,
    merges_path: str | os.PathLike | None = None,
) -> Tensor:
    """Tokenize texts with the vocabulary of OpenAI's models.

    Args:
        texts: One or more.
        context_length: Tokens in a row, including the start and the end of the text.
        truncate: Cut texts that are too long, which otherwise raise a ValueError.
        merges_path: The merges file; None finds it by `default_bpe`.

    Returns:
        (N, context_length) int64, zero after the end-of-text token.
    """
    return SimpleTokenizer.from_vocab_size(VOCAB_SIZE, merges_path)(texts, context_length, truncate)


class SimpleTokenizer:
    """Turns texts into tokens; without merges, tokens are bytes."""

    def __init__(self, merges: Iterable[tuple[str, str]] = ()) -> None:
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        letters = BYTE_ENCODER.values()
        symbols = [*letters, *(letter + END_OF_WORD for letter in letters)]
        symbols += [*map("".join, self.ranks), START, END]
        self.ids = {symbol: number for number, symbol in enumerate(symbols)}
        self.start, self.end = self.ids[START], self.ids[END]
        self._cache = {START: (self.start,), END: (self.end,)}

    @staticmethod
    def from_vocab_size(
        vocab_size: int = VOCAB_SIZE, merges_path: str | os.PathLike | None = None
    ) -> "SimpleTokenizer":
        """The tokenizer of a model with this many tokens, built once; see `default_bpe`."""
        return _build_tokenizer(vocab_size, merges_path or os.environ.get("CLIP_BPE_PATH"))

    def __call__(
        self, texts: str | Sequence[str], context_length: int = 77, truncate: bool = False
    ) -> Tensor:
        """Tokens of texts between start and end, zero after that; see `tokenize`."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        result = torch.zeros(len(texts), context_length, dtype=torch.int64, device="cpu")
        for row, text in zip(result, texts, strict=True):
            tokens = [self.start, *self.encode(text), self.end]
            if len(tokens) > context_length:
                if not truncate:
                    raise ValueError(
                        f"{text[:60]!r} makes {len(tokens)} tokens, and the context holds "
                        f"{context_length}: shorten it, or pass truncate=True"
                    )
                tokens = [*tokens[: context_length - 1], self.end]
            row[: len(tokens)] = torch.tensor(tokens, device="cpu")
        return result

    def encode(self, text: str) -> list[int]:
        """Tokens of one text, without start, end and padding."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        tokens = []
        for word in WORD.findall(" ".join(text.split()).lower()):
            if word not in self._cache:
                self._cache[word] = self._bpe(word)
            tokens += self._cache[word]
        return tokens

    def _bpe(self, word: str) -> tuple[int, ...]:
        """Join the pair that is first in the list of merges, until no pair is in it."""
        symbols = [BYTE_ENCODER[byte] for byte in word.encode("utf-8")]
        symbols[-1] += END_OF_WORD
        while len(symbols) > 1:
            pairs = set(zip(symbols, symbols[1:], strict=False))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            joined = []
            for symbol in symbols:
                if joined and (joined[-1], symbol) == best:
                    joined[-1] += symbol
                else:
                    joined.append(symbol)
            symbols = joined
        return tuple(self.ids[symbol] for symbol in symbols)


@lru_cache(maxsize=8)
def _build_tokenizer(vocab_size: int, merges_path: str | os.PathLike | None) -> SimpleTokenizer:
    count = min(vocab_size, VOCAB_SIZE) - BYTE_VOCAB_SIZE
    return SimpleTokenizer(read_merges(default_bpe(merges_path), count) if count > 0 else ())


def default_bpe(path: str | os.PathLike | None = None) -> Path:
    """The merges file at `path` or CLIP_BPE_PATH, in the cache, in open_clip, or downloaded."""
    if path := path or os.environ.get("CLIP_BPE_PATH"):
        path = Path(os.path.expanduser(path))
        if not path.is_file():
            raise FileNotFoundError(f"there is no merges file at {path}: check CLIP_BPE_PATH")
        return path
    cached = cache_dir() / MERGES_FILE
    if not cached.exists():
        spec = importlib.util.find_spec("open_clip")  # finds the folder, imports nothing
        if spec and spec.origin and (file := Path(spec.origin).with_name(MERGES_FILE)).is_file():
            return file
    return download_url(MERGES_URL, cached, MERGES_SHA256)


def read_merges(path: Path, count: int) -> list[tuple[str, str]]:
    """Read the first pairs of symbols of a merges file, gzipped or not, one a line."""
    content = path.read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        lines = content.decode("utf-8").rstrip("\n").split("\n")
        first = 1 if "#version" in lines[0] else 0
        merges = [(left, right) for left, right in map(str.split, lines[first : first + count])]
        if len(merges) < count:
            raise ValueError(f"it has {len(merges)} pairs, and {count} are needed")
    except (EOFError, ValueError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not OpenAI's {MERGES_FILE}: {error}") from None
    return merges
