"""Base to new classes and other datasets in the report: numbers worked out by hand."""

import json

import pytest
import report
import reporting.report
from report_helpers import make_run, read_csv, read_lines, read_table

KINDS = "cross-dataset transfer", "domain generalization"


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(reporting.report, "render_png", lambda draw: b"")


def report_text(folder):
    """Report on a folder; return tables.md."""
    assert report.main([str(folder)]) == 0
    return (folder / "report/tables.md").read_text()


def make_transfer(root, seed, source, targets):
    """Write a run on ImageNet with these accuracies on other datasets; zero-shot is 40."""
    folder = make_run(root, dataset="imagenet", seed=seed, accuracy=source)
    data = {"split": "published", "digest": "d" * 8}
    content = {
        name: {"zero_shot_accuracy": 40.0, "final_accuracy": accuracy, "data": data}
        for name, accuracy in targets.items()
    }
    (folder / "transfer.json").write_text(json.dumps(content))


def test_base_to_new_has_own_table(tmp_path):
    accuracies = {("dtd", 1): (80.0, 60.0), ("dtd", 2): (84.0, 64.0)}
    accuracies |= {("eurosat", 1): (90.0, 40.0), ("eurosat", 2): (92.0, 69.0)}
    for (dataset, seed), (base, new) in accuracies.items():
        make_run(
            tmp_path, "so", dataset, seed=seed, accuracy=base, new_accuracy=new, zero_shot=70.0,
            zero_shot_new_accuracy=75.0, settings={"subsample": "base"},
        )  # fmt: skip
    make_run(tmp_path, "so", "dtd", accuracy=66.0)  # on all classes
    text = report_text(tmp_path)
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
    all_classes = read_lines(text, "4 shots")["DTD"]
    assert (all_classes["zero-shot"], all_classes["SO"]) == ("44.00", "66.00 (1)")
    base = {"backbone": "ViT-B/16, base classes", "method": "so"}
    assert read_csv(tmp_path, **base, dataset="dtd")[0]["new_accuracy"] == "62.0"


def test_transfer_has_table_by_targets(tmp_path):
    variants = {"imagenetv2": 60.0, "imagenet_r": 80.0}
    make_transfer(tmp_path, 1, 70.0, {"dtd": 44.0, **variants})
    make_transfer(tmp_path, 2, 72.0, {"imagenet_r": 78.0, "imagenetv2": 64.0})
    make_transfer(tmp_path, 3, 71.0, {"imagenetv2": 62.0})
    make_run(tmp_path, "lora", "imagenet")  # tested on nothing else
    text = report_text(tmp_path)
    headings = [f"## ViT-B/16, {kind} from ImageNet" for kind in KINDS]
    assert [line for line in text.splitlines() if "from ImageNet" in line] == headings
    transfer, generalization = (text.split(heading)[1] for heading in headings)
    assert read_table(transfer, "4 shots")[1:] == [["DTD", "40.00", "44.00 (1)"]]
    assert read_table(generalization, "4 shots") == [
        ["dataset", "zero-shot", "SO"],
        ["ImageNetV2", "40.00", "62.00 ± 2.00 (3)"],
        ["ImageNet-R", "40.00", "79.00 ± 1.41 (2)"],
        ["mean over 2 of 2", "40.00", "70.50 ± 0.71 (2)"],  # of 70 and 71, of seeds 1 and 2
    ]
    assert read_lines(text, "4 shots")["ImageNet"]["SO"] == "71.00 ± 1.00 (3)"
