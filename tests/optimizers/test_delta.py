"""Deltas are exact in every precision, and refused where they do not belong."""

import json
import struct

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

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

HALF_AND_FULL = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
INT_VIEW = {2: torch.int16, 4: torch.int32}


def same_bits(a, b):
    """Whether two state dicts have the same names, dtypes and bits."""

    def bits(tensor):
        return tensor.detach().contiguous().view(INT_VIEW[tensor.element_size()])

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
    """A trained model, its state dict before training, and the path of its delta."""
    model = small_model()
    base = clone(model.state_dict())
    with torch.no_grad():
        model[0].weight.view(-1)[[1, 5, 40]] += 1
    path = tmp_path / "weights.safetensors"
    trained = {"0.weight": model[0].weight, "1.weight": model[1].weight}
    save_delta(path, trained, base, state_dict_sha256(base), backbone="small")
    return model, base, path


def rewrite(path, change):
    """Save a delta again after change(tensors, metadata)."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    path.write_bytes(safetensors.torch.save(tensors, metadata=metadata))


def assert_refused(path, base, words):
    """Reading or applying fails with one line that names the file, and changes nothing."""
    target = clone(base)
    with pytest.raises(ValueError, match=words) as caught:
        apply_delta(target, read_delta(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert same_bits(target, base)


# What changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_changed_indices_compares_bits(dtype):
    base = torch.tensor([[0.0, 1.0, float("nan")], [-0.0, 2.0, 3.0]], dtype=dtype)
    now = base.clone()
    assert changed_indices(base, now).tolist() == []
    now[0, 0], now[1, 2], now[1, 0] = -0.0, float("nan"), 0.0
    indices = changed_indices(base, now)
    assert indices.tolist() == [0, 3, 5] and indices.dtype == torch.int32
    assert changed_indices(base.T, now.T).tolist() == [0, 1, 5]  # positions in the transpose
    with pytest.raises(ValueError, match=r"\(2, 3\) with .* \(3, 2\)"):
        changed_indices(base, now.T)


def test_sha256_ignores_precision():
    model = small_model(torch.float16)
    sha256 = state_dict_sha256(model)
    assert sha256 == state_dict_sha256(model.state_dict()) == state_dict_sha256(model.float())
    with torch.no_grad():
        model[0].weight.view(-1)[3] = -0.0
    assert sha256 != state_dict_sha256(model)


# Round trips


@HALF_AND_FULL
@pytest.mark.parametrize("contiguous", [True, False])
def test_delta_restores_trained_bits(dtype, contiguous, tmp_path):
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
    trained = clone(dict(model.named_parameters()))
    save_delta(tmp_path / "delta", trained, base, state_dict_sha256(base), backbone="small")

    delta = read_delta(tmp_path / "delta")
    assert delta.metadata["backbone"] == "small" and delta.tensors.keys() == trained.keys()
    indices, values, shape = delta.tensors["0.weight"]
    assert 3 in indices.tolist() and len(indices) < shape[0] * shape[1] / 2
    assert values.dtype == dtype and indices.dtype == torch.int32
    model.load_state_dict(base)
    for target in (clone(base), model):
        apply_delta(target, delta)
        assert same_bits(target if target is not model else model.state_dict(), trained)


def test_delta_of_unchanged_weight_is_empty(saved):
    model, base, path = saved
    tensors = safetensors.torch.load_file(path)
    assert tensors["0.weight.indices"].tolist() == [1, 5, 40]
    assert tensors["1.weight.indices"].numel() == tensors["1.weight.values"].numel() == 0
    assert tensors["1.weight.values"].dtype == torch.float32
    delta = read_delta(path)
    with open(path, "r+b") as file:
        file.truncate(0)  # what was read does not depend on the file
    apply_delta(target := clone(base), delta)
    assert same_bits(target, model.state_dict())


def test_delta_applies_to_wider_dtype(saved, tmp_path):
    _, base, path = saved
    half = {key: t.bfloat16() for key, t in base.items()}
    trained = {"0.weight": half["0.weight"] * 1.5}
    save_delta(tmp_path / "half", trained, half, state_dict_sha256(half))
    full = {key: t.float() for key, t in half.items()}
    save_delta(path, {"0.weight": full["0.weight"] * 1.1}, full, state_dict_sha256(full))
    apply_delta(full, read_delta(tmp_path / "half"))
    assert torch.equal(full["0.weight"], trained["0.weight"].float())
    assert_refused(path, half, "would round")


def test_interpolation_scales_the_difference():
    base = {"w": torch.tensor([[1.0, -0.0, 8.0], [4.0, 0.0, 0.1]])}
    trained = {"w": torch.tensor([[3.0, -0.0, 6.0], [4.0, -0.0, 0.3]])}
    now = clone(trained)
    with interpolated_weights(now, base, 0.25):
        assert same_bits(now, {"w": torch.tensor([[1.5, -0.0, 7.5], [4.0, 0.0, 0.15]])})
        interpolate_weights_(now, base, 0)
        assert same_bits(now, base)
    assert same_bits(now, trained)
    interpolate_weights_(now, base, 1)
    assert same_bits(now, trained)
    transposed = {"w": trained["w"].T.contiguous().T}
    interpolate_weights_(transposed, base, 0.5)
    assert transposed["w"].tolist()[0] == [2.0, 0.0, 7.0]
    with pytest.raises(ValueError, match="cannot compare"):
        interpolate_weights_({"w": trained["w"].half()}, base, 0.5)


@HALF_AND_FULL
def test_state_diff_restores_bits(dtype):
    base = {"a": torch.randn(9, 7, dtype=dtype), "b": torch.randn(5, 4, dtype=dtype).t()}
    now = clone(base) | {"new": torch.randn(3, dtype=dtype)}
    now["a"][2, 3], now["a"][4, 4], now["b"][1, 1] = -0.0, float("nan"), 7
    diff = diff_state_dict(now, base)
    assert len(diff["a"][0]) == 2 and diff["new"][0] is None
    assert diff_state_dict({"a": now["a"] + 1}, base)["a"][0] is None  # smaller when stored whole
    tensors = {key: torch.zeros_like(t) for key, t in now.items()}
    apply_state_diff(diff, tensors, base)
    assert same_bits(tensors, now)


# Refusals


def test_save_rejects_unreadable_deltas(saved, tmp_path):
    model, base, _ = saved
    path = tmp_path / "new"
    for words, trained in (
        ("the base has no 2.weight", {"2.weight": model[0].weight}),
        ("cannot compare", {"0.weight": model[1].weight}),
        ("not finite", {"0.weight": model[0].weight / 0}),
    ):
        with pytest.raises(ValueError, match=words):
            save_delta(path, trained, base, "")
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


def put(key, value):
    def change(tensors, metadata):
        (metadata if isinstance(value, str) else tensors)[key] = value

    return change


def drop(key):
    return lambda tensors, metadata: (tensors if key in tensors else metadata).pop(key)


def indices(*values, dtype=torch.int32):
    return put("0.weight.indices", torch.tensor(values, dtype=dtype))


def shapes(**changes):
    return put("shapes", json.dumps({"0.weight": [8, 6], "1.weight": [4, 8], **changes}))


@pytest.mark.parametrize(
    ("change", "words"),
    {
        "beyond the end": (indices(1, 5, 48), "do not increase within its 48 entries"),
        "repeated": (indices(1, 5, 5), "do not increase within"),
        "fewer than values": (indices(1, 5), "one floating-point value for each"),
        "floating indices": (indices(1, 5, 40, dtype=torch.float32), "for each integer index"),
        "integer values": (put("0.weight.values", torch.ones(3).int()), "floating-point value"),
        "no values": (drop("0.weight.values"), "disagree about '0.weight.values'"),
        "no digest": (drop("base_digest"), "belongs to other weights"),
        "another base": (put("base_digest", "0" * 64), "belongs to other weights .* 'small'"),
        "no format": (drop("format"), "not a sparse delta"),
        "a newer version": (put("version", "2"), "version is '2', and only 1 is read"),
        "no shapes": (drop("shapes"), "shapes is missing or broken"),
        "nested shapes": (put("shapes", "[" * 100_000), "missing or broken"),
        "a shape of names": (shapes(**{"0.weight": "ab"}), "missing or broken"),
        "an escape sequence": (shapes(**{"\x1b[2J": [1]}), "missing or broken"),
        "another shape": (shapes(**{"0.weight": [6, 8]}), r"'0.weight' of shape \(6, 8\), which"),
        "a negative shape": (shapes(**{"0.weight": [-8, -6]}), "which these weights do not have"),
    }.values(),
)  # fmt: skip
def test_delta_rejects_contents(change, words, saved):
    _, base, path = saved
    rewrite(path, change)
    assert_refused(path, base, words)


def test_delta_rejects_other_models(saved):
    model, base, path = saved
    assert_refused(path, model.state_dict(), "other weights")  # applied twice
    trained = {"0.weight": model[0].weight, "9.weight": model[1].weight}
    save_delta(path, trained, {**base, "9.weight": base["1.weight"]}, state_dict_sha256(base))
    assert_refused(path, base, "'9.weight' of shape .* which these weights do not have")


def test_delta_rejects_damaged_files(saved, tmp_path):
    _, base, path = saved
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    for size in (0, 7, 8, 8 + length // 2, 8 + length, len(data) - 1):
        path.write_bytes(data[:size])
        assert_refused(path, base, "damaged")
    path.write_bytes(safetensors.torch.save(base))
    assert_refused(path, base, "not a sparse delta")
    torch.save(base, path)
    assert_refused(path, base, "damaged or not a safetensors")
    with pytest.raises(FileNotFoundError, match="no weights at .*: name a file that"):
        read_delta(tmp_path)
