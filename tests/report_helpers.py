"""Made-up runs, and tables read back, for the tests of what reads results."""

import csv
import json
import math
import random
from pathlib import Path


def make_run(
    root, method="so", dataset="dtd", shots=4, seed=1, accuracy=60.0, backbone="ViT-B/16",
    iterations=20, eval_every=0, zero_shot=44.0, settings=(), classes=4, **changes,
):  # fmt: skip
    """Write the files of a made-up run; `changes` replace entries of result.json."""
    config = {"lr": 2e-4, "seed": seed, **dict(settings)}
    tag = "-".join(f"{key}_{value}" for key, value in config.items()).replace("/", "-")
    folder = Path(root) / method / backbone.replace("/", "-") / dataset / f"{shots}shots" / tag
    folder.mkdir(parents=True)
    draw = random.Random(f"{method} {dataset} {shots} {seed}")
    rows = []
    for i in range(1, iterations + 1):
        done = 1 - math.exp(-5 * i / iterations)
        test = zero_shot + (accuracy - zero_shot) * done + draw.gauss(0, 0.3)
        if i == iterations:
            test = accuracy
        elif not eval_every or i % eval_every:
            test = ""
        loss = (0.05 + 2 * (1 - done)) * draw.uniform(0.7, 1.3)
        rows.append((i, loss, 2e-4 * (1 - i / iterations), test))
    with open(folder / "curve.csv", "w", newline="") as file:
        csv.writer(file).writerows([("iteration", "loss", "lr", "test_accuracy"), *rows])
    pairs = [(i, i if j > i % 4 else (i + 1) % classes) for i in range(classes) for j in range(8)]
    with open(folder / "predictions.csv", "w", newline="") as file:
        rows = [(f"{n}.jpg", *pair, 0.9) for n, pair in enumerate(pairs)]
        csv.writer(file).writerows([("path", "label", "predicted", "probability"), *rows])
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
