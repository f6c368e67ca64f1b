"""Runs on CLIPs that open_clip's modules run: from zero-shot to prediction."""

import csv
import io

import export
import onnxruntime
import predict
import pytest
import torch
from commands import call, outcome, refused, run, run_folder
from open_clip_folders import write_folder
from PIL import Image

import clip
from runs.weights import find_saved_run, load_run_model

pytest.importorskip("open_clip")


def check_exports(folder, data, out, predictions):
    """Exports to open_clip and ONNX give the run's features and probabilities."""
    for target in ("open_clip", "onnx"):
        status, _, err = call(export.main, folder, "--to", target, "--out", out / target)
        assert status == 0, err
    model = load_run_model(*find_saved_run(folder), torch.device("cpu"))
    exported, preprocess = clip.load(out / "open_clip", "cpu")
    tokens = model.tokenize(["annual crop", "forest"])
    assert torch.equal(tokens, exported.tokenize(["annual crop", "forest"]))
    assert torch.equal(exported.encode_text(tokens), model.encode_text(tokens))
    row = next(csv.DictReader(io.StringIO(predictions)))
    pixels = clip.image_transform(
        model.visual.input_resolution, (0, 0, 0), (1, 1, 1), model.image_resize
    )(Image.open(row["path"]))
    session = onnxruntime.InferenceSession(out / "onnx/classifier.onnx")
    (probabilities,) = session.run(None, {"images": pixels[None].numpy()})
    assert probabilities.max() == pytest.approx(float(row["probability"]), rel=1e-4)
    _, _, err = call(export.main, folder, "--to", "openai", "--out", out / "x.pt")
    assert "use --to open_clip or onnx" in err


@pytest.mark.parametrize("kind", ["siglip", "bert"])
def test_open_clip_backbone_runs(kind, flags, data, tmp_path, interrupt):
    write_folder(kind, tmp_path / kind)
    extra = ["--backbone", tmp_path / kind, "--lr", 1e-2, "--logit_scale", 20]
    flags = [*flags[:-1], *extra, "--save_path"]
    whole = [*flags, tmp_path / "whole"]
    out = run(*whole)
    assert " of query, key and value, " in out
    assert "gradients stay dense (not used by F.linear)" in out

    interrupt(3, flags, tmp_path / "broken")
    run(*flags, tmp_path / "broken", "--resume")
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")

    (final,) = [line.split()[-2] for line in out.splitlines() if "Final test accuracy" in line]
    assert f"**** Test accuracy: {final} ****" in run(*whole, "--eval_only")
    status, lines, err = call(predict.main, run_folder(tmp_path / "whole"), data, "--csv")
    assert status == 0 and lines.count("\n") > 1, err
    check_exports(run_folder(tmp_path / "whole"), data, tmp_path, lines)
    assert "--method lora needs the attention" in refused(*whole, "--method", "lora")
