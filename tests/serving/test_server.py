"""The server answers images, says no to everything else in one line, and never has more waiting than it may."""

import base64
import importlib.util
import io
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from small_answering import small_answering
from small_detectors import CLASSES
from typer.testing import CliRunner

from piip_scale.cli.app import app
from piip_scale.cli.serve import listening
from piip_scale.errors import KernelError, WorldError
from piip_scale.serving.branch_shares import WHOLE, BranchShares
from piip_scale.serving.server import Limits, build_app

FORM = "multipart/form-data"
LIMITS = Limits(mib=0.2, pixels=40_000, seconds=30, waiting=1)


@pytest.fixture(scope="module")
def answering():
    return small_answering(LIMITS.pixels)


@pytest.fixture(scope="module")
def client(answering):
    with TestClient(build_app(answering, LIMITS), raise_server_exceptions=False) as client:
        yield client


def image_bytes(size=(90, 60), kind="JPEG", **options):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def bomb():
    """A PNG of a hundred megapixels in a few kB."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (1251 * 10_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_an_image_is_answered_alike_as_a_body_and_in_a_form(client):
    content = image_bytes()
    raw = client.post("/predict?threshold=0", content=content)
    form = client.post("/predict?threshold=0", files={"image": ("a.jpg", content, "image/jpeg")})
    assert raw.status_code == form.status_code == 200
    first, second = raw.json(), form.json()
    assert (first["width_px"], first["height_px"]) == (90, 60)
    assert first["objects"] == second["objects"] != []
    assert {found["class"] for found in first["objects"]} <= set(CLASSES)
    some = client.post(f"/predict?threshold={first['objects'][0]['score'] - 1e-4}", content=content).json()["objects"]
    assert 1 <= len(some) < len(first["objects"])
    assert client.post("/predict", content=content).json()["objects"] == []


def test_a_photograph_is_seen_upright_and_drawn(client):
    exif = Image.Exif()
    exif[274] = 6
    answer = client.post("/predict?picture=true", content=image_bytes(exif=exif)).json()
    assert (answer["width_px"], answer["height_px"]) == (60, 90)
    with Image.open(io.BytesIO(base64.b64decode(answer["picture_png"]))) as picture:
        assert picture.size == (427, 640)


def test_branches_shares_are_of_what_each_adds_to_the_merged_map(client, answering):
    answer = client.post("/predict?threshold=0&branches=true", content=image_bytes()).json()
    for shares in (answer["branch_shares"], *(found["branch_shares"] for found in answer["objects"])):
        assert len(shares) == 2
        assert sum(shares) == pytest.approx(1, abs=1e-3)
    model = answering._looker.model
    parts = model.backbone.mergings[-1].parts
    with torch.no_grad():
        before = parts[0].weight.clone()
        try:
            parts[0].weight.zero_()
            nothing = client.post("/predict?branches=true", content=image_bytes()).json()
        finally:
            parts[0].weight.copy_(before)
    assert nothing["branch_shares"] == [0, 1]
    shares = BranchShares(model)
    shares._lengths = {0: torch.tensor([[1.0, 3.0]]), 1: torch.tensor([[1.0] * 4] * 4)}
    assert shares.of([WHOLE, (0.0, 0.0, 0.1, 0.1), (0.95, 0.5, 1.0, 0.5)]) == [
        [0.6667, 0.3333],
        [0.5, 0.5],
        [0.75, 0.25],
    ]


@pytest.mark.parametrize(
    ("content", "code", "part"),
    [
        (image_bytes()[:900], 415, "truncated"),
        (b"\xff\xd8\xff\xe0 no header", 415, "cannot be decoded"),
        (b"good morning", 415, "in no format"),
        (b"", 400, "no image was sent"),
        (bomb(), 413, "100000000 pixels; at most 40000"),
        (b"\0" * 300_000, 413, "larger than 0.2 MiB"),
        ((b"\0" * 60_000 for _ in range(5)), 413, "larger than 0.2 MiB"),
    ],
    ids=["truncated", "no header", "text", "empty", "bomb", "large", "large in parts"],
)
def test_what_is_no_image_is_refused_in_one_line(client, content, code, part):
    refused = client.post("/predict", content=content)
    assert (refused.status_code, list(refused.json())) == (code, ["error"])
    assert part in refused.json()["error"]
    assert "Traceback" not in refused.text


@pytest.mark.parametrize(
    ("send", "code"),
    [
        (lambda c: c.get("/predict"), 405),
        (lambda c: c.put("/predict", content=b"x"), 405),
        (lambda c: c.get("/nothing"), 404),
        (lambda c: c.post("/predict?threshold=2", content=image_bytes()), 422),
        (lambda c: c.post("/predict?threshold=nan", content=image_bytes()), 422),
        (lambda c: c.post("/predict", data={"image": "text"}, files={}), 415),
        (
            lambda c: c.post(
                "/predict", content=b"--x\r\nbad", headers={"content-type": "multipart/form-data; boundary=x"}
            ),
            400,
        ),
        (lambda c: c.post("/predict", content=b"x", headers={"content-type": "multipart/form-data"}), 400),
    ],
    ids=["get", "put", "path", "threshold", "nan", "form of text", "damaged form", "form without boundary"],
)
def test_other_requests_are_refused(client, send, code):
    refused = send(client)
    assert (refused.status_code, list(refused.json())) == (code, ["error"])
    assert isinstance(refused.json()["error"], str)


def test_health_metrics_and_the_page(client):
    told = client.get("/health").json()
    assert (told["status"], told["task"], told["classes"], told["step"]) == ("ok", "detection", list(CLASSES), 7)
    assert len(told["branches"]) == 2
    before = counted(client)
    client.post("/predict", content=image_bytes())
    client.get("/no/such/path")
    after = counted(client)
    assert (
        after[("piip_requests_total", "/predict", "200")]
        == before.get(("piip_requests_total", "/predict", "200"), 0) + 1
    )
    assert after[("piip_predict_seconds_count", None, None)] == before[("piip_predict_seconds_count", None, None)] + 1
    assert ("piip_requests_total", "other", "404") in after
    assert after[("process_resident_memory_bytes", None, None)] > 1e6
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    # It brings all that it shows.
    assert "http://" not in page.text
    assert "https://" not in page.text


def counted(client):
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = (sample for family in families for sample in family.samples)
    return {(one.name, one.labels.get("path"), one.labels.get("code")): one.value for one in samples}


class Slow:
    about = {}

    def __init__(self) -> None:
        self.asked, self.go_on = [], threading.Event()

    def answer(self, question):
        self.asked.append(question.content)
        self.go_on.wait(240)
        return {}


def in_threads(client, contents):
    codes = {}
    threads = []
    for content in contents:
        thread = threading.Thread(
            target=lambda c=content: codes.update({c: client.post("/predict", content=c).status_code})
        )
        thread.start()
        threads.append(thread)
        # One after the other, so that it is known who comes too late.
        wait_until(lambda c=content: c in codes or client.get("/health").json()["waiting"] >= min(len(threads), 2))
    return codes, threads


def wait_until(true):
    deadline = time.monotonic() + 240
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_more_than_may_wait_are_sent_away_and_the_rest_is_answered():
    slow = Slow()
    with TestClient(build_app(slow, LIMITS)) as client:
        codes, threads = in_threads(client, [b"1", b"2", b"3"])
        threads[2].join(240)
        assert codes == {b"3": 503}
        slow.go_on.set()
        for thread in threads:
            thread.join(240)
        assert (codes, slow.asked) == ({b"1": 200, b"2": 200, b"3": 503}, [b"1", b"2"])
        assert client.get("/health").json()["waiting"] == 0


def test_what_is_not_answered_in_time_is_given_up_and_does_not_begin():
    slow = Slow()
    with TestClient(build_app(slow, Limits(seconds=0.2, waiting=5))) as client:
        codes, threads = in_threads(client, [b"1", b"2"])
        for thread in threads:
            thread.join(240)
        assert codes == {b"1": 504, b"2": 504}
        slow.go_on.set()
        wait_until(lambda: not client.get("/health").json()["waiting"])
        # On a busy machine the first may not have begun in time either, and another may come too late.
        assert b"2" not in slow.asked
        wait_until(lambda: client.post("/predict", content=b"3").status_code == 200)


def test_a_place_that_is_taken_is_one_line_before_anything_is_loaded():
    with listening("127.0.0.1", 0) as place:
        place.listen()
        with pytest.raises(WorldError, match=r"cannot listen on 127\.0\.0\.1:\d+: got 'Address already in use'"):
            CliRunner().invoke(app, ["serve", "nowhere", "--port", str(place.getsockname()[1])], catch_exceptions=False)
    with pytest.raises(WorldError, match="cannot listen on no such host"):
        listening("no such host", 0)


def test_without_the_extra_it_is_one_line(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "fastapi" else find(name, *a))
    with pytest.raises(KernelError, match=r"serving needs fastapi; .*piip-scale\[serve\]"):
        CliRunner().invoke(app, ["serve", "nowhere"], catch_exceptions=False)
