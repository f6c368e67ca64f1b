"""The five commands of docs/custom_datasets.md, run as they are, on ViT-Tiny/8."""

import csv
import re
import shlex
from pathlib import Path

import predict
import report
from commands import call, call_main
from dataset_helpers import write_image

import datasets.__main__ as checker

PAGE = (Path(__file__).parents[2] / "docs/custom_datasets.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^ +```bash\n +(.*)\n +```$", PAGE, re.MULTILINE)
CLASSES = ["Great Tit", "Zaunkönig", "no. 3", "a_b", "f (old)", "Œuvre d'art", "100 %", "x & y"]
SUFFIXES = ["png", "PNG", "Jpg", "JPEG", "webp", "WebP"]
PROGRAMS = {
    "python main.py": call_main,
    "python -m datasets": lambda *argv: call(checker.main, *argv),
    "python scripts/report.py": lambda *argv: call(report.main, *argv),
    "python scripts/predict.py": lambda *argv: call(predict.main, *argv),
}


def test_own_images_page_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for label, name in enumerate(CLASSES):
        for i in range(8 + label):
            write_image(Path("photos", name, f"IMG {i}.{SUFFIXES[i % len(SUFFIXES)]}"), label, i)
    count, outputs = len(list(Path("photos").glob("*/*"))), []
    assert len(COMMANDS) == 5 == PAGE.count("```bash")
    for line in COMMANDS:
        line = line.replace("ViT-B/16", "ViT-Tiny/8").replace("ViT-B-16", "ViT-Tiny-8")
        program = next(name for name in PROGRAMS if line.startswith(f"{name} "))
        status, out, err = PROGRAMS[program](*shlex.split(line.removeprefix(program)))
        assert status == 0, (line, out, err)
        outputs.append(out)

    checked, zero_shot, trained, reported, predicted = outputs
    assert re.search(rf"photos .* {len(CLASSES)} .* ok", checked)
    assert zero_shot.count("****") == 2 and "Final test accuracy" in trained
    assert "tables and" in reported
    lines = [line.split("  ") for line in predicted.splitlines()]
    assert len(lines) == count and all(len(line) == 3 for line in lines)
    assert {name for _, name, _ in lines} <= set(CLASSES)

    run = Path("results/so/ViT-Tiny-8/photos/4shots/seed3-n_iters_50")
    with open(run / "predictions.csv", encoding="utf-8") as file:
        assert all(Path("photos", row["path"]).is_file() for row in csv.DictReader(file))
    figures = {path.name for path in Path("results/report").rglob("*.png")}
    assert {"confusion-photos-4shots-so.png", "classes-photos-4shots-so.png"} <= figures
