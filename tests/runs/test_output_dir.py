"""A run's folder: its name, what it holds, whose result it keeps, who may work in it."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch
from clip_helpers import TINY_VIT, random_state_dict
from commands import call_main, refused, result_of, run
from commands import run_folder as only_folder
from dataset_helpers import LAYOUTS, make_dataset

from run_utils import get_arguments
from runs import environment
from runs.output_dir import get_output_dir, lock_output_dir
from runs.records import read_run

ROOT = Path(__file__).parents[2]


# Its name


@pytest.mark.parametrize(
    "argv, name",
    [
        ("", "so/ViT-B-16/dtd/1shots/seed3"),
        ("--lr 0.001 --s 0.999", "so/ViT-B-16/dtd/1shots/seed3-lr_0.001-s_0.999"),
        ("--lr 2e-4 --t 5 --seed 1 --shots 4", "so/ViT-B-16/dtd/4shots/seed1"),
        ("--lr 0.00002 --n_iters 50", "so/ViT-B-16/dtd/1shots/seed3-lr_2e-05-n_iters_50"),
        ("--s 0.99995001", "so/ViT-B-16/dtd/1shots/seed3-s_0.99995001"),
        ("--dense_grad --no-flip", "so/ViT-B-16/dtd/1shots/seed3-dense_grad-no-flip"),
        ("--crop_scale 0.5 1", "so/ViT-B-16/dtd/1shots/seed3-crop_scale_0.5_1"),
        ("--grad_support magnitude", "so/ViT-B-16/dtd/1shots/seed3-grad_support_magnitude"),
        ("--position up --encoder text", "so/ViT-B-16/dtd/1shots/seed3-encoder_text-position_up"),
        ("--backbone ViT-L/14@336px --method lora", "lora/ViT-L-14-336px/dtd/1shots/seed3"),
        ("--device cpu --threads 1 --save_weights", "so/ViT-B-16/dtd/1shots/seed3"),
        ("--template clip --fewshot_split a/few.json --classnames b/names.yaml",
         "so/ViT-B-16/dtd/1shots/seed3-classnames_names-fewshot_split_few-template_clip"),
        ("--logit_scale checkpoint", "so/ViT-B-16/dtd/1shots/seed3-logit_scale_checkpoint"),
        ("--config configs/so_paper.yaml", "so/ViT-B-16/dtd/1shots/seed3-so_paper"),
        (
            "--config configs/so_paper.yaml --lr 1e-3 --t 10",
            "so/ViT-B-16/dtd/1shots/seed3-so_paper-lr_0.001",
        ),
        ("--config configs/digits.yaml", "so/ViT-Tiny-8/digits/16shots/seed3-digits"),
        ("DEMO", "so/ViT-Tiny-8/digits/16shots/seed3"),
        (
            "DEMO --method lora --lr 0.005 --n_iters 50",
            "lora/ViT-Tiny-8/digits/16shots/seed3-lr_0.005",
        ),
    ],
)  # fmt: skip
def test_a_folders_name_says_what_the_command_line_changed(argv, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    first, *rest = argv.split() or [""]
    argv = rest if first == "DEMO" else ["--root_path", ".", *argv.split()]
    args = get_arguments([*argv, "--save_path", "out"])
    assert str(get_output_dir(args)) == f"out/{name}"


def test_a_path_gives_its_files_stem(data):
    config = get_arguments(["--dataset", "dtd", "--backbone", str(data / "tiny vit.pt")])
    assert str(get_output_dir(config)) == "results/so/tiny vit/dtd/1shots/seed3"


def test_own_images_give_their_stem_and_need_no_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Käse & Wein v2.1").mkdir()
    config = get_arguments(["--dataset", "Käse & Wein v2.1"])
    assert str(get_output_dir(config)) == "results/so/ViT-B-16/Käse & Wein v2.1/1shots/seed3"
    assert (config.backbone, config.root_path, config.config) == ("ViT-B/16", None, None)


def test_prompts_give_a_short_plain_name_of_their_own():
    names = set()
    for prompts in (
        ["a photo of a {}, a type of pet."], ["a photo of a {}; a type of pet!"], ["{}"],
        ["ein Bild von {}", "noch/ein\\Bild: {}"], ["a " * 99 + "{}"], ["clip", "{}"], ["ein {}ß"],
    ):  # fmt: skip
        config = get_arguments(["--dataset", "dtd", "--template", *prompts])
        name = get_output_dir(config).name.removeprefix("seed3-template_")
        assert re.fullmatch(r"[\w-]{1,40}", name), name
        names.add(name)
    assert len(names) == 7 and "a-photo-of-a-a-type-of-pet-" in " ".join(names)


def test_a_loop_over_a_setting_leaves_a_folder_for_each_value(command, tmp_path):
    for t in (1, 2, 5):
        run(*command, "--t", t, "--n_iters", 1)
    names = sorted(path.parent.name for path in tmp_path.rglob("result.json"))
    common = "seed3-lr_0.001-n_iters_1-s_0.9"
    assert names == [common, f"{common}-t_1", f"{common}-t_2"]


# What it holds


def test_a_run_leaves_its_folder(command, tmp_path):
    run(*command, "--early_stop_loss", 0)
    folder = only_folder(tmp_path)
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "curve.csv", "fewshot.json", "predictions.csv", "result.json",
        "weights.safetensors",
    }  # fmt: skip
    result = result_of(tmp_path)
    assert {
        "method", "backbone", "dataset", "shots", "seed", "zero_shot_accuracy", "final_accuracy",
        "iterations", "wall_seconds", "peak_memory_mb", "versions", "git_commit", "data", "config",
        "classnames", "per_class", "ece",
    } <= result.keys()  # fmt: skip
    assert {"split", "digest", "train", "val", "test"} <= result["data"].keys()
    assert result["iterations"] == 4 and result["wall_seconds"] > 0
    with open(folder / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["iteration", "loss", "lr", "test_accuracy"]
    assert [row["iteration"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["test_accuracy"] for row in rows[:-1]] == ["", "", ""]
    assert float(rows[-1]["test_accuracy"]) == result["final_accuracy"]
    assert float(rows[0]["lr"]) == 1e-3
    read = read_run(folder)
    assert (read.method, read.final_accuracy, len(read.loss_curve)) == (
        "so",
        result["final_accuracy"],
        4,
    )
    assert read.config == result["config"] and read.data == result["data"]


def test_a_run_is_read_from_its_result_wherever_it_lies(command, tmp_path):
    run(*command, "--grad_support", "magnitude", "--n_iters", 1)
    moved = tmp_path / "a/lora/RN50/dtd/9shots/seed8"
    moved.parent.mkdir(parents=True)
    only_folder(tmp_path).rename(moved)
    read = read_run(moved)
    assert (read.method, read.dataset, read.shots, read.seed) == ("so", "eurosat", 2, 3)
    assert read.config["grad_support"] == "magnitude"


# Whose result it keeps


def test_a_finished_run_is_told_not_repeated(command, tmp_path):
    first = run(*command, "--no-save_weights")
    before = (only_folder(tmp_path) / "result.json").stat().st_mtime_ns
    status, second, err = call_main(*command)
    assert status == 0 and "This run is finished" in second
    assert first.split("****")[1:4:2] == second.split("****")[1:4:2]
    assert "note: it saved no weights.safetensors" in err
    assert (only_folder(tmp_path) / "result.json").stat().st_mtime_ns == before


def test_the_resolved_configuration_repeats_the_run(command, tmp_path):
    run(*command, "--n_iters", 1)
    folder = only_folder(tmp_path)
    run("--config", folder / "config.yaml", "--save_path", tmp_path / "other")
    again = only_folder(tmp_path / "other")
    assert again.name == "seed3-config"
    assert (again / "curve.csv").read_text() == (folder / "curve.csv").read_text()


def spoil(path, **entries):
    """Change entries of a result.json; None removes one."""
    result = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({k: v for k, v in result.items() if v is not None}))


def test_another_runs_result_is_refused_unless_overwritten(command, tmp_path):
    run(*command, "--n_iters", 1)
    command += ["--n_iters", 1]
    path = only_folder(tmp_path) / "result.json"
    whole = path.read_text()
    result = json.loads(whole)

    def told():
        message = refused(*command)
        assert "--save_path" in message and "--overwrite" in message
        return message

    spoil(path, config={**result["config"], "lr": 0.5})
    assert "(lr 0.5 there, 0.001 here)" in told()
    spoil(path, config={k: v for k, v in result["config"].items() if k != "rank"})
    assert "This run is finished" in run(*command)  # older than a flag: its default
    spoil(path, config=result["config"], data=result["data"] | {"digest": "0" * 64, "train": 7})
    assert "the images differ: 7 train" in told()
    path.write_text(whole)
    spoil(path, data=None)
    assert "is not a run's result" in told()
    path.write_text('{"final_accuracy": ')
    assert "is not a run's result" in told()
    run(*command, "--overwrite")
    assert result_of(tmp_path)["data"] == result["data"]


def test_images_that_came_later_make_another_run(command, tmp_path):
    make_dataset("eurosat", tmp_path, split=False, classes=2)
    command += ["--root_path", tmp_path, "--n_iters", 1]
    run(*command)
    before = result_of(tmp_path)["data"]
    (tmp_path / "eurosat" / LAYOUTS["eurosat"][2].replace("zhou", "so")).unlink()
    make_dataset("eurosat", tmp_path, split=False, classes=3)
    assert "the class names differ: " in refused(*command)
    assert result_of(tmp_path)["data"] == before


# Weights


def test_saved_weights_evaluate_to_the_final_accuracy(command, tmp_path):
    out = run(*command, "--filename", "mine")
    final = out.split("Final test accuracy: ")[1].split(". ")[0]
    folder = only_folder(tmp_path)
    kept = {p: p.read_bytes() for p in folder.iterdir()}
    out = run(*command, "--eval_only", "--filename", "mine")
    zero_shot, tuned = [line for line in out.splitlines() if line.startswith("****")]
    assert zero_shot.startswith("**** Zero-shot CLIP's test accuracy: ")
    assert tuned == f"**** Test accuracy: {final}. ****"
    assert kept == {p: p.read_bytes() for p in folder.iterdir()}
    # Under the same name, another model: its weights are not those that were adapted.
    other = tmp_path / "tiny vit.pt"
    torch.save(random_state_dict({**TINY_VIT, "context_length": 48}, seed=1), other)
    command += ["--eval_only", "--filename", "mine"]
    assert "other weights" in refused(*command, "--backbone", other)
    path = folder / "mine.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "mine.safetensors is damaged" in refused(*command)


def test_a_whole_state_dict_is_evaluated_where_the_authors_code_left_it(command, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    message = refused(*command, "--eval_only")
    assert "seed3-lr_0.001-n_iters_2-s_0.9/weights.safetensors" in message
    assert str(out / "weights.pt") in message
    state = random_state_dict({**TINY_VIT, "context_length": 48}, seed=5)
    torch.save(state, tmp_path / "five.pt")
    torch.save({"state_dict": {f"module.{k}": t for k, t in state.items()}}, out / "weights.pt")
    expected = run(*command, "--backbone", tmp_path / "five.pt", "--n_iters", 0)
    tuned = run(*command, "--eval_only").splitlines()[-1]
    assert tuned.startswith("**** Test accuracy")
    assert tuned.split(": ")[1] == expected.splitlines()[-1].split(": ")[1]
    torch.save(torch.load(data / "tiny-resnet.pt", weights_only=True), out / "weights.pt")
    assert "weights.pt does not hold weights of" in refused(*command, "--eval_only")


def test_no_iterations_measure_zero_shot_alone_and_leave_nothing(command, tmp_path):
    out = run(*command, "--n_iters", 0)
    assert out.count("****") == 2 and "Zero-shot CLIP's test accuracy" in out
    assert not (tmp_path / "out").exists()


# Locks


def test_a_folder_has_one_process_at_a_time_which_is_named(tmp_path):
    with lock_output_dir(tmp_path):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on .*--save_path"):
            with lock_output_dir(tmp_path):
                pass
        assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock").exists()
    with lock_output_dir(tmp_path):
        pass


def test_a_run_in_a_folder_that_another_one_has_is_told_who_it_is(command, tmp_path):
    run(*command, "--n_iters", 1)
    with lock_output_dir(only_folder(tmp_path)):
        assert f"in use by process {os.getpid()}" in refused(
            *command, "--n_iters", 1, "--overwrite"
        )


def test_a_dead_processs_lock_does_not_stay(tmp_path):
    code = "from filelock import FileLock; import os, sys; FileLock(sys.argv[1]).acquire()"
    code += "; os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, tmp_path / ".lock"], check=False)
    assert (tmp_path / ".lock").exists()
    with lock_output_dir(tmp_path):
        pass


def test_a_disk_without_locks_is_used_all_the_same(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with lock_output_dir(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()


def test_a_folder_that_cannot_be_written_is_named(command, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(*command, "--save_path", tmp_path / "file/x")
    assert "cannot write to" in message and "--save_path" in message


def test_windows_has_neither_resource_nor_fcntl(tmp_path):
    code = (
        "import sys, warnings; sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "warnings.simplefilter('ignore')\n"
        "import main; from runs import cli; sys.exit(cli.run_cli(lambda: main.main(sys.argv[1:])))"
    )
    flags = ["--shots", "1", "--n_iters", "1", "--save_path", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True
    )
    if "clip/download" in done.stderr:
        pytest.skip("clip still imports fcntl")
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path)["peak_memory_mb"] == 0
    assert not list(tmp_path.rglob(".lock"))


def test_outside_of_git_there_is_no_commit(monkeypatch):
    monkeypatch.setattr(environment, "REPO_ROOT", Path("/"))
    assert environment.get_git_sha() is None
