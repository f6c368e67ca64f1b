"""The digits study's own part: what was forgotten of the printed signs."""

import json

import pytest
import torch
from reporting import digits, moments, wise
from reporting.experiments import read_experiment
from reporting.forgetting import forgetting, printed_signs, remembered

import clip
import main


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """An experiment of two short runs that keep their weights."""
    root = tmp_path_factory.mktemp("study")
    (root / "small.yaml").write_text(
        "kind: compare\nsave_path: runs\nout: docs\n"
        "common: {config: configs/digits.yaml, n_iters: 8, shots: 1, seed: 1, save_weights: true}\n"
        "settings: [{method: so}, {method: adam, lr: 1.0e-2}]\n"
    )
    experiment = read_experiment(root / "small.yaml", ["--num_workers", "0"], root)
    for run in experiment.runs:
        main.main(run.arguments)
    return experiment


def test_printed_signs_are_the_same_each_time_and_known_to_the_tiny_clip():
    images, labels = printed_signs()
    again, _ = printed_signs()
    assert images.shape == (1400, 3, 32, 32) and torch.equal(images, again)
    assert labels.bincount().tolist() == [20] * 70
    model, _ = clip.load("ViT-Tiny/8", "cpu")
    assert remembered(model, images, labels) > 50


def test_what_was_forgotten_is_measured_on_the_adapted_weights(compared, tmp_path):
    before, after = forgetting(compared.runs)
    assert set(after) == {(1, "so"), (1, "adam")}
    assert after[1, "adam"][1] < before - 5  # at a rate that spoils it
    table = moments.means_table(after)
    assert f"{after[1, 'so'][1]:.1f}" in table and "| Adam |" in table.replace("  ", "")
    figure = digits.draw_forgetting(before, {**after, (1, "lora"): {1: 50.0}})
    assert figure.axes[0].get_ylabel() == "accuracy on 70 signs (%)"


def test_interpolation_begins_at_the_base_and_ends_at_what_was_trained(compared, monkeypatch):
    monkeypatch.setattr(wise, "SHOTS", (1,))
    monkeypatch.setattr(wise, "ALPHAS", [0, 0.5, 1])
    paths = wise.measure(compared.runs)
    before, after = forgetting(compared.runs)
    for run in compared.runs:
        ((zero, _, one),) = paths[1, run.config.method]
        assert zero[1] == before and one[1] == after[1, run.config.method][1]
        assert zero[0] == pytest.approx(67.04, abs=0.01)
        result = json.loads((run.folder / "result.json").read_text())
        assert one[0] == pytest.approx(result["final_accuracy"])
    paths[1, "lora"] = paths[1, "so"]
    assert f"| 67.0 / {before:.1f} |" in wise.table(paths).replace("  ", " ")
    assert len(wise.draw(paths).axes) == 1
