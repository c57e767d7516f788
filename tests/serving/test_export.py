"""An exported model is the run's, says what it is, names nothing of its makers, and looks at images in three lines."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import CONFIG
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import piip_scale
from piip_scale.cli.app import app
from piip_scale.config.loading import config_text, load_config
from piip_scale.data.images import ImageError
from piip_scale.errors import ConfigError, DataError, ModelError
from piip_scale.serving import onnx_export
from piip_scale.serving.exporting import export_model, measured_metrics
from piip_scale.tasks.exported import exported_values
from piip_scale.tasks.kinds import build_model
from piip_scale.tasks.trained import Trained, find_trained
from piip_scale.tasks.weights import SafetensorsWeights

CLASSES = ("disc", "猫|x", "box")
METRICS = {"box_ap": 0.25, "per_class/box_ap50/猫|x": 0.5}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A config that names places of its machine, and random weights."""
    folder = tmp_path_factory.mktemp("secret")
    (folder / "tiny.py").write_text(CONFIG.replace("{shards}", str(folder)))
    places = (f"model.branches.0.pretrained={str(folder)!r}", f"data.cache.folder={str(folder)!r}")
    config = load_config(folder / "tiny.py", [f"data.classes={CLASSES!r}", *places])
    (folder / "config.py").write_text(config_text(config))
    torch.manual_seed(0)
    state = build_model(config, len(CLASSES)).state_dict()
    save_file(state, folder / "w.safetensors", {"config": config_text(config)})
    return folder / "config.py", folder / "w.safetensors"


@pytest.fixture(scope="module")
def exported(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "mine"
    (out.parent / "metrics.json").write_text(json.dumps(METRICS))
    words = ["export", *map(str, files), str(out), "--metrics", str(out.parent / "metrics.json")]
    assert "2 metrics" in CliRunner().invoke(app, words, catch_exceptions=False).output
    return out


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


def test_weights_and_predictions_are_the_runs(files, exported, image):
    found, expected = find_trained(exported), find_trained(*files)
    assert found.config.model.branches[0].pretrained is None
    assert found.config.data.augment == expected.config.data.augment
    mine, theirs = found.load().state_dict(), expected.load().state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    results = [piip_scale.load(*source, threshold=0).predict(image) for source in ((exported,), files)]
    assert results[0].values == results[1].values
    assert len(results[0].objects) == 10


def test_nothing_of_the_machine_is_in_it(files, exported):
    assert sorted(path.name for path in exported.iterdir()) == [
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json")
    ]
    for path in exported.iterdir():
        content = path.read_bytes()
        for private in (str(files[0].parent), str(Path.home()) + "/", "secret", "/tmp/"):
            assert private.encode() not in content, (path, private)
    with safe_open(exported / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("place", ["/home/me/x", "~/x", "s3://mine/x", r"C:\\x"])
def test_a_place_that_would_stay_is_refused(files, place):
    found = find_trained(*files, overrides=[f"detector.overrides.neck.note={place!r}"])
    with pytest.raises(ConfigError, match=r"detector\.overrides\.neck\.note names a place"):
        exported_values(found.config, CLASSES)


def test_the_hub_reads_the_card(exported):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    card = huggingface_hub.ModelCard.load(exported / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("piip_scale", "object-detection")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("box_ap", 0.25)
    assert "| per\\_class/box\\_ap50/猫\\|x | 0.5000 |" in card.text
    assert "| 1 | vit | 64 | 2 | 32 |" in card.text
    labels = json.loads((exported / "config.json").read_text())["id2label"]
    assert tuple(labels.values()) == CLASSES


def test_its_three_lines_are_true(exported, image, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(exported.parent)
    Image.fromarray(image).save("photo.jpg")
    (lines,) = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    exec(lines)  # what the card shows
    assert capsys.readouterr().out.strip() == "()"


def test_any_form_of_an_image_is_seen_alike(exported, image, tmp_path):
    Image.fromarray(image).save(tmp_path / "photo.png")
    model = piip_scale.load(exported, threshold=0.0)
    forms = (image, Image.fromarray(image), tmp_path / "photo.png", str(tmp_path / "photo.png"))
    first, *others = [model.predict(form) for form in forms]
    assert all(other.values == first.values for other in others)
    assert (first.size_px, first.draw().size) == ((50, 70), (640, 457))
    assert first.objects[0].mask_HW.shape == (50, 70)
    assert first.objects[0].name in CLASSES
    for wrong in (image[..., 0], image.astype(float), [1], tmp_path / "absent.png", image[:0]):
        with pytest.raises(ImageError):
            model.predict(wrong)


def test_an_image_of_16_bits_is_refused_in_either_form(exported, tmp_path):
    """As RGB its values would be cut off at 255."""
    image = Image.fromarray(np.full((40, 60), 40_000, np.uint16))
    image.save(tmp_path / "deep.png")
    model = piip_scale.load(exported)
    for form in (image, tmp_path / "deep.png"):
        with pytest.raises(ImageError, match="mode I;16, not 8-bit"):
            model.predict(form)


def test_large_weights_are_files_that_an_index_names(files, exported, tmp_path):
    report = export_model(find_trained(*files), tmp_path / "out", metrics={}, max_file_gb=0.0006)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    parts = sorted((tmp_path / "out").glob("model-*"))
    assert len(parts) > 2
    assert set(index["weight_map"].values()) == {path.name for path in parts}
    assert all(path.stat().st_size < 1e6 for path in parts)
    mine, whole = SafetensorsWeights(tmp_path / "out"), SafetensorsWeights(exported)
    assert mine.shapes == {name: whole.shapes[name] for name in mine.shapes}
    assert len(mine.shapes) == len(whole.shapes)
    assert "Nothing: the run did not evaluate" in (tmp_path / "out" / "README.md").read_text()
    assert report.num_metrics == 0


def test_what_is_there_stays_and_strangers_are_refused(files, exported, tmp_path):
    with pytest.raises(ModelError, match="is there already"):
        export_model(find_trained(*files), exported, metrics={})
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="of another library"):
        find_trained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        find_trained(tmp_path)
    (tmp_path / "m.json").write_text("[]")
    words = ["export", *map(str, files), str(tmp_path / "out"), "--metrics", str(tmp_path / "m.json")]
    with pytest.raises(DataError, match="--metrics"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    cut = Trained(find_trained(*files).config, NoWeights())
    with pytest.raises(ModelError, match="are not this config's model"):
        export_model(cut, tmp_path / "out", metrics={})


class NoWeights:
    name, shapes = "none", {}


def test_metrics_are_those_of_the_weights_that_are_exported(tmp_path):
    lines = [
        {"kind": "evaluation", "step": 4, "eval/box_ap": 0.1},
        {"kind": "evaluation", "step": 6, "eval/box_ap": 0.2, "time": 1.0},
        {"kind": "step", "step": 6, "loss/total": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    plain = dict(averaged=False, keeps_averages=False)
    assert measured_metrics(tmp_path, 6, **plain) == {"box_ap": 0.2}
    assert measured_metrics(tmp_path, 5, **plain) == {}
    assert measured_metrics(tmp_path, None, **plain) == {}
    # A run with averages measures these, and not the weights beside them.
    assert measured_metrics(tmp_path, 6, averaged=False, keeps_averages=True) == {}
    assert measured_metrics(tmp_path, 6, averaged=True, keeps_averages=True) == {"box_ap": 0.2}


def test_importing_the_package_is_cheap():
    code = "import sys, piip_scale; print(piip_scale.load.__name__, 'torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.split() == ["load", "False", "False"]


@pytest.mark.parametrize(
    ("size", "parts"),
    [
        ("64", ["--onnx: got '64'", "height and width"]),
        ("64x40", ["--onnx: got '64x40'", "multiples of 32 px"]),
    ],
)
def test_a_graph_of_another_size_is_refused_in_one_line(files, tmp_path, size, parts):
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    done = CliRunner().invoke(app, ["export", *map(str, files), str(tmp_path / "out"), "--onnx", size])
    assert isinstance(done.exception, ConfigError)
    for part in parts:
        assert part in done.exception.line
    assert list(tmp_path.iterdir()) == []


def test_what_no_graph_can_be_written_of_says_why(monkeypatch, files):
    config = find_trained(*files).config
    monkeypatch.setattr(onnx_export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"ONNX needs onnx, onnxruntime.*piip-scale\[onnx\]"):
        onnx_export.check_onnx(config, 10, (64, 64))
    monkeypatch.setattr(onnx_export.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ModelError, match="7,291,000,000 parameters cannot be written as ONNX"):
        onnx_export.check_onnx(config, 7_291_000_000, (64, 64))


class Growing(torch.nn.Module):
    """What it computes follows the image."""

    not_static = ""

    def static_outputs(self, images_BCHW):
        return {"much": images_BCHW * 2 if images_BCHW.sum() > 0 else images_BCHW.sum(0)}


class Drawn(torch.nn.Module):
    """Drawn anew at each call."""

    not_static = ""

    def static_outputs(self, images_BCHW):
        return {"drawn": torch.rand_like(images_BCHW)}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "part"), [(Growing(), "cannot write this model"), (Drawn(), "something else")])
def test_a_graph_that_would_be_wrong_is_none(files, tmp_path, model, part):
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    with pytest.raises(ModelError, match=part) as caught:
        onnx_export.write_onnx(model, find_trained(*files).config, (32, 32), tmp_path / "model.onnx")
    assert "\n" not in caught.value.line


@pytest.mark.slow
def test_the_graph_computes_what_torch_does(files, tmp_path):
    """By onnxruntime, of an image that neither has seen."""
    runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    words = ["export", *map(str, files), str(tmp_path / "out"), "--onnx", "64x96"]
    told = CliRunner().invoke(app, words, catch_exceptions=False).output
    assert "neck and heads are left out" in told
    assert re.search(
        r"images to features_\d+ 1x\d+.* Largest difference from torch \S+e-0\d .* ms, on \d+ thread", told
    )
    graph = (tmp_path / "out" / "model.onnx").read_bytes()
    assert not any(private in graph for private in (b"piip_scale", b"/tmp/", b"site-packages", b".py"))
    found = find_trained(tmp_path / "out")
    image = np.random.default_rng(1).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    augment = found.config.data.augment
    pixels = (torch.from_numpy(image).permute(0, 3, 1, 2).float() - torch.tensor(augment.mean).view(3, 1, 1)) / (
        torch.tensor(augment.std).view(3, 1, 1)
    )
    with torch.no_grad():
        expected = found.load().backbone(pixels)
    outputs = runtime.InferenceSession(tmp_path / "out" / "model.onnx").run(None, {"images": image})
    for one, other in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=1e-4 * float(other.abs().max()))
