"""docs/own.md: its five commands, one after the other, as they stand there.

OpenAI's weights are not here: ViT-Tiny/8 is put in place of ViT-B/16, and nothing else is changed.
"""

import csv
import random
import re
import shlex
from pathlib import Path

import predict
import pytest
import report
from commands import call, call_main
from PIL import Image

import datasets.__main__ as doctor

PAGE = (Path(__file__).parents[2] / "docs/own.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^ +```bash\n +(.*)\n +```$", PAGE, re.MULTILINE)
CLASSES = [
    "Great Tit", "Zaunkönig", "no. 3", "Größe L", "a_b", "c-d", "E", "f (old)", "Œuvre d'art",
    "100 %", "x & y", "naïve",
]  # fmt: skip
ENDINGS = ["png", "PNG", "Jpg", "JPEG", "jpeg", "webp", "WebP"]
PROGRAMS = {
    "python main.py": call_main,
    "python -m datasets": lambda *argv: call(doctor.main, *argv),
    "python scripts/report.py": lambda *argv: call(report.main, *argv),
    "python scripts/predict.py": lambda *argv: call(predict.main, *argv),
}


def make_photos(folder):
    """Twelve classes of 8 to 19 images, each of its own colour, in several formats."""
    rng, count = random.Random(0), 0
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(8 + number):
            hue = Image.new("HSV", (40, 30), (number * 21, 200, rng.randrange(120, 255)))
            image = Image.blend(
                hue.convert("RGB"), Image.effect_noise((40, 30), 80).convert("RGB"), 0.2
            )
            image.save(folder / name / f"IMG {i}.{ENDINGS[count % len(ENDINGS)]}")
            count += 1
    return count


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Where the commands ran, and what each printed, by the beginning of the command."""
    folder = tmp_path_factory.mktemp("own")
    made = make_photos(folder / "photos")
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in COMMANDS:
            line = line.replace("ViT-B/16", "ViT-Tiny/8").replace("ViT-B-16", "ViT-Tiny-8")
            program = next(name for name in PROGRAMS if line.startswith(f"{name} "))
            status, out, err = PROGRAMS[program](*shlex.split(line.removeprefix(program)))
            assert status == 0, (line, out, err)
            printed.append(out)
    return folder, made, printed


def test_the_page_has_five_commands():
    assert len(COMMANDS) == 5 == PAGE.count("```bash")


def test_the_five_commands_lead_from_a_folder_to_predictions(told):
    folder, made, (checked, zero_shot, trained, reported, predicted) = told
    assert re.search(r"photos .* 12 .* ok", checked)
    assert zero_shot.count("****") == 2 and "Zero-shot CLIP's test accuracy" in zero_shot
    assert "Final test accuracy" in trained
    assert "hardest classes" in reported
    lines = [line.split("  ") for line in predicted.splitlines()]
    assert len(lines) == made and all(len(line) == 3 for line in lines)
    assert {name for _, name, _ in lines} <= set(CLASSES)
    assert {p.suffix for p in map(Path, (path for path, _, _ in lines))} >= {".WebP", ".Jpg"}


def test_what_the_page_says_is_there_is_there(told):
    folder, _, _ = told
    (run,) = (folder / "results/so/ViT-Tiny-8/photos/4shots").iterdir()
    assert run.name == "seed3-n_iters_50"
    text = (run / "predictions.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert list(rows[0]) == ["path", "label", "predicted", "probability"]
    assert all((folder / "photos" / row["path"]).is_file() for row in rows)
    assert (run / "fewshot.json").is_file() and (run / "weights.safetensors").is_file()
    drawn = {path.name for path in (folder / "results/report").rglob("*.png")}
    assert {"confusion-photos-4shots-so.png", "classes-photos-4shots-so.png"} <= drawn
