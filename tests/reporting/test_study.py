"""The digits study: what is forgotten of the glyphs, and the page that is made of its runs."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from digits import study
from digits.study import PAGE, StudyRun, WeightsEvaluator, glyph_test_set, write_page
from PIL import Image
from report_helpers import make_run, read_lines

import main
from run_utils import get_arguments
from runs.output_dir import get_hparams
from runs.records import read_run

SMALL = ["--n_iters", "8", "--shots", "1", "--seed", "1", "--num_workers", "0"]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A short run of Adam at a rate that spoils what was learned before."""
    folder = tmp_path_factory.mktemp("study")
    arguments = ["--method", "adam", "--lr", "1e-2", "--config", "configs/digits.yaml"]
    main.main([*SMALL, *arguments, "--save_path", str(folder)])
    (result,) = folder.rglob("result.json")
    return read_run(result.parent)


def test_glyph_test_set_is_known():
    images, labels = glyph_test_set()
    again, _ = glyph_test_set()
    assert images.shape == (1400, 3, 32, 32) and torch.equal(images, again)
    assert labels.bincount().tolist() == [20] * 70
    assert WeightsEvaluator().base is not None


def test_interpolation_joins_base_and_trained(adapted):
    evaluate = WeightsEvaluator()
    weights = adapted.folder / "weights.safetensors"
    base, half, trained = (evaluate(weights, alpha) for alpha in (0.0, 0.5, 1.0))
    assert base == pytest.approx((67.037, 56.4), abs=0.05)
    assert trained[0] == pytest.approx(adapted.final_accuracy)
    assert trained[1] < half[1] < base[1] - 1


def make_study(root):
    """Return a made-up run for each cell of the page."""
    template = read_run(make_run(root, backbone="ViT-Tiny/8", dataset="digits", iterations=4))

    def make(experiment, accuracy, *flags):
        config = get_arguments(["--config", "configs/digits.yaml", *flags])
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
            own = ["--method", method, *common]
            yield make("lr", 60.0, *own, "--lr", "0.1", "--eval_split", "val")
            yield make("compare", 70.0 + len(method), *own)
            yield make("overfitting", 60.0, *own)
        yield make("grid", 60.0, *common)
        for moments in ("none", "per_entry"):
            yield make("moments", 71.0, *common, "--moments", moments)
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
    assert prose[0] == prose[1]
    sections = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- /\1 -->", text, flags=re.S))
    assert read_lines(sections["accuracy"])["LoRA"]["4 shots"] == "75.5 ± 6.4"
    assert read_lines(sections["forgetting"])["SO"]["4 shots"] == "52.0 ± 0.0"
    assert "Best: SO 0.1; LoRA 0.1; Adam 0.1." in sections["lr"]
    assert read_lines(sections["grid"])["T = 5"]["0.01"] == "61.5 ± 0.7"
    assert list(read_lines(sections["moments"])) == [
        "SO", "SO, moments none", "SO, moments per_entry",
    ]  # fmt: skip
    assert read_lines(sections["interpolation"])["0.5"]["SO, 4 shots"] == "56.0 / 54.0"
    assert sections["time"] == (
        "lr 60, compare 60, overfitting 60, grid 20, moments 40, ablation 40"
    )
    for name in re.findall(r"\]\((\w+\.png)\)", text):
        assert np.asarray(Image.open(out / name)).std() > 10
    assert len(list(out.iterdir())) == 1 + text.count(".png)")


def test_page_has_every_place():
    names = re.findall(r"<!-- (\w+) -->", PAGE.read_text())
    assert len(names) == len(set(names)) == 11
