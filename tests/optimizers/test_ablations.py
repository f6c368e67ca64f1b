"""SO with other supports: against the plain twin, and through main.py's flags."""

import copy
import json

import pytest
import torch
from torch import nn
from twin import Twin, mask

import main
from optimizers.ablations import GRAD_SUPPORTS, MOMENT_SUPPORTS, SOVariant

SETTINGS = dict(lr=1e-2, density_ratio=0.1, T=3, seed=5)


def steps(optimizer, w, count):
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        w.grad = torch.randn(w.shape, generator=generator, dtype=w.dtype)
        optimizer.step()


@pytest.mark.parametrize("correction", ["tensor", "entry"])
@pytest.mark.parametrize("moment_support", MOMENT_SUPPORTS)
@pytest.mark.parametrize("grad_support", GRAD_SUPPORTS)
def test_variant_steps_equal_twin(grad_support, moment_support, correction):
    w = nn.Parameter(torch.randn(12, 15, dtype=torch.float64))
    other = nn.Parameter(torch.randn(7, 9, dtype=torch.float64))  # alone no tensor has its state
    twin = Twin(w, lr=1e-2, bias_correction=correction)
    supports = dict(grad_support=grad_support, moment_support=moment_support)
    optimizer = SOVariant([w, other], **supports, bias_correction=correction, **SETTINGS)
    state = optimizer.state[w]
    for step in range(10):
        w.grad, other.grad = torch.randn_like(w), torch.randn_like(other)
        before = state.get("grad_indices")
        optimizer.step()
        S_g = mask(state["grad_indices"], w.shape)
        if step == 0:
            first = S_g
        if step % 3:
            assert torch.equal(state["grad_indices"], before)
        elif grad_support == "magnitude":
            assert w.grad[S_g].abs().min() >= w.grad[~S_g].abs().max()
        if step % 3 == 0 and moment_support == "reset":
            twin.S_m, twin.m, twin.v = S_g, twin.m * 0, twin.v * 0
            twin.t = twin.t * 0 if correction == "entry" else twin.t
        twin.step(w.grad, S_g)
        torch.testing.assert_close(w.detach(), twin.W, rtol=1e-12, atol=1e-12)
        S_m = mask(state["indices"], w.shape)
        expected = dict(fixed=first, reset=S_g, magnitude=twin.S_m, random=S_m)[moment_support]
        assert torch.equal(S_m, expected) and S_m.sum() == S_g.sum() == 18
        # The twin keeps moments by magnitude; give it those that this variant keeps.
        twin.S_m = S_m
        for moment, name in ((twin.m, "exp_avg"), (twin.v, "exp_avg_sq")):
            moment.zero_().view(-1)[state["indices"]] = state[name]


@pytest.mark.parametrize("grad_support", GRAD_SUPPORTS)
def test_signsgd_moves_have_one_size(grad_support):
    w = nn.Parameter(torch.randn(12, 15, dtype=torch.float64))
    plain, size = w.detach().clone(), 1e-2 * 0.1 / 0.001**0.5
    settings = SETTINGS | {"weight_decay": 0.5}
    optimizer = SOVariant([w], grad_support=grad_support, moments="none", **settings)
    supports = []
    for _ in range(7):
        w.grad = torch.randn_like(w)
        optimizer.step()
        supports.append(optimizer.state[w]["grad_indices"])
        S_g = mask(supports[-1], w.shape)
        plain -= torch.where(S_g, size * (w.grad + 0.5 * plain).sign(), 0)
        torch.testing.assert_close(w.detach(), plain, rtol=1e-12, atol=1e-12)
    same = [torch.equal(one, two) for one, two in zip(supports[:-1], supports[1:], strict=True)]
    assert same == [True, True, False] * 2  # drawn anew after every T steps


@pytest.mark.parametrize(
    "variant, size",
    [({}, 3.16228e-2), ({"moments": "none"}, 3.16228e-2), ({"bias_correction": "entry"}, 1e-2)],
)
def test_late_entry_first_move_size(variant, size):
    w = nn.Parameter(torch.zeros(30, 30, dtype=torch.float64))
    optimizer = SOVariant([w], **variant, **SETTINGS | {"T": 1, "eps": 0.0})
    steps(optimizer, w, 1)
    first = optimizer.state[w]["grad_indices"]
    optimizer.state[w]["step"] += 20_000
    before = w.detach().clone()
    w.grad = torch.logspace(-9, 3, w.numel(), dtype=torch.float64).view_as(w)
    optimizer.step()
    second = optimizer.state[w]["grad_indices"]
    new = second[~torch.isin(second, first)]
    moved = (before - w.detach()).flatten()[new]
    assert len(new) > 70
    torch.testing.assert_close(moved, torch.full_like(moved, size), rtol=1e-5, atol=0)


def test_random_moment_support_follows_seed():
    def run(seed):
        w = nn.Parameter(torch.zeros(40, 40))
        optimizer = SOVariant([w], moment_support="random", **SETTINGS | {"seed": seed})
        w, optimizer = copy.deepcopy((w, optimizer))
        steps(optimizer, w, 4)
        return torch.cat([w.detach().flatten(), optimizer.state[w]["indices"].sort().values])

    assert torch.equal(run(5), run(5)) and not torch.equal(run(5), run(6))


@pytest.mark.parametrize("setting", [{"moment_support": "fixed"}, {"bias_correction": "entry"}])
def test_settings_without_moments_are_refused(setting):
    with pytest.raises(ValueError, match="without moments there is no support"):
        SOVariant([nn.Parameter(torch.ones(2, 2))], moments="none", **setting)


def test_ablations_have_own_folders(tmp_path):
    common = ["--shots", "1", "--n_iters", "2", "--save_path", str(tmp_path), "--num_workers", "0"]
    main.main([*common, "--grad_support", "magnitude", "--moment_support", "fixed"])
    folder = tmp_path / "so/ViT-Tiny-8/digits/1shots"
    run = "seed3-grad_support_magnitude-moment_support_fixed-n_iters_2"
    result = json.loads((folder / run / "result.json").read_text())
    assert result["method"] == "so" and result["config"]["grad_support"] == "magnitude"
    with pytest.raises(ValueError, match="belongs to --method so"):
        main.main([*common, "--method", "adam", "--moment_support", "random"])


def test_eval_split_val_is_measured(tmp_path, capsys):
    common = ["--shots", "1", "--n_iters", "2", "--num_workers", "0", "--eval_split", "val"]
    main.main([*common, "--save_path", str(tmp_path)])
    text = capsys.readouterr().out
    assert "10 to evaluate on" in text and "Final validation accuracy" in text
    assert "test accuracy" not in text
    result = json.loads(next(tmp_path.rglob("result.json")).read_text())
    assert result["final_accuracy"] % 10 == 0  # of ten images
