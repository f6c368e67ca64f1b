"""The command line end to end: what runs, what it prints, how it fails."""

import csv
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import refused, result_of, run, run_folder
from dataset_helpers import ELEVEN, LAYOUTS, make_dataset

import main
from optimizers.build import METHODS
from optimizers.delta import read_delta
from utils import Predictions

ROOT = Path(__file__).parents[2]
LINES = re.compile(
    r"\*\*\*\* Zero-shot CLIP's test accuracy: (\d+\.\d\d)\. \*\*\*\*\s+"
    r"\*\*\*\* Final test accuracy: (\d+\.\d\d)\. \*\*\*\*"
)


def curve(out):
    return (run_folder(out) / "curve.csv").read_text().splitlines()


def losses(out):
    return [line.split(",")[1] for line in curve(out)[1:]]


def test_the_program_prints_both_accuracies_and_ends_cleanly(command, tmp_path):
    python = [sys.executable, str(ROOT / "main.py"), *map(str, command)]
    done = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and re.fullmatch(r"(note: .*\n)*", done.stderr)
    told = LINES.search(done.stdout).groups()
    result = result_of(tmp_path)
    assert told == (f"{result['zero_shot_accuracy']:.2f}", f"{result['final_accuracy']:.2f}")


def test_a_run_repeats_bit_for_bit_with_any_number_of_workers(command, tmp_path):
    curves = []
    for workers in (0, 1, 3):
        out = tmp_path / str(workers)
        run(*command, "--save_path", out, "--num_workers", workers)
        curves.append(curve(out))
    assert curves[0] == curves[1] == curves[2]


@pytest.mark.parametrize("method", METHODS)
def test_methods_share_the_protocol_and_save_what_they_learnt(method, command, tmp_path):
    argv = [*command, "--method", method, "--lr", 0.01]
    final = LINES.search(run(*argv)).group(2)
    result = result_of(tmp_path / "out")
    delta = read_delta(run_folder(tmp_path / "out") / "weights.safetensors")
    assert delta.metadata["backbone"].endswith("tiny vit.pt")
    assert len(delta.tensors) == (6 if method == "lora" else 24)
    assert result["method"] == method and result["last_accuracy"] == result["final_accuracy"]
    assert result["selected_iteration"] == result["iterations"] == 4
    # The first loss is taken before anything is learnt: same images, same augmentation, same model.
    run(*command, "--save_path", tmp_path / "reference", "--n_iters", 1)
    assert losses(tmp_path / "out")[0] == losses(tmp_path / "reference")[0]
    assert f"**** Test accuracy: {final}. ****" in run(*argv, "--eval_only")


def test_accuracy_is_measured_while_training_which_changes_nothing(command, tmp_path):
    command += ["--n_iters", 5, "--early_stop_loss", 0]
    run(*command, "--eval_every", 4, "--save_path", tmp_path / "a")
    rows = list(csv.DictReader(curve(tmp_path / "a")))
    assert [int(row["iteration"]) for row in rows if row["test_accuracy"]] == [4, 8, 10]
    run(*command, "--save_path", tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize("method", METHODS)
def test_the_iterate_may_be_chosen_on_validation_images_alone(
    method, command, tmp_path, monkeypatch
):
    validation, test = iter([1, 5, 4]), iter([1, 2, 3, 6])  # hits of six

    def evaluate(classifier, loader, items, desc):
        hits = next(validation if desc == "Validation" else test)
        labels = (torch.arange(6) < hits).long()
        return Predictions(labels, torch.ones(6).long(), torch.full((6,), hits / 8))

    monkeypatch.setattr(main, "evaluate", evaluate)
    command += ["--method", method, "--early_stop_loss", 0, "--lr", 0.01]
    select = [*command, "--n_iters", 3, "--eval_every", 2, "--final_model", "best_val"]
    assert "Final test accuracy: 50.00" in run(*select)
    result = result_of(tmp_path)
    assert (result["final_accuracy"], result["last_accuracy"]) == (50.0, 100.0)
    assert (result["selected_iteration"], result["iterations"]) == (4, 6)
    assert result["per_class"] == dict(zip(result["classnames"], (0.0, 100.0, None), strict=True))
    assert result["ece"] == 100 * abs(0.5 - 3 / 8)
    lines = (run_folder(tmp_path) / "predictions.csv").read_text().splitlines()
    assert [line.split(",")[1:] for line in lines[1:]] == [["1", "1", "0.375"]] * 3 + [
        ["0", "1", "0.375"]
    ] * 3
    weights = (run_folder(tmp_path) / "weights.safetensors").read_bytes()
    monkeypatch.undo()
    argv = [*select, "--save_path", tmp_path / "last", "--final_model", "last_step"]
    run(*argv, "--overwrite")
    assert (run_folder(tmp_path / "last") / "weights.safetensors").read_bytes() != weights


def test_an_early_stop_is_told_with_its_iteration_and_loss(command, tmp_path):
    out = run(*command, "--n_iters", 9, "--early_stop_loss", 99)
    (line,) = [line for line in out.splitlines() if line.startswith("Stopped early")]
    assert "after iteration 1 of 18" in line and "is below 99" in line
    assert result_of(tmp_path)["iterations"] == 1 == len(losses(tmp_path))
    assert "Stopped" not in run(*command, "--n_iters", 9, "--early_stop_loss", -1)


@pytest.mark.parametrize("encoder", ["text", "vision", "both"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_encoder_and_precision_runs(command, encoder, precision):
    argv = [*command, "--n_iters", 1, "--encoder", encoder, "--precision", precision]
    assert LINES.search(run(*argv))


def test_a_resnet_adapts_its_text_tower(command, data):
    command += ["--backbone", data / "tiny-resnet.pt", "--n_iters", 1]
    assert "ResNet" in refused(*command, "--encoder", "vision")
    assert LINES.search(run(*command))


@pytest.mark.parametrize("name", ELEVEN)
@pytest.mark.parametrize("convention", ["coop", "lora"])
def test_every_dataset_runs_in_both_conventions(name, convention, command, tmp_path):
    make_dataset(name, tmp_path, convention, split=convention == "lora", per_class=10)
    argv = ["--root_path", tmp_path, "--dataset", name, "--n_iters", 1]
    assert LINES.search(run(*command, *argv))


def test_python_random_is_used_for_the_few_shots_alone(command, monkeypatch):
    states = []
    build = main.build_dataset

    def watched(*args, **own):
        assert random.getstate() == random.Random(3).getstate()
        dataset = build(*args, **own)
        states.append(random.getstate())
        return dataset

    monkeypatch.setattr(main, "build_dataset", watched)
    run(*command, "--n_iters", 1)
    assert random.getstate() == states[0]


@pytest.mark.parametrize("method", ["so", "lora"])
def test_the_closing_hint_repeats_the_method(method, tmp_path):
    flags = ["--shots", 1, "--n_iters", 1, "--save_path", tmp_path, "--method", method]
    last = run(*flags).splitlines()[-1].strip()
    hint = "python main.py --root_path $DATA --dataset eurosat --shots 16"
    assert last == (hint if method == "so" else f"{hint} --method lora")


# Failures


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


@pytest.mark.parametrize("content", ["cut", "empty", "text", "hostile"])
def test_a_damaged_or_hostile_checkpoint_is_refused_by_name(
    content, command, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad one.pt"
    whole = (data / "tiny vit.pt").read_bytes()
    hostile = pickle.dumps(Hostile())
    path.write_bytes(
        {"cut": whole[:-9999], "empty": b"", "text": b"x", "hostile": hostile}[content]
    )
    assert "bad one.pt" in refused(*command, "--backbone", path)
    assert not (tmp_path / "hacked").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--root_path", "/no/such/folder"], ["/no/such/folder", "DATASETS.md"]),
        (["--root_path", "a\nb\x1b[31m"], [r"a b\x1b[31m is not a folder"]),
        (["--dataset", "dtd"], ["dtd", "DTD", "DATASETS.md"]),
    ],
)
def test_data_that_is_not_there_is_refused_and_nothing_left(argv, words, command, tmp_path):
    message = refused(*command, *argv)
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


def test_a_broken_image_is_named_and_nothing_finished_is_lost(command, tmp_path):
    make_dataset("eurosat", tmp_path)
    run(*command)
    kept = {p: p.read_bytes() for p in run_folder(tmp_path).iterdir()}
    for path in (tmp_path / LAYOUTS["eurosat"][0]).rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:100])
    message = refused(*command, "--root_path", tmp_path, "--seed", 4)
    assert ".jpg cannot be read" in message and str(tmp_path) in message
    assert [path.parent.name[:5] for path in tmp_path.rglob("result.json")] == ["seed3"]
    assert kept == {p: p.read_bytes() for p in kept}


def test_a_loss_that_is_not_finite_keeps_the_curve(command, tmp_path):
    message = refused(*command, "--lr", 1e38)
    assert "iteration 2 of 4" in message and "--lr" in message
    assert len(losses(tmp_path)) == 2 and losses(tmp_path)[-1] == "nan"
    assert not (run_folder(tmp_path) / "result.json").exists()


def test_a_backbone_that_changes_during_the_run_is_noticed(command, data, tmp_path, monkeypatch):
    backbone = tmp_path / "tiny.pt"
    backbone.write_bytes((data / "tiny vit.pt").read_bytes())
    train = main.train

    def change(*args):
        yield from train(*args)
        backbone.unlink()

    monkeypatch.setattr(main, "train", change)
    assert "tiny.pt changed during this run" in refused(*command, "--backbone", backbone)
    assert not [*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("result.json")]
