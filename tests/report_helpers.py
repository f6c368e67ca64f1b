"""Made-up runs, and tables read back, for the tests of what reads results."""

import csv
import json
from pathlib import Path

from runs.records import CURVE_COLUMNS, PREDICTION_COLUMNS
from utils import to_csv


def make_run(
    root, method="so", dataset="dtd", shots=4, seed=1, accuracy=60.0, backbone="ViT-B/16",
    iterations=20, eval_every=0, zero_shot=44.0, settings=(), classes=4, **changes,
):  # fmt: skip
    """Write the files of a made-up run; `changes` replace entries of result.json."""
    config = {"lr": 2e-4, "seed": seed, **dict(settings)}
    tag = "-".join(f"{key}_{value}" for key, value in config.items()).replace("/", "-")
    folder = Path(root) / method / backbone.replace("/", "-") / dataset / f"{shots}shots" / tag
    folder.mkdir(parents=True)
    curve = []
    for i in range(1, iterations + 1):
        is_evaluated = i == iterations or (eval_every and i % eval_every == 0)
        test = zero_shot + (accuracy - zero_shot) * i / iterations
        curve.append((i, 2 / i, 2e-4, test if is_evaluated else ""))
    (folder / "curve.csv").write_text(to_csv(CURVE_COLUMNS, curve))
    pairs = [(i, i if j > i % 4 else (i + 1) % classes) for i in range(classes) for j in range(8)]
    write_predictions(folder, [(f"{n}.jpg", *pair, 0.9) for n, pair in enumerate(pairs)])
    result = {
        "method": method, "backbone": backbone, "dataset": dataset, "shots": shots, "seed": seed,
        "zero_shot_accuracy": zero_shot, "final_accuracy": accuracy, "iterations": iterations,
        "wall_seconds": 100.0, "peak_memory_mb": 2000.0, "device": "cpu",
        "versions": {"torch": "2.4"}, "git_commit": "abc", "config": config,
        "data": {"split": "published", "digest": dataset * 8},
        "classnames": [f"class {number}" for number in range(classes)],
        "template": ["a photo of a {}."], "ece": 5.0 + seed,
    }  # fmt: skip
    (folder / "config.yaml").write_text("lr: 0.0002\n")
    (folder / "result.json").write_text(json.dumps(result | changes))
    return folder


def write_predictions(folder, rows):
    """Write predictions.csv of path, label, predicted label and its probability."""
    (folder / "predictions.csv").write_text(to_csv(PREDICTION_COLUMNS[:4], rows))


def make_seeds(root, method, dataset, accuracies, **options):
    """Write such runs with seeds 1, 2, ..."""
    for seed, accuracy in enumerate(accuracies, start=1):
        make_run(root, method, dataset, seed=seed, accuracy=float(accuracy), **options)


def read_csv(folder, **wanted):
    """Return the lines of a report's tables.csv in which these fields have these values."""
    with open(folder / "report" / "tables.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if all(row[key] == str(wanted[key]) for key in wanted)]


def read_table(text, heading=""):
    """Return the rows of the first Markdown table below a heading, the header first."""
    if heading:
        text = text.split(f"### {heading}\n")[1].split("###")[0]
    text = f"\n{text}"
    table = text[text.index("\n|") :].replace("\\|", "!").strip().split("\n\n")[0]
    lines = table.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [rows[0], *rows[2:]]


def read_lines(text, heading=""):
    """Return the lines of such a table by first column, each a dict by header."""
    header, *rows = read_table(text, heading)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}
