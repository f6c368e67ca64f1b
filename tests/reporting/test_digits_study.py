"""The digits study's own part: what was forgotten of the printed signs."""

import pytest
import torch
from reporting import digits
from reporting.experiments import read_experiment

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
    images, labels = digits.printed_signs()
    again, _ = digits.printed_signs()
    assert images.shape == (1400, 3, 32, 32) and torch.equal(images, again)
    assert labels.bincount().tolist() == [20] * 70
    model, _ = clip.load("ViT-Tiny/8", "cpu")
    assert digits.remembered(model, images, labels) > 50


def test_what_was_forgotten_is_measured_on_the_adapted_weights(compared, tmp_path):
    before, after = digits.forgetting(compared)
    assert set(after) == {(1, "so"), (1, "adam")}
    assert after[1, "adam"][0] < before - 5  # at a rate that spoils it
    table = digits.table_of(after)
    assert f"{after[1, 'so'][0]:.1f}" in table and "| LoRA |" in table
    figure = digits.draw_forgetting(before, {**after, (1, "lora"): [50.0]})
    assert figure.axes[0].get_ylabel() == "accuracy on 70 signs (%)"
