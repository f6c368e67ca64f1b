"""The digits study: what is forgotten of the glyphs, and the page that is made of its runs."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from digits import study
from digits.study import PAGE, StudyRun, glyph_test_set, read_study, write_page
from PIL import Image
from report_helpers import make_run, read_lines
from reporting.experiments import read_experiment

import main
from run_utils import get_arguments
from runs.output_dir import get_hparams
from runs.records import read_run


def test_glyph_test_set_is_fixed():
    images, labels = glyph_test_set()
    again, _ = glyph_test_set()
    assert images.shape == (1400, 3, 32, 32) and torch.equal(images, again)
    assert labels.bincount().tolist() == [20] * 70


def test_study_evaluates_saved_weights(tmp_path, monkeypatch):
    (tmp_path / "digits_compare.yaml").write_text(
        "report: comparison\nsave_path: runs\nout: docs\nruns: [{method: adam, lr: 1.0e-2}]\n"
        "common: {config: configs/digits.yaml, n_iters: 8, shots: 1, seed: 1, save_weights: true}\n"
    )
    for name, value in {
        "CONFIGS": tmp_path, "EXPERIMENTS": ["compare"], "SHOTS": (1,), "ALPHAS": [0.0, 0.5, 1.0],
    }.items():  # fmt: skip
        monkeypatch.setattr(study, name, value)
    (planned,) = read_experiment(tmp_path / "digits_compare.yaml", (), tmp_path).runs
    main.main(planned.arguments)
    (run,) = read_study(tmp_path)
    base, half, trained = run.interpolation.values()
    assert base == pytest.approx((67.037, 56.4), abs=0.05)
    assert trained == (pytest.approx(run.final_accuracy), run.pretraining_accuracy)
    assert trained[1] < half[1] < base[1] - 1  # at a learning rate that spoils what was learned


def make_study(root):
    """Return a made-up run for each cell of the page."""
    template = read_run(make_run(root, backbone="ViT-Tiny/8", dataset="digits", iterations=4))

    def make(experiment, accuracy, *arguments):
        config = get_arguments(["--config", "configs/digits.yaml", *arguments])
        keys = ("method", "shots", "seed")
        run = dataclasses.replace(
            template, **{key: getattr(config, key) for key in keys}, config=get_hparams(config),
            final_accuracy=accuracy + config.seed, wall_seconds=10.0,
        )  # fmt: skip
        alphas = {"compare": study.ALPHAS, "moments": [1.0]}.get(experiment, [])
        points = {a: (40 + a * (accuracy - 40), 56 - a * config.shots) for a in alphas}
        return StudyRun(**vars(run), experiment=experiment, interpolation=points)

    for seed in ("1", "2"):
        common = ["--seed", seed, "--shots", "4"]
        for method in ("so", "lora", "adam"):
            flags = ["--method", method, *common]
            yield make("lr", 60.0, *flags, "--lr", "0.1", "--eval_split", "val")
            yield make("compare", 70.0 + len(method), *flags)
            yield make("overfitting", 60.0, *flags)
        yield make("grid", 60.0, *common)
        yield make("moments", 71.0, *common, "--bias_correction", "entry")
        yield make("moments", 71.0, *common, "--moments", "none")
        for support in ("magnitude", "fixed"):
            yield make("ablation", 71.0, *common, "--moment_support", support)


def test_page_is_made_of_runs(tmp_path):
    out = tmp_path / "docs"
    write_page(list(make_study(tmp_path)), out)
    text, template = (path.read_text() for path in (out / "README.md", PAGE))
    prose = [
        re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", "", page, flags=re.S)
        for page in (text, template)
    ]
    assert prose[0] == prose[1] and "<!--" not in prose[0]
    sections = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- /\1 -->", text, flags=re.S))
    assert read_lines(sections["accuracy"])["LoRA"]["4 shots"] == "75.5 ± 6.4"
    assert read_lines(sections["forgetting"])["SO"]["4 shots"] == "52.0 ± 0.0"
    assert "Best: SO 0.1; LoRA 0.1; Adam 0.1." in sections["lr"]
    assert read_lines(sections["grid"])["T = 5"]["0.01"] == "61.5 ± 0.7"
    assert list(read_lines(sections["moments"])) == [
        "SO", "SO, bias_correction entry", "SO, moments none",
    ]  # fmt: skip
    assert read_lines(sections["interpolation"])["0.5"]["SO, 4 shots"] == "56.0 / 54.0"
    assert sections["time"] == (
        "lr 60, compare 60, overfitting 60, grid 20, moments 40, ablation 40"
    )
    for name in re.findall(r"\]\((\w+\.png)\)", text):
        assert np.asarray(Image.open(out / name)).std() > 10
    assert len(list(out.iterdir())) == 1 + text.count(".png)")
