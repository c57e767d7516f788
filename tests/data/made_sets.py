"""Small made data sets for the tests of packing and streaming."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import simplejpeg

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def write_jpeg(path: Path, height: int, width: int, seed: int) -> None:
    rows, columns = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin((seed + 1) * rows / height + c + 5 * columns / width) for c in range(3)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(simplejpeg.encode_jpeg(np.stack(waves, -1).astype(np.uint8), quality=90))


def make_coco(folder: Path, num_images: int = 10, *, masks: bool = True, max_objects: int = 3) -> tuple[Path, Path]:
    """A set of small images of several sizes; image i has i % (max_objects + 1) objects, triangles as masks."""
    root = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "a"}, {"id": 2, "name": "b"}]}
    rng = np.random.default_rng(0)
    for index in range(num_images):
        height, width = 48 + 4 * (index % 5), 64 + 6 * (index % 3)
        write_jpeg(folder / "images" / f"{index}.jpg", height, width, index)
        root["images"].append({"id": 100 + index, "file_name": f"{index}.jpg", "height": height, "width": width})
        for _ in range(index % (max_objects + 1)):
            x, y = rng.integers(0, 30, 2).tolist()
            w, h = rng.integers(8, 18, 2).tolist()
            note = {"id": len(root["annotations"]), "image_id": 100 + index, "category_id": [7, 2][index % 2]}
            note |= {"bbox": [x, y, w, h], "area": w * h / 2, "iscrowd": 0}
            if masks:
                note["segmentation"] = [[x, y, x + w, y, x, y + h]]
            root["annotations"].append(note)
    path = folder / "ann.json"
    path.write_text(json.dumps(root))
    return path, folder / "images"


def make_maps(folder, count=6, values=4, size=(40, 56), ignored=255):
    """Photographs under ``images``, and under ``maps`` blocks of class numbers below ``values``, some pixels none."""
    for index in range(count):
        height, width = size[0] + index % 3, size[1] + index % 2
        write_jpeg(folder / "images" / f"scene{index % 2}" / f"photo_{index}.jpg", height, width, index)
        blocks = np.random.default_rng(index).integers(0, values, (-(-height // 8), -(-width // 8)), dtype=np.uint8)
        labels = np.kron(blocks, np.ones((8, 8), np.uint8))[:height, :width]
        labels[:3] = ignored
        path = folder / "maps" / f"scene{index % 2}" / f"photo_{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(labels).save(path)
    return folder / "images", folder / "maps"
