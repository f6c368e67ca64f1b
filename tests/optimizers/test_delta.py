"""Sparse deltas: exact in every precision, refused where they do not belong, and their command."""

import json
import struct

import delta as command
import pytest
import safetensors.torch
import torch
from clip_helpers import TINY_VIT, random_state_dict
from commands import call
from safetensors import safe_open
from torch import nn

import clip
from benchmarks import delta as benchmark
from optimizers import SO
from optimizers.delta import (
    apply_delta,
    apply_state_diff,
    changed_indices,
    diff_state_dict,
    interpolate_weights_,
    interpolated_weights,
    read_delta,
    save_delta,
    state_dict_sha256,
)

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def same(a, b):
    """Whether two state dicts hold the same bits, in the same precision, by the same names."""

    def bits(t):
        return t.detach().contiguous().view(INTEGERS.get(t.element_size(), t.dtype))

    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(bits(a[key]), bits(b[key])) for key in a
    )


def clone(state):
    return {key: tensor.detach().clone() for key, tensor in state.items()}


def small_model(dtype=torch.float32):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).to(dtype)
    with torch.no_grad():
        model[0].weight.view(-1)[3] = 0.0
    return model


@pytest.fixture
def saved(tmp_path):
    """A small model, its state before, and a delta of what was trained since."""
    model = small_model()
    base = clone(model.state_dict())
    with torch.no_grad():
        model[0].weight.view(-1)[[1, 5, 40]] += 1
    path = tmp_path / "weights.safetensors"
    matrices = {"0.weight": model[0].weight, "1.weight": model[1].weight}
    save_delta(path, matrices, base, state_dict_sha256(base), backbone="small")
    return model, base, path


def rewritten(path, change):
    """A delta with other tensors or metadata: change(tensors, metadata) changes both in place."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    path.write_bytes(safetensors.torch.save(tensors, metadata=metadata))


def refused(path, base, words):
    """Reading or applying fails with one sentence that names the file, and changes nothing."""
    target = clone(base)
    with pytest.raises(ValueError, match=words) as caught:
        apply_delta(target, read_delta(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert same(target, base)


# What changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_entries_have_changed_if_any_bit_has(dtype):
    base = torch.tensor([[0.0, 1.0, float("nan")], [-0.0, 2.0, 3.0]], dtype=dtype)
    now = base.clone()
    assert changed_indices(base, now).tolist() == []
    now[0, 0], now[1, 2], now[1, 0] = -0.0, float("nan"), 0.0
    found = changed_indices(base, now)
    assert found.tolist() == [0, 3, 5] and found.dtype == torch.int32
    assert changed_indices(base.T, now.T).tolist() == [0, 1, 5]  # in the order of what is seen
    assert changed_indices(base[0, 0], now[0, 0]).tolist() == [0]


def test_only_alike_tensors_are_compared():
    with pytest.raises(ValueError, match=r"float32 \(2, 3\) with float32 \(3, 2\)"):
        changed_indices(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match="bfloat16"):
        changed_indices(torch.ones(2), torch.ones(2).bfloat16())


def test_the_digest_is_of_values_whatever_the_precision():
    model = small_model(torch.float16)
    digest = state_dict_sha256(model)
    assert digest == state_dict_sha256(model.state_dict()) == state_dict_sha256(model.float())
    with torch.no_grad():
        model[0].weight.view(-1)[3] = -0.0
    assert digest != state_dict_sha256(model)


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_delta_brings_trained_weights_back_bit_for_bit(dtype, contiguous, tmp_path):
    model = small_model(dtype)
    if not contiguous:
        model[1].weight.data = model[1].weight.data.T.contiguous().T
    base = clone(model.state_dict())
    optimizer = SO(model.parameters(), lr=0.01, density_ratio=0.1, T=2, seed=0)
    for _ in range(5):
        model(torch.randn(3, 6, dtype=dtype)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model[0].weight.view(-1)[3] = -0.0
    trained = dict(model.named_parameters())
    save_delta(tmp_path / "delta", trained, base, state_dict_sha256(base), backbone="small")

    delta = read_delta(tmp_path / "delta")
    assert delta.metadata["backbone"] == "small" and delta.tensors.keys() == trained.keys()
    indices, values, shape = delta.tensors["0.weight"]
    assert 3 in indices.tolist() and len(indices) < shape[0] * shape[1] / 2
    assert values.dtype == dtype and indices.dtype == torch.int32
    apply_delta(target := clone(base), delta)
    assert same(target, trained)
    fresh = small_model(dtype)
    fresh.load_state_dict(base)
    if not contiguous:
        fresh[1].weight.data = fresh[1].weight.data.T.contiguous().T
    apply_delta(fresh, delta)
    assert same(fresh.state_dict(), trained)


def test_scaled_weights_are_base_plus_alpha_times_what_was_learned():
    base = {"w": torch.tensor([[1.0, -0.0, 8.0], [4.0, 0.0, 0.1]])}
    trained = {"w": torch.tensor([[3.0, -0.0, 6.0], [4.0, -0.0, 0.3]])}
    now = clone(trained)
    with interpolated_weights(now, base, 0.25):
        assert same(now, {"w": torch.tensor([[1.5, -0.0, 7.5], [4.0, 0.0, 0.15]])})
        interpolate_weights_(now, base, 0)
        assert same(now, base)
    assert same(now, trained)
    interpolate_weights_(now, base, 1)
    assert same(now, trained)
    transposed = {"w": clone(trained)["w"].T.contiguous().T}  # of other strides
    interpolate_weights_(transposed, base, 0.5)
    assert transposed["w"].tolist()[0] == [2.0, 0.0, 7.0]
    with pytest.raises(ValueError, match="cannot compare"):
        interpolate_weights_({"w": trained["w"].half()}, base, 0.5)


def test_a_matrix_without_changes_is_two_empty_tensors(saved):
    model, base, path = saved
    tensors = safetensors.torch.load_file(path)
    assert tensors["0.weight.indices"].tolist() == [1, 5, 40]
    assert tensors["1.weight.indices"].numel() == tensors["1.weight.values"].numel() == 0
    assert tensors["1.weight.values"].dtype == torch.float32
    apply_delta(target := clone(base), read_delta(path))
    assert same(target, model.state_dict())


def test_a_wider_model_takes_values_and_a_narrower_one_does_not(saved, tmp_path):
    _, base, path = saved
    half = {key: t.bfloat16() for key, t in base.items()}
    trained = {"0.weight": half["0.weight"] * 1.5}
    save_delta(tmp_path / "half", trained, half, state_dict_sha256(half))
    wide = {key: t.float() for key, t in half.items()}
    apply_delta(wide, read_delta(tmp_path / "half"))
    assert torch.equal(wide["0.weight"], trained["0.weight"].float())
    fine = {key: t.float() for key, t in half.items()}
    save_delta(path, {"0.weight": fine["0.weight"] * 1.1}, fine, state_dict_sha256(fine))
    refused(path, half, "would round")


def test_what_could_not_be_read_again_is_not_written(saved, tmp_path):
    model, base, _ = saved
    path = tmp_path / "new"
    with pytest.raises(ValueError, match="the base has no 2.weight"):
        save_delta(path, {"2.weight": model[0].weight}, base, "")
    with pytest.raises(ValueError, match="cannot compare"):
        save_delta(path, {"0.weight": model[1].weight}, base, "")
    with pytest.raises(ValueError, match="not finite"):
        save_delta(path, {"0.weight": model[0].weight / 0}, base, "")
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_packed_for_a_checkpoint_comes_back_bit_for_bit(dtype):
    base = {"a": torch.randn(9, 7, dtype=dtype), "b": torch.randn(5, 4, dtype=dtype).t()}
    now = clone(base) | {"new": torch.randn(3, dtype=dtype)}
    now["a"][2, 3], now["a"][4, 4], now["b"][1, 1] = -0.0, float("nan"), 7
    packed = diff_state_dict(now, base)
    assert len(packed["a"][0]) == 2 and packed["new"][0] is None
    assert (
        diff_state_dict({"a": now["a"] + 1}, base)["a"][0] is None
    )  # where all changed: less room whole
    tensors = {key: torch.zeros_like(t) for key, t in now.items()}
    apply_state_diff(packed, tensors, base)
    assert same(tensors, now)


# Refusals


def put(key, value):
    def change(tensors, metadata):
        (metadata if isinstance(value, str) else tensors)[key] = value

    return change


def drop(key):
    return lambda tensors, metadata: (tensors if key in tensors else metadata).pop(key)


def indices(*values, dtype=torch.int32):
    return put("0.weight.indices", torch.tensor(values, dtype=dtype))


def values(*numbers, dtype=torch.float32):
    return put("0.weight.values", torch.tensor(numbers, dtype=dtype))


def shapes(**changes):
    return put("shapes", json.dumps({"0.weight": [8, 6], "1.weight": [4, 8], **changes}))


@pytest.mark.parametrize(
    ("change", "words"),
    {
        "beyond the end": (indices(1, 5, 48), "outside of its 48 entries"),
        "negative": (indices(-1, 5, 40), "outside"),
        "repeated": (indices(1, 5, 5), "do not increase, or repeat"),
        "unsorted": (indices(5, 1, 40), "do not increase"),
        "fewer than values": (indices(1, 5), "not as many of both"),
        "two-dimensional": (put("0.weight.indices", torch.ones(1, 3).int()), "not as many"),
        "floating indices": (indices(1, 5, 40, dtype=torch.float32), "float32 indices"),
        "integer values": (values(1, 2, 3, dtype=torch.int32), "int32 values"),
        "NaN": (values(1, float("nan"), 3), "not finite"),
        "no values": (drop("0.weight.values"), "'0.weight.values' is missing"),
        "no indices": (drop("1.weight.indices"), "'1.weight.indices' is missing"),
        "more tensors": (put("2.weight.values", torch.ones(1)), "belongs to none of"),
        "an unlisted matrix": (put("shapes", '{"0.weight": [8, 6]}'), "belongs to none of"),
        "no digest": (drop("base_digest"), "digest of its base is missing"),
        "an odd digest": (put("base_digest", "0" * 63 + "G"), "digest of its base is missing"),
        "no format": (drop("format"), "not a sparse delta"),
        "another format": (put("format", "pt"), "not a sparse delta"),
        "a newer version": (put("version", "2"), "version '2', and 1 is read here"),
        "no version": (drop("version"), "version ''"),
        "no shapes": (drop("shapes"), "shapes is missing or broken"),
        "half of the shapes": (put("shapes", '{"0.weight": [8,'), "missing or broken"),
        "nested shapes": (put("shapes", "[" * 100_000), "missing or broken"),
        "a list of shapes": (put("shapes", "[[8, 6]]"), "missing or broken"),
        "a negative shape": (shapes(**{"0.weight": [-8, -6]}), "missing or broken"),
        "a floating shape": (shapes(**{"0.weight": [8.0, 6]}), "missing or broken"),
        "a huge shape": (shapes(**{"0.weight": [2**32, 2**31]}), "missing or broken"),
        "a long shape": (shapes(**{"0.weight": [2**62] * 10_000}), "missing or broken"),
        "a shape of text": (shapes(**{"0.weight": "86"}), "missing or broken"),
        "an escape sequence": (shapes(**{"\x1b[2J": [1]}), "missing or broken"),
        "another shape": (shapes(**{"0.weight": [6, 8]}), r"\(6, 8\) '0.weight', which these"),
        "another base": (put("base_digest", "0" * 64), "belongs to other weights .* 'small'"),
    }.values(),
)  # fmt: skip
def test_what_a_delta_may_not_say_is_refused(change, words, saved):
    _, base, path = saved
    rewritten(path, change)
    refused(path, base, words)


def test_a_matrix_that_the_model_has_not_is_refused_before_others_are_written(saved):
    model, base, path = saved
    trained = {"0.weight": model[0].weight, "9.weight": model[1].weight}
    save_delta(path, trained, {**base, "9.weight": base["1.weight"]}, state_dict_sha256(base))
    refused(path, base, "'9.weight', which these weights do not have")


def test_a_delta_is_not_applied_twice(saved):
    model, _, path = saved
    refused(path, model.state_dict(), "other weights")


def test_foreign_and_damaged_files_are_refused(saved, tmp_path):
    _, base, path = saved
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    for size in (0, 7, 8, 8 + length // 2, 8 + length, len(data) - 1):
        path.write_bytes(data[:size])
        refused(path, base, "damaged")
    for place in range(0, 8 + length, 3):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            apply_delta(target := clone(base), read_delta(path))
        except ValueError as error:
            assert str(path) in str(error)
            continue
        # A flip may hit the backbone's name or padding; what counts is as it was.
        path.write_bytes(data)
        apply_delta(sound := clone(base), read_delta(path))
        assert same(target, sound)
    path.write_bytes(safetensors.torch.save(base))
    refused(path, base, "not a sparse delta")
    torch.save(base, path)
    refused(path, base, "damaged or not a safetensors")
    with pytest.raises(FileNotFoundError, match="no weights at .*: name a file that"):
        read_delta(tmp_path)


def test_what_was_read_stays_when_the_file_goes(saved):
    model, base, path = saved
    delta = read_delta(path)
    with open(path, "r+b") as file:
        file.truncate(0)
    apply_delta(target := clone(base), delta)
    assert same(target, model.state_dict())


# scripts/delta.py


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def checkpoint(request, tmp_path_factory):
    """A tiny CLIP's file in some precision, the model as trained in float32, and its delta."""
    folder = tmp_path_factory.mktemp("it's a föld€r")
    state = random_state_dict(TINY_VIT)
    state = {k: t.to(request.param) if t.is_floating_point() else t for k, t in state.items()}
    torch.save(state, folder / "base.pt")
    model, _ = clip.load(folder / "base.pt", "cpu")
    base = clone(model.state_dict())
    matrices = {k: p for k, p in model.named_parameters() if "resblocks" in k and p.dim() == 2}
    with torch.no_grad():
        for p in matrices.values():
            p.view(-1)[::50] *= 1 + 2**-20  # less than half of the others' precision
    digest = state_dict_sha256(base)
    save_delta(folder / "delta", matrices, base, digest, backbone=str(folder / "base.pt"))
    return folder, model.eval(), state


def test_a_scaled_file_is_a_delta_of_the_same_base(checkpoint, tmp_path):
    folder, model, _ = checkpoint
    whole, scaled_files = read_delta(folder / "delta"), {}
    for alpha in (0, 0.5, 1):
        out = tmp_path / f"{alpha}.safetensors"
        status, said, err = call(command.main, "scale", folder / "delta", alpha, "--out", out)
        assert status == 0 and f"scaled by {alpha}" in said, err
        scaled_files[alpha] = read_delta(out)
        assert scaled_files[alpha].metadata == whole.metadata | {"wise": str(alpha)}
    assert all(not len(change.indices) for change in scaled_files[0].tensors.values())
    for name, (indices, values, _) in scaled_files[1].tensors.items():
        assert torch.equal(indices, whole.tensors[name].indices)
        assert torch.equal(values, whole.tensors[name].values)
    again = tmp_path / "again.safetensors"
    call(command.main, "scale", tmp_path / "0.5.safetensors", 0.5, "--out", again)
    assert read_delta(again).metadata["wise"] == "0.25"

    half = tmp_path / "half.pt"
    status, _, err = call(command.main, "apply", tmp_path / "0.5.safetensors", "--out", half)
    assert status == 0, err
    base = clip.load(folder / "base.pt", "cpu")[0].state_dict()
    found, trained = clip.load(half, "cpu")[0].state_dict(), model.state_dict()
    for name in whole.tensors:
        middle = (base[name].double() + trained[name].double()) / 2
        assert torch.equal(found[name], middle.float())


@pytest.mark.parametrize("name", ["full.pt", "full.safetensors"])
def test_applied_weights_load_as_the_trained_ones_and_are_reverted(checkpoint, name, tmp_path):
    folder, model, state = checkpoint
    full, base = tmp_path / name, tmp_path / f"base of {name}"
    status, out, err = call(command.main, "apply", folder / "delta", "--out", full)
    assert status == 0 and str(full) in out, err
    assert same(clip.load(full, "cpu")[0].state_dict(), model.state_dict())
    trained = read_delta(folder / "delta").tensors
    for key, tensor in clip.read_checkpoint(full).items():
        assert tensor.dtype == (torch.float32 if key in trained else state[key].dtype)
    status, out, err = call(command.main, "revert", full, folder / "delta", "--out", base)
    assert status == 0, err
    assert same(clip.read_checkpoint(base), state)


def test_nothing_but_what_was_applied_is_reverted(checkpoint, tmp_path):
    folder, _, state = checkpoint
    full, out = tmp_path / "full.pt", tmp_path / "base.pt"
    assert call(command.main, "apply", folder / "delta", "--out", full)[0] == 0
    weights = torch.load(full, weights_only=True)
    key = "transformer.resblocks.1.mlp.c_fc.weight"
    for change in (
        {key: weights[key] + (torch.arange(weights[key].numel()).view_as(weights[key]) == 50)},
        {key: weights[key] + (torch.arange(weights[key].numel()).view_as(weights[key]) == 51)},
        {"ln_final.bias": -weights["ln_final.bias"]},
        {key: state[key]},
    ):
        torch.save({**weights, **change}, full)
        status, _, err = call(command.main, "revert", full, folder / "delta", "--out", out)
        assert status == 2 and f"it differs in {[*change][0]};" in err and err.count("\n") == 1
    torch.save({**weights, "extra": torch.ones(1)}, full)
    status, _, err = call(command.main, "revert", full, folder / "delta", "--out", out)
    assert status == 2 and str(full) in err and err.count("\n") == 1
    assert not out.exists()


def test_inspect_shows_each_matrix_and_the_sums(checkpoint):
    folder, _, _ = checkpoint
    status, out, err = call(command.main, "inspect", folder / "delta")
    assert status == 0 and not err
    table = [line for line in out.splitlines() if line.startswith("| ")][1:]
    *rows, total = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    row = ["transformer.resblocks.0.mlp.c_fc.weight", "256 x 64", "328", "2.0020", "2,624"]
    assert [*row, "65,536"] in rows and len(rows) == 24
    for column in (2, 4, 5):  # entries, bytes, bytes of all
        cells = [int(cells[column].replace(",", "")) for cells in (*rows, total)]
        assert cells.pop() == sum(cells) > 0
    assert f"file: {(folder / 'delta').stat().st_size:,} bytes" in out
    assert f"backbone: {folder / 'base.pt'}" in out
    base = read_delta(folder / "delta").metadata["base_digest"]
    assert f"base_digest: {base}" in out


def test_the_command_refuses_with_one_sentence(checkpoint, saved, tmp_path):
    folder, _, _ = checkpoint
    delta, small = folder / "delta", saved[2]
    nameless = tmp_path / "nameless"
    nameless.write_bytes(small.read_bytes())
    rewritten(nameless, drop("backbone"))
    broken = tmp_path / "broken"
    broken.write_bytes(delta.read_bytes()[:-1])
    foreign = tmp_path / "foreign.pt"
    torch.save(saved[1], foreign)
    there = {p: p.read_bytes() for p in (*folder.iterdir(), *tmp_path.iterdir())}
    out = tmp_path / "out.pt"
    for words, *argv in (
        ("COMMAND",),
        ("damaged", "inspect", broken),
        ("not a safetensors file", "inspect", foreign),
        ("no weights at", "inspect", tmp_path),
        ("--out", "apply", delta),
        ("damaged", "apply", broken, "--out", out),
        ("damaged", "revert", foreign, broken, "--out", out),
        ("other weights", "apply", delta, "--out", out, "--base", "ViT-Tiny/8"),
        ("other weights", "apply", small, "--out", out, "--base", folder / "base.pt"),
        ("give --base", "apply", small, "--out", out),
        ("names no backbone", "apply", nameless, "--out", out),
        ("unknown backbone", "apply", delta, "--out", out, "--base", "ViT-Tiny"),
        ("no checkpoint", "apply", delta, "--out", out, "--base", tmp_path / "none.pt"),
        ("foreign.pt cannot be used", "apply", delta, "--out", out, "--base", foreign),
        ("foreign.pt cannot be used", "revert", foreign, delta, "--out", out),
        ("no checkpoint at", "revert", tmp_path / "none.pt", delta, "--out", out),
        ("would replace", "apply", delta, "--out", delta),
        ("would replace", "apply", delta, "--out", folder / "base.pt"),
        ("not a file's name", "apply", delta, "--out", tmp_path),
        ("not a file's name", "apply", delta, "--out", tmp_path / "none" / "out.pt"),
    ):
        status, text, err = call(command.main, *argv)
        assert status == 2 and words in err and err.startswith("delta.py"), err
        assert err.count("\n") == 1 and not text, err
    assert there == {p: p.read_bytes() for p in (*folder.iterdir(), *tmp_path.iterdir())}


# The benchmark


def test_the_benchmark_prints_sizes_beside_others(tmp_path, monkeypatch, capsys):
    path = tmp_path / "sizes.json"
    flags = ["--backbone=tiny", "--steps", "10", "4", "--density=1e-3", "--threads=1"]
    monkeypatch.setattr("sys.argv", ["", *flags, f"--json={path}"])
    benchmark.main()
    rows = json.loads(path.read_text())["rows"]
    text = capsys.readouterr().out
    assert all(f"| {row['row']} |" in text and row["bytes"] > 0 for row in rows)
    first, second, _, whole, full, half = rows
    assert first["steps"] == 4 and second["steps"] == 10
    assert first["entries"] < second["entries"] < 2 * first["entries"] + 1
    assert second["bytes"] < whole["bytes"] < full["bytes"] and half["bytes"] < full["bytes"]
