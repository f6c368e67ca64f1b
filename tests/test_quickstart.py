"""The notebook of docs runs from top to bottom, and writes nothing beside itself."""

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs"


@pytest.mark.filterwarnings("ignore")  # those of Jupyter's packages are theirs
def test_quickstart_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name in ("TMPDIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("N_ITERS", "2")
    notebook = nbformat.read(FOLDER / "quickstart.ipynb", as_version=4)
    resources = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    (result,) = tmp_path.glob("*/results/so/ViT-Tiny-8/digits/16shots/*/result.json")
    assert (result.parent / "weights.safetensors").exists()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    assert re.search(r"Final test accuracy.*zero .*^SO:.*^Adam:", text, re.DOTALL | re.MULTILINE)
