"""Broken samples: replaced, counted, told once in a run, and too many of them are an error."""

import json
import logging

import pytest
from damaged import damage
from made_sets import make_coco
from streams import content, loader

from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.reading.broken import BrokenSample, BrokenSamples
from piip_scale.errors import DataError

NUM_SAMPLES = 20


@pytest.fixture
def packed(tmp_path):
    pack_coco(*make_coco(tmp_path, NUM_SAMPLES), tmp_path / "out", target_samples=7)
    return tmp_path / "out"


@pytest.fixture
def told(caplog, monkeypatch):
    """Keys in the order they were told of."""
    monkeypatch.setattr(logging.getLogger("piip_scale"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="piip_scale"):
        yield lambda: [record.args[0] for record in caplog.records if "replaced by a neighbour" in record.getMessage()]


def read(ranks, epochs):
    for epoch in epochs:
        for rank in ranks:
            list(rank.batches(epoch))


@pytest.mark.parametrize("workers", [0, 2])
def test_one_is_replaced_counted_and_told_once(packed, workers, told):
    damage(packed, 5)
    stream = loader(packed, workers=workers, max_broken_share=0.05, micro_batch_size=5)
    first, second = (list(stream.batches(epoch)) for epoch in (0, 1))
    assert (stream.num_seen, stream.num_broken) == (40, 2)
    assert told() == ["000000000105"]
    keys = [info.key for batch in first for info in batch.infos]
    assert len(keys) == NUM_SAMPLES
    assert keys.count("000000000105") == 0
    assert keys.count("000000000106") == 2
    again = list(loader(packed, max_broken_share=0.05, micro_batch_size=5).batches(1))
    assert [content(batch) for batch in again] == [content(batch) for batch in second]


def test_the_ranks_of_a_run_and_its_later_starts_tell_each_once(packed, tmp_path, told):
    damage(packed, 5, 12)
    keys = {"max_broken_share": 0.1, "num_ranks": 2, "micro_batch_size": 2, "broken_samples": tmp_path / "broken"}
    for start in range(2):
        ranks = [loader(packed, rank=rank, **keys) for rank in range(2)]
        read(ranks, range(6 * start, 6 * start + 6))
        assert sum(rank.num_broken for rank in ranks) == 12
        assert all(rank.num_broken for rank in ranks), "each rank should meet one in each start"
    assert sorted(told()) == ["000000000105", "000000000112"]
    noted = [json.loads(path.read_text()) for path in (tmp_path / "broken").rglob("*.json")]
    assert sorted(note["key"] for note in noted) == sorted(told())
    assert all("checksum" in note["reason"] for note in noted)


def test_another_set_of_a_run_has_a_count_of_its_own(tmp_path):
    first, second = (BrokenSamples("here", 1, tmp_path / name) for name in ("train", "val"))
    first.add(BrokenSample("a", "why"))
    second.add(BrokenSample("b", "why"))
    assert (len(first), len(second)) == (1, 1)


def test_too_many_stop_the_run(packed):
    damage(packed, 5, 9)
    with pytest.raises(
        DataError, match=r"too many broken samples in .*, the last 0000000001.*: got 2; at most 1.8, by"
    ):
        list(loader(packed, max_broken_share=0.09, micro_batch_size=5).batches(0))
    damage(packed, *range(NUM_SAMPLES))
    with pytest.raises(DataError, match="no whole sample among 16"):
        list(loader(packed, workers=1).batches(0))


@pytest.mark.parametrize("together", [True, False])
def test_too_many_are_those_of_all_ranks_together(packed, tmp_path, together):
    """Two ranks that find one each: too many for the run where they know of each other, else for each of them."""
    damage(packed, 5, 12)
    keys = {"max_broken_share": 0.05, "num_ranks": 2, "micro_batch_size": 2}
    folder = tmp_path / "broken" if together else None
    ranks = [loader(packed, rank=rank, broken_samples=folder, **keys) for rank in range(2)]
    with pytest.raises(DataError, match=f"got {1 + together}; at most {1 if together else 0.5}, by"):
        read(ranks, range(4))


@pytest.mark.parametrize("folder", ["file", "file/set"])
def test_a_folder_that_cannot_be_written_hides_nothing(tmp_path, told, folder):
    (tmp_path / "file").write_text("")
    samples = BrokenSamples("here", 1, tmp_path / folder)
    samples.add(BrokenSample("a", "why"))
    samples.add(BrokenSample("a", "why"))
    with pytest.raises(DataError, match="got 2"):
        samples.add(BrokenSample("b", "why"))
    assert told() == ["a", "b"]
