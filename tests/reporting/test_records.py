"""A run's files: what is read of them, and what is refused."""

import pytest
from report_helpers import make_run

from runs.records import load_confusion_matrix, read_run

HEADER = "iteration,loss,lr,test_accuracy\n"
LABELS = "path,label,predicted,probability\n"


def test_read_run_returns_fields(tmp_path):
    folder = make_run(tmp_path, accuracy=70.0, iterations=4, eval_every=2, backbone="/m/RN50.pt")
    run = read_run(folder)
    assert (run.final_accuracy, run.zero_shot_accuracy, run.backbone) == (70.0, 44.0, "RN50")
    assert (run.git_commit, run.device, run.new_accuracy) == ("abc", "cpu", None)
    assert run.loss_curve.shape == (4,)
    assert run.eval_curve[:, 0].tolist() == [0, 2, 4]
    assert run.eval_curve[[0, -1], 1].tolist() == [44.0, 70.0]


@pytest.mark.parametrize("key, value", [
    ("device", None), ("shots", 4.0), ("zero_shot_accuracy", float("nan")),
    ("final_accuracy", "60"), ("data", []), ("template", "x"),
])  # fmt: skip
def test_read_run_refuses_values(tmp_path, key, value):
    folder = make_run(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=rf"result.json is malformed .no valid {key}.*--overwrite"):
        read_run(folder)


@pytest.mark.parametrize("name, text, reason", [
    ("result.json", "\x00\xff", "malformed"), ("result.json", "[" * 100_000, "malformed"),
    ("result.json", "[1]", "malformed"), ("transfer.json", "[1]", "transfer.json is malformed"),
    ("transfer.json", '{"own": {"final_accuracy": 1}}', "malformed .no valid data"),
    ("curve.csv", None, "curve.csv"), ("curve.csv", "", "0 of 2 iterations"),
    ("curve.csv", "a,b\n1,2\n", "malformed"), ("curve.csv", HEADER + "1,x,0.1,\n", "malformed"),
    ("curve.csv", HEADER + "1,2.0,0.1,\n", "1 of 2 iterations"),
    ("predictions.csv", "a,b\n", "no rows"), ("predictions.csv", LABELS + "a,0\n", "malformed"),
    ("predictions.csv", LABELS + "a,0,0,1\nb,4,0,1\n", "labels of other classes"),
])  # fmt: skip
def test_read_run_refuses_files(tmp_path, name, text, reason):
    folder = make_run(tmp_path, iterations=2)
    (folder / name).unlink(missing_ok=True)
    if text is not None:
        (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises((ValueError, OSError), match=reason):
        load_confusion_matrix(read_run(folder))
