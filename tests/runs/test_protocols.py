"""--subsample, --test_on, --wise: base to new classes, other datasets, interpolated weights."""

import json
import re

import list_pending
import pytest
import torch
from clip_helpers import TINY_VIT, random_state_dict
from commands import read_losses, refused, result_of, run, run_folder
from dataset_helpers import make_dataset

import main
from run_utils import get_arguments
from runs.output_dir import lock_output_dir

ACCURACY = re.compile(r"\*\*\*\* (.+): (\d+\.\d\d)\. \*\*\*\*")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five textures, other datasets of a few classes, and a random ViT."""
    folder = tmp_path_factory.mktemp("data")
    make_dataset("dtd", folder, classes=5, per_class=20)
    make_dataset("eurosat", folder, classes=4, per_class=20)
    make_dataset("imagenet_r", folder, classes=6, per_class=4)
    torch.save(random_state_dict({**TINY_VIT, "context_length": 48}), folder / "tiny vit.pt")
    return folder


@pytest.fixture
def command(command):
    """Arguments of a run of four iterations on five textures into `out`."""
    return [*command, "--dataset", "dtd", "--s", 0.5, "--lr", 1e-2, "--early_stop_loss", -1]


def is_finished(argv):
    return list_pending.is_finished(get_arguments([str(argument) for argument in argv]))


def parse_accuracies(out):
    """The printed accuracies by the words before them."""
    return {words: float(value) for words, value in ACCURACY.findall(out)}


@pytest.mark.parametrize("method", ["so", "lora"])
def test_subsample_base_tests_new_classes(method, command, tmp_path):
    base = [*command, "--method", method, "--subsample", "base"]
    printed = parse_accuracies(run(*base))
    folder, result = run_folder(tmp_path), result_of(tmp_path)
    assert folder.name.endswith("-subsample_base")
    names = ["banded", "meshed", "polka-dotted"]  # of five classes three, the half rounded up
    assert result["classnames"] == list(result["per_class"]) == names
    assert printed == {
        "Zero-shot CLIP's test accuracy": round(result["zero_shot_accuracy"], 2),
        "Zero-shot CLIP's test accuracy on new classes": round(result["zero_shot_new_accuracy"], 2),
        "Final test accuracy": round(result["final_accuracy"], 2),
        "Final test accuracy on new classes": round(result["new_accuracy"], 2),
    }
    assert (result["data"]["train"], result["data"]["test"]) == (30, 18)
    fewshot = json.loads((folder / "fewshot.json").read_text())["train"]
    assert sorted(label for _, label, _ in fewshot) == [0, 0, 1, 1, 2, 2]
    assert parse_accuracies(run(*base)) == printed  # finished
    # The same weights on the new classes only.
    assert parse_accuracies(run(*base, "--subsample", "new", "--eval_only")) == {
        "Zero-shot CLIP's test accuracy": printed["Zero-shot CLIP's test accuracy on new classes"],
        "Test accuracy": printed["Final test accuracy on new classes"],
    }


def test_subsample_new_is_another_run(command, tmp_path):
    new = [*command, "--subsample", "new"]
    message = refused(*new, "--eval_only")
    assert message.count(".safetensors") == 1 and "no weights to evaluate" in message
    run(*new)
    result = result_of(tmp_path)
    assert result["classnames"] == ["striped", "zigzagged"] and "new_accuracy" not in result
    assert is_finished(new) and not is_finished([*new, "--subsample", "all"])


@pytest.mark.parametrize("method", ["so", "lora"])
def test_best_val_is_tested_everywhere(method, command, tmp_path):
    command += ["--subsample", "base", "--final_model", "best_val", "--eval_every", 1]
    command += ["--method", method, "--n_iters", 3, "--test_on", "eurosat"]
    printed, result = parse_accuracies(run(*command)), result_of(tmp_path)
    assert result["selected_iteration"] < result["iterations"]  # or this test shows nothing
    expected = {words.replace("Final test", "Test"): value for words, value in printed.items()}
    assert parse_accuracies(run(*command, "--eval_only")) == expected


@pytest.mark.parametrize("method", ["so", "lora"])
def test_test_on_other_datasets(method, command, tmp_path):
    command += ["--method", method, "--test_on", "imagenet_r", "eurosat"]
    printed = parse_accuracies(run(*command))
    path = run_folder(tmp_path) / "transfer.json"
    transfer = json.loads(path.read_text())
    assert list(transfer) == ["imagenet_r", "eurosat"]
    assert [(t["classes"], t["images"]) for t in transfer.values()] == [(6, 12), (4, 24)]
    for name, entry in transfer.items():
        for key, words in (("zero_shot_accuracy", "Zero-shot CLIP's"), ("final_accuracy", "Final")):
            assert round(entry[key], 2) == printed[f"{words} test accuracy on {name}"]
    # A finished run's saved weights are tested, without training; a damaged file is replaced.
    for text in ('{"own": ', '{"own": {"zero_shot_accuracy": 1}}'):
        path.write_text(text)
        again = run(*command)
        assert "This run is finished" in again and parse_accuracies(again) == printed
        assert json.loads(path.read_text()) == transfer


def test_test_on_evaluates_once(command, tmp_path, monkeypatch):
    run(*command, "--test_on", "eurosat")
    folder, evaluated, evaluate = run_folder(tmp_path), [], main.evaluate

    def record_name(classifier, loader, items, desc):
        evaluated.append(desc)
        return evaluate(classifier, loader, items, desc)

    monkeypatch.setattr(main, "evaluate", record_name)
    with lock_output_dir(folder):  # found out before evaluating
        assert "is used by" in refused(*command, "--test_on", "imagenet_r") and not evaluated
    printed = parse_accuracies(run(*command, "--test_on", "eurosat", "imagenet_r"))
    assert evaluated == ["imagenet_r", "imagenet_r"] and len(printed) == 6
    assert is_finished([*command, "--test_on", "imagenet_r", "eurosat"])
    run(*command, "--overwrite", "--filename", "b")  # other weights, not yet tested on others
    assert [path.name for path in folder.glob("*.safetensors")] == ["b.safetensors"]
    run(*command, "--overwrite", "--no-save_weights")
    assert not (folder / "transfer.json").exists()
    assert not is_finished([*command, "--test_on", "eurosat"])
    assert "--save_weights" in refused(*command, "--test_on", "eurosat")


def test_test_on_with_eval_only(command, tmp_path):
    weights = random_state_dict({**TINY_VIT, "context_length": 48})
    torch.save(weights, tmp_path / "weights.pt")  # as the authors' code leaves them
    out = run(*command, "--save_path", tmp_path, "--eval_only", "--test_on", "imagenet_r")
    titles = ["Zero-shot CLIP's test accuracy", "Test accuracy"]
    expected = [f"{title}{target}" for title in titles for target in ("", " on imagenet_r")]
    assert list(parse_accuracies(out)) == expected
    assert not list(tmp_path.rglob("transfer.json"))  # there is no run that it would belong to


def test_test_on_rejects_bad_names(command, tmp_path):
    assert "did you mean 'eurosat'" in refused(*command, "--test_on", "eurosta")
    assert "twice" in refused(*command, "--test_on", "eurosat", "eurosat")
    assert "there is no food-101" in refused(*command, "--test_on", "food101")
    (tmp_path / "new classes").mkdir()
    assert "another name" in refused(*command, "--test_on", tmp_path / "new classes")
    assert not (tmp_path / "out").exists()


def test_test_only_sets_skip_training(command, tmp_path):
    command += ["--dataset", "imagenet_r"]
    start = command.index("--n_iters")
    without_n_iters = command[:start] + command[start + 2 :]
    for argv in (without_n_iters, [*command, "--n_iters", 0]):
        assert len(parse_accuracies(run(*argv))) == 1
    assert "train on imagenet and give --test_on imagenet_r" in refused(*command)
    assert "no validation images" in refused(*without_n_iters, "--eval_split", "val")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["so", "lora"])
def test_wise_scales_what_was_learned(method, command, tmp_path):
    command += ["--method", method, "--eval_every", 2]
    run(*command)
    folder = run_folder(tmp_path)
    out = run(*command, "--wise", 0.5)
    wise_folder = folder.with_name(f"{folder.name}-wise_0.5")
    accuracy = f"{result_of(wise_folder)['final_accuracy']:.2f}"
    assert f"Final test accuracy: {accuracy}." in out
    assert read_losses(wise_folder) == read_losses(folder)
    command += ["--wise", 0.5, "--eval_only"]
    assert f"Test accuracy: {accuracy}" in run(*command)  # not scaled twice
    (wise_folder / "weights.safetensors").unlink()
    assert f"Test accuracy: {accuracy}" in run(*command)  # the other run's, scaled
