"""--subsample and --test_on: base to new classes, and other datasets than a run's own."""

import json
import re

import list_pending
import pytest
import torch
from clip_helpers import TINY_VIT, random_state_dict
from commands import refused, result_of, run, run_folder
from dataset_helpers import ROOT, make_dataset
from PIL import Image

import clip
import main

ACCURACY = re.compile(r"\*\*\*\* (.+): (\d+\.\d\d)\. \*\*\*\*")


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """Five textures, other datasets of a few classes, and a random ViT."""
    folder = tmp_path_factory.mktemp("disk")
    make_dataset("dtd", folder, classes=5, per_class=20)
    make_dataset("eurosat", folder, classes=4, per_class=20)
    make_dataset("imagenet_r", folder, classes=6, per_class=4)
    model = random_state_dict({**TINY_VIT, "context_length": 48})
    torch.save(model, folder / "tiny.pt")
    return folder


@pytest.fixture
def command(disk, tmp_path):
    """Arguments of a run of four iterations on five textures into `out`."""
    return [
        "--root_path", disk, "--dataset", "dtd", "--backbone", disk / "tiny.pt", "--shots", 2,
        "--n_iters", 2, "--s", 0.5, "--lr", 1e-2, "--num_workers", 0, "--threads", 1,
        "--save_path", tmp_path / "out", "--early_stop_loss", -1,
    ]  # fmt: skip


def told(out):
    """The accuracies that a run prints, by what stands before them."""
    return {words: float(value) for words, value in ACCURACY.findall(out)}


# Base to new classes


@pytest.mark.parametrize("method", ["so", "lora"])
def test_a_run_on_base_classes_tests_on_new_ones_too(method, command, disk, tmp_path):
    command += ["--method", method]
    found = told(run(*command, "--subsample", "base"))
    assert run_folder(tmp_path).name == "seed3-early_stop_loss_-1-lr_0.01-n_iters_2-s_0.5-" \
        "subsample_base"  # fmt: skip
    result = result_of(tmp_path)
    names = ["banded", "meshed", "polka-dotted"]  # of five classes three, the half rounded up
    assert result["classnames"] == list(result["per_class"]) == names
    assert {words: round(result[key], 2) for words, key in {
        "Zero-shot CLIP's test accuracy": "zero_shot_accuracy",
        "Zero-shot CLIP's test accuracy on new classes": "zero_shot_new_accuracy",
        "Final test accuracy": "final_accuracy",
        "Final test accuracy on new classes": "new_accuracy",
    }.items()} == found  # fmt: skip
    assert (result["data"]["train"], result["data"]["test"]) == (30, 18)
    few = json.loads((run_folder(tmp_path) / "fewshot.json").read_text())
    assert sorted(label for _, label, _ in few["train"]) == [0, 0, 1, 1, 2, 2]
    lines = (run_folder(tmp_path) / "predictions.csv").read_text().splitlines()[1:]
    assert len(lines) == 18 and {line.split(",")[1] for line in lines} == {"0", "1", "2"}
    assert told(run(*command, "--subsample", "base")) == found  # finished: printed, not run
    # The same on new classes alone, with the weights of the base run.
    again = told(run(*command, "--subsample", "new", "--eval_only"))
    assert again == {
        "Zero-shot CLIP's test accuracy": found["Zero-shot CLIP's test accuracy on new classes"],
        "Test accuracy": found["Final test accuracy on new classes"],
    }


def test_each_half_is_a_run_of_its_own_with_images_of_one_draw(command, tmp_path, monkeypatch):
    images = {}
    for subsample in ("all", "base", "new"):
        out = tmp_path / subsample
        run(*command, "--subsample", subsample, "--save_path", out, "--n_iters", 1)
        few = json.loads((run_folder(out) / "fewshot.json").read_text())["train"]
        images[subsample] = {path for path, _, _ in few}
        assert ("new_accuracy" in result_of(out)) == (subsample == "base")
        arguments = [str(a) for a in [*command, "--save_path", out, "--n_iters", 1]]
        assert list_pending.is_finished([*arguments, "--subsample", subsample])
        assert not list_pending.is_finished([*arguments, "--subsample", subsample, "--seed", "1"])
    assert images["base"] | images["new"] == images["all"]
    assert result_of(tmp_path / "new")["classnames"] == ["striped", "zigzagged"]
    only_base = refused(*command, "--subsample", "new", "--eval_only", "--seed", 1)
    assert only_base.count(".safetensors") == 1 and "no weights to evaluate" in only_base


def test_the_new_accuracy_is_that_of_the_iterate_that_is_reported(command, tmp_path):
    chosen = ["--subsample", "base", "--final_model", "best_val", "--eval_every", 1, "--n_iters", 4]
    found = told(run(*command, *chosen))["Final test accuracy on new classes"]
    result = result_of(tmp_path)
    assert result["selected_iteration"] < result["iterations"]  # or this shows nothing
    (kept,) = tmp_path.rglob("weights.safetensors")
    with_kept = [
        "--subsample",
        "base",
        "--eval_only",
        "--final_model",
        "best_val",
        "--eval_every",
        1,
    ]
    evaluated = told(run(*command, *with_kept, "--n_iters", 4))
    assert evaluated["Test accuracy on new classes"] == found
    assert evaluated["Test accuracy"] == round(result["final_accuracy"], 2)


# Other datasets


@pytest.mark.parametrize("method", ["so", "lora"])
def test_a_run_is_tested_on_other_datasets_once_its_result_is_written(method, command, tmp_path):
    command += ["--method", method, "--test_on", "imagenet_r", "eurosat"]
    found = told(run(*command))
    folder = run_folder(tmp_path)
    transfer = json.loads((folder / "transfer.json").read_text())
    assert list(transfer) == ["imagenet_r", "eurosat"]
    assert [(t["classes"], t["images"]) for t in transfer.values()] == [(6, 12), (4, 24)]
    for name, entry in transfer.items():
        assert round(entry["zero_shot_accuracy"], 2) == found[
            f"Zero-shot CLIP's test accuracy on {name}"]  # fmt: skip
        assert round(entry["final_accuracy"], 2) == found[f"Final test accuracy on {name}"]
        assert set(entry["data"]) == {"split", "digest", "train", "val", "test"}
    zero_shot = told(run(*command[:2], "--dataset", "imagenet_r", *command[4:6]))
    assert list(zero_shot.values()) == [found["Zero-shot CLIP's test accuracy on imagenet_r"]]
    # A finished run is tested with its kept weights, without training anew, and only once.
    (folder / "transfer.json").unlink()
    again = run(*command)
    assert "This run is finished" in again and told(again) == found
    assert json.loads((folder / "transfer.json").read_text()) == transfer


def test_what_is_known_of_a_dataset_is_not_measured_again(command, tmp_path, monkeypatch):
    run(*command, "--test_on", "eurosat")
    titles, usual = [], main.evaluate

    def evaluate(classifier, loader, items, desc):
        titles.append(desc)
        return usual(classifier, loader, items, desc)

    monkeypatch.setattr(main, "evaluate", evaluate)
    found = told(run(*command, "--test_on", "eurosat", "imagenet_r"))
    assert titles == ["imagenet_r", "imagenet_r"] and len(found) == 6
    arguments = [str(argument) for argument in command]
    assert list_pending.is_finished([*arguments, "--test_on", "imagenet_r", "eurosat"])
    run(*command, "--overwrite", "--no-save_weights")  # other weights: nothing is known of them
    assert not any(run_folder(tmp_path).glob("transfer.json"))
    assert not list_pending.is_finished([*arguments, "--test_on", "eurosat"])
    sentence = refused(*command, "--test_on", "eurosat")
    assert "--save_weights" in sentence


def test_weights_of_eval_only_are_tested_on_others_too(command, disk, tmp_path):
    weights = random_state_dict({**TINY_VIT, "context_length": 48})
    torch.save(weights, tmp_path / "weights.pt")  # as the authors' code leaves them
    argv = [*command, "--save_path", tmp_path, "--eval_only", "--test_on", "imagenet_r"]
    found = told(run(*argv))
    assert list(found) == [
        "Zero-shot CLIP's test accuracy", "Zero-shot CLIP's test accuracy on imagenet_r",
        "Test accuracy", "Test accuracy on imagenet_r",
    ]  # fmt: skip
    assert not list(tmp_path.rglob("transfer.json"))  # there is no run that it would belong to


def test_the_reported_iterate_is_tested_on_others(command, tmp_path):
    chosen = [
        "--final_model",
        "best_val",
        "--eval_every",
        1,
        "--n_iters",
        4,
        "--test_on",
        "eurosat",
    ]
    found = told(run(*command, *chosen))
    assert result_of(tmp_path)["selected_iteration"] < 8
    (run_folder(tmp_path) / "transfer.json").unlink()
    assert told(run(*command, *chosen)) == found


def test_targets_that_cannot_be_are_refused_before_training(command, tmp_path):
    assert "did you mean 'eurosat'" in refused(*command, "--test_on", "eurosta")
    assert "twice" in refused(*command, "--test_on", "eurosat", "eurosat")
    assert "there is no food-101" in refused(*command, "--test_on", "food101")
    assert not (tmp_path / "out").exists()


# Sets that are for testing alone


def test_a_set_for_testing_alone_has_a_zero_shot_accuracy_and_no_training(command, tmp_path):
    usual = [*command[:2], *command[4:]]
    at = usual.index("--n_iters")
    del usual[at : at + 2]
    assert len(told(run(*usual, "--dataset", "imagenet_r"))) == 1
    assert len(told(run(*usual, "--dataset", "imagenet_r", "--n_iters", 0))) == 1
    sentence = refused(*usual, "--dataset", "imagenet_r", "--n_iters", 1)
    assert "train on imagenet and give --test_on imagenet_r" in sentence
    assert "no validation images" in refused(*usual, "--dataset", "imagenet_r",
                                             "--eval_split", "val")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_set_of_200_classes_has_logits_over_these_alone(disk, tmp_path):
    make_dataset("imagenet_a", tmp_path, classes=200, per_class=2, size=(16, 16))
    path = disk / "tiny.pt"
    found = told(run("--root_path", tmp_path, "--dataset", "imagenet_a", "--backbone", path,
                     "--threads", 1))  # fmt: skip
    model, preprocess = clip.load(path, "cpu")
    lines = (ROOT / "datasets/imagenet_classnames.txt").read_text().splitlines()[:200]
    wnids, names = zip(*(line.split(maxsplit=1) for line in lines), strict=True)
    with torch.no_grad():
        prompts = model.tokenize([f"a photo of a {name}." for name in names])
        texts = model.encode_text(prompts)
        texts = texts / texts.norm(dim=-1, keepdim=True)
        hits = 0
        for label, wnid in enumerate(wnids):
            (file,) = (tmp_path / "imagenet-adversarial/imagenet-a" / wnid).iterdir()
            image = preprocess(Image.open(file).convert("RGB"))[None]
            hits += int((model.encode_image(image) @ texts.T).argmax()) == label
    assert found == {"Zero-shot CLIP's test accuracy": pytest.approx(hits / 2, abs=0.006)}
