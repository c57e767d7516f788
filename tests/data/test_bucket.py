"""A set in a bucket, from an S3 server on this machine: the same stream as from its folder."""

import pytest
from made_sets import make_coco
from streams import content, loader

from piip_scale.config.run import CacheConfig
from piip_scale.data.pack import pack_coco
from piip_scale.data.set_files import has_manifest
from piip_scale.data.shards import ShardSet
from piip_scale.errors import FetchError

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("s3fs", reason="needs the s3 extra")
boto3 = pytest.importorskip("boto3", reason="S3 is tested against moto's server: install the dev extra")
moto = pytest.importorskip("moto.server", reason="S3 is tested against moto's server: install the dev extra")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    pack_coco(*make_coco(folder, 41), folder / "out", target_samples=5, workers=1)
    return folder / "out"


@pytest.fixture(scope="module")
def bucket(packed):
    """The set in a bucket of an S3 server on this machine, and what its clients are told."""
    s3 = moto.ThreadedMotoServer(port=0, verbose=False)
    s3.start()
    _, port = s3.get_host_and_port()
    options = {"endpoint_url": f"http://127.0.0.1:{port}", "key": "key", "secret": "secret"}
    client = boto3.client(
        "s3",
        endpoint_url=options["endpoint_url"],
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="sets")
    for path in packed.iterdir():
        client.put_object(Bucket="sets", Key=f"coco/train/{path.name}", Body=path.read_bytes())
    yield options
    s3.stop()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bucket_streams_as_a_folder_does(packed, bucket, tmp_path, monkeypatch, workers):
    monkeypatch.setitem(fsspec.config.conf, "s3", bucket)
    monkeypatch.setattr("piip_scale.data.sources._BLOCK_BYTES", 3000)
    remote = loader("s3://sets/coco/train", cache={"folder": str(tmp_path)}, workers=workers)
    expected = [content(batch) for batch in loader(packed).batches(0)]
    assert [content(batch) for batch in remote.batches(0)] == expected


def test_a_bucket_that_is_not_there_is_one_line(bucket, tmp_path, monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "s3", bucket)
    for location in ("s3://sets/coco/val", "s3://absent/coco"):
        with pytest.raises(
            FetchError, match=f"^manifest.json cannot be fetched from {location}: got 'it is not there'"
        ):
            ShardSet.open(location, cache=CacheConfig(folder=str(tmp_path)))
    assert not has_manifest("s3://absent/coco", CacheConfig(folder=str(tmp_path)))
