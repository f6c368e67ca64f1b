"""The command line end to end: what it prints, what it leaves, what it refuses."""

import csv
import json
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from clip_helpers import TINY_RESNET, TINY_VIT, random_state_dict
from commands import call_main
from dataset_helpers import LAYOUTS, make_dataset

import main
import results
import run_utils
from clip import available_models
from datasets import DATASETS
from optimizers.methods import METHODS

ROOT = Path(__file__).parents[2]
LINES = re.compile(
    r"\*\*\*\* Zero-shot CLIP's test accuracy: (\d+\.\d\d)\. \*\*\*\*\s+"
    r"\*\*\*\* Final test accuracy: (\d+\.\d\d)\. \*\*\*\*"
)
VIT = {**TINY_VIT, "context_length": 48}
RESULT_KEYS = {
    "method", "backbone", "dataset", "shots", "seed", "zero_shot_accuracy", "final_accuracy",
    "iterations", "wall_seconds", "peak_memory_mb", "versions", "git_commit",
}  # fmt: skip


def refused(*argv):
    """The one sentence that a command ends with."""
    status, _, err = call_main(*argv)
    lines = err.strip().splitlines()
    assert status == 2 and lines[-1].startswith("main.py"), err
    assert "Traceback" not in err and len(lines) == 1, err
    return err


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a small EuroSAT, random checkpoints of a ViT and a ResNet."""
    folder = tmp_path_factory.mktemp("data")
    make_dataset("eurosat", folder)
    torch.save(random_state_dict(VIT), folder / "tiny vit.pt")
    torch.save(random_state_dict({**TINY_RESNET, "context_length": 48}), folder / "tiny-resnet.pt")
    return folder


@pytest.fixture
def command(data, tmp_path):
    """Arguments of a run of four iterations."""
    return [
        "--root_path", data, "--dataset", "eurosat", "--backbone", data / "tiny vit.pt",
        "--shots", 2, "--n_iters", 2, "--s", 0.9, "--lr", 1e-3, "--num_workers", 1,
        "--save_path", tmp_path / "out",
    ]  # fmt: skip


def folder_of(tmp_path, seed=3, method="so"):
    return tmp_path / "out" / method / "tiny vit" / "eurosat" / "2shots" / f"seed{seed}"


def test_a_run_prints_both_accuracies_and_leaves_its_folder(command, tmp_path):
    status, out, err = call_main(*command, "--save_weights")
    assert status == 0, err
    zero_shot, final = map(float, LINES.search(out).groups())
    folder = folder_of(tmp_path)
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "curve.csv", "result.json", "weights.safetensors",
    }  # fmt: skip
    result = json.loads((folder / "result.json").read_text())
    assert RESULT_KEYS <= set(result)
    assert (result["method"], result["dataset"], result["shots"]) == ("so", "eurosat", 2)
    assert result["zero_shot_accuracy"] == pytest.approx(zero_shot, abs=0.005)
    assert result["final_accuracy"] == pytest.approx(final, abs=0.005)
    assert result["iterations"] == 4 and result["wall_seconds"] > 0
    with open(folder / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["iteration", "loss", "lr", "test_accuracy"]
    assert [row["iteration"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["test_accuracy"] for row in rows[:-1]] == ["", "", ""]
    assert float(rows[-1]["test_accuracy"]) == result["final_accuracy"]
    assert float(rows[0]["lr"]) == 1e-3


def test_a_run_repeats_bit_for_bit_with_any_number_of_workers(command, tmp_path):
    curves = []
    for number, workers in enumerate((0, 1, 3)):
        options = ["--save_path", tmp_path / str(number), "--num_workers", workers]
        assert call_main(*command, *options)[0] == 0
        (curve,) = (tmp_path / str(number)).rglob("curve.csv")
        curves.append(curve.read_text())
    assert curves[0] == curves[1] == curves[2]


def test_saved_weights_evaluate_to_the_final_accuracy(command, data, tmp_path):
    _, out, _ = call_main(*command, "--save_weights", "--filename", "mine")
    final = LINES.search(out).group(2)
    kept = {p: p.read_bytes() for p in folder_of(tmp_path).iterdir()}
    status, out, _ = call_main(*command, "--eval_only", "--filename", "mine")
    assert status == 0 and f"**** Final test accuracy: {final}. ****" in out
    assert kept == {p: p.read_bytes() for p in folder_of(tmp_path).iterdir()}
    # Under the same name, another model: its weights are not those that were adapted.
    other = tmp_path / "tiny vit.pt"
    torch.save(random_state_dict(VIT, seed=1), other)
    message = refused(*command, "--eval_only", "--filename", "mine", "--backbone", other)
    assert "other weights" in message
    path = folder_of(tmp_path) / "mine.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "mine.safetensors is damaged" in refused(*command, "--eval_only", "--filename", "mine")
    assert "--save_weights" in refused(*command, "--eval_only", "--filename", "none")


@pytest.mark.parametrize("method", METHODS)
def test_methods_share_the_protocol_and_save_what_they_learnt(method, command, tmp_path):
    argv = [*command, "--method", method, "--lr", 0.01, "--save_weights"]
    status, out, err = call_main(*argv)
    assert status == 0, err
    zero_shot, final = map(float, LINES.search(out).groups())
    folder = folder_of(tmp_path, method=method)
    result = json.loads((folder / "result.json").read_text())
    assert result["method"] == method and result["last_accuracy"] == result["final_accuracy"]
    assert result["selected_iteration"] == result["iterations"] == 4
    # The first loss is taken before anything is learnt: same images, same augmentation, same model.
    assert call_main(*command, "--save_path", tmp_path / "reference", "--n_iters", 1)[0] == 0
    (reference,) = (tmp_path / "reference").rglob("curve.csv")
    losses = [
        f.read_text().splitlines()[1].split(",")[1] for f in (folder / "curve.csv", reference)
    ]
    assert losses[0] == losses[1]
    _, out, _ = call_main(*argv, "--eval_only")
    assert f"**** Final test accuracy: {final:.2f}. ****" in out


def test_an_unknown_method_names_the_valid_ones(command):
    assert all(name in refused(*command, "--method", "sparse") for name in METHODS)


def test_accuracy_is_measured_while_training(command, tmp_path):
    status, _, err = call_main(*command, "--n_iters", 5, "--early_stop_loss", 0, "--eval_every", 4)
    assert status == 0, err
    with open(folder_of(tmp_path) / "curve.csv", newline="") as file:
        measured = {int(r["iteration"]): r["test_accuracy"] for r in csv.DictReader(file)}
    assert [i for i, accuracy in measured.items() if accuracy] == [4, 8, 10]
    whole = (folder_of(tmp_path) / "curve.csv").read_text()
    call_main(*command, "--n_iters", 5, "--early_stop_loss", 0, "--overwrite")
    losses = [line.rpartition(",")[0] for line in whole.splitlines()]
    again = (folder_of(tmp_path) / "curve.csv").read_text().splitlines()
    assert losses == [line.rpartition(",")[0] for line in again]  # looking changes nothing


@pytest.mark.parametrize("method", METHODS)
def test_the_iterate_may_be_chosen_on_validation_images_alone(
    method, command, tmp_path, monkeypatch
):
    validation, test = iter([50.0, 90.0, 80.0]), iter([1.0, 10.0, 20.0, 30.0])

    def evaluate(model, batches, total, prompts, precision, desc):
        return next(validation if desc == "Validation" else test)

    monkeypatch.setattr(main, "evaluate", evaluate)
    argv = [*command, "--method", method, "--n_iters", 3, "--eval_every", 2, "--select", "val"]
    status, out, err = call_main(*argv, "--save_weights")
    assert status == 0, err
    result = json.loads((folder_of(tmp_path, method=method) / "result.json").read_text())
    assert (result["final_accuracy"], result["last_accuracy"]) == (20.0, 30.0)
    assert (result["selected_iteration"], result["iterations"]) == (4, 6)
    assert "Final test accuracy: 20.00" in out
    assert "--eval_every" in refused(*command, "--select", "val")


def test_a_finished_run_is_told_not_repeated(command, tmp_path):
    _, first, _ = call_main(*command)
    before = (folder_of(tmp_path) / "result.json").stat().st_mtime_ns
    status, second, _ = call_main(*command)
    assert status == 0 and LINES.search(first).groups() == LINES.search(second).groups()
    assert (folder_of(tmp_path) / "result.json").stat().st_mtime_ns == before
    config = folder_of(tmp_path) / "config.yaml"
    status, third, _ = call_main("--config", config)
    assert status == 0 and LINES.search(first).groups() == LINES.search(third).groups()


def test_the_resolved_configuration_repeats_the_run(command, tmp_path):
    call_main(*command)
    folder = folder_of(tmp_path)
    other = tmp_path / "other"
    status, _, err = call_main("--config", folder / "config.yaml", "--save_path", other)
    assert status == 0, err
    (curve,) = other.rglob("curve.csv")
    assert curve.read_text() == (folder / "curve.csv").read_text()


def test_a_result_from_before_a_flag_existed_counts_as_one_of_its_default(command, tmp_path):
    call_main(*command)
    path = folder_of(tmp_path) / "result.json"
    result = json.loads(path.read_text())
    del result["config"]["rank"], result["config"]["text_chunk"]
    path.write_text(json.dumps(result))
    status, out, _ = call_main(*command)
    assert status == 0 and "This run is finished" in out
    assert "rank 2 there, 3 here" in refused(*command, "--rank", 3)


def test_another_configurations_result_is_kept_unless_overwritten(command, tmp_path):
    call_main(*command)
    message = refused(*command, "--lr", 0.002)
    assert "lr 0.001 there, 0.002 here" in message
    assert "--save_path" in message and "--overwrite" in message
    before = json.loads((folder_of(tmp_path) / "result.json").read_text())
    status, _, err = call_main(*command, "--lr", 0.002, "--overwrite")
    assert status == 0, err
    after = json.loads((folder_of(tmp_path) / "result.json").read_text())
    assert before["config"]["lr"] == 0.001 and after["config"]["lr"] == 0.002
    (folder_of(tmp_path) / "result.json").write_text('{"final_accuracy": ')
    assert "is not a run's result" in refused(*command)


def test_flags_win_over_the_file_which_wins_over_the_defaults(data, tmp_path):
    file = tmp_path / "my settings.yaml"
    file.write_text(
        "dataset: eurosat\nlr: 1e-4\nshots: 4\nflip: false\ncrop_scale: [0.5, 1]\nthreads: null\n"
        "logit_scale: checkpoint\n"
    )
    config = run_utils.parse_args(["--config", str(file), "--shots", "8", "--t", "7"])
    assert (config.dataset, config.lr, config.shots, config.t) == ("eurosat", 1e-4, 8, 7)
    assert (config.flip, config.crop_scale, config.threads) == (False, [0.5, 1.0], None)
    assert (config.logit_scale, config.batch_size) == ("checkpoint", 32)


def test_paper_defaults():
    config = run_utils.parse_args(["--dataset", "eurosat"])
    expected = dict(
        seed=3, shots=1, backbone="ViT-B/16", lr=2e-4, n_iters=2000, early_stop_loss=0.01,
        batch_size=32, s=0.99995, t=5, save_path="results", filename="weights", eval_only=False,
        precision="fp32", logit_scale=100.0, crop_scale=[0.08, 1.0], flip=True,
        encoder="both", position="all", config=None,
    )  # fmt: skip
    assert expected.items() <= vars(config).items()


@pytest.mark.parametrize(
    "argv, embedded",
    [
        ([], True),
        (["--shots", "4"], True),
        (["--dataset", "digits"], True),
        (["--backbone", "ViT-Tiny/8"], True),
        (["--dataset", "eurosat"], False),
        (["--dataset", "digits", "--backbone", "ViT-B/16"], False),
        (["--dataset", "eurosat", "--backbone", "ViT-Tiny/8"], False),
    ],
)
def test_the_embedded_default_is_left_by_naming_something_else(argv, embedded):
    config = run_utils.parse_args(argv)
    assert (config.config is not None and config.config.endswith("digits.yaml")) == embedded
    assert (config.logit_scale == "checkpoint") == embedded
    if embedded:
        assert (config.dataset, config.backbone) == ("digits", "ViT-Tiny/8")


@pytest.mark.parametrize(
    "backbone, folder",
    [("ViT-L/14@336px", "ViT-L-14-336px"), ("/some where/my model.pt", "my model")],
)
def test_folder_names_come_from_names_and_stems(backbone, folder):
    config = run_utils.parse_args(["--dataset", "eurosat"])
    config.backbone = backbone
    assert str(results.run_folder(config)) == f"results/so/{folder}/eurosat/1shots/seed3"


@pytest.mark.parametrize("encoder", ["text", "vision", "both"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_encoder_and_precision_runs(command, encoder, precision):
    status, out, err = call_main(*command, "--encoder", encoder, "--precision", precision)
    assert status == 0 and LINES.search(out), err


def test_a_resnet_adapts_its_text_tower(command, data):
    options = ["--backbone", data / "tiny-resnet.pt"]
    assert "ResNet" in refused(*command, *options, "--encoder", "vision")
    status, out, err = call_main(*command, *options)
    assert status == 0 and LINES.search(out), err


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
@pytest.mark.parametrize("convention", ["coop", "lora"])
def test_every_dataset_runs_in_both_conventions(name, convention, command, tmp_path):
    make_dataset(name, tmp_path, convention, split=convention == "lora", per_class=10)
    status, out, err = call_main(*command, "--root_path", tmp_path, "--dataset", name)
    assert status == 0 and LINES.search(out), err


def test_python_random_is_used_for_the_few_shots_alone(command, monkeypatch):
    states = []
    build = main.build_dataset

    def watched(*args):
        assert random.getstate() == random.Random(3).getstate()
        dataset = build(*args)
        states.append(random.getstate())
        return dataset

    monkeypatch.setattr(main, "build_dataset", watched)
    assert call_main(*command)[0] == 0
    assert random.getstate() == states[0]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--dataset", "eurosta"], ["eurosta", "did you mean 'eurosat'", "oxford_pets"]),
        (["--backbone", "ViT-B16"], ["ViT-B16", "did you mean 'ViT-B/16'", "RN50x4"]),
        (["--backbone", "gone.pt"], ["gone.pt", "check the path"]),
        (["--position", "botom"], ["botom", "did you mean 'bottom'", "half-up"]),
        (["--encoder", "image"], ["image", "vision"]),
        (["--precision", "fp8"], ["fp8", "bf16"]),
        (["--shots", "0"], ["--shots", ">= 1", "'0'"]),
        (["--shots", "two"], ["--shots", "whole number", "'two'"]),
        (["--s", "1"], ["--s", "< 1"]),
        (["--s", "-0.1"], ["--s", ">= 0"]),
        (["--t", "0"], ["--t", ">= 1"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--lr", "0"], ["--lr", "> 0"]),
        (["--logit_scale", "big"], ["--logit_scale", "big"]),
        (["--batch_size", "0"], ["--batch_size"]),
        (["--n_iters", "1.5"], ["--n_iters", "whole number"]),
        (["--crop_scale", "0.9", "0.1"], ["--crop_scale", "MIN is above MAX"]),
        (["--filename", "../x"], ["--filename", "../x"]),
        (["--datset", "x"], ["--datset", "did you mean '--dataset'"]),
        (["stray"], ["stray"]),
        (["--config", "no such.yaml"], ["no such.yaml"]),
        (["--device", "cuda:77"], ["cuda:77", "--device cpu"]),
        (["--device", "tpu"], ["tpu"]),
        (["--root_path", "/no/such/folder"], ["/no/such/folder", "DATASETS.md"]),
        (["--dataset", "dtd"], ["dtd", "DTD", "DATASETS.md"]),
        (["--save_path", "/dev/null/x"], ["/dev/null/x", "--save_path"]),
    ],
)
def test_bad_arguments_end_in_one_sentence_and_leave_nothing(argv, words, command, tmp_path):
    if argv[0] == "--device" and torch.cuda.is_available():
        words = words[:1]
    message = refused(*command, *argv)
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, words",
    [
        ("dataste: eurosat", ["dataste", "did you mean 'dataset'", "n_iters"]),
        ("config: x.yaml", ["config"]),
        ("shots: many", ["--shots", "many"]),
        ("position: botom", ["botom", "did you mean 'bottom'"]),
        ("flip: 3", ["flip", "true or false"]),
        ("lr: true", ["lr", "True"]),
        ("lr: {a: 1}", ["lr"]),
        ("crop_scale: [0.1]", ["crop_scale"]),
        ("- a list", ["key: value"]),
        ("", ["key: value"]),
        ("a: [1", ["not YAML"]),
        ("\x00", ["not YAML"]),
        ("!!python/object/apply:os.system ['touch hacked']", ["not YAML"]),
    ],
)
def test_a_bad_configuration_file_is_named_with_its_fault(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    message = refused("--config", "mine.yaml", "--dataset", "eurosat")
    assert "mine.yaml" in message and all(word in message for word in words), message
    assert not (tmp_path / "hacked").exists()


def test_a_backbone_without_a_task_asks_for_one():
    assert "--dataset" in refused("--backbone", "ViT-B/32")


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


def test_a_broken_image_is_named_and_nothing_finished_is_lost(command, tmp_path):
    make_dataset("eurosat", tmp_path)
    call_main(*command)
    kept = {p: p.read_bytes() for p in folder_of(tmp_path).iterdir()}
    images = tmp_path / LAYOUTS["eurosat"][0]
    for path in images.rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:100])
    message = refused_after_start(*command, "--root_path", tmp_path, "--seed", 4)
    assert ".jpg cannot be read" in message and str(tmp_path) in message
    assert not (folder_of(tmp_path, seed=4) / "result.json").exists()
    assert kept == {p: p.read_bytes() for p in folder_of(tmp_path).iterdir()}


def test_a_loss_that_is_not_finite_keeps_the_curve(command, tmp_path):
    message = refused_after_start(*command, "--lr", 1e38)
    assert "iteration 2 of 4" in message and "--lr" in message
    rows = (folder_of(tmp_path) / "curve.csv").read_text().splitlines()
    assert len(rows) == 3 and "nan" in rows[-1]
    assert not (folder_of(tmp_path) / "result.json").exists()


def refused_after_start(*argv):
    """The last line of a command that fails when it has begun to work."""
    status, _, err = call_main(*argv)
    assert status == 2 and "Traceback" not in err, err
    return err.strip().splitlines()[-1]


def test_help_names_every_flag_of_the_specification():
    status, out, _ = call_main("--help")
    assert status == 0
    for flag in (
        "seed device root_path dataset shots backbone position encoder lr n_iters early_stop_loss "
        "batch_size s t save_path filename eval_only num_workers precision logit_scale threads "
        "save_weights overwrite dense_grad config method rank eval_every select text_chunk compile"
    ).split():
        assert f"--{flag}" in out
    assert len(available_models()) == 10


def test_the_program_itself_runs_ends_and_is_interrupted_cleanly(command, tmp_path):
    python = [sys.executable, str(ROOT / "main.py"), *map(str, command)]
    done = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and LINES.search(done.stdout), done.stderr
    assert done.stderr == ""
    done = subprocess.run([*python, "--s", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_shipped_configurations_parse():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert path.read_text().startswith("#")
        config = run_utils.parse_args(["--config", str(path), "--dataset", "eurosat"])
        assert yaml.safe_load(path.read_text()).keys() <= vars(config).keys()
