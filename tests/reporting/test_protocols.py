"""Base to new classes and other datasets in the report: numbers worked out by hand."""

import csv
import json

import pytest
import report
import reporting.report
from report_helpers import make_run
from reporting.protocols import harmonic


@pytest.fixture
def tables(monkeypatch, capsys):
    """Report on a folder; return tables.md and what was complained of."""
    monkeypatch.setattr(reporting.report, "can_draw", lambda: False)

    def run(folder):
        assert report.main([str(folder)]) == 0
        return (folder / "report/tables.md").read_text(), capsys.readouterr().err

    return run


def lines_of(text, heading):
    """The cells of a table's lines, the header first."""
    lines = text.split(f"### {heading}\n")[1].split("###")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return [rows[0], *rows[2:]]


def make_base(root, dataset, seed, base, new, method="so", **options):
    settings = {"subsample": "base"}
    zero = dict(zero_shot=70.0, zero_shot_new_accuracy=75.0)
    make_run(
        root, method, dataset, seed=seed, accuracy=base, new_accuracy=new, settings=settings,
        **zero, **options,
    )  # fmt: skip


def make_transfer(root, seed, source, targets, **options):
    """A run on ImageNet with these accuracies on others; zero-shot is 10 less."""
    folder = make_run(root, dataset="imagenet", seed=seed, accuracy=source, **options)
    content = {
        name: {
            "zero_shot_accuracy": 40.0, "final_accuracy": accuracy, "classes": 200, "images": 9,
            "data": {"split": "published", "digest": name * 8},
        }
        for name, accuracy in targets.items()
    }  # fmt: skip
    (folder / "transfer.json").write_text(json.dumps(content))
    return folder


def test_the_harmonic_mean_is_that_of_base_and_new_accuracy():
    assert harmonic(80, 60) == pytest.approx(68.5714, abs=1e-4)  # 2 * 80 * 60 / 140
    assert harmonic(0, 0) == 0


def test_base_new_and_harmonic_mean_stand_in_a_section_of_their_own(tmp_path, tables):
    make_base(tmp_path, "dtd", 1, 80.0, 60.0)
    make_base(tmp_path, "dtd", 2, 84.0, 64.0)
    make_base(tmp_path, "eurosat", 1, 90.0, 70.0)
    make_base(tmp_path, "eurosat", 2, 92.0, 69.0)
    make_base(tmp_path, "dtd", 1, 50.0, 50.0, method="lora")
    make_base(tmp_path, "dtd", 2, 60.0, 60.0, method="lora")
    make_run(tmp_path, "so", "dtd", accuracy=66.0)  # on all classes
    text, complaints = tables(tmp_path)
    assert "skipped" not in complaints and "zero-shot" not in complaints
    # DTD: 2 * 80 * 60 / 140 = 68.571 and 2 * 84 * 64 / 148 = 72.649, mean 70.610, deviation 2.883;
    # EuroSAT: 2 * 90 * 70 / 160 = 78.75 and 2 * 92 * 69 / 161 = 78.857. LoRA has DTD alone.
    assert lines_of(text, "From base to new classes, 4 shots") == [
        ["dataset", "method", "base", "new", "H"],
        ["EuroSAT", "zero-shot", "70.00", "75.00", "72.41"],
        ["EuroSAT", "SO", "91.00 ± 1.41 (2)", "69.50 ± 0.71 (2)", "78.80 ± 0.08 (2)"],
        ["DTD", "zero-shot", "70.00", "75.00", "72.41"],
        ["DTD", "SO", "82.00 ± 2.83 (2)", "62.00 ± 2.83 (2)", "70.61 ± 2.88 (2)"],
        ["DTD", "LoRA", *["55.00 ± 7.07 (2)"] * 3],
        ["mean over 1 of 2", "zero-shot", "70.00", "75.00", "72.41"],
        ["mean over 1 of 2", "SO", "82.00 ± 2.83 (2)", "62.00 ± 2.83 (2)", "70.61 ± 2.88 (2)"],
        ["mean over 1 of 2", "LoRA", *["55.00 ± 7.07 (2)"] * 3],
    ]
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## ViT-B/16", "## ViT-B/16, base classes"]
    assert lines_of(text, "4 shots")[1][:3] == ["DTD", "44.00", "44.27 (-0.27)"]  # all classes'
    with open(tmp_path / "report/base_to_new.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[3]["harmonic"]) == pytest.approx((4800 / 70 + 5376 / 74) / 2, rel=1e-12)


def test_the_mean_over_datasets_has_the_harmonic_mean_of_its_own_two(tmp_path, tables):
    make_base(tmp_path, "dtd", 1, 80.0, 60.0)
    make_base(tmp_path, "eurosat", 1, 90.0, 40.0)
    last = lines_of(tables(tmp_path)[0], "From base to new classes, 4 shots")[-1]
    assert last == ["mean over 2 of 2", "SO", "85.00 (1)", "50.00 (1)", "62.96 (1)"]


def test_targets_stand_beside_their_source_with_their_average(tmp_path, tables):
    variants = {"imagenetv2": 60.0, "imagenet_r": 80.0}
    make_transfer(tmp_path, 1, 70.0, {"dtd": 44.0, **variants})
    make_transfer(tmp_path, 2, 72.0, {"imagenet_r": 78.0, "imagenetv2": 64.0})
    make_transfer(tmp_path, 3, 71.0, {"imagenetv2": 62.0})
    make_run(tmp_path, "lora", "imagenet")  # tested on nothing else
    text, complaints = tables(tmp_path)
    assert "skipped" not in complaints and "zero-shot" not in complaints
    assert lines_of(text, "Domain generalisation from ImageNet") == [
        ["shots", "method", "ImageNet", "ImageNetV2", "ImageNet-R", "average"],
        ["-", "zero-shot", "44.00", "40.00", "40.00", "40.00"],
        ["4", "SO", "71.00 ± 1.00 (3)", "62.00 ± 2.00 (3)", "79.00 ± 1.41 (2)", "70.50 ± 0.71 (2)"],
    ]  # averages 70 and 71 of seeds 1 and 2
    assert lines_of(text, "Cross-dataset transfer from ImageNet") == [
        ["shots", "method", "ImageNet", "DTD", "average"],
        ["-", "zero-shot", "44.00", "40.00", "40.00"],
        ["4", "SO", "70.00 (1)", "44.00 (1)", "44.00 (1)"],
    ]
    with open(tmp_path / "report/transfer.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["target"] == "imagenet_r"]
    assert [(row["method"], row["mean"], row["seeds"]) for row in rows] == [
        ("zero_shot", "40.0", ""), ("so", "79.0", "2"),
    ]  # fmt: skip


def test_targets_with_other_images_are_never_averaged(tmp_path, tables):
    make_transfer(tmp_path, 1, 70.0, {"dtd": 40.0})
    folder = make_transfer(tmp_path, 2, 70.0, {"dtd": 50.0})
    other = (folder / "transfer.json").read_text().replace("dtd" * 8, "other" * 8)
    (folder / "transfer.json").write_text(other)
    header, _, so = lines_of(tables(tmp_path)[0], "Cross-dataset transfer from ImageNet")
    assert dict(zip(header, so, strict=False)) == {
        "shots": "4", "method": "SO", "ImageNet": "70.00 ± 0.00 (2)", "DTD, dtddtdd": "40.00 (1)",
        "DTD, otherot": "50.00 (1)",
    }  # fmt: skip


@pytest.mark.parametrize("content, complaint", [
    ("{", "transfer.json is not JSON"),
    ('{"dtd": 3}', "an object for each dataset"),
    ('{"dtd": {"zero_shot_accuracy": 101}}', "zero_shot_accuracy cannot be '101'"),
])  # fmt: skip
def test_a_run_with_a_broken_transfer_json_is_named_and_left_out(
    tmp_path, tables, content, complaint
):
    make_run(tmp_path, "so", "dtd", seed=1)
    folder = make_run(tmp_path, "so", "dtd", seed=2)
    (folder / "transfer.json").write_text(content)
    assert complaint in tables(tmp_path)[1]
