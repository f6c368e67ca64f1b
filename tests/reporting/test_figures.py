"""The report's figures: what is drawn, that it is there, and that it is the same each time."""

import pytest
import report
from PIL import Image
from report_helpers import make_run
from reporting import figures
from reporting.aggregate import find_runs, group_by_backbone


def make_results(root, datasets=("dtd", "eurosat"), shots=(1, 2, 4, 8, 16)):
    """Write results of three methods; some cells are missing."""
    behind = {"so": 0, "lora": 2.5, "adam": 4, "so random": 1.5}
    for dataset in datasets:
        for n in shots:
            for method, loss in behind.items():
                settings = {"moment_support": "random"} if method == "so random" else {}
                if settings and (dataset, n) != ("dtd", 4):
                    continue
                if (dataset, n, method) == ("eurosat", 8, "adam"):
                    continue
                for seed in (1, 2, 3):
                    make_run(
                        root, method.split()[0], dataset, n, seed, 60.0 + n - loss + seed,
                        settings=settings, zero_shot=44.3, eval_every=50 if n < 16 else 0,
                        iterations=300 * n + 50 * seed,
                    )  # fmt: skip


@pytest.fixture
def drawn(tmp_path):
    """Return matplotlib's figures of made-up results, by name."""

    def draw(*names, **results):
        make_results(tmp_path, **results)
        (backbone,) = group_by_backbone(find_runs([tmp_path], pytest.fail))
        plan = figures.plan_figures(backbone)
        return [plan[f"ViT-B-16/{name}.png"]() for name in names]

    return draw


def legend(figure):
    return [text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()]


def test_report_draws_same_files_twice(tmp_path, capsys):
    for dataset in ("dtd", "eurosat"):
        for method in ("so", "lora"):
            for seed in (1, 2):
                make_run(
                    tmp_path / "r", method, dataset, 1, seed, 60.0 + seed, eval_every=5,
                    iterations=18 + 2 * seed,
                )  # fmt: skip
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        assert report.main([str(tmp_path / "r"), "--out", str(out)]) == 0
        assert capsys.readouterr().err == ""
    files = [{str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.*")} for out in outs]
    assert files[0] == files[1]
    cells = [f"{data}-1shots-{method}" for data in ("dtd", "eurosat") for method in ("lora", "so")]
    names = [f"{kind}-{cell}" for kind in ("classes", "confusion") for cell in cells]
    names += [f"accuracy-{name}" for name in ("dtd", "eurosat", "mean")]
    names += ["cost", "differences", "curves-dtd-1shots", "curves-eurosat-1shots"]
    names = {f"ViT-B-16/{name}.png" for name in names}
    assert set(files[0]) == names | {"classes.csv", "tables.csv", "tables.md"}
    text = (outs[0] / "tables.md").read_text()
    for name in names:
        assert f"({name})" in text
        image = Image.open(outs[0] / name)
        assert image.width >= 900 and image.height > 250
        assert len(image.convert("RGB").getcolors(10**6)) > 50


def test_accuracy_has_published_points(drawn):
    (figure,) = drawn("accuracy-dtd", datasets=["dtd"], shots=(1, 4))
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "4", "8", "16"]
    assert axes.get_ylabel() == "test accuracy (%)" and "shots" in axes.get_xlabel()
    assert sorted(legend(figure)) == [
        "Adam", "LoRA", "LoRA, published (CLIP-LoRA)", "LoRA, published (SO's table)", "SO",
        "SO, moment_support random", "SO, published (SO's paper)", "zero-shot (44.3)",
    ]  # fmt: skip
    lines = {line.get_label(): line for line in axes.lines}
    theirs = lines["LoRA, published (CLIP-LoRA)"]
    assert list(theirs.get_xdata()) == [1, 4, 16]
    assert list(theirs.get_ydata()) == [54.3, 63.8, 72.0]
    so = axes.containers[0]
    assert len(so.lines[0].get_ydata()) == 2 and so.has_yerr


def test_mean_is_over_always_complete_datasets(drawn):
    (cost,) = drawn("cost", shots=(4, 8))  # Adam lacks eurosat at 8 shots: there is no mean of two
    assert legend(cost) == ["SO", "LoRA", "Adam"]
    assert [axes.get_ylabel() for axes in cost.axes] == ["peak memory (MB)", "time (s)"]


def test_curves_have_loss_and_accuracy(drawn):
    four, sixteen = drawn(
        "curves-dtd-4shots", "curves-dtd-16shots", datasets=["dtd"], shots=(4, 16)
    )
    loss, accuracy = four.axes
    assert loss.get_yscale() == "log" and "mean of 27 iterations" in loss.get_ylabel()
    assert accuracy.get_ylabel() == "test accuracy (%)"
    assert accuracy.lines[0].get_xdata()[0] == 0
    assert accuracy.lines[0].get_ydata()[0] == pytest.approx(44.3)
    assert legend(four)[1] == "SO, moment_support random (3 seeds)"
    assert len(sixteen.axes) == 1  # measured only at the end


def test_short_run_is_continued(tmp_path):
    for seed, n in ((1, 4), (2, 10)):
        make_run(tmp_path, seed=seed, iterations=n)
    runs = find_runs([tmp_path], pytest.fail)
    x, (short, long) = figures.average_losses(runs, width=4)
    assert list(x) == [2.5, 6.5, 9.5]
    assert list(short) == pytest.approx([runs[0].loss_curve.mean()] * 3)
    assert list(long) == pytest.approx([runs[1].loss_curve[i : i + 4].mean() for i in (0, 4, 8)])
