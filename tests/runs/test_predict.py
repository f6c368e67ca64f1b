"""scripts/predict.py: probabilities for single images, and errors."""

import csv
import io
import json
import shutil
from functools import partial

import predict
import pytest
from commands import call, error_of, output_of

from datasets import build_dataset


@pytest.fixture(scope="module")
def image(data):
    return next((data / "eurosat/2750").rglob("*.jpg"))


printed, error = (partial(f, predict.main) for f in (output_of, error_of))


def test_predict_matches_the_run(vit_run, data):
    test = build_dataset("eurosat", data, 1).test
    out = printed(vit_run, *(item.impath for item in test), "--top", 1, "--csv")
    saved = csv.DictReader((vit_run / "predictions.csv").read_text().splitlines())
    rows = csv.DictReader(io.StringIO(out))
    for row, expected, item in zip(rows, saved, test, strict=True):
        assert row["path"] == item.impath and item.impath.endswith("2750/" + expected["path"])
        assert row["class"] == expected["predicted_classname"]
        assert float(row["probability"]) == pytest.approx(float(expected["probability"]), abs=1e-6)


def test_predict_searches_folders(vit_run, image, tmp_path):
    for name in ("b/ä b.JPG", "a.jpg", ".hidden/c.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(image, tmp_path / name)
    (tmp_path / "b/loop").symlink_to(tmp_path)
    lines = [line.split("  ") for line in printed(vit_run, tmp_path).splitlines()]
    assert [path for path, *_ in lines] == 3 * [f"{tmp_path}/a.jpg"] + 3 * [f"{tmp_path}/b/ä b.JPG"]
    probabilities = [float(probability) for _, _, probability in lines[:3]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=2e-4)
    assert len(printed(vit_run, tmp_path, "--top", 2).splitlines()) == 4


def test_trained_images_are_noted(vit_run, data, image, tmp_path):
    few = json.loads((vit_run / "fewshot.json").read_text())["train"]
    shutil.copy(image, tmp_path / "new.jpg")
    trained = data / "eurosat/2750" / few[0][0]
    status, _, err = call(predict.main, vit_run, trained, tmp_path / "new.jpg")
    assert status == 0 and f"note: the run was trained on {trained}\n" in err


def test_backbone_may_have_moved(vit_run, data, image, tmp_path):
    expected, run = printed(vit_run, image), tmp_path / "results/run"
    shutil.copytree(vit_run, run)
    (run / "fewshot.json").unlink()  # is not needed
    result = (run / "result.json").read_text().replace(str(data / "tiny vit.pt"), "/gone/moved.pt")
    (run / "result.json").write_text(result)
    assert "moved.pt" in error(run, image)
    shutil.copy(data / "tiny vit.pt", tmp_path / "moved.pt")
    assert printed(run, image) == expected
    (tmp_path / "moved.pt").rename(tmp_path / "other.pt")
    assert printed(run, image, "--backbone", tmp_path / "other.pt") == expected


def test_predict_names_what_it_skips(vit_run, image, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    status, out, err = call(predict.main, vit_run, tmp_path / "text.png", image)
    assert status == 2 and "text.png cannot be read" in err and out == printed(vit_run, image)
    assert "gone.png: not found" in error(vit_run, image, tmp_path / "gone.png")
    assert f"no image in {tmp_path / 'empty'}" in error(vit_run, tmp_path / "empty")
    assert "has no result.json: name the folder" in error(tmp_path, "x.png")
