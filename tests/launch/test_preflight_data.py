"""A preflight looks at a run's data as the run does."""

from pathlib import Path

from made_sets import make_coco

from piip_scale.data.packing.pack import pack_coco
from piip_scale.launch.preflight import _try_data

CONFIG = Path(__file__).parents[2] / "configs" / "demo" / "boxes.py"


def test_a_preflight_holds_images_to_the_runs_own_limit(tmp_path):
    pack_coco(*make_coco(tmp_path, 2), tmp_path / "set", workers=1)
    where = [f"data.{name}={str(tmp_path / 'set')!r}" for name in ("train_shards", "val_shards")]
    assert _try_data(CONFIG, where) is None
    error = _try_data(CONFIG, [*where, "data.max_pixels=99"])
    assert error is not None
    assert "at most 99 pixels are read" in error.line
