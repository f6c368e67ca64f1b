"""The report's figures: what is drawn, that it is there, and that it is the same each time."""

import io
from itertools import product

import pytest
import report
from PIL import Image
from report_helpers import make_run
from reporting import figures
from reporting.aggregate import find_runs, group_by_backbone


@pytest.fixture
def plan(tmp_path):
    """Return a function that draws a figure of made-up results by name."""
    for method, settings in (("so", {}), ("lora", {}), ("so", {"moment_support": "random"})):
        for shots, seed in product((1, 4), (1, 2)):
            make_run(
                tmp_path, method, "dtd", shots, seed, 60.0 + seed, settings=settings,
                zero_shot=44.3, eval_every=5, iterations=300 * shots + 50 * seed,
            )  # fmt: skip
    (results,) = group_by_backbone(find_runs([tmp_path], pytest.fail))
    drawings = figures.plan_figures(results)
    return lambda name: drawings[f"ViT-B-16/{name}.png"]()


def legend(figure):
    return [text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()]


def test_report_draws_same_files_twice(tmp_path, capsys):
    for method, dataset in (("so", "dtd"), ("so", "eurosat"), ("lora", "dtd")):
        for seed in (1, 2):
            make_run(tmp_path / "r", method, dataset, 1, seed, 60.0 + seed, eval_every=5)
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        assert report.main([str(tmp_path / "r"), "--out", str(out)]) == 0
        assert capsys.readouterr().err == ""
    files = [{str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.*")} for out in outs]
    assert files[0] == files[1]
    cells = ["dtd-1shots-so", "dtd-1shots-lora", "eurosat-1shots-so"]
    names = [f"{kind}-{cell}" for kind in ("classes", "confusion") for cell in cells]
    names += ["accuracy-dtd", "accuracy-eurosat", "differences"]
    names += ["curves-dtd-1shots", "curves-eurosat-1shots"]
    names = {f"ViT-B-16/{name}.png" for name in names}
    assert set(files[0]) == names | {"report.html", "tables.csv", "tables.md"}
    for name in names:
        image = Image.open(io.BytesIO(files[0][name]))
        assert image.width > 800 and image.height > 250
        assert len(image.convert("RGB").getcolors(10**6)) > 50


def test_accuracy_has_spread_and_baseline(plan):
    figure = plan("accuracy-dtd")
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "4"]
    assert sorted(legend(figure)) == ["LoRA", "SO", "SO, moment_support random", "zero-shot (44.3)"]
    so = axes.containers[0]
    assert list(so.lines[0].get_ydata()) == [61.5, 61.5] and so.has_yerr


def test_curves_have_line_per_run(plan):
    figure = plan("curves-dtd-4shots")
    loss, accuracy = figure.axes
    assert loss.get_yscale() == "log" and "mean of 26 iterations" in loss.get_ylabel()
    assert legend(figure)[1] == "SO, moment_support random (2 seeds)"
    assert len(loss.lines) == len(accuracy.lines) == 6
    x, y = accuracy.lines[0].get_data()
    assert (x[0], y[0]) == (0, pytest.approx(44.3)) and x[-1] == 1250


def test_long_legend_stays_on_page(tmp_path):
    for number in range(14):
        settings = {"lr": number / 7, "batch_size": 33 + number, "moment_support": "random" * 9}
        make_run(tmp_path, settings=settings)
    make_run(tmp_path, settings={"classnames": r"$\x$.yaml"})
    (results,) = group_by_backbone(find_runs([tmp_path], pytest.fail))
    for draw in figures.plan_figures(results).values():
        png = Image.open(io.BytesIO(figures.render_png(draw))).convert("L")
        edge = [png.getpixel((x, y)) for x in range(png.width) for y in (0, png.height - 1)]
        assert min(edge) == 255  # nothing is cut
    assert png.height > 1500  # that of the curves, for a legend higher than its panels
