"""Deltas are exact in every precision, and refused where they do not belong."""

from copy import deepcopy

import pytest
import safetensors.torch
import torch
from torch import nn

from optimizers.delta import (
    apply_delta,
    apply_state_diff,
    diff_state_dict,
    interpolate_weights_,
    interpolated_weights,
    read_delta,
    save_delta,
    state_dict_sha256,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def bits(state):
    """The dtype and bytes of each tensor of a state dict."""
    return {
        name: (tensor.dtype, tensor.detach().contiguous().view(torch.uint8).tolist())
        for name, tensor in state.items()
    }


def save_small(path, dtype=torch.float32, contiguous=True):
    """Save the delta of a trained model; return the model and its state dict before training."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).to(dtype)
    weight = model[0].weight
    if not contiguous:
        weight.data = weight.data.T.contiguous().T
    with torch.no_grad():
        weight[0, 3] = 0.0
        base = deepcopy(model.state_dict())
        weight[0, 1] += 1
        weight[0, 3] = -0.0
        weight[6, 4] += 1
    trained = {"0.weight": weight, "1.weight": model[1].weight}
    save_delta(path, trained, base, state_dict_sha256(base), backbone="small")
    return model, base


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


def assert_refused(path, base, words):
    """Reading or applying fails with a sentence that names the file, and changes nothing."""
    target = deepcopy(base)
    with pytest.raises(ValueError, match=words) as caught:
        apply_delta(target, read_delta(path))
    assert str(path) in str(caught.value) and bits(target) == bits(base)


@DTYPES
@pytest.mark.parametrize("contiguous", [True, False])
def test_delta_restores_trained_bits(dtype, contiguous, path):
    model, base = save_small(path, dtype, contiguous)
    trained, delta = deepcopy(model.state_dict()), read_delta(path)
    with open(path, "r+b") as file:
        file.truncate(0)  # what was read does not depend on the file
    indices, values, shape = delta.tensors["0.weight"]
    assert indices.tolist() == [1, 3, 40] and values.dtype == dtype and shape == (8, 6)
    assert len(delta.tensors["1.weight"].values) == 0 and delta.metadata["backbone"] == "small"
    model.load_state_dict(base)
    apply_delta(model, delta)
    apply_delta(base, delta)
    assert bits(model.state_dict()) == bits(trained) and bits(base) == bits(trained)
    with pytest.raises(ValueError, match="belongs to other weights .* 'small'"):
        apply_delta(model, delta)  # a second time


def test_delta_applies_to_wider_dtype(path):
    half = {"w": torch.randn(4, 3).bfloat16()}
    full, trained = {"w": half["w"].float()}, {"w": half["w"] * 1.5}
    save_delta(path, trained, half, state_dict_sha256(half))
    apply_delta(full, read_delta(path))
    assert torch.equal(full["w"], trained["w"].float())
    save_delta(path, {"w": trained["w"].float()}, {"w": half["w"].float()}, state_dict_sha256(half))
    assert_refused(path, half, "would round")


def test_interpolation_scales_the_difference():
    base = {"w": torch.tensor([[1.0, -0.0, 8.0], [4.0, 0.0, 0.1]]).T}
    trained = {"w": torch.tensor([[3.0, -0.0, 6.0], [4.0, -0.0, 0.3]]).T}
    now = deepcopy(trained)
    with interpolated_weights(now, base, 0.25):
        assert bits(now) == bits({"w": torch.tensor([[1.5, -0.0, 7.5], [4.0, 0.0, 0.15]]).T})
        interpolate_weights_(now, base, 0)
        assert bits(now) == bits(base)
    assert bits(now) == bits(trained)
    interpolate_weights_(now, base, 1)
    assert bits(now) == bits(trained)


@DTYPES
def test_state_diff_restores_bits(dtype):
    base = {"a": torch.randn(9, 7, dtype=dtype), "b": torch.randn(5, 4, dtype=dtype).t()}
    now = deepcopy(base) | {"new": torch.randn(3, dtype=dtype)}
    now["a"][2, 3], now["a"][4, 4], now["b"][1, 1] = -0.0, float("nan"), 7
    diff = diff_state_dict(now, base)
    assert len(diff["a"][0]) == 2 and diff["new"][0] is None
    assert diff_state_dict({"a": now["a"] + 1}, base)["a"][0] is None  # smaller when stored whole
    tensors = {key: torch.zeros_like(t) for key, t in now.items()}
    apply_state_diff(diff, tensors, base)
    assert bits(tensors) == bits(now)


def test_delta_is_finite(path):
    weights = {"w": torch.ones(3)}
    with pytest.raises(ValueError, match="w is not finite"):
        save_delta(path, {"w": weights["w"] / 0}, weights, "")
    assert not path.exists()


@pytest.mark.parametrize("indices", [[1, 3, 48], [3, 3, 40], [-1, 3, 40], [1, 3]])
def test_delta_rejects_wrong_indices(indices, path):
    _, base = save_small(path)
    metadata, tensors = read_delta(path).metadata, safetensors.torch.load(path.read_bytes())
    tensors["0.weight.indices"] = torch.tensor(indices)
    path.write_bytes(safetensors.torch.save(tensors, metadata=metadata))
    assert_refused(path, base, "0.weight lacks floating-point values at")


def test_delta_rejects_damaged_files(path):
    _, base = save_small(path)
    data = path.read_bytes()
    pairs = (b'"version":"1"', b'"version":"2"'), (b"F32", b"I32"), (b"I32", b"F32")
    changed = [data.replace(*pair) for pair in pairs]
    for damaged in (b"", data[:8], data[:-1], safetensors.torch.save(base), *changed):
        path.write_bytes(damaged)
        assert_refused(path, base, "damaged, or not a sparse delta of version 1")
    for pair in ((b"0.weight", b"2.weight"), (b"[8, 6]", b"[6, 8]"), (b"[8, 6]", b"[9, 9]")):
        path.write_bytes(data.replace(*pair))
        assert_refused(path, base, "of shape .*, which these weights do not have")
    with pytest.raises(FileNotFoundError, match="no weights at .*: name a file that"):
        read_delta(path.parent)
