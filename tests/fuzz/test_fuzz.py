"""A few hundred of the fuzzer's inputs, whether it sees faults, and what it has found so far."""

import logging
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import delta
import pytest
import report
from clip_helpers import TINY_VIT, random_state_dict
from dataset_helpers import LAYOUTS, make_dataset
from reporting.numbers import find_runs

import clip
from datasets import __main__ as doctor
from datasets import build_dataset
from runs import cli

ROOT = Path(__file__).parents[2]


def test_a_hundred_and_fifty_hostile_inputs_end_well_or_in_one_sentence():
    command = [sys.executable, ROOT / "tests/fuzz/fuzz.py", "--inputs", "150", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


FAULTS = """
import os, sys, time, warnings
sys.path.insert(0, {tests!r})
import fuzz

def trace(rng, room): raise KeyError("x")
def hang(rng, room): time.sleep(9)
def crash(rng, room): os.abort()
def warn(rng, room): return fuzz.command(lambda: warnings.warn("spilt"))
def babble(rng, room): return fuzz.command(lambda: print("a\\nb", file=sys.stderr) or 2)
def status(rng, room): return fuzz.command(lambda: 1)
def write(rng, room): (room.shared / "new").touch()
def change(rng, room): os.system(f"touch {{room.shared}}/new")
def start(rng, room): os.system("true")
def fine(rng, room): return fuzz.SUCCESS

targets = trace, hang, crash, warn, babble, status, write, change, start, fine
fuzz.TARGETS = {{target.__name__: (target, 1) for target in targets}}
fuzz.LIMIT = 1
sys.exit(fuzz.command_line(["--inputs", "10"]))
"""


def test_the_fuzzer_sees_faults_of_every_kind(tmp_path):
    code = FAULTS.format(tests=str(ROOT / "tests/fuzz"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = [line.split("--only ")[1] for line in done.stdout.splitlines() if "FINDING" in line]
    kinds = "trace hang crash warn babble status write change start".split()
    assert found == [f"{kind} --case 0" for kind in kinds], done.stdout
    assert "Timeout" in done.stdout and "Aborted" in done.stdout and "9 findings" in done.stdout


def test_warnings_of_odd_metadata_stay_silent(capsys):
    def warn():
        logging.getLogger("PIL.TiffImagePlugin").error("more samples than can be decoded")
        warnings.warn_explicit("corrupt", UserWarning, "x.py", 1, module="PIL.TiffImagePlugin")

    assert cli.run_cli(warn) == 0
    assert capsys.readouterr().err == ""


# Data


def test_the_doctor_opens_neither_a_pipe_nor_an_impossible_name(tmp_path):
    make_dataset("eurosat", tmp_path)
    split = tmp_path / "eurosat" / LAYOUTS["eurosat"][2]
    split.write_text(split.read_text().replace("Forest_0000.jpg", "a" * 300))
    image = next((tmp_path / "eurosat" / "2750").rglob("*_0001.jpg"))
    image.unlink()
    os.mkfifo(image)
    finding = doctor.examine("eurosat", str(tmp_path), decode=True)
    for name in (image.name, "a" * 300):
        assert any(name in problem for problem in finding.problems)


def test_entries_of_a_split_file_are_shown_on_one_line(tmp_path):
    make_dataset("eurosat", tmp_path)
    (tmp_path / "eurosat" / LAYOUTS["eurosat"][2]).write_text(
        '{"train": ["a\\nb"], "val": [], "test": []}'
    )
    with pytest.raises(ValueError, match=r"train: 'a\\nb'"):
        build_dataset("eurosat", tmp_path, 1)


def test_the_report_complains_in_letters_on_one_line(tmp_path, capsys):
    assert report.main([str(tmp_path / "no\nsuch\x1b[31m")]) == 2
    assert r"no such\x1b[31m" in capsys.readouterr().err


def test_the_report_reads_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "result.json")
    said = []
    assert find_runs([tmp_path], said.append) == []
    assert "result.json is not a file" in said[0]


# Checkpoints


def test_what_a_checkpoint_names_is_shown_in_letters(tmp_path):
    content = pickle.dumps(random_state_dict(TINY_VIT)["logit_scale"], 2)
    content = content.replace(b"_rebuild_tensor_v2", b"_rebuild\x00\x1b[31mr_v2")
    (tmp_path / "odd.pt").write_bytes(content)
    with pytest.raises(ValueError) as error:
        clip.load(tmp_path / "odd.pt", "cpu")
    assert str(error.value).isprintable()


def test_a_delta_with_unprintable_names_is_refused_in_printable_words(tmp_path, capsys):
    header = b'{"\\u0000":{"dtype":"F32","shape":[1],"data_offsets":[0,9]}}'
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(9))
    assert delta.main(["inspect", str(path)]) == 2
    assert capsys.readouterr().err.rstrip("\n").isprintable()
