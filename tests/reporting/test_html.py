"""report.html: images and mistakes in one file of bounded size, whatever is gone."""

import base64
import csv
import io
import json
from html.parser import HTMLParser
from itertools import product

import pytest
import report
import reporting.report
from dataset_helpers import write_image
from PIL import Image
from report_helpers import make_run
from reporting import html

NAMES = ["annual <crop>", "herbs | grass", "road & rail"]
# Image of three of each class, predicted class and probability: one, two and no mistakes.
PREDICTIONS = [(0, 0, 0, 0.9), (0, 1, 2, 0.6), (0, 2, 0, 0.9), (1, 0, 0, 0.5), (1, 1, 2, 0.8)]
PREDICTIONS += [(1, 2, 1, 0.9), (2, 0, 2, 0.9), (2, 1, 2, 0.9), (2, 2, 2, 0.9)]


class Page(HTMLParser):
    """What a page shows."""

    def __init__(self, path):
        super().__init__()
        self.images, self.cells, self.headings, self.text, self.stack = [], [], [], "", []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "iframe")
        attrs = dict(attrs)
        assert attrs.get("src", "data:").startswith("data:") and "://" not in str(attrs)
        if tag == "img":
            self.images.append((attrs["alt"], attrs["src"]))
        elif tag != "meta":
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.stack and self.stack[-1] in ("td", "h4"):
            (self.cells if self.stack[-1] == "td" else self.headings).append(data.strip())

    def thumbnails(self):
        return [alt for alt, src in self.images if src.startswith("data:image/jpeg")]


@pytest.fixture
def runs(tmp_path):
    """Runs of three seeds on images of EuroSAT; their folders."""
    paths = [[f"{label}/{index}.jpg" for index in range(8)] for label in range(3)]
    for label, index in product(range(3), range(8)):
        write_image(tmp_path / "eurosat/2750" / paths[label][index], label, index, (400, 320))
    folders = []
    for seed, accuracy in ((1, 60.0), (2, 67.0), (3, 68.0)):
        folder = make_run(
            tmp_path / "runs", dataset="eurosat", seed=seed, accuracy=accuracy, classes=3,
            classnames=NAMES,
        )  # fmt: skip
        config = f"dataset: eurosat\nroot_path: {tmp_path}\n"
        (folder / "config.yaml").write_text(config)
        few = [(path, label, "") for label in range(3) for path in paths[label][3:8]]
        few += few[:1]  # repeated, where a class has too few
        (folder / "fewshot.json").write_text(json.dumps({"train": few, "val": []}))
        with open(folder / "predictions.csv", "w", newline="") as file:
            rows = [(paths[label][i], label, *prediction) for label, i, *prediction in PREDICTIONS]
            csv.writer(file).writerows([("path", "label", "predicted", "probability"), *rows])
        folders.append(folder)
    return folders


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Report on the runs; return a function that returns the page."""
    monkeypatch.setattr(reporting.report, "render_png", lambda draw: b"figure")

    def make():
        html.make_thumbnail.cache_clear()
        assert report.main([str(tmp_path / "runs")]) == 0
        return Page(tmp_path / "runs/report/report.html")

    return make


def test_page_shows_shots_and_mistakes(runs, page):
    shown = page()
    assert "those of seed 2, whose accuracy of\n67.00 % is nearest to the mean" in shown.text
    order = [NAMES[1], NAMES[0], NAMES[2]]  # worst first
    assert [heading for heading in shown.headings if "%" not in heading] == order
    assert "33.3 % of\n3 test images" in shown.text
    few = [alt for alt in shown.thumbnails() if "few-shot" in alt]
    assert len(few) == 15 and few[0] == "herbs | grass, few-shot image: 1/3.jpg"
    assert [alt.split(": ")[0] for alt in shown.thumbnails() if "taken" in alt] == [
        "herbs | grass, taken for road & rail", "herbs | grass, taken for annual <crop>",
        "annual <crop>, taken for road & rail",
    ]  # fmt: skip
    assert "road & rail 0.800\n1/1.jpg" in shown.text
    assert "EuroSAT" in shown.cells and "SO" in shown.cells
    assert {src for alt, src in shown.images if alt.startswith("ViT-B-16/")} == {
        "data:image/png;base64," + base64.b64encode(b"figure").decode()
    }
    sources = [src for _, src in shown.images if src.startswith("data:image/jpeg;base64,")]
    thumbnail = Image.open(io.BytesIO(base64.b64decode(sources[0].partition(",")[2])))
    assert thumbnail.format == "JPEG" and thumbnail.size == (80, 64)


def test_gone_images_are_named(runs, page, tmp_path):
    images = tmp_path / "eurosat/2750"
    (images / "0/1.jpg").write_bytes(b"no image")
    (images / "0/3.jpg").unlink()
    shown = page()
    assert len(shown.thumbnails()) == 16 and "unreadable" in shown.text
    images.parent.rename(tmp_path / "moved")
    (runs[1] / "fewshot.json").unlink()
    shown = page()
    assert shown.thumbnails() == [] and "The images are gone: eurosat: there is no" in shown.text
    assert f"not known: {runs[1] / 'fewshot.json'}: No such file" in shown.text
    assert shown.text.count("\ngone\n") == 3 and "0.800" in shown.text
    (runs[1] / "config.yaml").unlink()
    assert f"The images are gone: {runs[1] / 'config.yaml'}: No such" in page().text


def test_page_has_bounded_size(runs, page, monkeypatch):
    for name, limit in {"MAX_CLASSES": 2, "MAX_FEW": 3, "MAX_MISTAKES": 1}.items():
        monkeypatch.setattr(html, name, limit)
    shown = page()
    assert len(shown.thumbnails()) == 2 * (3 + 1)
    assert "Classes not shown:\n1 of higher accuracy." in shown.text


def test_markdown_becomes_blocks():
    text = "## A\n\nb c\nd\n\n* e\n* f\n\n| g | h |\n| --- | --: |\n| i \\| j | k |\n"
    assert list(html.parse_markdown(text)) == [
        ("h2", "A"), ("p", "b c\nd"), ("ul", ["e", "f"]),
        ("table", [["g", "h"], ["---", "--:"], ["i | j", "k"]]),
    ]  # fmt: skip
