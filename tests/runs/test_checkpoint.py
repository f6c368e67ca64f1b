"""Nothing lost: resumed runs end as unbroken ones, whatever ended them."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import call_main, outcome, refused, result_of, run, run_folder
from crash import crash_test

import clip
import utils
from runs.signals import Preempted, SignalHandler
from utils import sha256_of_tree

ROOT = Path(__file__).parents[2]
COMMON = ["--shots", "1", "--n_iters", "12", "--num_workers", "0", "--eval_split", "val"]
COMMON += ["--save_path"]


def broken_at(monkeypatch, iterations):
    """Have a signal come after these iterations; each process of the run looks at its own."""
    left = list(iterations)
    calls = 0

    def check(self):
        nonlocal calls
        calls += 1
        if left and calls == left[0]:
            left.pop(0)
            calls = 0
            raise Preempted(signal.SIGTERM)

    monkeypatch.setattr(SignalHandler, "raise_if_pending", check)


def interrupted(out, monkeypatch, *extra, iterations=(6,)):
    """A checkpoint that a run left; calls come before the zero-shot, then after each iteration."""
    with monkeypatch.context() as patch:
        broken_at(patch, iterations)
        for number, _ in enumerate(iterations):
            status, _, err = call_main(*COMMON, out, *extra, *["--resume"] * min(number, 1))
            assert status == 143 and "--resume continues from iteration" in err
    (checkpoint,) = out.rglob("checkpoint.pt")
    return checkpoint


def read(checkpoint):
    return torch.load(checkpoint, weights_only=True)


@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast")  # torch 2.4's own, when recomputing
@pytest.mark.parametrize(
    "extra",
    [
        ["--method", "so", "--t", "4", "--num_workers", "2"],
        [
            "--method",
            "so",
            "--final_model",
            "best_val",
            "--eval_every",
            "5",
            "--grad_accum_steps",
            "3",
        ],
        ["--method", "so", "--moment_support", "random", "--grad_support", "magnitude"],
        ["--method", "so", "--moments", "none"],
        ["--method", "so", "--precision", "fp16", "--encoder", "text"],
        ["--method", "lora", "--class_batch_size", "4"],
        [
            "--method",
            "lora",
            "--final_model",
            "best_val",
            "--eval_every",
            "4",
            "--precision",
            "bf16",
        ],
        ["--method", "adam", "--grad_accum_steps", "2", "--batch_size", "4"],
    ],
    ids=" ".join,
)
def test_a_resumed_run_ends_as_an_unbroken_one(extra, tmp_path, monkeypatch):
    run(*COMMON, tmp_path / "whole", *extra)
    checkpoint = interrupted(tmp_path / "broken", monkeypatch, *extra, iterations=(6, 4))
    assert 4 < read(checkpoint)["state"]["iteration"] < 12
    torch.manual_seed(int(time.time()))
    assert "Resuming from iteration" in run(*COMMON, tmp_path / "broken", *extra, "--resume")
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    assert not checkpoint.exists()
    for name in ("checkpoint.pt", ".lock", ".curve.csv.99.tmp"):  # killed at its very end
        (checkpoint.parent / name).write_text("left")
    assert "This run is finished" in run(*COMMON, tmp_path / "broken", *extra, "--resume")
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("method", ["so", "lora", "adam"])
def test_a_checkpoint_holds_what_changed_and_not_the_model(method, tmp_path, monkeypatch):
    flags = ["--s", "0.999", "--t", "2"] if method == "so" else ["--method", method]
    path = interrupted(tmp_path, monkeypatch, *flags)
    trained = read(path)["trained"]
    if method == "so":
        entries = sum(len(at) for at, _ in trained.values())
        assert 1 < entries / 884 <= 3  # of 885 thousand entries, three draws of 884
    else:  # whole tensors where that takes less room than positions and values
        assert all(at is None for at, _ in trained.values())
    assert path.stat().st_size < {"so": 300_000, "lora": 300_000, "adam": 11_000_000}[method]


@pytest.mark.parametrize("kills", [1])
def test_killed_runs_end_as_an_unbroken_one(kills, tmp_path):
    assert crash_test(kills, 0, ["--n_iters", "8"], tmp_path).total() == kills


# Signals


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_and_its_repeats_leave_a_checkpoint_and_one_sentence(number, status, tmp_path):
    flags = [*COMMON, tmp_path, "--n_iters", "100000", "--early_stop_loss", "0"]
    process = subprocess.Popen(
        [sys.executable, "main.py", *map(str, flags), "--checkpoint_every", "3"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (path := next(tmp_path.rglob("checkpoint.pt"), None)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    for sent in (number, number, signal.SIGTERM, number):
        process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in err
    count = read(path)["state"]["iteration"]
    assert count >= 3 and f"--resume continues from iteration {count}, saved in {path}" in err
    assert {p.name for p in path.parent.iterdir()} == {
        "checkpoint.pt", "config.yaml", "fewshot.json",
    }  # fmt: skip


def test_ctrl_c_a_second_time_later_ends_at_once():
    code = (
        "import signal; from runs.signals import SignalHandler\n"
        "with SignalHandler(force_quit_after_s=60) as signals, signals.defer():\n"
        "    signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)\n"
        "    print('going on', flush=True); signals.force_quit_after_s = 0\n"
        "    signal.raise_signal(signal.SIGTERM); signal.raise_signal(signal.SIGINT); print('no')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "going on\n")


def test_deferred_signals_wait_and_others_raise_at_once():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with SignalHandler() as signals:
            with signals.defer():
                signal.raise_signal(signal.SIGINT)  # nothing happens yet
                signal.raise_signal(signal.SIGTERM)  # nor by another kind
                with pytest.raises(Preempted) as stop, signals.allow():
                    pass
                assert stop.value.signum == signal.SIGINT
        with pytest.raises(Preempted) as stop, SignalHandler():
            signal.raise_signal(signal.SIGTERM)
        assert stop.value.signum == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # until the process has ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Checkpoints that are in the way, or cannot be used


def test_a_run_without_resume_keeps_its_checkpoint(tmp_path, monkeypatch):
    path = interrupted(tmp_path, monkeypatch)
    before = path.read_bytes(), (path.parent / "config.yaml").read_bytes()
    message = refused(*COMMON, tmp_path)
    assert f"{path} has this run at iteration 4 of 12" in message
    assert "--resume continues" in message and "--overwrite starts anew" in message
    assert before == (path.read_bytes(), (path.parent / "config.yaml").read_bytes())
    run(*COMMON, tmp_path, "--overwrite")
    assert result_of(tmp_path)["iterations"] == 12 and not path.exists()


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    return interrupted(tmp_path, monkeypatch)


def change(path, **entries):
    """Write a checkpoint with other entries, and the digest that belongs to them."""
    data = read(path)
    data.pop("digest")
    data.update(entries)
    torch.save({**data, "digest": sha256_of_tree(data)}, path)


def test_a_damaged_checkpoint_is_refused(checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    place = whole.rfind(b"\x3f", 0, len(whole) // 2)  # in a tensor: torch itself does not notice
    flipped = whole[:place] + b"\x3e" + whole[place + 1 :]
    for data in (whole[: len(whole) // 2], b"", b"\x80\x04nonsense", whole[1000:], flipped):
        checkpoint.write_bytes(data)
        message = refused(*COMMON, tmp_path, "--resume")
        assert f"{checkpoint} is damaged" in message and "--overwrite" in message
        assert checkpoint.read_bytes() == data
    checkpoint.write_bytes(whole)
    run(*COMMON, tmp_path, "--resume")


def test_a_checkpoint_of_another_run_is_refused(checkpoint, tmp_path):
    data = read(checkpoint)
    for words, entries in (
        ("lr 0.1 there, 0.005 here", {"config": {**data["config"], "lr": 0.1}}),
        ("the images differ: 7 train", {"data": data["data"] | {"digest": "", "train": 7}}),
        ("the backbone differs", {"inputs": data["inputs"] | {"backbone": "0"}}),
        ("written by another version of this software", {"version": 1}),
    ):
        before = checkpoint.read_bytes()
        change(checkpoint, **entries)
        message = refused(*COMMON, tmp_path, "--resume")
        assert words in message and str(checkpoint) in message
        assert "--overwrite" in message
        checkpoint.write_bytes(before)
    change(checkpoint, config={**data["config"], "lr": 0.1})
    run(*COMMON, tmp_path, "--overwrite", "--resume")  # as an overwriting sweep is started again


def test_checkpoints_are_read_as_data_alone(checkpoint, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"version": 3, "config": Evil()}, checkpoint)
    assert "damaged" in refused(*COMMON, tmp_path, "--resume")
    assert not (tmp_path / "owned").exists()


# Disks and locks


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # no file may be longer
    try:
        status, _, err = call_main(*COMMON, tmp_path, "--checkpoint_every", "4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert err.count("checkpoint.pt could not be written") >= 2
    assert status == 2 and "weights.safetensors" in err  # which are larger than the limit
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        "config.yaml",
        "curve.csv",
        "fewshot.json",
    }  # nothing half-written, and no result


@pytest.mark.parametrize("name", ["curve.csv", "weights.safetensors", "result.json"])
def test_a_result_that_cannot_be_written_leaves_the_checkpoint(name, tmp_path, monkeypatch):
    replace = os.replace

    def fails(source, target):
        if Path(target).name == name:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(utils.os, "replace", fails)
        message = refused(*COMMON, tmp_path / "a", "--checkpoint_every", "5")
    assert name in message and "Read-only file system" in message
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")
    assert read(checkpoint)["state"]["iteration"] == 12
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("result.json"))
    run(*COMMON, tmp_path / "a", "--resume")
    run(*COMMON, tmp_path / "whole")
    assert outcome(tmp_path / "a") == outcome(tmp_path / "whole")


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(tmp_path):
    message = refused(*COMMON, tmp_path, "--lr", "1e30", "--checkpoint_every", "1")
    assert "the loss became" in message
    course = read(run_folder(tmp_path) / "checkpoint.pt")["state"]
    assert course["iteration"] >= 1 and course["losses"].isfinite().all()


def test_a_backbone_that_is_gone_costs_a_checkpoint_and_not_the_run(tmp_path, monkeypatch):
    load = clip.load
    loads = iter([load])  # the first one is the run's own
    gone = FileNotFoundError("There is no checkpoint at x: check the path.")

    def once(*args, **options):
        if call := next(loads, None):
            return call(*args, **options)
        raise gone

    monkeypatch.setattr(clip, "load", once)
    argv = [*COMMON, tmp_path, "--no-save_weights", "--checkpoint_every", "5"]
    status, _, err = call_main(*argv)
    assert status == 0
    assert err.count("could not be written (ViT-Tiny/8 changed during this run") == 3
