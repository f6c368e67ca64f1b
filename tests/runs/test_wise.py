"""--wise: what was learned is scaled where it is reported and saved, and nowhere else."""

import json

import pytest
import torch
from commands import run

import clip
from optimizers.delta import read_delta


@pytest.mark.parametrize("method", ["so", "lora", "adam"])
def test_a_run_reports_and_saves_scaled_weights_and_trains_as_without(method, tmp_path):
    common = ["--method", method, "--shots", "1", "--n_iters", "6", "--eval_every", "3"]
    common += ["--num_workers", "0", "--save_path", str(tmp_path)]
    run(*common)
    out = run(*common, "--wise", "0.5")
    folders = sorted(path.parent for path in tmp_path.rglob("result.json"))
    assert [folder.name for folder in folders] == [
        "seed3-eval_every_3-n_iters_6",
        "seed3-eval_every_3-n_iters_6-wise_0.5",
    ]
    plain, half = (read_delta(folder / "weights.safetensors") for folder in folders)
    assert half.metadata == plain.metadata | {"wise": "0.5"}
    base = clip.load("ViT-Tiny/8", "cpu")[0].state_dict()
    for name, (indices, values, _) in plain.tensors.items():
        before = base[name].flatten()[indices.long()].double()
        middle = (before + 0.5 * (values.double() - before)).float()
        moved = middle != before
        assert torch.equal(half.tensors[name].values, middle[moved])
        assert torch.equal(half.tensors[name].indices, indices[moved])
    losses = [
        [line.split(",")[1] for line in (folder / "curve.csv").read_text().splitlines()]
        for folder in folders
    ]
    assert losses[0] == losses[1]
    result = json.loads((folders[1] / "result.json").read_text())
    assert f"Final test accuracy: {result['final_accuracy']:.2f}." in out
    assert result["config"]["wise"] == 0.5

    again = (*common, "--wise", "0.5", "--eval_only")
    assert f"Test accuracy: {result['final_accuracy']:.2f}" in run(*again)  # not scaled twice
    (folders[1] / "weights.safetensors").unlink()
    assert f"Test accuracy: {result['final_accuracy']:.2f}" in run(*again)
