"""report.html: images and mistakes in one file of bounded size, whatever is gone."""

import base64
import io
import json
import re
from html import unescape
from itertools import product
from unittest.mock import Mock

import pytest
import report
import reporting.report
from dataset_helpers import write_image
from PIL import Image
from report_helpers import make_run, write_predictions
from reporting import html

NAMES = ["annual <crop>", "herbs | grass", "road & rail"]
# Image of three of each class, predicted class and probability: one, two and no mistakes.
PREDICTIONS = [(0, 0, 0, 0.9), (0, 1, 2, 0.6), (0, 2, 0, 0.9), (1, 0, 0, 0.5), (1, 1, 2, 0.8)]
PREDICTIONS += [(1, 2, 1, 0.9), (2, 0, 2, 0.9), (2, 1, 2, 0.9), (2, 2, 2, 0.9)]


@pytest.fixture
def runs(tmp_path):
    """Runs of three seeds on images of EuroSAT; their folders."""
    for label, index in product(range(3), range(8)):
        write_image(tmp_path / f"eurosat/2750/{label}/{index}.jpg", label, index, (400, 320))
    few = [(f"{label}/{index}.jpg", label, "") for label in range(3) for index in range(3, 8)]
    folders = []
    for seed, accuracy in ((1, 60.0), (2, 67.0), (3, 68.0)):
        folder = make_run(
            tmp_path / "runs", dataset="eurosat", seed=seed, accuracy=accuracy, classes=3,
            classnames=NAMES,
        )  # fmt: skip
        (folder / "config.yaml").write_text(f"dataset: eurosat\nroot_path: {tmp_path}\n")
        # The first one is repeated, as where a class has too few.
        (folder / "fewshot.json").write_text(json.dumps({"train": few + few[:1], "val": []}))
        write_predictions(folder, [(f"{x}/{i}.jpg", x, *others) for x, i, *others in PREDICTIONS])
        folders.append(folder)
    return folders


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Return a function that reports on the runs and returns the page's text and its images.

    These are addresses by alternative text, in the order of the page.
    """
    monkeypatch.setattr(reporting.report, "render_png", lambda draw: b"figure")

    def read():
        html.make_thumbnail.cache_clear()
        assert report.main([str(tmp_path / "runs")]) == 0
        source = (tmp_path / "runs/report/report.html").read_text()
        assert not re.search("<(script|link|iframe)|://", source)
        images = re.findall('<img src="([^"]+)" alt="([^"]+)"', source)
        assert len(images) == source.count("<img")
        text = re.sub("<[^>]+>", "", source.split("</style>")[1])
        return unescape(text), {unescape(alt): address for address, alt in images}

    return read


def thumbnails(images):
    return [alt for alt, address in images.items() if address.startswith("data:image/jpeg")]


def test_page_shows_shots_and_mistakes(runs, page):
    text, images = page()
    assert "those of seed 2, whose accuracy of\n67.00 % is nearest to the mean" in text
    few = [alt.split(", few-shot image: ") for alt in thumbnails(images) if "few-shot" in alt]
    assert few == [  # classes are worst first
        [NAMES[label], f"{label}/{index}.jpg"] for label in (1, 0, 2) for index in range(3, 8)
    ]
    assert [alt.split(": ")[0] for alt in thumbnails(images) if "taken" in alt] == [
        "herbs | grass, taken for road & rail", "herbs | grass, taken for annual <crop>",
        "annual <crop>, taken for road & rail",
    ]  # fmt: skip
    assert "herbs | grass (33.3), annual <crop> (66.7)" in text  # in a table
    assert "road & rail 0.800\n1/1.jpg" in text and "33.3 % of\n3 test images" in text
    figures = {address for alt, address in images.items() if alt.startswith("ViT-B-16/")}
    assert figures == {"data:image/png;base64," + base64.b64encode(b"figure").decode()}
    address = images["herbs | grass, few-shot image: 1/3.jpg"]
    thumbnail = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    assert thumbnail.format == "JPEG" and thumbnail.size == (80, 64)


def test_failed_figure_is_left_out(runs, page, monkeypatch, capsys):
    render = Mock(side_effect=[ValueError("unknown\n$x$"), b"1", b"2", b"3"])
    monkeypatch.setattr(reporting.report, "render_png", render)
    assert sum(alt.endswith(".png") for alt in page()[1]) == 3
    assert "left out ViT-B-16/accuracy-eurosat.png: unknown $x$\n" in capsys.readouterr().err


def test_gone_images_are_named(runs, page, tmp_path):
    folder = tmp_path / "eurosat/2750"
    (folder / "0/1.jpg").write_bytes(b"no image")
    (folder / "0/3.jpg").unlink()
    text, images = page()
    assert len(thumbnails(images)) == 16 and "unreadable" in text
    folder.parent.rename(tmp_path / "moved")
    (runs[1] / "fewshot.json").unlink()
    text, images = page()
    assert thumbnails(images) == [] and "The images are gone: eurosat: there is no" in text
    assert f"not known: {runs[1] / 'fewshot.json'}: No such file" in text
    assert text.count("\ngone\n") == 3 and "0.800" in text


def test_page_has_bounded_size(runs, page, monkeypatch):
    limits = {"MAX_CLASSES": 2, "MAX_FEW": 3, "MAX_MISTAKES": 1, "MAX_FIGURE_BYTES": 18}
    for name, limit in limits.items():
        monkeypatch.setattr(html, name, limit)
    text, images = page()
    assert "/classes-eurosat-4shots-so.png is left out to" in text and "confusion" not in text
    assert len(thumbnails(images)) == 2 * (3 + 1)
    assert "Classes not shown:\n1 of higher accuracy." in text
