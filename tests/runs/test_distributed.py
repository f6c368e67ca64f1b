"""One run in several processes: the numbers of one process, and an end that all of them share."""

import csv
import os
import re
import signal

import pytest
import torch
import torch.distributed as dist
from clip_helpers import TINY_RESNET, TINY_VIT, random_state_dict
from commands import call_main
from process_helpers import in_processes, main_in_processes

import job
from clip import build_model
from clip.lora import merged_lora
from clip.zero_shot import evaluate, tokenize_class_prompts
from optimizers.build import build_optimizer, mark_as_trainable
from runs import distributed
from train import Adapted, TrainConfig, TrainState, own_images, train

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed"),
    # What torch 2.4 says of its own autocast.
    pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning"),
]
NAMES = ["red", "green", "blue", "x", "grey"]
SIZES = [5, 5, 2, 1]  # of the batches of an epoch
SHORT = ["--shots", 1, "--n_iters", 6, "--num_workers", 0, "--batch_size", 7, "--device", "cpu"]


def batches(group, grad_accum_steps, side):
    """Random batches for ever, of which a process has its share of the images."""
    generator = torch.Generator().manual_seed(1)
    while True:
        for size in SIZES:
            images = torch.randint(256, (size, 3, side, side), generator=generator)
            labels = torch.randint(len(NAMES), (size,), generator=generator)
            yield (
                (images[own_images(grad_accum_steps, group, size)].byte(), labels),
                size == SIZES[-1],
            )


def adapt(group, method="so", config=TINY_VIT, encoder="both", dtype=torch.float64, **settings):
    """A few iterations: weights, losses, predictions for 7 images, generator's next number."""
    torch.manual_seed(5)
    model = build_model(random_state_dict(config)).to(dtype)
    matrices = mark_as_trainable(model, encoder, "all")
    made = build_optimizer(
        method, model, matrices, lr=1e-2, density=0.02, T=3, rank=2, seed=1,
        sampled=settings.pop("sampled", True),
    )  # fmt: skip
    prompts = tokenize_class_prompts(model, NAMES, ["a {}.", "the {}."])
    course, settings = TrainState(9), TrainConfig(**settings)
    side = model.visual.input_resolution
    stream = batches(group, settings.grad_accum_steps, side)
    train(Adapted(model, prompts, made), stream, course, settings, processes=group)
    images = torch.randint(256, (7, 3, side, side)).byte()[group.own(7)]
    mine = [(images, torch.arange(7)[group.own(7)])]
    with merged_lora(model):
        answers = evaluate(model, mine, 7, prompts, processes=group)
    weights = {name: p.detach() for name, p in made.trained.items()}
    return weights, course.losses, tuple(answers), torch.rand(())


def connected(work):
    """What a process does with the group of all."""

    def run(_):
        group = distributed.init_store()
        distributed.init_distributed(group, "cpu")
        return work(group)

    return run


CASES = [
    (2, {}),
    (3, dict(grad_accum_steps=2, class_batch_size=2)),
    (4, dict(encoder="text", class_batch_size=3)),
    (2, dict(encoder="vision", grad_accum_steps=3)),
    (2, dict(config=TINY_RESNET)),
    (2, dict(sampled=False)),
    (3, dict(method="lora", grad_accum_steps=2, class_batch_size=2)),
    (2, dict(method="lora")),
    (2, dict(method="adam")),
    (2, dict(dtype=torch.float32)),
    (2, dict(dtype=torch.float32, precision="bf16")),
]
BOUNDS = {torch.float64: 1e-10, "fp32": 1e-3, "bf16": 0.1}  # Adam divides tiny gradients by tiny


@pytest.mark.parametrize("count, case", CASES)
def test_several_processes_compute_what_one_computes(count, case, tmp_path):
    alone = adapt(distributed.SINGLE_PROCESS, **case)
    several = in_processes(count, connected(lambda group: adapt(group, **case)), tmp_path)
    exact = "dtype" not in case
    bound = BOUNDS[torch.float64 if exact else case.get("precision", "fp32")]
    for one in several:
        for (name, weight), expected in zip(one[0].items(), alone[0].values(), strict=True):
            assert torch.equal(weight, several[0][0][name])
            torch.testing.assert_close(weight, expected, rtol=bound, atol=bound)
        assert torch.equal(one[1], several[0][1])
        torch.testing.assert_close(one[1], alone[1], rtol=max(bound, 1e-6), atol=0)
        assert torch.equal(one[2][0], alone[2][0])
        assert torch.equal(one[2][2], several[0][2][2])
        if exact:
            assert torch.equal(one[2][1], alone[2][1])
        assert one[3] == alone[3]  # as many random numbers were drawn


def curve(folder):
    """The losses in a run's curve.csv."""
    with open(folder / "curve.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def run_of(save_path):
    """The folder of the only run below a folder."""
    return next(save_path.rglob("config.yaml")).parent


def test_a_run_of_three_processes_has_one_writer_and_the_losses_of_one_process(tmp_path):
    status, _, err = call_main(*SHORT, "--save_path", tmp_path / "one")
    assert status == 0, err
    first, *others = main_in_processes(3, tmp_path, *SHORT, "--save_path", tmp_path / "three")
    assert first[0] == 0 and first[1].count("****") == 4, first
    assert others == [(0, "", "")] * 2
    one, three = run_of(tmp_path / "one"), run_of(tmp_path / "three")
    assert curve(three) == pytest.approx(curve(one), rel=1e-3)
    assert {p.name for p in three.iterdir()} == {p.name for p in one.iterdir()}


def interrupt(rank, victim, number, iteration=3):
    """Send a signal to one process after some iterations."""
    seen = []

    def counted(self, signals):
        seen.append(signals)
        if rank == victim and len(seen) == iteration:
            os.kill(os.getpid(), number)
        return check(self, signals)

    check = distributed.DistInfo.check
    distributed.DistInfo.check = counted


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_process_ends_all_at_one_iteration_and_one_process_goes_on(
    victim, tmp_path
):
    argv = [*SHORT, "--save_path", tmp_path / "runs"]
    prepare = lambda rank: interrupt(rank, victim, signal.SIGTERM)  # noqa: E731
    first, second = main_in_processes(2, tmp_path, *argv, prepare=prepare)
    assert first[0] == second[0] == 143 and second[2] == ""
    assert "ended by SIGTERM; --resume goes on from iteration" in first[2]
    status, out, err = call_main(*argv, "--resume")
    assert status == 0 and "Going on from iteration" in out, err
    call_main(*SHORT, "--save_path", tmp_path / "one")
    assert curve(run_of(tmp_path / "runs")) == pytest.approx(
        curve(run_of(tmp_path / "one")), rel=1e-3
    )


def test_a_process_that_is_killed_ends_the_other_which_keeps_what_was_done(tmp_path):
    argv = [*SHORT, "--save_path", tmp_path / "runs"]
    prepare = lambda rank: interrupt(rank, 1, signal.SIGKILL)  # noqa: E731
    first, second = main_in_processes(2, tmp_path, *argv, prepare=prepare)
    assert second == -signal.SIGKILL and first[0] == 2
    assert "ended by the loss of another process; --resume goes on from iteration" in first[2]
    status, out, _ = call_main(*argv, "--resume")
    assert status == 0 and "Going on from iteration" in out


def unreadable(rank):
    """Have the second process alone fail to read its images."""
    if rank == 1:

        def fail(*_, **__):
            raise ValueError("the image 7.png cannot be read: replace it")

        job.build_dataset = fail


def of_rank(one):
    """Arguments that the second process alone has."""
    return lambda rank: [*SHORT, *one] if rank == 1 else None


REFUSED = {
    "too few images": (["--shots", 1, "--batch_size", 1], None, "2 processes .* batches of 1"),
    "other arguments": ([], of_rank(["--lr", 7]), "process 1 has lr 7.0, process 0 has"),
    "bad arguments": ([], of_rank(["--lr", "x"]), "argument --lr"),
    "all bad": (["--lr", "x"], None, "argument --lr"),
    "unreadable": ([], unreadable, "7.png cannot be read"),
    "no such GPU": (["--device", "cuda"], None, "--device cuda cannot be used here"),
}


@pytest.mark.parametrize("argv, prepare, sentence", REFUSED.values(), ids=REFUSED)
def test_bad_input_ends_all_processes_with_one_sentence(argv, prepare, sentence, tmp_path):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    argv = [*SHORT, "--save_path", tmp_path / "runs", *argv]
    ends = main_in_processes(2, tmp_path, *argv, prepare=prepare)
    assert {status for status, *_ in ends} == {2}, ends
    told = [err for *_, err in ends if err]
    assert len(told) == 1 and told[0].count("\n") == 1, ends
    assert re.search(sentence, told[0])
