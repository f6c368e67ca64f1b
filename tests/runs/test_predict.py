"""scripts/predict.py: a run's answers for single images, and what it refuses."""

import csv
import io
import json
import shutil

import predict
import pytest
from commands import call, run, run_folder

from datasets import build_dataset


@pytest.fixture(scope="module")
def adapted(data, tmp_path_factory):
    """The folder of a run with weights, whose path has a blank."""
    out = tmp_path_factory.mktemp("out of it")
    run(
        "--root_path", data, "--dataset", "eurosat", "--backbone", data / "tiny vit.pt",
        "--n_iters", 2, "--s", 0.9, "--lr", 1e-2, "--save_path", out, "--filename", "mine",
        "--logit_scale", 20,
    )  # fmt: skip
    return run_folder(out)


def told(*argv):
    status, out, err = call(predict.main, *argv)
    assert status == 0, err
    return out


def complaint(*argv, out=""):
    status, told, err = call(predict.main, *argv)
    (line,) = [line for line in err.splitlines() if not line.startswith("note:")]
    assert status == 2 and line.startswith("predict.py: error: ") and told == out, (told, err)
    return line


def test_predictions_are_the_runs_own(adapted, data):
    test = build_dataset("eurosat", data, 1).test
    out = told(adapted, *(item.impath for item in test), "--top", 1, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    kept = list(csv.DictReader((adapted / "predictions.csv").read_text().splitlines()))
    names = json.loads((adapted / "result.json").read_text())["classnames"]
    assert len(rows) == len(kept) == len(test)
    for row, own, item in zip(rows, kept, test, strict=True):
        assert row["path"] == item.impath and item.impath.endswith("2750/" + own["path"])
        assert row["class"] == names[int(own["predicted"])] and int(own["label"]) == item.label
        assert float(row["probability"]) == pytest.approx(float(own["probability"]), abs=1e-6)


def test_a_folder_is_searched_and_the_likeliest_classes_come_first(adapted, data, tmp_path):
    (image,) = list((data / "eurosat/2750").rglob("*.jpg"))[:1]
    for place in ("b/ä b.JPG", "a.jpg", ".hidden/c.jpg", "notes.txt"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        shutil.copy(image, tmp_path / place)
    (tmp_path / "b/loop").symlink_to(tmp_path)
    lines = [line.split("  ") for line in told(adapted, tmp_path).splitlines()]
    paths = [str(tmp_path / "a.jpg")] * 3 + [str(tmp_path / "b/ä b.JPG")] * 3
    assert [path for path, _, _ in lines] == paths
    shares = [float(share) for _, _, share in lines[:3]]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=2e-4)
    assert {name for _, name, _ in lines[:3]} == {name for _, name, _ in lines[3:]}
    assert len(told(adapted, tmp_path, "--top", 2).splitlines()) == 4


def test_what_is_not_an_image_is_named_and_the_others_classified(adapted, data, tmp_path):
    (image,) = list((data / "eurosat/2750").rglob("*.jpg"))[:1]
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    out = told(adapted, image)
    argv = adapted, tmp_path / "text.png", image
    assert "text.png cannot be read" in complaint(*argv, out=out)
    assert "gone.png is missing" in complaint(adapted, image, tmp_path / "gone.png", out=out)
    assert f"no image in {tmp_path / 'empty'}" in complaint(adapted, tmp_path / "empty")


def test_a_folder_without_result_or_weights_is_refused_with_the_remedy(adapted, tmp_path):
    assert "no result.json" in complaint(tmp_path, "x.png")
    bare = tmp_path / "bare"
    shutil.copytree(adapted, bare)
    (bare / "mine.safetensors").unlink()
    line = complaint(bare, "x.png")
    assert "no weights" in line and "--save_weights" in line and "--save_path" in line
    result = json.loads((bare / "result.json").read_text())
    for key in ("classnames", "template", "per_class", "ece"):
        del result[key]
    (bare / "result.json").write_text(json.dumps(result))
    assert "earlier version" in complaint(bare, "x.png")
    (bare / "result.json").write_text("{")
    assert "not JSON" in complaint(bare, "x.png")
