"""Every program has a --help; the shell scripts that a new user meets first."""

import importlib
import sys
from pathlib import Path

import pytest
from commands import call

ROOT = Path(__file__).parents[1]
PROGRAMS = [
    path
    for folder in ("scripts", "scripts/digits", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "ArgumentParser(" in path.read_text() or path.name == "list_pending.py"
]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_programs_have_help(path, monkeypatch):
    is_benchmark = path.parent.name == "benchmarks"
    monkeypatch.syspath_prepend(ROOT if is_benchmark else path.parent)
    module = importlib.import_module(f"benchmarks.{path.stem}" if is_benchmark else path.stem)
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    status, out, err = call(lambda argv: module.main())
    assert status in (0, None) and "usage: " in out + err


def test_demo_says_what_follows():
    _, said = (ROOT / "scripts/demo.sh").read_text().split("cat <<'END'\n")
    assert "source .venv/bin/activate" in said and "docs/custom_datasets.md" in said
    assert max(map(len, said.splitlines())) <= 80
