"""The command line end to end: accuracies, methods, choice of weights, datasets, failures."""

import csv
import random

import pytest
import torch
from commands import read_losses, refused, result_of, run, run_folder
from dataset_helpers import change_split, make_dataset

import main
from optimizers.build import METHODS
from optimizers.delta import read_delta
from utils import Predictions


@pytest.mark.parametrize("method", METHODS)
def test_methods_share_one_protocol(method, command, tmp_path):
    argv = [*command, "--method", method, "--lr", 0.01]
    printed, result = run(*argv), result_of(tmp_path / "out")
    zero_shot, final = (f"{result[f'{key}_accuracy']:.2f}" for key in ("zero_shot", "final"))
    assert f"\n**** Zero-shot CLIP's test accuracy: {zero_shot}. ****\n" in printed
    assert f"\n**** Final test accuracy: {final}. ****\n" in printed
    assert result["method"] == method and result["last_accuracy"] == result["final_accuracy"]
    assert result["selected_iteration"] == result["iterations"] == 4
    delta = read_delta(run_folder(tmp_path / "out") / "weights.safetensors")
    assert len(delta.tensors) == (6 if method == "lora" else 24)
    # The first loss is that of the pretrained weights: same images and augmentation.
    run(*command, "--save_path", tmp_path / "so", "--n_iters", 1)
    assert read_losses(tmp_path / "out")[0] == read_losses(tmp_path / "so")[0]
    assert f"**** Test accuracy: {final}. ****" in run(*argv, "--eval_only")


def test_best_val_is_reported(command, tmp_path, monkeypatch):
    val_hits, test_hits = iter([1, 5, 4]), iter([1, 2, 3, 6])  # of six images

    def fake_evaluate(classifier, loader, items, desc):
        hits = next(val_hits if desc == "Validation" else test_hits)
        labels = (torch.arange(6) < hits).long()
        return Predictions(labels, torch.ones(6).long(), torch.full((6,), hits / 8))

    monkeypatch.setattr(main, "evaluate", fake_evaluate)
    command += ["--n_iters", 3, "--early_stop_loss", 0, "--eval_every", 2]
    assert "Final test accuracy: 50.00" in run(*command, "--final_model", "best_val")
    result, folder = result_of(tmp_path / "out"), run_folder(tmp_path / "out")
    assert (result["final_accuracy"], result["last_accuracy"]) == (50.0, 100.0)
    assert (result["selected_iteration"], result["iterations"]) == (4, 6)
    assert result["per_class"] == dict(zip(result["classnames"], (0.0, 100.0, None), strict=True))
    assert result["ece"] == 100 * abs(0.5 - 3 / 8)
    assert result["balanced_accuracy"] == 50 and result["macro_f1"] == pytest.approx(100 / 3)
    rows = list(csv.DictReader((folder / "predictions.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == ["1"] * 3 + ["0"] * 3
    assert {(row["predicted"], row["probability"]) for row in rows} == {("1", "0.375")}


@pytest.mark.parametrize("uneven", [False, True])
def test_uneven_classes_print_balanced_accuracy(uneven, command, tmp_path):
    folder = make_dataset("eurosat", tmp_path)
    if uneven:
        change_split(folder, lambda split: split["test"].pop())
    command += ["--root_path", tmp_path]
    printed, again, evaluated = run(*command), run(*command), run(*command, "--eval_only")
    balanced = f"alanced accuracy: {result_of(tmp_path / 'out')['balanced_accuracy']:.2f}. ****\n"
    for out in (printed, again, evaluated):
        assert (balanced in out) == uneven


def test_python_random_only_draws_shots(command, monkeypatch):
    states, build_dataset = [], main.build_dataset

    def record_states(*args, **options):
        states.append(random.getstate())
        dataset = build_dataset(*args, **options)
        states.append(random.getstate())
        return dataset

    monkeypatch.setattr(main, "build_dataset", record_states)
    run(*command, "--n_iters", 1)
    assert states == [random.Random(3).getstate(), random.getstate()]


@pytest.mark.parametrize(
    "extra, words",
    [
        (["--root_path", "/no/such/folder"], ["/no/such/folder", "DATASETS.md"]),
        (["--root_path", "a\nb\x1b[31m"], [r"a b\x1b[31m is not a folder"]),
        (["--backbone", "main.py"], ["main.py"]),
    ],
)
def test_missing_data_leaves_nothing(extra, words, command, tmp_path, monkeypatch):
    monkeypatch.chdir(main.REPO_ROOT)
    message = refused(*command, *extra)
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()
