"""The digits study: its second task, its two files of runs, and the page that is made of them."""

import io
import re

import numpy as np
import pytest
from digits import collect, greek, study
from PIL import Image
from reporting.experiments import read_experiment
from reporting.figures import render_png

import main

PAGE = study.PAGE


def test_greek_letters_are_fixed(tmp_path, monkeypatch):
    monkeypatch.setattr(greek, "PER_CLASS", 3)
    contents = []
    for name in "ab":
        greek.write_greek(tmp_path / name)
        paths = sorted((tmp_path / name).glob("*/*.png"))
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1] and len(set(contents[0])) == len(paths) == 3 * 24
    images = np.stack([Image.open(path) for path in paths])
    assert images.shape[1:] == (32, 32, 3) and images.std(axis=(1, 2, 3)).min() > 5  # all drawn


def test_collected_runs_read_back(tmp_path, monkeypatch):
    (tmp_path / "digits_compare.yaml").write_text(
        "report: comparison\nsave_path: runs\nout: docs\nruns: [{method: adam, lr: 1.0e-2}]\n"
        "common: {config: configs/digits.yaml, n_iters: 8, shots: 1, seed: 1, save_weights: true,\n"
        "         eval_every: 4}\n"
    )
    for name, value in {
        "CONFIGS": tmp_path, "EXPERIMENTS": ["compare"], "SHOTS": (1,), "ALPHAS": (0.0, 0.5, 1.0),
    }.items():  # fmt: skip
        monkeypatch.setattr(collect, name, value)
    (planned,) = read_experiment(tmp_path / "digits_compare.yaml", (), tmp_path).runs
    main.main(planned.arguments)
    collect.collect(tmp_path, tmp_path / "out")
    (run,) = study.read_runs(tmp_path / "out")
    base, half, trained = run.interpolation.values()
    assert base == pytest.approx((67.037, 56.4), abs=0.05)
    assert trained == (run.final_accuracy, run.glyphs_accuracy)
    assert trained[1] < half[1] < base[1] - 1  # at a learning rate that spoils what was learned
    assert run.config["lr"] == 1e-2 and len(run.per_class.split()) == 10
    assert len(run.loss_curve) == 8 and run.eval_curve[:, 0].tolist() == [0, 4, 8]


def test_page_follows_from_runs():
    text = PAGE.read_text(encoding="utf-8")
    assert study.fill_page(text, study.read_runs(PAGE.parent)) == text


def test_figures_follow_from_runs():
    runs = study.read_runs(PAGE.parent)
    linked = re.findall(r"\]\((\w+)\.png\)", PAGE.read_text(encoding="utf-8"))
    assert set(study.FIGURES) == set(linked) == {path.stem for path in PAGE.parent.glob("*.png")}
    for experiment, draw in study.FIGURES.values():
        drawn = render_png(lambda: draw(study.runs_of(runs, experiment)))  # noqa: B023
        assert np.asarray(Image.open(io.BytesIO(drawn))).std() > 10
