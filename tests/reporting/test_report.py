"""The report: numbers checked by hand, and bad input named and left out."""

import csv

import pytest
import report
import reporting.report
from report_helpers import make_run, make_seeds, read_lines
from reporting.aggregate import PUBLISHED, Variant, find_runs, group_by_backbone, paired_test

from datasets import DATASETS

ELEVEN = PUBLISHED["datasets"]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(reporting.report, "render_png", lambda draw: b"")


@pytest.fixture
def run(capsys):
    """Run the command; return its status, standard output and standard error."""

    def command(*args):
        status = report.main([str(arg) for arg in args])
        return status, *capsys.readouterr()

    return command


@pytest.fixture
def lines(run, tmp_path):
    """Report on tmp_path; return the lines of a table of tables.md."""

    def table(heading="4 shots"):
        if not (tmp_path / "report").exists():
            assert run(tmp_path)[0] == 0
        return read_lines((tmp_path / "report" / "tables.md").read_text(), heading)

    return table


def csv_rows(folder, **wanted):
    """Return the lines of tables.csv in which these fields have these values."""
    with open(folder / "report" / "tables.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if all(row[key] == str(wanted[key]) for key in wanted)]


def load_results(folder):
    (results,) = group_by_backbone(find_runs([folder], pytest.fail))
    return results


# Numbers


def test_values_are_rounded_when_printed(lines, tmp_path):
    make_seeds(tmp_path, "so", "digits", (60, 62, 67), backbone="ViT-Tiny/8")
    make_seeds(tmp_path, "lora", "digits", (60, 61.80318), backbone="ViT-Tiny/8")
    by_class = {"balanced_accuracy": 61.25, "macro_f1": 60.0}
    make_seeds(tmp_path, "adam", "digits", (61.5,), backbone="ViT-Tiny/8", **by_class)
    # (60 + 62 + 67) / 3 = 63; squares 9 + 1 + 16 = 26; sqrt(26 / 2) = 3.6056. 1.80318 / sqrt(2) is
    # 1.27504, which is 1.2750 first and 1.27 then where it is rounded twice.
    assert lines()["Digits"] == {
        "dataset": "Digits", "zero-shot": "44.00", "SO": "63.00 ± 3.61 (3)",
        "LoRA": "60.90 ± 1.28 (2)", "Adam": "61.50 (1)",
    }  # fmt: skip
    so, lora, adam = (csv_rows(tmp_path, method=name)[0] for name in ("so", "lora", "adam"))
    assert (so["mean"], so["seeds"], so["zero_shot"]) == ("63.0", "3", "44.0")
    assert float(so["std"]) == pytest.approx(13**0.5, rel=1e-12)
    assert float(lora["std"]) == pytest.approx(1.80318 / 2**0.5, rel=1e-9)
    assert (adam["mean"], adam["std"], adam["seeds"]) == ("61.5", "", "1")
    assert [adam[key] for key in by_class] == ["61.25", "60.0"] and so["macro_f1"] == ""


def test_published_figures_have_source_and_difference(lines, tmp_path):
    make_seeds(tmp_path, "so", "dtd", (66, 67))
    make_seeds(tmp_path, "lora", "dtd", (63, 64))
    make_seeds(tmp_path, "adam", "dtd", (60,))
    make_seeds(tmp_path, "lora", "eurosat", (85,))
    table = lines()
    found = {
        (r["method"], r["published_source"]): (
            r["published"], r["difference"] and round(float(r["difference"]), 6)
        )
        for r in csv_rows(tmp_path, dataset="dtd")
    }  # fmt: skip
    assert found == {  # ours are 66.5 and 63.5
        ("zero_shot", "CLIP"): ("44.27", -0.27),
        ("so", "SO's paper"): ("66.4", 0.1),
        ("lora", "SO's table"): ("63.5", 0.0),
        ("lora", "CLIP-LoRA"): ("63.8", -0.3),
        ("adam", ""): ("", ""),
    }
    assert table["DTD"]["SO's paper [1]"] == "66.4 (+0.10)"
    assert table["EuroSAT"]["SO"] == "-" and table["EuroSAT"]["SO's paper [1]"] == "87.7"
    text = (tmp_path / "report" / "tables.md").read_text()
    assert "two points below" in text and "arXiv 2405.18541" in text


def test_published_figures_need_same_setting(run, tmp_path):
    make_run(tmp_path, backbone="ViT-B/32")
    make_run(tmp_path, shots=8)
    make_run(tmp_path, data={"split": "made", "digest": "abcdefgh"})
    run(tmp_path)
    rows = [row for row in csv_rows(tmp_path, method="so") if row["mean"]]
    assert {row["published"] for row in rows} == {""}


def test_published_rows_match_their_means():
    for row in PUBLISHED["figures"]:
        if "accuracies" in row:
            assert len(row["accuracies"]) == len(ELEVEN)
            assert sum(row["accuracies"]) / len(ELEVEN) == pytest.approx(row["mean"], abs=0.06)
        assert set(row.get("by_dataset", ())) < set(ELEVEN)
        assert row["source"] in PUBLISHED["sources"]
    others = {name for name, row in DATASETS.items() if row.test_only} | {"digits"}
    assert set(ELEVEN) == set(DATASETS) - others


def test_mean_over_eleven_uses_published_mean(run, tmp_path):
    for dataset in ELEVEN:
        make_seeds(tmp_path, "so", dataset, (71, 72), shots=1)
    run(tmp_path)
    so, zero_shot = (
        csv_rows(tmp_path, dataset="mean over 11 of 11", method=method)[0]
        for method in ("so", "zero_shot")
    )
    assert (so["mean"], so["std"][:6], so["published"]) == ("71.5", "0.7071", "73.8")
    assert zero_shot["published"] == "63.87"
    text = (tmp_path / "report" / "tables.md").read_text()
    assert "Published means of other methods: CLIP-SVD 73.20 [2], TCP 70.63 [3]" in text
    assert "SD-LoRA (selected on test images) 74.90 [5]" in text
    assert "[2] CLIP-SVD: the README of" in text


def test_published_rows_of_some_datasets(lines, tmp_path):
    for dataset in ("caltech101", "eurosat"):
        make_seeds(tmp_path, "lora", dataset, (90,))
    table = lines()
    mean = table["mean over 2 of 2"]["CLIP-LoRA rerun [3]"]
    assert mean == "90.45 (-0.45)"  # of 95.4 and 85.5


def test_mean_is_over_common_datasets(lines, tmp_path):
    for dataset, values in {"dtd": (60, 62), "eurosat": (80, 84), "fgvc": (30, 30)}.items():
        make_seeds(tmp_path, "so", dataset, values)
        lora = [value - 1 for value in values]
        make_seeds(tmp_path, "lora", dataset, lora[: 1 if dataset == "fgvc" else 2])
    make_run(tmp_path, "so", "dtd", accuracy=50.0, settings={"s": 0.9})  # tried once: not counted
    table = lines()
    (so,) = csv_rows(tmp_path, dataset="mean over 2 of 3", method="so", settings="")
    # Seeds' means are 70 and 73; published is (66.4 + 87.7) / 2.
    assert (so["mean"], so["std"][:6], so["seeds"]) == ("71.5", "2.1213", "2")
    assert float(so["published"]) == pytest.approx(77.05)
    assert table["mean over 2 of 3"]["SO's paper [1]"] == "77.05 (-5.55)"
    assert table["mean over 2 of 3"]["SO, s 0.9"] == "-"
    assert table["DTD"]["SO, s 0.9"] == "50.00 (1)"
    assert table["FGVC-Aircraft"]["LoRA"] == "29.00 (1)"


def test_missing_cells_are_shown(lines, tmp_path):
    make_run(tmp_path, "so", "dtd", 1)
    make_run(tmp_path, "lora", "eurosat", 4, 1, wall_seconds=100, peak_memory_mb=1000.0)
    make_run(tmp_path, "lora", "eurosat", 4, 2, wall_seconds=103, peak_memory_mb=3000.0)
    costs = lines("Memory and time")
    assert (costs["4"]["LoRA"], costs["4"]["SO"]) == ("2,000 MB, 101.5 s", "-")
    table = lines("1 shot")
    assert table["EuroSAT"]["SO"] == table["EuroSAT"]["LoRA"] == table["DTD"]["LoRA"] == "-"
    (row,) = csv_rows(tmp_path, shots=1, dataset="eurosat", method="so")
    assert (row["mean"], row["seeds"]) == ("", "0")


def test_paired_test_uses_common_seeds(tmp_path):
    for shots in (1, 4):
        so = [60 + seed * (shots - 2) for seed in (1, 2, 3)]
        make_seeds(tmp_path, "so", "dtd", so, shots=shots)
        make_seeds(tmp_path, "lora", "dtd", (60, 60), shots=shots)
    results = load_results(tmp_path)
    one, four, both = (paired_test(results, *results.variants, n) for n in ([1], [4], [1, 4]))
    assert one[:1] + one[2:] == (-1.5, 0, 0, 2, 0.5)
    assert (four.mean, four.wins, four.losses) == (3.0, 2, 0)
    assert four.half_width == pytest.approx(12.706 * 1.0, rel=1e-3)  # t of one degree, s / sqrt(2)
    assert both[:1] + both[2:] == (0.75, 2, 0, 2, 1.0)
    assert paired_test(results, results.variants[0], Variant("adam"), [1]) is None


# Settings


def test_different_settings_are_never_averaged(lines, tmp_path):
    make_seeds(tmp_path, "so", "dtd", (60, 62))
    make_seeds(tmp_path, "so", "dtd", (70, 72), settings={"lr": 1e-3})
    make_seeds(tmp_path, "so", "dtd", (50,), settings={"s": 0.999})
    make_seeds(tmp_path, "lora", "dtd", (58, 59))
    line = lines()["DTD"]
    assert [name for name in line if "[" not in name] == [  # the default settings first
        "dataset", "zero-shot", "SO", "SO, lr 0.001", "SO, s 0.999", "LoRA",
    ]  # fmt: skip
    assert list(line)[4] == "SO's paper [1]"  # once, behind the first of the method's settings
    assert line["SO"] == "61.00 ± 1.41 (2)" and line["SO, lr 0.001"] == "71.00 ± 1.41 (2)"
    assert line["SO, s 0.999"] == "50.00 (1)"
    pairs = lines("Paired differences")["SO, lr 0.001"]
    assert pairs["SO minus"] == "SO, lr 0.001"
    assert pairs["4 shots"] == "-10.00 ± 0.00 (0/0/2, p 0.5)"


def test_ignored_hparams_do_not_split(run, tmp_path):
    ignored = {"so": ["rank", "eval_every"], "lora": ["s", "t", "dense_grad"]}
    ignored["adam"] = ["s", "t", "rank"]
    for method, keys in ignored.items():
        make_run(tmp_path, method, seed=1)
        make_run(tmp_path, method, seed=2, settings=dict.fromkeys(keys, 7))
    make_run(tmp_path, "lora", seed=1, settings={"rank": 8})
    run(tmp_path)
    found = {(row["method"], row["settings"], row["seeds"]) for row in csv_rows(tmp_path)}
    assert found == {
        ("zero_shot", "", ""), ("so", "", "2"), ("lora", "", "2"), ("lora", "rank 8", "1"),
        ("adam", "", "2"),
    }  # fmt: skip


def make_moved_run(root, folder, seed, weights="0f" * 32, **inputs):
    """Write a run whose files lay in `folder`; `inputs` replace their contents."""
    contents = {"classnames": ["cat"], "template": ["a {}."], "train_images": "1"}
    settings = {"backbone": f"{folder}/my.pt", "classnames": f"{folder}/names.yaml"}
    make_run(
        root / folder, backbone=f"{folder}/my.pt", seed=seed, settings=settings,
        inputs={"backbone": weights, **contents, **inputs},
    )  # fmt: skip


def test_settings_are_compared_by_content(tmp_path):
    make_moved_run(tmp_path / "moved", "a", 1)
    make_moved_run(tmp_path / "moved", "b", 2)
    (variant,) = load_results(tmp_path / "moved").variants
    assert variant.label == "SO"
    make_moved_run(tmp_path / "other", "a", 1)
    make_moved_run(tmp_path / "other", "b", 1, weights="1e" * 32)
    assert [variant.label for variant in load_results(tmp_path / "other").variants] == [
        "SO, backbone my, 0f0f0f0", "SO, backbone my, 1e1e1e1",
    ]  # fmt: skip
    make_moved_run(tmp_path / "names", "a", 1)
    make_moved_run(tmp_path / "names", "b", 1, classnames=["kitten"])
    labels = [variant.label for variant in load_results(tmp_path / "names").variants]
    assert len(set(labels)) == 2 and all("SO, classnames names, " in label for label in labels)


def test_fewshot_lists_of_seeds_are_one_setting(tmp_path):
    for seed, digest in ((1, "a"), (2, "b")):
        inputs = {"backbone": "", "classnames": [], "template": [], "train_images": digest}
        settings = {"fewshot_split": f"/2sfs/shot_4-seed_{seed}_train.jsonl"}
        make_run(tmp_path, seed=seed, settings=settings, inputs=inputs)
    make_run(tmp_path, seed=1, inputs=inputs | {"train_images": "c"})
    assert [variant.label for variant in load_results(tmp_path).variants] == [
        "SO", "SO, fewshot_split shot-seed_train",
    ]  # fmt: skip


def test_variants_are_named_by_differences(tmp_path):
    for settings in ({"lr": 0.05}, {"lr": 0.01}, {"lr": 0.01, "flip": False, "dense_grad": True}):
        make_run(tmp_path / "lr", settings=settings)
    make_run(tmp_path / "lr", "adam", settings={"lr": 0.01, "seed": 1})
    assert [variant.label for variant in load_results(tmp_path / "lr").variants] == [
        "SO, lr 0.01", "SO, lr 0.05", "SO, dense_grad, no flip, lr 0.01", "Adam",
    ]  # fmt: skip


def test_other_images_are_never_averaged(lines, tmp_path):
    for seed, split, digest in ((1, "published", "a"), (2, "made", "b"), (3, "made", "c")):
        make_run(tmp_path, seed=seed, data={"split": split, "digest": digest * 8})
    table = lines()
    assert [name for name in table if "mean" not in name] == [
        "DTD", "DTD (made split), bbbbbbb", "DTD (made split), ccccccc",
    ]  # fmt: skip
    assert all(table[name]["SO"] == "60.00 (1)" for name in table if "mean" not in name)


def test_backbones_have_sections(run, tmp_path):
    make_run(tmp_path, backbone="ViT-B/16")
    make_run(tmp_path, backbone="RN50")
    make_run(tmp_path / "by_path", seed=2, backbone="ViT-B-16.pt")
    run(tmp_path)
    text = (tmp_path / "report" / "tables.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## RN50", "## ViT-B/16"]
    (row,) = csv_rows(tmp_path, backbone="ViT-B/16", method="so")
    assert row["seeds"] == "2"


def test_disagreeing_zero_shot_is_left_out(lines, tmp_path):
    make_run(tmp_path, seed=1)
    make_run(tmp_path, seed=2, zero_shot=50.0)
    assert lines()["DTD"]["zero-shot"] == "-"


# Input and output


def test_broken_runs_are_named(run, tmp_path):
    make_run(tmp_path, accuracy=61.0)
    broken, unfinished = make_run(tmp_path, seed=2), make_run(tmp_path, seed=3)
    (broken / "curve.csv").write_text("")
    (unfinished / "result.json").unlink()
    validated = make_run(tmp_path, seed=4, settings={"eval_split": "val"})
    for name in ("notes/notes.json", ".hidden/result.json"):  # are passed over
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{")
    status, _, err = run(tmp_path)
    assert status == 0
    for line, folder, reason in zip(
        err.splitlines(), (broken, unfinished, validated),
        ("malformed", "unfinished", "of validation images"), strict=True,
    ):  # fmt: skip
        assert "skipped" in line and str(folder) in line and reason in line
    (row,) = csv_rows(tmp_path, method="so")
    assert (row["mean"], row["seeds"]) == ("61.0", "1")


def test_run_counts_once(run, tmp_path):
    first = make_run(tmp_path / "a", accuracy=60.0)
    second = make_run(tmp_path / "b", accuracy=70.0)
    status, out, err = run(tmp_path / "b", tmp_path / "b" / "so", tmp_path / "a")
    assert status == 0 and "1 run: tables" in out
    assert f"skipped {first}: the same run as {second}, which is used\n" in err
    assert err.count("skipped") == 1
    (row,) = csv_rows(tmp_path / "b", method="so")
    assert (row["mean"], row["seeds"]) == ("70.0", "1")


def test_bad_folders_are_one_sentence(run, tmp_path):
    (tmp_path / "file").write_text("")
    for args, words in [
        ([tmp_path], "no finished run below"),
        ([tmp_path / "file"], "there is no folder"),
        ([tmp_path, tmp_path / "gone"], "there is no folder"),
    ]:
        status, out, err = run(*args)
        assert (status, out, err.count("\n")) == (2, "", 1) and words in err
    assert not (tmp_path / "report").exists()
    make_run(tmp_path / "results")
    status, _, err = run(tmp_path / "results", "--out", tmp_path / "file")
    assert status == 2 and err.splitlines()[-1].endswith(f"{tmp_path / 'file'}: File exists")
