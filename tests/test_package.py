"""`pip install .`: the two modules that people copy, and nothing else."""

import ast
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = ["SparseOptimizer", "SampledGradients"]


@pytest.mark.filterwarnings("ignore:Support for")  # older versions of setuptools call it beta
def test_wheel_contains_two_modules(tmp_path, monkeypatch):
    backend = pytest.importorskip("setuptools.build_meta", reason="setuptools builds the wheel")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("clip", "datasets", "optimizers"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.p[ty]c*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["setup.py"])  # which setuptools reads
    wheel = zipfile.ZipFile(tmp_path / backend.build_wheel(str(tmp_path)))
    files = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert sorted(files) == sorted(f"{module}.py" for module in MODULES)
    (about,) = (wheel.read(name).decode() for name in wheel.namelist() if "METADATA" in name)
    needed = [line for line in about.splitlines() if line.startswith("Requires-Dist: ")]
    assert needed == ["Requires-Dist: torch>=2.4"]


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
