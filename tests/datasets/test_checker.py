"""The checker, `python -m datasets`: what it prints, and how it ends."""

from dataclasses import replace

import pytest
from dataset_helpers import ELEVEN, LAYOUTS, VARIANTS, change_split, make_small_dataset

from datasets import DATASETS, digits
from datasets.__main__ import main


@pytest.fixture
def small(monkeypatch):
    """Make the published numbers those of small copies."""
    for name, info in DATASETS.items():
        counts = (24, None, 12) if name == "imagenet" else (12, 6, 6)
        counts = (0, 0, 12) if name in VARIANTS else counts
        monkeypatch.setitem(DATASETS, name, replace(info, num_classes=3, num_images=counts))


@pytest.fixture
def check(tmp_path, capsys):
    """Run the checker: its status and output. It writes nothing."""

    def run(*arguments):
        before = sorted(tmp_path.rglob("*"))
        status = main(["--root_path", str(tmp_path), *map(str, arguments)])
        assert sorted(tmp_path.rglob("*")) == before
        return status, capsys.readouterr().out

    return run


@pytest.mark.parametrize("convention", ["coop", "lora"])
def test_complete_datasets_are_ok(tmp_path, check, small, convention):
    for name in LAYOUTS:
        make_small_dataset(name, tmp_path, convention)
    status, out = check("--decode")
    assert status == 0 and "*" not in out
    rows = out.split("\n\n")[0].splitlines()[1:]
    assert [row.split()[0] for row in rows] == list(LAYOUTS)
    assert all(row.endswith("ok") and len(row) <= 100 for row in rows)


def test_table_compares_with_published_numbers(tmp_path, check):
    for name in ELEVEN:
        make_small_dataset(name, tmp_path, "lora", split=name != "dtd")
    status, out = check()
    table = out.split("\n\n")[0].splitlines()
    assert status == 1 and len(table) == 17 and max(map(len, table)) <= 120
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in table}
    numbers = "3 of 101 12 of 50500 6 of 20200 6 of 30300"
    assert rows["food101"] == f"Food101 published {numbers} incomplete"
    numbers = "3 of 1000 24 of 1281167 - 12 of 50000"
    assert rows["imagenet"] == f"imagenet published {numbers} incomplete"
    assert rows["dtd"].startswith("DTD made 3 of 47") and rows["digits"].endswith("on first use")
    assert all(rows[name] == "- - - - - - not found" for name in VARIANTS)
    assert "* food101: not the published numbers in" in out
    assert "imagenet_a:" not in out  # few people have it; whoever names it gets its problem
    assert check("--dataset", "imagenet_a")[0] == 1


def test_all_problems_are_listed(tmp_path, check, small):
    folder = make_small_dataset("eurosat", tmp_path)

    def spoil(split):
        split["train"][0] = ["../x.jpg", 1, "Forest"]
        split["train"][1] = ["Forest/x.jpg", 1, "Forest"]
        split["test"] = [entry for entry in split["test"] if entry[1] != 2]

    change_split(folder, spoil)
    status, out = check("--dataset", "eurosat")
    assert status == 1 and out.count("section EuroSAT") == 4
    for problem in ("../x.jpg, outside", "x.jpg: named in", "no test images", "not the published"):
        assert problem in out


def test_decode_names_corrupt_images(tmp_path, check, small):
    images = make_small_dataset("dtd", tmp_path, size=(64, 64)) / "images"
    content = (images / "meshed/meshed_0001.jpg").read_bytes()
    (images / "meshed/meshed_0001.jpg").write_bytes(content[: len(content) // 2])
    (images / "banded/banded_0002.jpg").write_bytes(b"")
    (images / "banded/banded_0004.jpg").unlink()
    assert "cannot be decoded" not in check("--dataset", "dtd")[1]
    status, out = check("--dataset", "dtd", "--decode")
    missing, corrupt = [line for line in out.splitlines() if line.startswith("* ")]
    assert status == 1 and "banded_0004.jpg: named in" in missing
    assert "meshed/meshed_0001" in corrupt and "banded/banded_0002" in corrupt


def test_digits_are_shown_once_made(tmp_path, check):
    assert check("--dataset", "digits")[0] == 0
    digits.build_digits(tmp_path / "digits")
    status, out = check("--dataset", "digits")
    assert status == 0
    assert out.splitlines()[1].split() == "digits digits published 10 898 359 540 ok".split()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataset", "dtdd", "--root_path", "."], "did you mean 'dtd'"),
        (["--dataset", "dtd"], "--root_path is missing, or not a folder"),
        (["--root_path", "/nowhere/at/all"], "--root_path is missing, or not a folder"),
    ],
)
def test_wrong_usage_ends_with_two(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err
