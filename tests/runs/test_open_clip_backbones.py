"""Runs on CLIPs that open_clip's modules run: from zero-shot to prediction."""

import signal

import predict
import pytest
from commands import call, call_main, outcome, refused, run, run_folder
from open_clip_folders import write_folder

from runs.signals import Preempted, SignalHandler

pytest.importorskip("open_clip")


@pytest.mark.parametrize("kind", ["siglip", "bert"])
def test_open_clip_backbone_runs(kind, data, tmp_path, monkeypatch):
    write_folder(kind, tmp_path / kind)
    flags = [
        "--root_path", data, "--dataset", "eurosat", "--backbone", tmp_path / kind, "--shots", 2,
        "--n_iters", 3, "--s", 0.99, "--lr", 1e-2, "--num_workers", 0, "--logit_scale", 20,
    ]  # fmt: skip
    whole, broken = ([*flags, "--save_path", tmp_path / name] for name in ("whole", "broken"))
    out = run(*whole)
    assert " of query, key and value, " in out and "matrices stay dense (used by torch's own" in out

    calls = iter(range(100))

    def stop_after_three(self):
        if next(calls) == 3:
            raise Preempted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(SignalHandler, "raise_if_pending", stop_after_three)
        assert call_main(*broken)[0] == 143
    assert "Resuming from iteration " in run(*broken, "--resume")
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")

    (final,) = [line.split()[-2] for line in out.splitlines() if "Final test accuracy" in line]
    assert f"**** Test accuracy: {final} ****" in run(*whole, "--eval_only")
    status, lines, err = call(predict.main, run_folder(tmp_path / "whole"), data, "--csv")
    assert status == 0 and lines.count("\n") > 1, err
    assert "--method lora needs the attention" in refused(*whole, "--method", "lora")
