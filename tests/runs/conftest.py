"""Fixtures for the tests of runs: a small EuroSAT, random checkpoints, a short command."""

import pytest
import torch
from clip_helpers import TINY_RESNET, TINY_VIT, random_state_dict
from commands import act_after, call_main, preempt, run, run_folder
from dataset_helpers import make_dataset

import main


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with a small EuroSAT, random checkpoints of a ViT and a ResNet."""
    folder = tmp_path_factory.mktemp("data")
    make_dataset("eurosat", folder)
    for name, config in (("tiny vit.pt", TINY_VIT), ("tiny-resnet.pt", TINY_RESNET)):
        torch.save(random_state_dict({**config, "context_length": 48}), folder / name)
    return folder


@pytest.fixture(scope="module")
def flags(data):
    """Arguments of a run of four iterations on the CPU; the --save_path follows."""
    return [
        "--root_path", data, "--dataset", "eurosat", "--backbone", data / "tiny vit.pt",
        "--shots", 2, "--n_iters", 2, "--s", 0.9, "--lr", 1e-3, "--num_workers", 0,
        "--threads", 1, "--device", "cpu", "--save_path",
    ]  # fmt: skip


@pytest.fixture
def command(flags, tmp_path):
    """Arguments of a run of four iterations into `out`."""
    return [*flags, tmp_path / "out"]


@pytest.fixture
def interrupt(monkeypatch):
    """A function that stops a run after an iteration; it returns the checkpoint's path."""

    def run_and_interrupt(iteration, flags, out, *extra):
        with monkeypatch.context() as patch:
            patch.setattr(main, "train", act_after(iteration, preempt))
            status, _, err = call_main(*flags, out, *extra)
        assert status == 143 and "--resume continues from iteration" in err
        return next(out.rglob("checkpoint.pt"))

    return run_and_interrupt


def train(data, backbone, out):
    """The folder of a short run that saves its weights under another name."""
    run(
        "--root_path", data, "--dataset", "eurosat", "--backbone", data / backbone,
        "--n_iters", 2, "--s", 0.9, "--lr", 1e-2, "--save_path", out, "--num_workers", 0,
        "--logit_scale", 20, "--filename", "mine",
    )  # fmt: skip
    return run_folder(out)


@pytest.fixture(scope="session")
def vit_run(data, tmp_path_factory):
    return train(data, "tiny vit.pt", tmp_path_factory.mktemp("vit run"))


@pytest.fixture(scope="session")
def resnet_run(data, tmp_path_factory):
    return train(data, "tiny-resnet.pt", tmp_path_factory.mktemp("resnet run"))


@pytest.fixture
def fake_python(tmp_path):
    """A script in place of Python, which appends main.py's arguments to calls.txt.

    In place of list_pending.py it prints the runs that are not in finished.txt.
    """
    path = tmp_path / "python"
    path.write_text(
        f"""#!/usr/bin/env bash
cd "{tmp_path}" || exit
if [ "$1" = scripts/list_pending.py ]; then
    touch finished.txt
    grep -vxFf finished.txt
    exit 0
fi
echo "$@" >>calls.txt
case "$*" in
*--method\\ wait*) trap 'sleep 0.3; echo written >checkpoint.pt; exit 143' TERM
    touch started; while :; do sleep 0.05; done ;;
*--method\\ fail*) exit 137 ;;
esac
"""
    )
    path.chmod(0o755)
    return path
