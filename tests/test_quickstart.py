"""The notebook of docs runs from top to bottom, and writes nothing beside itself."""

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
    texts = [
        "".join(output.get("text", "") for output in cell["outputs"])
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    assert float(texts[2].split()[0]) == pytest.approx(67.04, abs=0.6)  # zero-shot, as committed
    assert "Final test accuracy" in texts[3] and "zero " in texts[4]
    assert [line.split(":")[0] for line in texts[6].splitlines()] == ["SO", "Adam"]
