"""scripts/delta.py: inspect, apply, scale and revert, and their errors."""

from copy import deepcopy
from functools import partial

import delta
import pytest
import torch
from clip_helpers import TINY_VIT, random_state_dict
from commands import error_of, output_of
from open_clip_folders import write_folder

import clip
from optimizers.delta import apply_delta, read_delta, save_delta, state_dict_sha256

run, error = (partial(f, delta.main) for f in (output_of, error_of))


def assert_equal(a, b):
    torch.testing.assert_close(dict(a), dict(b), rtol=0, atol=0)


@pytest.fixture(scope="module", params=[torch.float32, torch.float16], ids=str)
def checkpoint(request, tmp_path_factory):
    """Folder of base.pt and delta, the trained model, and the state dict in base.pt."""
    folder = tmp_path_factory.mktemp("it's a föld€r")
    state = random_state_dict(TINY_VIT)
    state = {k: t.to(request.param) if t.is_floating_point() else t for k, t in state.items()}
    torch.save(state, folder / "base.pt")
    model, _ = clip.load(folder / "base.pt", "cpu")
    base = deepcopy(model.state_dict())
    trained = {k: p for k, p in model.named_parameters() if "resblocks" in k and p.dim() == 2}
    with torch.no_grad():
        for p in trained.values():
            p.view(-1)[::50] *= 1 + 2**-20  # a change that half precision would lose
    sha256 = state_dict_sha256(base)
    save_delta(folder / "delta", trained, base, sha256, backbone=str(folder / "base.pt"))
    return folder, model.eval(), state


@pytest.mark.parametrize("name", ["full.pt", "full.safetensors"])
def test_apply_and_revert_round_trip(checkpoint, name, tmp_path):
    folder, model, state = checkpoint
    full, base = tmp_path / name, tmp_path / f"base of {name}"
    assert str(full) in run("apply", folder / "delta", "--out", full)
    assert_equal(clip.load(full, "cpu")[0].state_dict(), model.state_dict())
    trained = read_delta(folder / "delta").tensors
    for key, tensor in clip.read_checkpoint(full).items():
        assert tensor.dtype == (torch.float32 if key in trained else state[key].dtype)
    run("revert", full, folder / "delta", "--out", base)
    assert_equal(clip.read_checkpoint(base), state)
    torch.save(model.state_dict() | {"ln_final.bias": -model.ln_final.bias}, tmp_path / "other.pt")
    assert "is not what" in error("revert", tmp_path / "other.pt", folder / "delta", "--out", base)


def test_scale_writes_an_interpolated_delta(checkpoint, tmp_path):
    folder, _, state = checkpoint
    half, quarter = tmp_path / "half", tmp_path / "quarter"
    assert "scaled by 0.5" in run("scale", folder / "delta", 0.5, "--out", half)
    for name, (indices, values, _) in read_delta(folder / "delta").tensors.items():
        middle = (state[name].flatten()[indices.long()].double() + values.double()) / 2
        assert torch.equal(read_delta(half).tensors[name].values, middle.float())
    run("scale", half, 0.5, "--out", quarter)
    assert read_delta(quarter).metadata["wise"] == "0.25"


def test_inspect_prints_tensors_and_totals(checkpoint):
    folder, _, _ = checkpoint
    out = run("inspect", folder / "delta")
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip().replace(",", "") for cell in row] for row in rows[1:]]
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    assert [name, "256 x 64", "328", "2.0020", "2624", "65536"] in rows and len(rows) == 25
    *changed, total = (int(row[2]) for row in rows)
    assert total == sum(changed) > 0
    assert f"backbone: {folder / 'base.pt'}" in out


def test_open_clip_deltas_are_scaled(tmp_path):
    pytest.importorskip("open_clip")
    write_folder("siglip", tmp_path / "siglip")
    model = clip.load(tmp_path / "siglip", "cpu")[0]
    base, file = deepcopy(model.state_dict()), tmp_path / "delta"
    name, weight = next((n, p) for n, p in model.named_parameters() if p.dim() == 2)
    trained = {name: weight + 1}
    save_delta(file, trained, base, state_dict_sha256(base), backbone=str(tmp_path / "siglip"))
    run("scale", file, 0.5, "--out", tmp_path / "half")
    apply_delta(base, read_delta(tmp_path / "half"))
    torch.testing.assert_close(base[name], weight + 0.5)
    assert "export.py RUN --to open_clip" in error("apply", file, "--out", tmp_path / "full.pt")


def test_delta_errors_are_one_line(checkpoint, tmp_path):
    folder, _, _ = checkpoint
    file, base, out = folder / "delta", folder / "base.pt", tmp_path / "out.pt"
    small, foreign, before = tmp_path / "small", tmp_path / "foreign.pt", file.read_bytes()
    save_delta(small, {"w": torch.ones(2)}, {"w": torch.zeros(2)}, "0" * 64)
    torch.save({"w": torch.ones(2)}, foreign)
    for words, *argv in (
        ("not a sparse delta", "inspect", foreign),
        ("other weights", "apply", file, "--out", out, "--base", "ViT-Tiny/8"),
        ("give --base", "apply", small, "--out", out),
        ("foreign.pt cannot be used", "revert", foreign, file, "--out", out),
        ("would replace", "apply", file, "--out", file),
        ("would replace", "apply", file, "--out", base),
    ):
        assert words in error(*argv)
    assert before == file.read_bytes() and not out.exists()
