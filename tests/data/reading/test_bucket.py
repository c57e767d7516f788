"""A set in a bucket, from servers of S3 and GCS on this machine: the same stream as from its folder."""

import contextlib

import pytest
from made_sets import make_coco
from streams import content, loader

from piip_scale.config.run import CacheConfig
from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.reading.set_files import has_manifest
from piip_scale.data.reading.shards import ShardSet
from piip_scale.errors import FetchError

fsspec = pytest.importorskip("fsspec")
FOLDER = "coco/train"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    pack_coco(*make_coco(folder, 41), folder / "out", target_samples=5, workers=1)
    return folder / "out"


@contextlib.contextmanager
def s3_bucket(files):
    """What clients of an S3 server are told whose bucket holds some files."""
    reason = "S3 is tested against moto's server: install the dev extra"
    pytest.importorskip("s3fs", reason="needs the s3 extra")
    boto3, moto = (pytest.importorskip(name, reason=reason) for name in ("boto3", "moto.server"))
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    options = {"endpoint_url": f"http://127.0.0.1:{port}", "key": "key", "secret": "secret"}
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=options["endpoint_url"], **keys)
    client.create_bucket(Bucket="sets")
    for path in files:
        client.put_object(Bucket="sets", Key=f"{FOLDER}/{path.name}", Body=path.read_bytes())
    yield options
    server.stop()


@contextlib.contextmanager
def gcs_bucket(files):
    """The same of a GCS server."""
    pytest.importorskip("gcsfs", reason="needs the gcs extra")
    reason = "GCS is tested against an emulator: install the dev extra"
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason=reason)
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="sets")
    server.start()
    url = f"http://127.0.0.1:{server._api._httpd.server_address[1]}"
    options = {"endpoint_url": url, "token": "anon"}
    import requests

    for path in files:
        query = {"uploadType": "media", "name": f"{FOLDER}/{path.name}"}
        requests.post(f"{url}/upload/storage/v1/b/sets/o", params=query, data=path.read_bytes()).raise_for_status()
    yield options
    server.stop()


@pytest.fixture(scope="module", params=["s3", "gs"])
def protocol(request, packed):
    """Of a bucket with the set in it, whose client knows where the server is."""
    make = {"s3": s3_bucket, "gs": gcs_bucket}[request.param]
    with make(packed.iterdir()) as options, pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, request.param, options)
        yield request.param


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bucket_streams_as_a_folder_does(packed, protocol, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("piip_scale.data.reading.sources._BLOCK_BYTES", 3000)
    remote = loader(f"{protocol}://sets/{FOLDER}", cache={"folder": str(tmp_path)}, workers=workers)
    expected = [content(batch) for batch in loader(packed).batches(0)]
    assert [content(batch) for batch in remote.batches(0)] == expected


def test_a_bucket_that_is_not_there_is_one_line(protocol, tmp_path):
    for location in (f"{protocol}://sets/coco/val", f"{protocol}://absent/coco"):
        with pytest.raises(
            FetchError, match=f"^manifest.json cannot be fetched from {location}: got 'it is not there'"
        ):
            ShardSet.open(location, cache=CacheConfig(folder=str(tmp_path)))
    assert not has_manifest(f"{protocol}://absent/coco", CacheConfig(folder=str(tmp_path)))
