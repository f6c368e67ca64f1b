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
from helpers import imported_names

from optimizers.SparseOptimizer import __version__

ROOT = Path(__file__).parents[1]
PREFIXES = re.compile(r"dist\.|torch\.optim\.|'")
MODULES = ["SparseOptimizer", "SampledGradients"]


@pytest.mark.filterwarnings("ignore:Support for")  # older versions of setuptools call it beta
def test_wheel_contains_two_modules(tmp_path, monkeypatch):
    pytest.importorskip("setuptools", minversion="68", reason="it builds the wheel")
    backend = import_module("setuptools.build_meta")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("clip", "datasets", "optimizers"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.p[ty]c*"))
    monkeypatch.chdir(tmp_path)
    # setuptools adds this once; a test that restores sys.path may have taken it away.
    monkeypatch.syspath_prepend(Path(backend.__file__).parent / "_vendor")
    monkeypatch.setattr(sys, "argv", ["setup.py"])  # which setuptools reads
    wheel = zipfile.ZipFile(tmp_path / backend.build_wheel(str(tmp_path)))
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    kinds = ".py", "-stubs/__init__.pyi", "-stubs/py.typed"
    assert files == {module + kind for module in MODULES for kind in kinds}
    (about,) = (wheel.read(name).decode() for name in wheel.namelist() if "METADATA" in name)
    assert re.findall("Requires-Dist: (.*)", about) == ["torch>=2.4"]
    assert f"Version: {__version__}" in about.splitlines()


def signatures(path):
    """The arguments of a file's functions and methods, as text, by name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {
        f"{getattr(parent, 'name', '')}.{node.name}": PREFIXES.sub("", ast.unparse(node.args))
        for parent in (tree, *classes)
        for node in parent.body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("module", MODULES)
def test_stubs_match_modules(module):
    stub = signatures(ROOT / f"optimizers/stubs/{module}/__init__.pyi")
    source = signatures(ROOT / f"optimizers/{module}.py")
    assert stub.items() <= source.items()


@pytest.mark.parametrize("module", MODULES)
def test_modules_need_only_torch(module):
    names = set(imported_names(ROOT / "optimizers" / f"{module}.py"))
    assert names - set(sys.stdlib_module_names) <= {"torch", *MODULES}


def test_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == __version__
    paper = citation["preferred-citation"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert paper["title"] in readme
    assert all(author["family-names"] in readme for author in paper["authors"])
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{__version__}.0] - {citation['date-released']}" in changelog
