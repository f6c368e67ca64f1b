"""The command with which `scripts/delta.py apply` ends."""

import shlex

import delta
from commands import call, call_main

import clip
from optimizers.delta import save_delta, state_dict_sha256
from run_utils import get_arguments
from runs.output_dir import save_config


def test_apply_ends_with_the_command_that_measures_what_it_wrote(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _ = clip.load("ViT-Tiny/8", "cpu")
    base, digest = {k: v.clone() for k, v in model.state_dict().items()}, state_dict_sha256(model)
    name = "visual.transformer.resblocks.3.mlp.c_proj.weight"
    matrix = model.get_parameter(name)
    matrix.data[:64] += 0.05
    (tmp_path / "a run").mkdir()
    for folder in ("a run", "."):
        file = tmp_path / folder / "weights.safetensors"
        save_delta(file, {name: matrix}, base, digest, backbone="ViT-Tiny/8")
    flags = ["--num_workers", "0", "--threads", "1", "--save_path", str(tmp_path / "out")]
    save_config(tmp_path / "a run", get_arguments(flags))

    status, out, err = call(delta.main, "apply", "a run/weights.safetensors", "--out", "full.pt")
    assert status == 0, err
    command = shlex.split(out.splitlines()[-1].partition(": ")[2])
    assert command[:4] == ["python", "main.py", "--config", "a run/config.yaml"]
    status, out, err = call_main(*command[2:])
    assert status == 0 and "**** Zero-shot CLIP's test accuracy: " in out, err
    assert "accuracy: 67.04" not in out  # which is the base's

    _, out, _ = call(delta.main, "apply", "weights.safetensors", "--out", "full.pt")
    command = shlex.split(out.splitlines()[-1].partition(": ")[2])
    argv = [{"NAME": "dtd", "DATA": str(tmp_path)}.get(word, word) for word in command[2:]]
    config = get_arguments(argv)
    assert (config.dataset, config.backbone, config.n_iters) == ("dtd", "full.pt", 0)
