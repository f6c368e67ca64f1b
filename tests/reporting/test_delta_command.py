"""scripts/delta.py and benchmarks/delta.py."""

import json
import shlex

import delta
import pytest
import torch
from clip_helpers import TINY_VIT, random_state_dict
from commands import call, call_main

import clip
from benchmarks import delta as benchmark
from optimizers.delta import read_delta, save_delta, state_dict_sha256
from run_utils import get_arguments
from runs.output_dir import save_config


def run(*argv):
    status, out, err = call(delta.main, *argv)
    assert status == 0, err
    return out


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


@pytest.fixture(scope="module", params=[torch.float32, torch.float16], ids=str)
def checkpoint(request, tmp_path_factory):
    """Folder of base.pt and delta, the trained model, and the state dict in base.pt."""
    folder = tmp_path_factory.mktemp("it's a föld€r")
    state = random_state_dict(TINY_VIT)
    state = {k: t.to(request.param) if t.is_floating_point() else t for k, t in state.items()}
    torch.save(state, folder / "base.pt")
    model, _ = clip.load(folder / "base.pt", "cpu")
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
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
    assert equal(clip.load(full, "cpu")[0].state_dict(), model.state_dict())
    trained = read_delta(folder / "delta").tensors
    for key, tensor in clip.read_checkpoint(full).items():
        assert tensor.dtype == (torch.float32 if key in trained else state[key].dtype)
    run("revert", full, folder / "delta", "--out", base)
    assert equal(clip.read_checkpoint(base), state)


def test_revert_rejects_other_weights(checkpoint, tmp_path):
    folder, _, _ = checkpoint
    full, out = tmp_path / "full.pt", tmp_path / "base.pt"
    run("apply", folder / "delta", "--out", full)
    weights = torch.load(full, weights_only=True)
    for key in ("transformer.resblocks.1.mlp.c_fc.weight", "ln_final.bias"):
        torch.save({**weights, key: -weights[key]}, full)
        status, _, err = call(delta.main, "revert", full, folder / "delta", "--out", out)
        assert status == 2 and "is not what" in err and err.count("\n") == 1
    assert not out.exists()


def test_scale_writes_an_interpolated_delta(checkpoint, tmp_path):
    folder, model, _ = checkpoint
    scaled = {}
    for alpha in (0, 0.5, 1):
        out = tmp_path / f"{alpha}.safetensors"
        assert f"scaled by {alpha}" in run("scale", folder / "delta", alpha, "--out", out)
        scaled[alpha] = read_delta(out)
        assert scaled[alpha].metadata["wise"] == str(alpha)
    assert not any(len(change.indices) for change in scaled[0].tensors.values())
    for name, (indices, values, _) in read_delta(folder / "delta").tensors.items():
        assert torch.equal(indices, scaled[1].tensors[name].indices)
        assert torch.equal(values, scaled[1].tensors[name].values)
    run("scale", tmp_path / "0.5.safetensors", 0.5, "--out", tmp_path / "again")
    assert read_delta(tmp_path / "again").metadata["wise"] == "0.25"

    run("apply", tmp_path / "0.5.safetensors", "--out", tmp_path / "half.pt")
    base = clip.load(folder / "base.pt", "cpu")[0].state_dict()
    half, trained = clip.load(tmp_path / "half.pt", "cpu")[0].state_dict(), model.state_dict()
    for name in scaled[1].tensors:
        middle = (base[name].double() + trained[name].double()) / 2
        assert torch.equal(half[name], middle.float())


def test_inspect_prints_tensors_and_totals(checkpoint):
    folder, _, _ = checkpoint
    out = run("inspect", folder / "delta")
    table = [line for line in out.splitlines() if line.startswith("| ")][1:]
    *rows, total = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    row = ["transformer.resblocks.0.mlp.c_fc.weight", "256 x 64", "328", "2.0020", "2,624"]
    assert [*row, "65,536"] in rows and len(rows) == 24
    for column in (2, 4, 5):  # entries, bytes, bytes of all
        cells = [int(cells[column].replace(",", "")) for cells in (*rows, total)]
        assert cells.pop() == sum(cells) > 0
    assert f"file: {(folder / 'delta').stat().st_size:,} bytes" in out
    for key in ("backbone", "base_digest"):
        assert f"{key}: {read_delta(folder / 'delta').metadata[key]}" in out


def test_apply_prints_the_evaluation_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _ = clip.load("ViT-Tiny/8", "cpu")
    base, sha256 = {k: v.clone() for k, v in model.state_dict().items()}, state_dict_sha256(model)
    name = "visual.transformer.resblocks.3.mlp.c_proj.weight"
    weight = model.get_parameter(name)
    weight.data[:64] += 0.05
    (tmp_path / "a run").mkdir()
    for folder in ("a run", "."):
        file = tmp_path / folder / "weights.safetensors"
        save_delta(file, {name: weight}, base, sha256, backbone="ViT-Tiny/8")
    flags = ["--num_workers", "0", "--threads", "1", "--save_path", str(tmp_path / "out")]
    save_config(tmp_path / "a run", get_arguments(flags))

    def evaluation(file):
        out = run("apply", file, "--out", "full.pt")
        return shlex.split(out.splitlines()[-1].partition(": ")[2])

    command = evaluation("a run/weights.safetensors")
    assert command[:4] == ["python", "main.py", "--config", "a run/config.yaml"]
    status, out, err = call_main(*command[2:])
    assert status == 0 and "**** Zero-shot CLIP's test accuracy: " in out, err
    assert "accuracy: 67.04" not in out  # which is the base's

    argv = [
        {"NAME": "dtd", "DATA": "."}.get(word, word) for word in evaluation("weights.safetensors")
    ]
    args = get_arguments(argv[2:])
    assert (args.dataset, args.backbone, args.n_iters) == ("dtd", "full.pt", 0)


def test_delta_errors_are_one_line(checkpoint, tmp_path):
    folder, _, _ = checkpoint
    file, base, out = folder / "delta", folder / "base.pt", tmp_path / "out.pt"
    broken, small, foreign = (tmp_path / name for name in ("broken", "small", "foreign.pt"))
    broken.write_bytes(file.read_bytes()[:-1])
    tensors = {"weight": torch.ones(2)}
    save_delta(small, tensors, {"weight": torch.zeros(2)}, "0" * 64)
    torch.save(tensors, foreign)
    before = {p: p.read_bytes() for p in (*folder.iterdir(), *tmp_path.iterdir())}
    for words, *argv in (
        ("COMMAND",),
        ("damaged", "inspect", broken),
        ("not a safetensors file", "inspect", foreign),
        ("no weights at", "inspect", tmp_path),
        ("--out", "apply", file),
        ("other weights", "apply", file, "--out", out, "--base", "ViT-Tiny/8"),
        ("names no backbone", "apply", small, "--out", out),
        ("other weights", "apply", small, "--out", out, "--base", base),
        ("unknown backbone", "apply", file, "--out", out, "--base", "ViT-Tiny"),
        ("no checkpoint", "apply", file, "--out", out, "--base", tmp_path / "none.pt"),
        ("foreign.pt cannot be used", "revert", foreign, file, "--out", out),
        ("would replace", "apply", file, "--out", file),
        ("would replace", "apply", file, "--out", base),
        ("not a file name", "apply", file, "--out", tmp_path),
        ("not a file name", "apply", file, "--out", tmp_path / "none" / "out.pt"),
    ):
        status, text, err = call(delta.main, *argv)
        assert status == 2 and words in err and err.startswith("delta.py"), err
        assert err.count("\n") == 1 and not text, err
    assert before == {p: p.read_bytes() for p in (*folder.iterdir(), *tmp_path.iterdir())}


def test_benchmark_prints_file_sizes(tmp_path, monkeypatch, capsys):
    path = tmp_path / "sizes.json"
    flags = ["--backbone=tiny", "--steps", "10", "4", "--density=1e-3", "--threads=1"]
    monkeypatch.setattr("sys.argv", ["", *flags, f"--json={path}"])
    benchmark.main()
    rows = json.loads(path.read_text())["rows"]
    text = capsys.readouterr().out
    assert all(f"| {row['row']} |" in text and row["bytes"] > 0 for row in rows)
    first, second, _, whole, full, half = rows
    assert first["entries"] < second["entries"] < 2 * first["entries"] + 1
    assert second["bytes"] < whole["bytes"] < full["bytes"] and half["bytes"] < full["bytes"]
