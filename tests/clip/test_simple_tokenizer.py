"""The tokenizer against open_clip's, its vocabularies, and where its merges come from."""

import gzip
import importlib.util
import sys
from importlib.machinery import ModuleSpec

import pytest
import torch
from clip_helpers import TINY_VIT, random_state_dict

import clip
from clip import simple_tokenizer
from clip.download import sha256_file
from clip.simple_tokenizer import BYTE_ENCODER, SimpleTokenizer, default_bpe, read_merges, tokenize

TEXTS = [
    "a photo of a cat.",
    "",
    "   \t\n ",
    "A Photo Of A 2012 Audi A8 W12!?",
    "it's, they'll, we'd, I'm, you've, can't, they're; IT'S 'S 'tis rock'n'roll",
    "naïve café Ångström Straße İstanbul ﬁnance ½ ² Ⅷ",
    "e\u0301 against \u00e9, na\u00efve with a curly \u2019s",
    "schÃ¶n and donâ€™t are broken Unicode",
    "&lt;b&gt;bold&lt;/b&gt; &amp;amp; &amp;lt; &eacute; &#233; &nbsp; &unknown;",
    "snake_case __init__ a_b_c --dashes-- (brackets) [x] {y} #hash @at $5.00 100%",
    "0123456789 3.14159 1,000,000 ٣٤٥ 二〇二四",
    "🙂 👩‍👩‍👧 🇫🇷 ☃️ ❤ plain 🙂🙂",
    "日本語のテキスト、漢字。 Привет мир! مرحبا שלום नमस्ते ไทย",
    "</w> < /w> <end> \u0120 <|start|> </s>",
    "<start_of_text> inside <end_of_text> a text",
    "x" * 60,
    "zero\u200bwidth soft\u00adhyphen nbsp\u00a0here line\u2028break \ufeffbom",
    "nul \x00 bell \x07 escape \x1b[31m \x7f",
    "ǅ ß ẞ ſ 'ſ ŉ K Ω ℡",
]
BYTE_ID = {chr(byte): number for number, byte in enumerate(BYTE_ENCODER)}


@pytest.fixture
def no_merges(monkeypatch, tmp_path):
    """Neither a path, nor a cache, nor open_clip: only the address is left."""
    monkeypatch.delenv("CLIP_BPE_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "open_clip", None)
    return tmp_path


@pytest.fixture
def open_clip():
    return pytest.importorskip("open_clip", reason="open_clip is the reference, and has the merges")


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_equal_open_clip(text, open_clip):
    assert torch.equal(tokenize(text, 200), open_clip.tokenize([text], 200))


def test_tokenize_pads_with_zeros():
    rows = tokenize(["a cat", "a very small cat"])
    assert rows.shape == (2, 77) and rows.dtype == torch.int64
    assert torch.equal(tokenize("a cat"), rows[:1])
    assert rows[0].tolist() == [49406, 320, 2368, 49407] + [0] * 73
    assert tokenize([]).shape == (0, 77)


def test_long_text_needs_truncation():
    with pytest.raises(ValueError, match=r"'cat cat .*' makes 102 tokens.*truncate=True"):
        tokenize("cat " * 100)
    with pytest.raises(ValueError, match="the context holds 4"):
        tokenize(["a cat", "a small cat"], context_length=4)
    cut = tokenize("cat " * 100, truncate=True)
    assert cut.tolist() == [[49406, *[2368] * 75, 49407]]
    assert torch.equal(tokenize("a cat", 4, truncate=True), tokenize("a cat", 4))


def test_byte_vocabulary_needs_no_file(no_merges):
    model = clip.build_model(random_state_dict(TINY_VIT))
    a, b = BYTE_ID["a"], BYTE_ID["b"]
    assert model.tokenize("ab a").tolist() == [[512, a, 256 + b, 256 + a, 513] + [0] * 11]
    with pytest.raises(ValueError, match="the context holds 16"):
        model.tokenize("a photo of a horse.")
    assert model.tokenize("a photo of a horse.", truncate=True)[0, -1] == 513


def test_vocabulary_uses_first_merges(open_clip):
    assert read_merges(default_bpe(), 2) == [("i", "n"), ("t", "h")]
    small, full = SimpleTokenizer.from_vocab_size(514 + 2), SimpleTokenizer.from_vocab_size()
    assert (small.start, small.end, full.start, full.end) == (514, 515, 49406, 49407)
    assert SimpleTokenizer.from_vocab_size(49411).end == 49407  # a padded one
    assert small.encode("in") == [BYTE_ID["i"], 256 + BYTE_ID["n"]]
    assert small.encode("thin")[0] == 513  # "th", the second merge
    assert small.encode("int")[0] == 512  # "in", the first one
    assert len(small.encode("a photo")) > len(full.encode("a photo"))


def test_path_precedes_environment(no_merges, monkeypatch):
    given, named = no_merges / "given.txt", no_merges / "named.txt"
    given.write_text("a b</w>\n")
    named.write_text("#version: 1\nb a</w>\n")
    for file, text in ((given, "ab"), (named, "ba")):
        monkeypatch.setenv("CLIP_BPE_PATH", str(file))  # which may change
        assert (default_bpe(given), default_bpe()) == (given, file)
        assert SimpleTokenizer.from_vocab_size(515).encode(text) == [512]
    assert SimpleTokenizer.from_vocab_size(515, given).encode("ab") == [512]


def test_cache_precedes_open_clip(open_clip, no_merges, monkeypatch):
    monkeypatch.delitem(sys.modules, "open_clip")
    path = default_bpe()
    assert path.parent.name == "open_clip" and "open_clip" not in sys.modules
    cached = no_merges / ".cache" / "clip" / simple_tokenizer.MERGES_FILE
    cached.parent.mkdir(parents=True)
    cached.write_bytes(path.read_bytes())
    assert default_bpe() == cached


def test_merges_are_downloaded(no_merges, monkeypatch):
    file = no_merges / "merges"
    file.write_bytes(gzip.compress(b"#version: 1\na b</w>\n", mtime=0))
    monkeypatch.setattr(simple_tokenizer, "MERGES_URL", file.as_uri())
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: ModuleSpec(name, None)
    )  # a folder
    with pytest.raises(ValueError, match="wrong SHA-256"):
        default_bpe()
    monkeypatch.setattr(simple_tokenizer, "MERGES_SHA256", sha256_file(file))
    path = default_bpe()
    assert path == no_merges / ".cache" / "clip" / simple_tokenizer.MERGES_FILE
    assert read_merges(path, 1) == [("a", "b</w>")]


@pytest.mark.parametrize(
    "content", [b"", b"a b\nthree words here\n", gzip.compress(b"a b\nc d\n", mtime=0)[:-6]]
)
def test_wrong_merges_file_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="x is not OpenAI's bpe_simple_vocab"):
        read_merges(tmp_path / "x", 2)


def test_missing_merges_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no merges file at .*missing.txt"):
        tokenize("a", merges_path=tmp_path / "missing.txt")
