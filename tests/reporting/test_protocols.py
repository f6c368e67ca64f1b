"""Base to new classes and other datasets in the report: numbers worked out by hand."""

import csv
import json

import pytest
import report
import reporting.report
from report_helpers import make_run, read_lines, read_table
from reporting.protocols import harmonic_mean


@pytest.fixture
def report_text(monkeypatch, capsys, tmp_path):
    """Report on tmp_path; return tables.md."""
    monkeypatch.setattr(reporting.report, "render_png", lambda draw: b"")

    def run():
        assert report.main([str(tmp_path)]) == 0
        assert capsys.readouterr().err == ""
        return (tmp_path / "report/tables.md").read_text()

    return run


def csv_rows(folder):
    with open(folder / "report/protocols.csv", newline="") as file:
        return list(csv.DictReader(file))


def make_base(root, dataset, seed, base, new):
    make_run(
        root, "so", dataset, seed=seed, accuracy=base, new_accuracy=new, zero_shot=70.0,
        zero_shot_new_accuracy=75.0, settings={"subsample": "base"},
    )  # fmt: skip


def make_transfer(root, seed, source, targets):
    """Write a run on ImageNet with these accuracies on other datasets; zero-shot is 40."""
    folder = make_run(root, dataset="imagenet", seed=seed, accuracy=source)
    content = {
        name: {
            "zero_shot_accuracy": 40.0, "final_accuracy": accuracy, "classes": 200, "images": 9,
            "data": {"split": "published", "digest": name * 8},
        }
        for name, accuracy in targets.items()
    }  # fmt: skip
    (folder / "transfer.json").write_text(json.dumps(content))
    return folder


def test_harmonic_mean():
    assert harmonic_mean(80, 60) == pytest.approx(68.5714, abs=1e-4)  # 2 * 80 * 60 / 140
    assert harmonic_mean(0, 0) == 0


def test_base_to_new_has_own_table(tmp_path, report_text):
    make_base(tmp_path, "dtd", 1, 80.0, 60.0)
    make_base(tmp_path, "dtd", 2, 84.0, 64.0)
    make_base(tmp_path, "eurosat", 1, 90.0, 40.0)
    make_base(tmp_path, "eurosat", 2, 92.0, 69.0)
    make_run(tmp_path, "so", "dtd", accuracy=66.0)  # on all classes
    text = report_text()
    # DTD: 2 * 80 * 60 / 140 = 68.571 and 2 * 84 * 64 / 148 = 72.649, mean 70.610, deviation 2.883;
    # means over datasets: H of 85 and 50 is 62.963, of 88 and 66.5 is 75.754.
    zero_shot = ["4", "zero-shot", "70.00", "75.00", "72.41"]
    assert read_table(text, "From base to new classes") == [
        ["dataset", "shots", "method", "base", "new", "H"],
        ["EuroSAT", *zero_shot],
        ["EuroSAT", "4", "SO", "91.00 ± 1.41 (2)", "54.50 ± 20.51 (2)", "67.12 ± 16.60 (2)"],
        ["DTD", *zero_shot],
        ["DTD", "4", "SO", "82.00 ± 2.83 (2)", "62.00 ± 2.83 (2)", "70.61 ± 2.88 (2)"],
        ["mean over 2 of 2", *zero_shot],
        ["mean over 2 of 2", "4", "SO", "86.50 ± 2.12 (2)", "58.25 ± 11.67 (2)",
         "69.36 ± 9.04 (2)"],
    ]  # fmt: skip
    # 2 * 84.1 * 74.8 / 158.9 and 2 * 85.32 * 70.63 / 155.95
    assert "CLIP-LoRA 84.10, 74.80, 79.18 (CLIP-SVD's README)" in text
    assert "CLIP-LoRA 85.32, 70.63, 77.28 (2SFS's paper)" in text
    headings = [line for line in text.splitlines() if line.startswith("## ViT")]
    assert headings == ["## ViT-B/16", "## ViT-B/16, base classes"]
    all_classes = read_lines(text, "4 shots")["DTD"]
    assert (all_classes["zero-shot"], all_classes["SO"]) == ("44.00", "66.00 (1)")
    harmonic = csv_rows(tmp_path)[11]
    assert (harmonic["dataset"], harmonic["method"], harmonic["tested_on"]) == ("dtd", "so", "H")
    assert float(harmonic["mean"]) == pytest.approx((4800 / 70 + 5376 / 74) / 2, rel=1e-12)


def test_transfer_has_average_of_targets(tmp_path, report_text):
    variants = {"imagenetv2": 60.0, "imagenet_r": 80.0}
    make_transfer(tmp_path, 1, 70.0, {"dtd": 44.0, **variants})
    make_transfer(tmp_path, 2, 72.0, {"imagenet_r": 78.0, "imagenetv2": 64.0})
    make_transfer(tmp_path, 3, 71.0, {"imagenetv2": 62.0})
    make_run(tmp_path, "lora", "imagenet")  # tested on nothing else
    text = report_text()
    assert read_table(text, "Domain generalization from ImageNet") == [
        ["dataset", "shots", "method", "ImageNet", "ImageNetV2", "ImageNet-R", "average"],
        ["ImageNet", "-", "zero-shot", "44.00", "40.00", "40.00", "40.00"],
        ["ImageNet", "4", "SO", "71.00 ± 1.00 (3)", "62.00 ± 2.00 (3)", "79.00 ± 1.41 (2)",
         "70.50 ± 0.71 (2)"],
    ]  # fmt: skip
    # The averages are 70 and 71, of seeds 1 and 2.
    assert read_table(text, "Cross-dataset transfer from ImageNet") == [
        ["dataset", "shots", "method", "ImageNet", "DTD", "average"],
        ["ImageNet", "-", "zero-shot", "44.00", "40.00", "40.00"],
        ["ImageNet", "4", "SO", "70.00 (1)", "44.00 (1)", "44.00 (1)"],
    ]
    rows = [row for row in csv_rows(tmp_path) if row["tested_on"] == "imagenet_r"]
    assert [(row["method"], row["mean"], row["seeds"]) for row in rows] == [
        ("zero_shot", "40.0", ""), ("so", "79.0", "2"),
    ]  # fmt: skip
