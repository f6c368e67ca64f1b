"""CLIP's tokenizer: byte-level BPE over lower-cased, cleaned text.

A vocabulary is 256 bytes, the same 256 at the end of a word (`</w>`), one token per merge and
two for the start and the end of a text. A model with V tokens uses the first V - 514 merges of
OpenAI's list, so that a vocabulary of 514 needs no file at all. Tokens beyond OpenAI's 49,408,
which some models were padded to, stand for nothing.
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

from clip.download import cache_dir, download_url, sha256_file

MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
MERGES_URL = f"https://raw.githubusercontent.com/openai/CLIP/main/clip/{MERGES_FILE}"
MERGES_LIMIT = 2**26  # bytes of such a list, unpacked; OpenAI's has 3 million
VOCAB_SIZE = 49408  # of OpenAI's models
BYTE_VOCABULARY = 514  # bytes, bytes that end a word, start and end of text
END_OF_WORD = "</w>"

START, END = "<start_of_text>", "<end_of_text>"
WORD = regex.compile(
    rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+",
    regex.IGNORECASE,
)


def bytes_to_unicode() -> dict[int, str]:
    """A visible letter for each byte, as merges files spell them, in the vocabulary's order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible}
    letters |= {byte: chr(256 + number) for number, byte in enumerate(hidden)}
    return letters


BYTE_ENCODER = bytes_to_unicode()
BYTE_DECODER = {letter: byte for byte, letter in BYTE_ENCODER.items()}


class SimpleTokenizer:
    """Turns texts into tokens and back.

    Args:
        merges: pairs of symbols in the order in which they are to be joined; none for tokens
            that are bytes.
    """

    def __init__(self, merges: Iterable[tuple[str, str]] = ()):
        merges = list(merges)
        symbols = [
            *BYTE_ENCODER.values(),
            *(letter + END_OF_WORD for letter in BYTE_ENCODER.values()),
        ]
        symbols += [left + right for left, right in merges] + [START, END]
        self.symbols = symbols
        self.ids = {symbol: number for number, symbol in enumerate(symbols)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.vocab_size = len(symbols)
        self.start, self.end = self.ids[START], self.ids[END]
        self._words = {START: (self.start,), END: (self.end,)}

    @staticmethod
    def for_vocabulary(
        vocab_size: int = VOCAB_SIZE, merges_path: str | os.PathLike | None = None
    ) -> "SimpleTokenizer":
        """The tokenizer of a model with so many tokens; made once, then kept.

        Args:
            vocab_size: the model's tokens; 514 of them need no merges.
            merges_path: the merges file to use; found by `default_bpe` when None.

        Raises:
            ValueError: if there is no such vocabulary, or the file has too few merges for it.
            FileNotFoundError: if the merges file that was named does not exist.
        """
        path = merges_path or os.environ.get("CLIP_BPE_PATH") or None
        return _tokenizer(min(int(vocab_size), VOCAB_SIZE), path and os.fspath(path))

    def encode(self, text: str) -> list[int]:
        """Tokens of one text, without start, end and padding."""
        tokens = []
        for word in WORD.findall(clean_text(text)):
            if word not in self._words:
                self._words[word] = self._encode_word(word)
            tokens += self._words[word]
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens up to the end of text, with single spaces between words."""
        symbols = []
        for token in map(int, tokens):
            if token == self.end:
                break
            if token != self.start:
                symbols.append(self.symbols[token])
        text = "".join(symbols).replace(END_OF_WORD, " ")
        return (
            bytes(BYTE_DECODER.get(letter, 0x20) for letter in text)
            .decode("utf-8", "replace")
            .strip()
        )

    def __call__(
        self, texts: str | Sequence[str], context_length: int = 77, truncate: bool = False
    ) -> Tensor:
        """Tokens of texts between start and end, zero behind; see `tokenize`."""
        if isinstance(texts, str):
            texts = [texts]
        elif not isinstance(texts, Iterable):
            raise ValueError(f"texts must be a string or a list of strings, not {texts!r}")
        texts = list(texts)
        if context_length < 2:
            raise ValueError(
                f"a context length of {context_length} cannot hold start and end: use 2 or more"
            )
        result = torch.zeros(len(texts), context_length, dtype=torch.int64, device="cpu")
        for row, text in zip(result, texts, strict=True):
            tokens = [self.start, *self.encode(text), self.end]
            if len(tokens) > context_length:
                if not truncate:
                    shown = text if len(text) <= 60 else text[:57] + "..."
                    raise ValueError(
                        f"{shown!r} makes {len(tokens)} tokens, and the context holds "
                        f"{context_length}: shorten it, or pass truncate=True"
                    )
                tokens = [*tokens[: context_length - 1], self.end]
            row[: len(tokens)] = torch.tensor(tokens, device="cpu")
        return result

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Join the pair that comes first in the list of merges, until no pair is in it."""
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
def _tokenizer(vocab_size: int, path: str | None) -> SimpleTokenizer:
    count = vocab_size - BYTE_VOCABULARY
    if count < 0:
        raise ValueError(
            f"a vocabulary of {vocab_size} tokens has no tokenizer: bytes alone need "
            f"{BYTE_VOCABULARY}"
        )
    if count == 0:
        return SimpleTokenizer()
    path = default_bpe(path)
    merges = read_merges(path, count)
    if len(merges) < count:
        raise ValueError(
            f"{path} holds {len(merges)} merges, and a vocabulary of {vocab_size} tokens needs "
            f"{count}: use OpenAI's {MERGES_FILE}"
        )
    return SimpleTokenizer(merges)


def clean_text(text: str) -> str:
    """Repair broken Unicode, resolve HTML entities, collapse white space, lower the case."""
    if not isinstance(text, str):
        raise ValueError(f"a text to tokenize must be a string, not {text!r}")
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def tokenize(
    texts: str | Sequence[str],
    context_length: int = 77,
    truncate: bool = False,
    *,
    merges_path: str | os.PathLike | None = None,
) -> Tensor:
    """Tokens of one or more texts in the vocabulary of OpenAI's models.

    Args:
        texts: a text or several.
        context_length: tokens in a row, the start and the end of the text among them.
        truncate: cut texts that are too long, keeping the end-of-text token, instead of
            refusing them.
        merges_path: the merges file; found by `default_bpe` when None.

    Returns:
        (N, context_length) int64, zero after the end-of-text token.

    Raises:
        ValueError: if a text is too long and `truncate` is not set, or is not a string.
    """
    return SimpleTokenizer.for_vocabulary(VOCAB_SIZE, merges_path)(texts, context_length, truncate)


def default_bpe(path: str | os.PathLike | None = None) -> Path:
    """Where the merges file lies: as named, in the cache, in `open_clip`, or downloaded.

    Args:
        path: the file to use, whatever its digest. The environment variable CLIP_BPE_PATH says
            the same where no path is given.

    Raises:
        FileNotFoundError: if the file that was named does not exist.
        ConnectionError: if there is none anywhere and it cannot be downloaded.
    """
    named = path or os.environ.get("CLIP_BPE_PATH")
    if named:
        found = Path(os.path.expanduser(named))
        if not found.is_file():
            source = "the path given" if path else "CLIP_BPE_PATH"
            raise FileNotFoundError(f"there is no merges file at {found}, which is {source}")
        return found
    cached = cache_dir() / MERGES_FILE
    if not cached.exists():
        spec = importlib.util.find_spec("open_clip")  # finds the folder, imports nothing
        for folder in spec.submodule_search_locations or () if spec else ():
            found = Path(folder) / MERGES_FILE
            if found.is_file() and sha256_file(found) == MERGES_SHA256:
                return found
    return download_url(MERGES_URL, cached, MERGES_SHA256)


def read_merges(path: str | os.PathLike, count: int | None = None) -> list[tuple[str, str]]:
    """The pairs of a merges file, one a line, gzipped or not, below an optional version line.

    Args:
        path: the file.
        count: read no more than the first so many.

    Raises:
        ValueError: if the file is not a list of merges.
    """
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            data = (gzip.open(file) if packed else file).read(MERGES_LIMIT + 1)
        if len(data) > MERGES_LIMIT:
            raise ValueError(f"it is longer than {MERGES_LIMIT} bytes")
        text = data.decode("utf-8")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} is not a merges file, neither text nor gzip: {error}") from None
    lines = text.rstrip("\n").split("\n")
    first = 1 if "#version" in lines[0] else 0
    known = {*BYTE_ENCODER.values(), *(letter + END_OF_WORD for letter in BYTE_ENCODER.values())}
    merges = []
    for number, line in enumerate(lines[first:][:count], start=first + 1):
        pair = tuple(line.split())
        if len(pair) != 2 or not known.issuperset(pair):
            raise ValueError(
                f"{path} is not a merges file: line {number} is {line[:40]!r}, and should be two "
                "symbols, each a byte or made by an earlier line"
            )
        known.add(pair[0] + pair[1])
        merges.append(pair)
    return merges
