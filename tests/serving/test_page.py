"""The page in a real browser: an image that is dropped on it is drawn, listed, and filtered by the slider."""

import json
import re
import shutil
import subprocess
import threading
import time
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from fastapi.responses import HTMLResponse, Response
from PIL import Image
from small_answering import small_answering

from piip_scale.serving.server import Limits, build_app

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Drops an image on the page, as a hand would, and writes down what it then shows.
HARNESS = Path(__file__).with_name("harness.html")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    app = build_app(small_answering(1_000_000), Limits())
    path = tmp_path_factory.mktemp("page") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(path)
    app.get("/harness")(lambda: HTMLResponse(HARNESS.read_text()))
    app.get("/photo.png")(lambda: Response(path.read_bytes(), media_type="image/png"))
    app.get("/broken.png")(lambda: Response(path.read_bytes()[:500], media_type="image/png"))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 240
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(240)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_an_image_is_dropped_drawn_listed_and_filtered(address, tmp_path):
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=60000",
    ]
    done = subprocess.run(
        [BROWSER, *words, "--dump-dom", f"{address}/harness"], capture_output=True, text=True, timeout=240, check=True
    )
    found = re.search(r'data-told="([^"]*)"', done.stdout)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    told = json.loads(unescape(found[1]))
    assert "error" not in told, told
    assert told["about"] == "detection, 3 classes, 2 branches"
    assert (told["none"], told["drawn"], told["kept"]) == (0, True, told["all"])
    assert told["title"] == f"{told['all']} of {told['all']} objects"
    assert told["all"] > 0
    assert told["bars"] == 2 * told["all"]
    assert re.fullmatch(r"(branch \d \(vit, \d+ px\): \d+ %){2}", told["key"])
    assert set(told["classes"]) <= {"disc", "box", "star"}
    assert told["state"].startswith("photo.png: 90 x 60 px in ")
    assert "broken.png" not in told["refused"]
    assert "cannot be decoded" in told["refused"]
