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
from process_helpers import run_in_processes, run_main_in_processes

import main
from clip import build_model
from clip.lora import set_dropout
from clip.zero_shot import ZeroShotClassifier, tokenize_class_prompts
from optimizers.build import build_optimizer, mark_as_trainable, trainable_parameters
from runs import distributed
from train import TrainConfig, TrainState, encode_all_classes, train

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed"),
    # What torch 2.4 says of its own autocast.
    pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning"),
]
NAMES = ["red", "green", "blue", "x", "grey"]
SIZES = [5, 5, 2, 1]  # of the batches of an epoch
SHORT = ["--shots", 1, "--n_iters", 6, "--num_workers", 0, "--batch_size", 7, "--device", "cpu"]


def batches(side):
    """Random batches for ever, of which a process has its slice of the images."""
    generator = torch.Generator().manual_seed(1)
    while True:
        for size in SIZES:
            images = torch.randint(256, (size, 3, side, side), generator=generator).byte()
            labels = torch.randint(len(NAMES), (size,), generator=generator)
            yield (images[distributed.local_slice(size)], labels), size == SIZES[-1]


def fit(config=TINY_VIT, encoder="both", method="so", dtype=torch.float64, **options):
    """A few iterations: weights, losses, cosines of 7 images."""
    model = build_model(random_state_dict(config)).to(dtype)
    weights = mark_as_trainable(model, encoder, "all", method)
    optimizer = build_optimizer(
        method, model, weights, lr=1e-2, density=0.02, T=3, rank=2, seed=1,
        sparse_grad=options.pop("sparse_grad", True),
    )  # fmt: skip
    if method == "lora":  # each rank's own noise, which no other number of ranks has
        set_dropout(model, False)
    tokens = tokenize_class_prompts(model, NAMES, ["a {}.", "the {}."])
    config = TrainConfig(1e-2, grad_accum_steps=options.pop("grad_accum_steps", 1))
    classifier = ZeroShotClassifier(model, tokens, **options)
    state, side = TrainState(9), model.visual.input_resolution
    for _ in train(classifier, optimizer, batches(side), state, config):
        pass
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(256, (7, 3, side, side), generator=generator).byte()
    with torch.no_grad():
        local = classifier.encode_images(images[distributed.local_slice(7)])
        cosines = distributed.all_gather_rows(local, 7) @ encode_all_classes(classifier).T
    trained = {name: p.detach() for name, p in trainable_parameters(model).items()}
    return trained, state.losses, cosines


def connected(work):
    """What a process does within the group of all."""

    def run(_):
        distributed.init_store()
        distributed.init_distributed("cpu")
        return work()

    return run


CASES = [
    (2, {}),
    (3, dict(grad_accum_steps=2, class_batch_size=2)),
    (4, dict(encoder="text", class_batch_size=3)),
    (2, dict(encoder="vision", grad_accum_steps=3)),
    (2, dict(config=TINY_RESNET)),
    (2, dict(sparse_grad=False)),
    (3, dict(method="lora", grad_accum_steps=2, class_batch_size=2)),
    (2, dict(method="lora")),
    (2, dict(method="adam")),
    (2, dict(dtype=torch.float32)),
    (2, dict(dtype=torch.float32, precision="bf16")),
]
BOUNDS = {torch.float64: 1e-10, "fp32": 1e-3, "bf16": 0.1}  # Adam divides tiny gradients by tiny


@pytest.mark.parametrize("count, case", CASES)
def test_several_processes_compute_what_one_computes(count, case, tmp_path):
    one = fit(**case)
    several = run_in_processes(count, connected(lambda: fit(**case)), tmp_path)
    bound = BOUNDS[case.get("precision", "fp32") if "dtype" in case else torch.float64]
    for weights, losses, cosines in several:
        for (name, weight), expected in zip(weights.items(), one[0].values(), strict=True):
            assert torch.equal(weight, several[0][0][name])
            torch.testing.assert_close(weight, expected, rtol=bound, atol=bound)
        assert torch.equal(losses, several[0][1]) and torch.equal(cosines, several[0][2])
        torch.testing.assert_close(losses, one[1], rtol=max(bound, 1e-6), atol=0)
        torch.testing.assert_close(cosines, one[2], rtol=bound, atol=bound)


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
    first, *others = run_main_in_processes(3, tmp_path, *SHORT, "--save_path", tmp_path / "three")
    assert first[0] == 0 and first[1].count("****") == 4, first
    assert others == [(0, "", "")] * 2
    one, three = run_of(tmp_path / "one"), run_of(tmp_path / "three")
    assert curve(three) == pytest.approx(curve(one), rel=1e-3)
    assert {p.name for p in three.iterdir()} == {p.name for p in one.iterdir()}


def interrupt(rank, victim, number, iteration=3):
    """Send a signal to one process after some iterations."""
    if rank != victim:
        return
    check, calls = main.raise_if_any_preempted, []

    def counted(signals):
        calls.append(signals)
        if len(calls) == iteration:
            os.kill(os.getpid(), number)
        return check(signals)

    main.raise_if_any_preempted = counted


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_process_ends_all_at_one_iteration_and_one_process_goes_on(
    victim, tmp_path
):
    argv = [*SHORT, "--save_path", tmp_path / "runs"]
    prepare = lambda rank: interrupt(rank, victim, signal.SIGTERM)  # noqa: E731
    first, second = run_main_in_processes(2, tmp_path, *argv, prepare=prepare)
    assert first[0] == second[0] == 143 and second[2] == ""
    assert "ended by SIGTERM; --resume continues from iteration" in first[2]
    status, out, err = call_main(*argv, "--resume")
    assert status == 0 and "Resuming from iteration" in out, err
    call_main(*SHORT, "--save_path", tmp_path / "one")
    assert curve(run_of(tmp_path / "runs")) == pytest.approx(
        curve(run_of(tmp_path / "one")), rel=1e-3
    )


def test_a_process_that_is_killed_ends_the_other_which_keeps_what_was_done(tmp_path):
    argv = [*SHORT, "--save_path", tmp_path / "runs"]
    prepare = lambda rank: interrupt(rank, 1, signal.SIGKILL)  # noqa: E731
    first, second = run_main_in_processes(2, tmp_path, *argv, prepare=prepare)
    assert second == -signal.SIGKILL and first[0] == 2
    assert "ended by the loss of another process; --resume continues from iteration" in first[2]
    status, out, _ = call_main(*argv, "--resume")
    assert status == 0 and "Resuming from iteration" in out


def unreadable(rank):
    """Have the second process alone fail to read its images."""
    if rank == 1:

        def fail(*_, **__):
            raise ValueError("the image 7.png cannot be read: replace it")

        main.build_dataset = fail


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
    ends = run_main_in_processes(2, tmp_path, *argv, prepare=prepare)
    assert {status for status, *_ in ends} == {2}, ends
    told = [err for *_, err in ends if err]
    assert len(told) == 1 and told[0].count("\n") == 1, ends
    assert re.search(sentence, told[0])
