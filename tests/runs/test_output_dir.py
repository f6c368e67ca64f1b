"""The output directory of a run: its name, its files, whose result it keeps, its lock."""

import csv
import json
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from clip_helpers import TINY_VIT, random_state_dict
from commands import call_main, outcome, refused, result_of, run, run_folder

from run_utils import get_arguments
from runs import environment
from runs.output_dir import get_output_dir, lock_output_dir

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "argv, name",
    [
        ("", "so/ViT-B-16/dtd/1shots/seed3"),
        ("--lr 2e-4 --t 5 --seed 1 --shots 4", "so/ViT-B-16/dtd/4shots/seed1"),
        ("--backbone ViT-L/14@336px --method lora", "lora/ViT-L-14-336px/dtd/1shots/seed3"),
        ("--config configs/digits.yaml", "so/ViT-Tiny-8/digits/16shots/seed3-digits"),
        ("--backbone clip/weights/ViT-Tiny-8.pt", "so/ViT-Tiny-8/dtd/1shots/seed3"),
        ("--s 0.999 --lr 0.00002", "seed3-lr_2e-05-s_0.999"),
        ("--s 0.99995001", "seed3-s_0.99995001"),
        ("--dense_grad --no-flip", "seed3-dense_grad-no-flip"),
        ("--crop_scale 0.5 1", "seed3-crop_scale_0.5_1"),
        ("--device cpu --threads 1 --save_weights", "seed3"),
        ("--template clip --fewshot_split a/few.json", "seed3-fewshot_split_few-template_clip"),
        ("--classnames b/names.yaml", "seed3-classnames_names"),
        ("--config configs/so_paper.yaml --lr 1e-3 --t 10", "seed3-so_paper-lr_0.001"),
    ],
)
def test_output_dir_names_overrides(argv, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = get_arguments(["--root_path", ".", *argv.split(), "--save_path", "out"])
    assert str(get_output_dir(args)).endswith(f"/{name}")


def test_output_dir_of_demo():
    args = get_arguments(["--method", "lora", "--lr", "0.005", "--n_iters", "50"])
    assert str(get_output_dir(args)) == "results/lora/ViT-Tiny-8/digits/16shots/seed3-lr_0.005"


def test_output_dir_shortens_templates():
    templates = (["a {}, b."], ["a {}; b!"], ["a" * 99, "noch/ein\\Bild: {}ß"])
    arguments = (["--dataset", "dtd", "--template", *each] for each in templates)
    names = {get_output_dir(get_arguments(argv)).name for argv in arguments}
    assert len(names) == 3  # with a digest each
    assert all(re.fullmatch(r"seed3-template_[\w-]{1,40}", name) for name in names), names


def test_run_writes_its_files(command, tmp_path):
    run(*command, "--eval_every", 3)
    folder, result = run_folder(tmp_path), result_of(tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "curve.csv", "fewshot.json", "predictions.csv", "result.json",
        "weights.safetensors",
    }  # fmt: skip
    assert result.keys() > {
        "method", "backbone", "dataset", "shots", "seed", "zero_shot_accuracy", "final_accuracy",
        "iterations", "wall_seconds", "peak_memory_mb", "versions", "git_commit", "data", "config",
        "classnames", "per_class", "ece",
    }  # fmt: skip
    assert result["data"].keys() == {"split", "digest", "train", "val", "test"}
    assert result["iterations"] == 4 and result["wall_seconds"] > 0
    rows = list(csv.DictReader((folder / "curve.csv").read_text().splitlines()))
    assert list(rows[0]) == ["iteration", "loss", "lr", "test_accuracy"]
    assert [row["iteration"] for row in rows] == ["1", "2", "3", "4"]
    assert [bool(row["test_accuracy"]) for row in rows] == [False, False, True, True]
    assert float(rows[-1]["test_accuracy"]) == result["final_accuracy"]


def test_config_yaml_repeats_run(command, tmp_path):
    run(*command)
    config = run_folder(tmp_path) / "config.yaml"
    run("--config", config, "--save_path", tmp_path / "again")
    assert run_folder(tmp_path / "again").name == "seed3-config"
    assert outcome(tmp_path / "again") == outcome(tmp_path / "out")


def test_finished_run_is_printed(command, tmp_path):
    first = run(*command, "--no-save_weights")
    path = run_folder(tmp_path) / "result.json"
    before = path.stat().st_mtime_ns
    for name in ("checkpoint.pt", ".lock", ".curve.csv.99.tmp"):  # of a run killed at its end
        path.with_name(name).write_text("")
    _, second, err = call_main(*command, "--resume")
    assert "This run is finished" in second and "note: it saved no weights" in err
    assert first.split("****")[1:4:2] == second.split("****")[1:4:2]
    assert path.stat().st_mtime_ns == before
    names = ["config.yaml", "curve.csv", "fewshot.json", "predictions.csv", "result.json"]
    assert sorted(file.name for file in path.parent.iterdir()) == names


def test_other_result_is_refused(command, tmp_path):
    run(*command)
    path = run_folder(tmp_path) / "result.json"
    result = json.loads(path.read_text())
    config = result["config"]
    for words, changes in (
        ("(lr 0.5 there, 0.001 here)", {"config": config | {"lr": 0.5}}),
        ("is damaged", {"data": None}),
        ("is damaged", {"final_accuracy": None}),
    ):
        path.write_text(json.dumps(result | changes))
        message = refused(*command)
        assert words in message and "--save_path" in message and "--overwrite" in message
    del config["rank"]  # as a version wrote it that had no such flag
    path.write_text(json.dumps(result))
    assert "This run is finished" in run(*command)


def test_unusable_weights_are_refused(command, data, tmp_path):
    command += ["--filename", "mine", "--eval_only"]
    run(*command[:-1])
    other = tmp_path / "tiny vit.pt"  # another model of the same name
    other.write_bytes((data / "tiny-resnet.pt").read_bytes())
    assert "the backbone's weights" in refused(*command, "--backbone", other)
    path = run_folder(tmp_path) / "mine.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "mine.safetensors is damaged" in refused(*command)


def test_authors_state_dict_is_evaluated(command, data, tmp_path):
    path, message = tmp_path / "out" / "weights.pt", refused(*command, "--eval_only")
    assert "n_iters_2-s_0.9/weights.safetensors" in message and str(path) in message
    state = random_state_dict({**TINY_VIT, "context_length": 48}, seed=5)
    torch.save(state, tmp_path / "five.pt")
    zero_shot = run(*command, "--backbone", tmp_path / "five.pt", "--n_iters", 0).splitlines()[-1]
    path.parent.mkdir()
    torch.save({"state_dict": {f"module.{key}": t for key, t in state.items()}}, path)
    evaluated = run(*command, "--eval_only").splitlines()[-1]
    assert evaluated == zero_shot.replace("Zero-shot CLIP's test", "Test")
    path.write_bytes((data / "tiny-resnet.pt").read_bytes())
    assert "weights.pt does not hold weights of this model" in refused(*command, "--eval_only")


def test_unusable_output_dir_is_refused(command, tmp_path, monkeypatch):
    run(*command)
    with lock_output_dir(run_folder(tmp_path)):
        message = refused(*command, "--overwrite")
    assert "used by another run" in message and "--save_path" in message
    (tmp_path / "file").write_text("")
    message = refused(*command, "--save_path", tmp_path / "file/x")
    assert "cannot write to" in message and "--save_path" in message
    monkeypatch.setattr(Path, "unlink", Mock(side_effect=PermissionError))  # of the lock's file
    with lock_output_dir(tmp_path):
        pass


def test_git_sha_outside_git(monkeypatch):
    monkeypatch.setattr(environment, "REPO_ROOT", Path("/"))
    assert environment.get_git_sha() is None
