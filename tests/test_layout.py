"""The root has four modules, imports point downwards, and sources run nothing that they read."""

import re
from pathlib import Path

import pytest
from helpers import imported_names

ROOT = Path(__file__).parents[1]
LAYERS = [  # from the bottom up: each may import those before it
    "utils", "clip", "optimizers", "datasets", "run_utils", "runs", "train", "main", "scripts",
    "benchmarks",
]  # fmt: skip
LAYER_OF = {
    **{path.stem: "scripts" for path in (ROOT / "scripts").iterdir()},
    **dict.fromkeys(("SparseOptimizer", "SampledGradients"), "optimizers"),
    **{name: name for name in LAYERS},
}


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_downwards(layer):
    file = ROOT / f"{layer}.py"
    modules = [file] if file.exists() else sorted((ROOT / layer).rglob("*.py"))
    assert modules
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules
        for name in imported_names(path)
        if LAYERS.index(LAYER_OF.get(name, "utils")) > LAYERS.index(layer)
    ]
    assert upward == []


def test_root_has_four_modules():
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert modules == {"main", "train", "run_utils", "utils"}


def test_shell_scripts_keep_line_ends():
    rules = (ROOT / ".gitattributes").read_text().splitlines()
    assert {"*.sh text eol=lf", ".ci/run text eol=lf"} <= set(rules)


FORBIDDEN = {  # what no line may hold, since it runs what it reads: a line that does
    r"torch\.load\((?!.*weights_only=True)": "torch.load(path)",
    r"\byaml\.(?!safe_|YAMLError|(Safe|Base)Loader|Alias"
    r"|load\(.*=(NoAliasSafe|yaml\.Base)Loader\))": "yaml.load(file)",
    r"shell=True|os\.(system|popen|spawn|exec)|getoutput": "subprocess.run(line, shell=True)",
    r"\beval\((?!\))|\bexec\(": "eval(text)",  # .eval() is a model's mode
    r"allow_pickle|np\.load\(|joblib|torch\.jit\.load\(": "np.load(path, allow_pickle=True)",
    r"\bpickle\.(?!_Unpickler|BUILD)|import (dill|marshal|shelve)": "pickle.loads(data)",
    r"urlopen|requests\.|_unverified_|verify=False|http://": "urllib.request.urlopen(url)",
    r"extractall|\.extract\(|unpack_archive": "archive.extractall(folder)",
    r"Image\.open\((?!\w+, formats=FORMATS)": "Image.open(path)",
}


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_sources_run_nothing_they_read(pattern):
    assert re.search(pattern, FORBIDDEN[pattern])
    for path in sorted(ROOT.rglob("*.py")):
        top = path.relative_to(ROOT).parts[0]
        if top != "tests" and not top.startswith("."):
            text = re.sub(r'""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            lines = [line.split("  #")[0] for line in text.splitlines()]
            assert not [line for line in lines if re.search(pattern, line)], path
