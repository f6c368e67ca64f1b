"""The report: numbers checked by hand, and bad input named and left out."""

import pytest
import report
import reporting.report
from report_helpers import make_run, make_seeds, read_csv, read_lines
from reporting.aggregate import PUBLISHED, Variant, find_runs, group_by_backbone
from reporting.tables import format_differences

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
    costs = [lines()[name]["SO"] for name in ("peak memory (MB)", "time (s)")]
    assert costs == ["2,000.0", "100.0"]
    so, lora, adam = (read_csv(tmp_path, method=name)[0] for name in ("so", "lora", "adam"))
    assert (so["mean"], so["seeds"], so["macro_f1"]) == ("63.0", "3", "")
    assert float(so["std"]) == pytest.approx(13**0.5, rel=1e-12)
    assert float(lora["std"]) == pytest.approx(1.80318 / 2**0.5, rel=1e-9)
    assert (adam["mean"], adam["std"], adam["seeds"]) == ("61.5", "", "1")
    assert [adam[key] for key in by_class] == ["61.25", "60.0"]


def test_published_figures_have_differences(lines, tmp_path):
    make_seeds(tmp_path, "so", "dtd", (66, 67))
    make_seeds(tmp_path, "so", "dtd", (50,), settings={"lr": 1e-3})
    make_seeds(tmp_path, "lora", "dtd", (63, 64))
    make_seeds(tmp_path, "adam", "dtd", (60,))
    make_seeds(tmp_path, "lora", "eurosat", (85,))
    table = lines()
    rows = read_csv(tmp_path, dataset="dtd", settings="")
    assert [(row["method"], row["published_source"], row["published"]) for row in rows] == [
        ("zero_shot", "CLIP", "44.27"), ("so", "SO's paper", "66.4"),
        ("lora", "SO's table", "63.5"), ("lora", "CLIP-LoRA", "63.8"), ("adam", "", ""),
    ]  # fmt: skip
    assert float(rows[1]["difference"]) == pytest.approx(0.1)  # ours is 66.5
    assert list(table["DTD"])[3:6] == ["SO", "SO's paper", "SO, lr 0.001"]  # once, behind the first
    assert table["DTD"]["SO's paper"] == "66.4 (+0.10)"
    assert table["EuroSAT"]["SO"] == "-" and table["EuroSAT"]["SO's paper"] == "87.7"
    text = (tmp_path / "report" / "tables.md").read_text()
    assert "two points below" in text and "arXiv 2405.18541" in text


def test_published_rows_match_their_means():
    for row in PUBLISHED["figures"]:
        accuracies = row.get("accuracies", {})
        assert set(accuracies) <= set(ELEVEN) and row["source"] in PUBLISHED["sources"]
        if accuracies and "mean" in row:
            assert sum(accuracies.values()) / len(ELEVEN) == pytest.approx(row["mean"], abs=0.06)


def test_eleven_use_published_mean(run, tmp_path):
    for dataset in ELEVEN:
        make_seeds(tmp_path, "so", dataset, (71, 72), shots=1)
    run(tmp_path)
    zero_shot, so = read_csv(tmp_path, dataset="mean over 11 of 11")
    assert (so["mean"], so["std"][:6], so["published"]) == ("71.5", "0.7071", "73.8")
    assert zero_shot["published"] == "63.87"


def test_mean_is_over_common_datasets(lines, tmp_path):
    for dataset, values in {"dtd": (60, 62), "eurosat": (80, 84), "fgvc": (30, 30)}.items():
        make_seeds(tmp_path, "so", dataset, values)
        if dataset != "fgvc":
            make_seeds(tmp_path, "lora", dataset, values[:1] if dataset == "dtd" else values)
    make_run(tmp_path, "so", "dtd", accuracy=50.0, settings={"s": 0.9})  # tried once
    mean = lines()["mean over 2 of 3"]
    # Seeds' means are 70 and 73, LoRA's only 70; published is (66.4 + 87.7) / 2.
    assert mean["SO"] == "71.50 ± 2.12 (2)" and mean["LoRA"] == "70.00 (1)"
    assert mean["SO's paper"] == "77.05 (-5.55)" and mean["SO, s 0.9"] == "-"


def test_paired_differences_use_common_seeds(tmp_path):
    for shots in (1, 4):
        so = [60 + seed * (shots - 2) for seed in (1, 2, 3)]
        make_seeds(tmp_path, "so", "dtd", so, shots=shots)
        make_seeds(tmp_path, "lora", "dtd", (60, 60), shots=shots)
    results = load_results(tmp_path)
    one, four, both = (results.paired_differences(*results.variants, n) for n in ([1], [4], [1, 4]))
    assert (one, four, both) == ([[-1], [-2]], [[2], [4]], [[-1, 2], [-2, 4]])
    # 12.706, t of one degree, times 1 and 0.5: deviations over sqrt(2) of 2, 4 and of 0.5, 1.
    assert format_differences(four) == "+3.00 ± 12.71 (2/0/0, p 0.5)"
    assert format_differences(both) == "+0.75 ± 3.18 (2/0/2, p 1)"
    assert format_differences([[0.0]]) == "+0.00 (0/1/0, p 1)"
    assert results.paired_differences(results.variants[0], Variant("adam"), [1]) == []


# Settings


def test_different_settings_are_never_averaged(lines, tmp_path):
    make_seeds(tmp_path, "so", "dtd", (60, 62))
    make_seeds(tmp_path, "so", "dtd", (70, 72), settings={"lr": 1e-3}, zero_shot=50.0)
    line = lines()["DTD"]
    assert "zero-shot" not in line  # which the settings do not change
    assert line["SO"] == "61.00 ± 1.41 (2)" and line["SO, lr 0.001"] == "71.00 ± 1.41 (2)"
    pairs = lines("Paired differences")["SO, lr 0.001"]
    assert pairs["4 shots"] == "-10.00 ± 0.00 (0/0/2, p 0.5)"


def test_ignored_hparams_do_not_split(run, tmp_path):
    ignored = {"so": ["rank", "eval_every"], "lora": ["s", "t", "dense_grad"]}
    ignored["adam"] = ["s", "t", "rank"]
    for method, keys in ignored.items():
        make_run(tmp_path, method, seed=1)
        make_run(tmp_path, method, seed=2, settings=dict.fromkeys(keys, 7))
    make_run(tmp_path, "lora", seed=1, settings={"rank": 8})
    run(tmp_path)
    found = {(row["method"], row["settings"], row["seeds"]) for row in read_csv(tmp_path)}
    assert found == {
        ("zero_shot", "", ""), ("so", "", "2"), ("lora", "", "2"), ("lora", "rank 8", "1"),
        ("adam", "", "2"),
    }  # fmt: skip


def test_backbones_are_compared_by_content(tmp_path):
    make_run(tmp_path / "model", backbone="ViT-B/16")
    make_run(tmp_path / "model", backbone="ViT-B-16.pt", seed=2)
    (model,) = group_by_backbone(find_runs([tmp_path / "model"], pytest.fail))
    assert model.name == "ViT-B/16" and len(model.runs()) == 2
    for folder, weights in (("a", "0f" * 32), ("b", "0f" * 32), ("c", "1e" * 32)):
        make_run(
            tmp_path / folder, backbone=f"/{folder}/my.pt", seed=1 + (folder == "b"),
            settings={"classnames": f"/{folder}/names.yaml"}, inputs={"backbone": weights},
        )  # fmt: skip
    (moved,) = group_by_backbone(find_runs([tmp_path / "a", tmp_path / "b"], pytest.fail))
    assert (moved.name, [variant.label for variant in moved.variants]) == ("my", ["SO"])
    others = group_by_backbone(find_runs([tmp_path / "a", tmp_path / "c"], pytest.fail))
    assert [results.name for results in others] == ["my, 0f0f0f0", "my, 1e1e1e1"]


def test_variants_are_named_by_differences(tmp_path):
    for settings in ({"lr": 0.05}, {"lr": 0.01}, {"lr": 0.01, "flip": False, "dense_grad": True}):
        make_run(tmp_path, settings=settings)
    make_run(tmp_path, "adam", settings={"lr": 0.01, "seed": 1})
    assert [variant.label for variant in load_results(tmp_path).variants] == [
        "SO, lr 0.01", "SO, lr 0.05", "SO, dense_grad, no flip, lr 0.01", "Adam",
    ]  # fmt: skip


@pytest.mark.parametrize("lists, seeds", [  # path, seed and content of each; seeds of each variant
    ("a/few 1 0, b/few 2 1, c/few 3 1", [[1], [2, 3]]), ("seed_1 3 0, seed_2 3 1", [[3], [3]]),
    ("shot_4-seed_1_train 1 0, shot_4-seed_2_train 2 1", [[1, 2]]),
    ("seed1/few 1 0, seed2/few 2 1", [[1, 2]]),
])  # fmt: skip
def test_lists_are_compared_by_content(lists, seeds, tmp_path):
    for path, seed, digit in map(str.split, lists.split(", ")):
        inputs = {"backbone": "a", "train_images": digit * 64}
        settings = {"fewshot_split": f"/{path}.jsonl"}
        make_run(tmp_path, seed=int(seed), settings=settings, inputs=inputs)
    results = load_results(tmp_path)
    assert [sorted(results.cell("dtd", 4, x)) for x in results.variants] == seeds


def test_other_images_are_never_averaged(lines, tmp_path):
    for seed, split, digest in ((1, "published", "dtd"), (2, "made", "b"), (3, "made", "c")):
        make_run(tmp_path, seed=seed, data={"split": split, "digest": digest * 8})
    make_run(tmp_path, backbone="ViT-B/32")
    make_run(tmp_path, shots=8)
    cells = {name: line["SO"] for name, line in lines().items() if name.startswith("DTD")}
    names = ["DTD", "DTD (made split), bbbbbbb", "DTD (made split), ccccccc"]
    assert cells == dict.fromkeys(names, "60.00 (1)")
    found = [row for row in read_csv(tmp_path, method="so") if row["mean"] and row["published"]]
    assert [(row["backbone"], row["shots"]) for row in found] == [("ViT-B/16", "4")]


# Input and output


def test_broken_runs_are_named(run, tmp_path):
    make_run(tmp_path, accuracy=61.0)
    broken, unfinished = make_run(tmp_path, seed=2), make_run(tmp_path, seed=3)
    (broken / "curve.csv").write_text("")
    (unfinished / "result.json").unlink()
    validated = make_run(tmp_path, seed=4, settings={"eval_split": "val"})
    make_run(tmp_path / ".Trash", seed=5)  # a hidden folder, passed over
    status, _, err = run(tmp_path)
    assert status == 0
    for line, folder, reason in zip(
        err.splitlines(), (broken, unfinished, validated),
        ("malformed", "unfinished", "of validation images"), strict=True,
    ):  # fmt: skip
        assert "skipped" in line and str(folder) in line and reason in line
    (row,) = read_csv(tmp_path, method="so")
    assert (row["mean"], row["seeds"]) == ("61.0", "1")


def test_run_counts_once(run, tmp_path):
    first = make_run(tmp_path / "a", accuracy=60.0)
    second = make_run(tmp_path / "b", accuracy=70.0)
    status, out, err = run(tmp_path / "b", tmp_path / "b" / "so", tmp_path / "a")
    assert status == 0 and "1 run: tables" in out and "SO: 70.00 (1)" in out
    assert err == f"report.py: skipped {first}: the same seed and settings as {second}\n"


@pytest.mark.parametrize("folders, words", [
    ([""], "no finished run below"), (["file"], "there is no folder"),
    (["", "gone"], "there is no folder"),
])  # fmt: skip
def test_bad_folders_are_one_sentence(folders, words, run, tmp_path):
    (tmp_path / "file").write_text("")
    status, out, err = run(*(tmp_path / name for name in folders))
    assert (status, out, err.count("\n")) == (2, "", 1) and words in err
    assert not (tmp_path / "report").exists()
