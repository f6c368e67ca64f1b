"""`pip install .`: the two modules that people copy, with their types, and nothing else."""

import ast
import re
import shutil
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from optimizers.SparseOptimizer import __version__

ROOT = Path(__file__).parents[1]
MODULES = ["SparseOptimizer", "SampledGradients"]


@pytest.mark.filterwarnings("ignore:Support for")  # older versions of setuptools call it beta
def test_wheel_contains_two_modules(tmp_path, monkeypatch):
    pytest.importorskip("setuptools", minversion="68", reason="it builds the wheel")
    backend = import_module("setuptools.build_meta")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("clip", "datasets", "optimizers"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.p[ty]c*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["setup.py"])  # which setuptools reads
    wheel = zipfile.ZipFile(tmp_path / backend.build_wheel(str(tmp_path)))
    files = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert set(files) == {
        *(f"{module}.py" for module in MODULES),
        *(f"{module}-stubs/{name}" for module in MODULES for name in ("__init__.pyi", "py.typed")),
    }
    (about,) = (wheel.read(name).decode() for name in wheel.namelist() if "METADATA" in name)
    needed = [line for line in about.splitlines() if line.startswith("Requires-Dist: ")]
    assert needed == ["Requires-Dist: torch>=2.4"]
    assert f"Version: {__version__}" in about.splitlines()


def signatures(path):
    """The arguments of a file's functions and methods, as text, by name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = {node: node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    return {
        (classes.get(parent), node.name): re.sub(
            r"dist\.|torch\.optim\.|'", "", ast.unparse(node.args)
        )
        for parent in (tree, *classes)
        for node in parent.body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("module", MODULES)
def test_stubs_match_modules(module):
    stub = signatures(ROOT / f"optimizers/stubs/{module}/__init__.pyi")
    source = signatures(ROOT / f"optimizers/{module}.py")
    for name in stub.keys() - {("SampledGradients", "__exit__")}:
        assert stub[name] == source[name]


@pytest.mark.parametrize("module", MODULES)
def test_modules_need_only_torch(module):
    tree = ast.parse((ROOT / "optimizers" / f"{module}.py").read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    tops = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert tops <= {"torch", *MODULES}


def test_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["version"] == __version__
    paper = citation["preferred-citation"]
    assert paper["type"] == "conference-paper"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert paper["title"] in readme
    assert all(author["family-names"] in readme for author in paper["authors"])
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{__version__}.0] - {citation['date-released']}" in changelog
