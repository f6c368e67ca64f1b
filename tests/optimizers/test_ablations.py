"""SO with other supports: against the plain twin, and through main.py's flags."""

import json

import pytest
import torch
from torch import nn
from twin import Twin, mask

import main
from optimizers.ablations import GRAD_SUPPORTS, MOMENT_SUPPORTS, SOVariant
from optimizers.SparseOptimizer import SO

SETTINGS = dict(lr=1e-2, density_ratio=0.1, T=3, seed=5)


def steps(optimizer, params, count, seed=0):
    for step in range(count):
        generator = torch.Generator().manual_seed(100 * seed + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()


def test_default_variant_is_so():
    ours, theirs = (nn.Parameter(torch.ones(20, 30)) for _ in range(2))
    steps(SOVariant([ours], **SETTINGS), [ours], 10)
    steps(SO([theirs], **SETTINGS), [theirs], 10)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("correction", ["tensor", "entry"])
@pytest.mark.parametrize("moment_support", MOMENT_SUPPORTS)
@pytest.mark.parametrize("grad_support", GRAD_SUPPORTS)
def test_variant_steps_equal_twin(grad_support, moment_support, correction):
    shape = (12, 15)
    w = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    other = nn.Parameter(torch.randn(7, 9, dtype=torch.float64))  # alone no tensor has its state
    twin = Twin(w, lr=1e-2)
    supports = dict(grad_support=grad_support, moment_support=moment_support)
    optimizer = SOVariant([w, other], **supports, bias_correction=correction, **SETTINGS)
    k = int(w.numel() * 0.1)
    first = before = None
    for step in range(10):
        w.grad, other.grad = torch.randn_like(w), torch.randn_like(other)
        optimizer.step()
        state = optimizer.state[w]
        if step % 3 == 0 and grad_support == "magnitude":
            largest = w.grad.abs().flatten().topk(k).indices
            assert torch.equal(state["grad_indices"], largest.sort().values)
        elif step % 3:
            assert torch.equal(state["grad_indices"], before)
        before = state["grad_indices"]
        first = before if first is None else first
        if correction == "entry":  # steps so far of each entry's moments, in place of the tensor's
            twin.t = twin.t * twin.S_m if step else torch.zeros_like(twin.W)
        if step % 3 == 0 and moment_support == "reset":
            twin.S_m, twin.m, twin.v = mask(before, shape), twin.m * 0, twin.v * 0
            twin.t = twin.t * 0 if correction == "entry" else twin.t
        twin.step(w.grad, mask(before, shape))
        torch.testing.assert_close(w.detach(), twin.W, rtol=1e-12, atol=1e-12)
        kept = mask(state["indices"], shape)
        assert kept.sum() == k
        if moment_support == "fixed":
            assert torch.equal(kept, mask(first, shape))
        elif moment_support == "reset":
            assert torch.equal(kept, mask(before, shape))
        elif moment_support == "magnitude":
            assert torch.equal(kept, twin.S_m)
        # The twin keeps moments by magnitude; give it those that this variant keeps.
        twin.S_m = kept
        for moment, name in ((twin.m, "exp_avg"), (twin.v, "exp_avg_sq")):
            moment.zero_()
            moment.view(-1)[state["indices"]] = state[name]


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
        assert optimizer.state[w].keys() == {"step", "grad_indices"}
    same = [torch.equal(one, two) for one, two in zip(supports[:-1], supports[1:], strict=True)]
    assert same == [True, True, False] * 2  # drawn anew after every T steps


@pytest.mark.parametrize(
    "variant",
    [{"moments": "none"}, {"bias_correction": "entry"}, {"moment_support": "reset"}],
    ids=lambda variant: "-".join(variant.values()),
)
def test_loaded_variant_continues_bit_exactly(variant):
    def make():
        w = nn.Parameter(torch.ones(20, 30))
        return w, SOVariant([w], **variant, **SETTINGS)

    (whole, optimizer), (broken, first) = make(), make()
    steps(optimizer, [whole], 4)
    steps(first, [broken], 4)
    second = SOVariant([broken], **variant, **SETTINGS | {"seed": 6})
    second.load_state_dict(first.state_dict())
    assert second.state[broken].keys() == first.state[broken].keys()
    steps(optimizer, [whole], 9, seed=1)
    steps(second, [broken], 9, seed=1)
    assert torch.equal(whole, broken)


@pytest.mark.parametrize(
    "variant, size",
    [({}, 3.16228e-2), ({"moments": "none"}, 3.16228e-2), ({"bias_correction": "entry"}, 1e-2)],
)
def test_late_entry_first_move_size(variant, size):
    w = nn.Parameter(torch.zeros(30, 30, dtype=torch.float64))
    optimizer = SOVariant([w], **variant, **SETTINGS | {"T": 1, "eps": 0.0})
    steps(optimizer, [w], 1)
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
        steps(optimizer, [w], 3)
        union = set(optimizer.state[w]["indices"].tolist())
        steps(optimizer, [w], 1, seed=1)
        state = optimizer.state[w]
        union |= set(state["grad_indices"].tolist())
        assert set(state["indices"].tolist()) <= union
        assert not torch.equal(state["indices"].sort().values, state["grad_indices"])
        return w.detach(), state["indices"].sort().values

    assert all(map(torch.equal, run(5), run(5)))
    assert not torch.equal(run(5)[1], run(6)[1])


def test_unknown_supports_are_refused():
    w = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="'largest'; valid: random, magnitude"):
        SOVariant([w], grad_support="largest")
    with pytest.raises(ValueError, match="no support of them to choose"):
        SOVariant([w], moments="none", moment_support="fixed")
    with pytest.raises(ValueError, match="no bias to correct"):
        SOVariant([w], moments="none", bias_correction="entry")


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
