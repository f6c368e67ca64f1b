"""The documents: their links lead somewhere, and they say what the code does."""

import re
from pathlib import Path

import pytest

from run_utils import default_settings

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    ROOT / "benchmarks/README.md",
    ROOT / "clip/weights/README.md",
]


def prose(page):
    """A page without its code."""
    return re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text(encoding="utf-8"))


def anchors(page):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", prose(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert "://" in link or target.exists() and (not anchor or anchor in anchors(target)), link


def test_readme_snippet_runs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "optimizers")
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    namespace = {}
    exec(snippet, namespace)
    assert namespace["loss"].isfinite()
    assert {int(state["step"]) for state in namespace["optimizer"].state.values()} == {10}


def test_cli_page_lists_flags():
    table = re.findall(r"^\| (`--.*?) \|", (ROOT / "docs/cli.md").read_text(), re.MULTILINE)
    listed = {flag for cell in table for flag in re.findall(r"--(\w+)", cell)}
    described = {"activation", "heads", "local_rank"}  # with --backbone; of launchers
    assert listed | described == {*default_settings(), "sparsity"}
