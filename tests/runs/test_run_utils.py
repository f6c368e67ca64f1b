"""Flags and files of settings: what they resolve to, and how they are refused."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from commands import call_main, refused

from run_utils import DEMO_CONFIG, get_arguments
from runs.cli import run_cli

ROOT = Path(__file__).parents[2]
FLAGS = (
    "seed device root_path dataset shots backbone position encoder lr n_iters early_stop_loss "
    "batch_size s sparsity t save_path filename eval_only num_workers precision logit_scale "
    "threads save_weights overwrite dense_grad config method rank eval_every final_model "
    "class_batch_size "
    "activation heads"
).split()


def test_the_defaults_are_the_papers():
    expected = dict(
        seed=3, shots=1, backbone="ViT-B/16", lr=2e-4, n_iters=2000, early_stop_loss=0.01,
        batch_size=32, s=0.99995, t=5, save_path="results", filename="weights", eval_only=False,
        precision="fp32", logit_scale=100.0, crop_scale=[0.08, 1.0], flip=True,
        encoder="both", position="all", config=None, save_weights=False,
    )  # fmt: skip
    assert expected.items() <= vars(get_arguments(["--dataset", "eurosat"])).items()


def test_help_names_every_flag_with_a_noun_and_what_flip_does():
    status, out, _ = call_main("--help")
    text = " ".join(out.split())
    assert status == 0 and all(f"--{flag}" in text for flag in FLAGS)
    assert "mirror each training image with probability one half" in text


def test_flags_win_over_the_file_which_wins_over_the_defaults(tmp_path):
    file = tmp_path / "my settings.yaml"
    file.write_text(
        "dataset: eurosat\nlr: 1e-4\nshots: 4\nflip: false\ncrop_scale: [0.5, 1]\nthreads: null\n"
        "logit_scale: checkpoint\n"
    )
    config = get_arguments(["--config", str(file), "--shots", "8", "--t", "7"])
    assert (config.dataset, config.lr, config.shots, config.t) == ("eurosat", 1e-4, 8, 7)
    assert (config.flip, config.crop_scale, config.threads) == (False, [0.5, 1.0], None)
    assert (config.logit_scale, config.batch_size) == ("checkpoint", 32)


def test_shipped_configurations_parse():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert path.read_text().startswith("#")
        config = get_arguments(["--config", str(path), "--dataset", "eurosat"])
        assert yaml.safe_load(path.read_text()).keys() <= vars(config).keys()


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--root", "x", "--data", "eurosat"], {"root_path": "x", "dataset": "eurosat"}),
        (["--sparsity", "0.9"], {"s": 0.9}),
        (["--s", "0.9", "--sh", "4"], {"s": 0.9, "shots": 4}),
        (["--early_stop_loss", "-1"], {"early_stop_loss": -1.0}),
        (["--n_iters", "0"], {"n_iters": 0}),
        (["--save_path", "w"], {"save_weights": True}),
        (["--save_path", "w", "--no-save_weights"], {"save_weights": False}),
    ],
)
def test_flags_of_the_authors_scripts_mean_what_they_mean_there(argv, expected):
    assert expected.items() <= vars(get_arguments(argv)).items()


@pytest.mark.parametrize(
    "argv, is_demo",
    [
        ([], True),
        (["--shots", "4", "--method", "lora"], True),
        (["--config", "configs/so_paper.yaml"], False),
        (["--root_path", "."], False),
        (["--backbone", "ViT-Tiny/8"], False),
        (["--dataset", "digits"], False),
    ],
)
def test_demo_is_left_by_naming_a_task(argv, is_demo, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = get_arguments(argv)
    assert (args.dataset == "digits" and args.backbone == "ViT-Tiny/8") == is_demo or argv[1:] == [
        "digits"
    ]
    assert (args.logit_scale == "checkpoint") == is_demo and (args.n_iters == 50) == is_demo
    assert is_demo or argv[0] == "--dataset" or args.dataset == "dtd"


def test_demo_methods_have_the_studys_rates():
    page = (ROOT / "docs/digits/README.md").read_text()
    chosen = re.search(r"^Best: (SO) (\S+); (LoRA) (\S+); (Adam) (\S+);", page, re.MULTILINE)
    chosen = zip(chosen.groups()[::2], chosen.groups()[1::2], strict=True)
    for method, lr in chosen:
        method = method.lower()
        assert get_arguments(["--method", method]).lr == float(lr)
        assert get_arguments(["--config", DEMO_CONFIG, "--method", method]).lr == float(lr)
        assert get_arguments(["--method", method, "--lr", "0.3"]).lr == 0.3
        assert get_arguments(["--method", method, "--dataset", "dtd"]).lr == 2e-4


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--dataset", "eurosta"], ["eurosta", "did you mean 'eurosat'", "oxford_pets"]),
        (["--backbone", "ViT-B16"], ["ViT-B16", "ViT-B/16"]),
        (["--backbone", "gone.pt"], ["gone.pt", "check the path"]),
        (["--position", "botom"], ["botom", "did you mean 'bottom'", "half-up"]),
        (["--method", "sparse"], ["sparse", "so, lora, adam"]),
        (["--precision", "fp8"], ["fp8", "bf16"]),
        (["--shots", "0"], ["--shots", ">= 1", "'0'"]),
        (["--shots", "two"], ["--shots", "whole number", "'two'"]),
        (["--s", "1"], ["--s", "< 1"]),
        (["--s", "-0.1"], ["--s", ">= 0"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--lr", "0"], ["--lr", "> 0"]),
        (["--early_stop_loss", "x"], ["--early_stop_loss", "a number, not 'x'"]),
        (["--logit_scale", "big"], ["--logit_scale", "big"]),
        (["--n_iters", "1.5"], ["--n_iters", "whole number"]),
        (["--n_iters", 10**30], ["--n_iters"]),
        (["--crop_scale", "0.9", "0.1"], ["--crop_scale", "MIN is above MAX"]),
        (["--filename", "../x"], ["--filename", "../x"]),
        (["--datset", "x"], ["--datset", "did you mean '--dataset'"]),
        (["--e", "x"], ["ambiguous", "--encoder"]),
        (["stray"], ["stray"]),
        (["--final_model", "best_val"], ["--final_model", "--eval_every"]),
        (["--method", "lora", "--grad_support", "magnitude"], ["--grad_support", "--method so"]),
        (["--method", "adam", "--moments", "none"], ["--moments", "--method so"]),
        (["--config", "no such.yaml"], ["no such.yaml"]),
        (["--precision=--"], ["--precision", "expected a value"]),
        (["--method", "9" * 5000], ["valid: so, lora, adam"]),
    ],
)
def test_bad_flags_end_in_one_sentence(argv, words):
    message = refused(*argv)
    assert all(word in message for word in words) and len(message) < 2100, message


@pytest.mark.parametrize(
    "text, words",
    [
        ("dataste: eurosat", ["dataste", "did you mean 'dataset'", "n_iters"]),
        ("config: x.yaml", ["config"]),
        ("shots: many", ["shots", "whole number", "many"]),
        ("position: botom", ["botom", "did you mean 'bottom'"]),
        ("flip: 3", ["flip", "true or false"]),
        ("lr: true", ["lr", "plain values"]),
        ("lr: {a: 1}", ["lr", "plain values"]),
        ("crop_scale: [0.1]", ["crop_scale", "2 values"]),
        ("crop_scale: [0.1, [1]]", ["crop_scale"]),
        ("- a list", ["key: value"]),
        ("", ["key: value"]),
        ("a: [1", ["not YAML"]),
        ("\x00", ["not YAML"]),
        ("[" * 3000, ["not YAML"]),
        ("lr: !!bool x", ["not YAML"]),
        ("lr: 2001-99-99", ["not YAML"]),
        ("!!python/object/apply:os.system ['touch hacked']", ["not YAML"]),
    ],
    ids=range(17),
)
def test_a_bad_file_of_settings_is_named_with_its_fault(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    message = refused("--config", "mine.yaml", "--dataset", "eurosat")
    assert "mine.yaml" in message and all(word in message for word in words), message
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore")]
)
def test_a_lack_of_memory_is_one_sentence_and_mistakes_of_ours_keep_their_traceback(error, capsys):
    def fail(error):
        raise error

    assert run_cli(lambda: fail(error)) == 2
    said = capsys.readouterr().err
    assert "memory" in said and "--batch_size" in said and said.count("\n") == 1
    with pytest.raises(RuntimeError):
        run_cli(lambda: fail(RuntimeError("a mistake of ours")))


@pytest.mark.parametrize("device", ["cuda:77", "tpu", "meta", "hpu"])
def test_a_device_that_is_not_there_is_refused(device):
    message = refused("--device", device, "--n_iters", 0)
    assert f"--device {device} cannot be used" in message
    assert "--device cpu" in message or torch.cuda.is_available()


def test_prompts_come_from_a_file_as_from_flags(tmp_path):
    file = tmp_path / "a.yaml"
    for text, template in [
        ("template: clip", ["clip"]),
        ("template: ['a {}.', 'my {}']", ["a {}.", "my {}"]),
    ]:
        file.write_text(f"dataset: dtd\n{text}\n")
        assert get_arguments(["--config", str(file)]).template == template
        argv = ["--dataset", "dtd", "--template", *template]
        assert get_arguments(argv).template == template
    file.write_text("dataset: dtd\ntemplate: []\n")
    assert "key 'template': must be a list of at least one value" in refused("--config", file)
