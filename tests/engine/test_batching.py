import math
import re
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from ranks import tiny_config

from piip_scale.config.loading import load_config
from piip_scale.engine.batching import (
    batch_line,
    can_share,
    images_per_step,
    keep_images_per_step,
    keep_streams,
    planned_batch,
    scale_to_ranks,
    shrunk_line,
)
from piip_scale.engine.schedule import lr_factor
from piip_scale.errors import ConfigError

small = st.integers(1, 12)
CONFIGS = Path(__file__).parents[2] / "configs"
MIXED = load_config(CONFIGS / "demo" / "digit_classes.py")
H6B = load_config(CONFIGS / "coco" / "mask_rcnn_h6b_1024_512.py")


@given(small, small, small)
def test_a_step_has_as_many_images_on_any_ranks_that_fit(accumulation, micro, ranks):
    images = accumulation * micro * ranks
    config = tiny_config(data={"micro_batch_size": micro}, train={"images_per_step": images})
    scaled = scale_to_ranks(config, ranks)
    assert scaled.train.gradient_accumulation == accumulation
    assert images_per_step(scaled, ranks) == images_per_step(config, ranks) == images
    assert scale_to_ranks(scaled, ranks) == scaled


def taking(config, images, micro):
    """The run with steps and micro-batches of so many images."""
    data = type(config.data).model_validate(
        config.data.model_dump() | {"num_streams": "auto", "micro_batch_size": micro}
    )
    return config.model_copy(
        update={"data": data, "train": config.train.model_copy(update={"images_per_step": images})}
    )


def passed(line):
    """What a line says to pass: images of a step, and the rate."""
    told = dict(re.findall(r"--set (\S+)=([^\s,]+)", line))
    assert set(told) == {"train.images_per_step", "optimizer.lr"}
    return int(told["train.images_per_step"]), float(told["optimizer.lr"])


@pytest.mark.parametrize("config", [tiny_config(), MIXED], ids=["any", "even"])
@given(images=st.integers(1, 60), pairs=small, ranks=small)
def test_ranks_that_cannot_share_a_step_are_told_what_to_pass_and_planned_with_it(config, images, pairs, ranks):
    config = taking(config, images, 2 * pairs)
    assume(not can_share(config, images, ranks))
    with pytest.raises(ConfigError, match=f"^{ranks} ranks cannot share the {images} images") as caught:
        scale_to_ranks(config, ranks)
    planned, line = planned_batch(config, ranks)
    larger, rate = passed(caught.value.fix)
    assert (larger, rate) == passed(line) == (planned.train.images_per_step, planned.optimizer.lr)
    assert images_per_step(scale_to_ranks(planned, ranks), ranks) == larger > images
    assert not any(can_share(config, number, ranks) for number in range(images, larger))
    assert rate / larger == pytest.approx(config.optimizer.lr / images, rel=1e-5)
    named = re.search(r"take ([\d, or]+) ranks", caught.value.fix)
    fitting = [number for number in range(1, images + 1) if can_share(config, images, number)]
    assert [int(number) for number in re.findall(r"\d+", named[1] if named else "")] == fitting
    assert bool(named) == ("to keep it take" in line)


@pytest.mark.parametrize("config", [tiny_config(), MIXED], ids=["any", "even"])
@given(share=small, pairs=small, ranks=small)
def test_ranks_that_can_share_a_step_are_planned_as_they_are(config, share, pairs, ranks):
    images = 2 * share * ranks
    config = taking(config, images, 2 * pairs)
    assert can_share(config, images, ranks)
    assert planned_batch(config, ranks) == (config, "")
    assert images_per_step(scale_to_ranks(config, ranks), ranks) == images


def test_a_rate_that_a_rule_makes_is_not_told():
    rule = {"lr_scaling": "linear", "reference_images_per_step": 16}
    planned, line = planned_batch(tiny_config(optimizer=rule, train={"images_per_step": 16}), 32)
    assert "planned with --set train.images_per_step=32, which is another recipe" in line
    assert planned.optimizer == tiny_config(optimizer=rule).optimizer


@given(small, small, small, small)
def test_a_resumed_run_keeps_its_images_on_any_ranks_that_share_them(accumulation, micro, ranks, others):
    images = accumulation * micro * ranks
    config = tiny_config(data={"micro_batch_size": micro, "num_streams": "auto"})
    if images % others == 0:
        kept = scale_to_ranks(keep_images_per_step(config, images, others), others)
        assert images_per_step(kept, others) == images
        # As large as memory was found to hold, where that divides.
        size = kept.data.micro_batch_size
        assert size == micro if images // others % micro == 0 else size < micro
        assert scale_to_ranks(keep_images_per_step(kept, images, others), others) == kept
    elif images_per_step(config, others) != images:
        with pytest.raises(ConfigError, match=f"whose steps have {images} images") as caught:
            keep_images_per_step(config, images, others)
        named = {int(number) for number in re.findall(r"\d+", caught.value.fix)}
        assert named == {number for number in range(1, images + 1) if images % number == 0}


@given(
    st.integers(1, 6), st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 6, 8, 12]), st.sampled_from([1, 2, 3, 4, 6, 8])
)
def test_micro_batches_that_are_mixed_in_pairs_stay_even_on_other_ranks(accumulation, pairs, ranks, others):
    data = MIXED.data.model_copy(update={"num_streams": 48, "micro_batch_size": 2 * pairs})
    config = MIXED.model_copy(update={"data": data})
    assert config.data.augment.mix is not None
    images = accumulation * 2 * pairs * ranks
    if images % others == 0 and images // others % 2 == 0:
        assert keep_images_per_step(config, images, others).data.micro_batch_size % 2 == 0
    elif images % others == 0:
        with pytest.raises(ConfigError, match="in pairs"):
            keep_images_per_step(config, images, others)


def test_a_resumed_run_that_is_told_other_images_outright_is_refused():
    asked = tiny_config(train={"images_per_step": 16})
    assert keep_images_per_step(asked, 16, 2) is asked
    with pytest.raises(ConfigError, match="got 16; the run to resume has steps of 8 images"):
        keep_images_per_step(asked, 8, 2)


@pytest.mark.parametrize(("rule", "power"), [("linear", 1.0), ("sqrt", 0.5)])
@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_rate_and_warm_up_follow_the_images_of_a_step(rule, power, ranks):
    config = tiny_config(
        optimizer={"lr": 1e-4, "lr_scaling": rule, "reference_images_per_step": 16}, schedule={"warmup_steps": 480}
    )
    scaled, ratio = scale_to_ranks(config, ranks), 2 * ranks / 16
    assert scaled.optimizer.lr == pytest.approx(1e-4 * math.pow(ratio, power))
    # Half-way through warm-up as many images have been seen.
    assert lr_factor(scaled.schedule, round(240 / ratio), 10**9) == pytest.approx(0.5, abs=0.01)
    assert scale_to_ranks(scaled, ranks) == scaled
    assert f"lr {scaled.optimizer.lr:.4g}" in batch_line(config, ranks)


def test_at_the_reference_nothing_changes_and_without_a_rule_neither():
    given_rule = tiny_config(optimizer={"lr": 3e-4, "lr_scaling": "linear", "reference_images_per_step": 16})
    assert scale_to_ranks(given_rule, 8).optimizer.lr == 3e-4
    plain = tiny_config(train={"gradient_accumulation": 3})
    streams = plain.data.model_copy(update={"num_streams": 48})
    assert scale_to_ranks(plain, 8) == plain.model_copy(update={"data": streams})
    assert batch_line(plain, 8) == "48 images a step: 8 ranks x 2 x 3 accumulated"


LARGER = "pass --set train.images_per_step={} --set optimizer.lr={}, which is another recipe"


@pytest.mark.parametrize(
    ("ranks", "batch", "shrunk"),
    [
        (1, "1 ranks x 2 x 8 accumulated", ""),
        (8, "8 ranks x 2 x 1 accumulated", ""),
        (16, "16 ranks x 1 x 1 accumulated", f"to keep 2 take 1, 2, 4 or 8 ranks or {LARGER.format(32, 0.0002)}"),
    ],
)
def test_the_published_recipe_meets_clusters_that_share_its_16_images(ranks, batch, shrunk):
    assert batch_line(H6B, ranks) == f"16 images a step: {batch}"
    assert shrunk_line(H6B, ranks).endswith(shrunk)
    assert bool(shrunk_line(H6B, ranks)) == bool(shrunk)


@pytest.mark.parametrize(("ranks", "rate"), [(32, "0.0002"), (64, "0.0004"), (512, "0.0032")])
def test_the_published_recipe_meets_larger_clusters(ranks, rate):
    refusal = (
        f"{ranks} ranks cannot share the 16 images of train.images_per_step; each takes as many, so these are a "
        f"multiple of {ranks}; take 1, 2, 4, 8 or 16 ranks or {LARGER.format(ranks, rate)}"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(refusal)}$"):
        scale_to_ranks(H6B, ranks)
    planned, _ = planned_batch(H6B, ranks)
    assert batch_line(planned, ranks) == f"{ranks} images a step: {ranks} ranks x 1 x 1 accumulated"


@pytest.mark.parametrize(
    ("section", "keys", "told"),
    [
        ("train", {"images_per_step": 16, "gradient_accumulation": 2}, "images_per_step=16 decides"),
        ("optimizer", {"lr_scaling": "sqrt"}, "belong together"),
        ("optimizer", {"reference_images_per_step": 16}, "belong together"),
        ("train", {"images_per_step": 0}, "greater than 0"),
    ],
)
def test_rules_that_contradict_are_refused(section, keys, told):
    with pytest.raises(ConfigError, match=told):
        tiny_config(**{section: keys})


@given(small, st.integers(1, 8), st.sampled_from([1, 2, 3, 8, 16, 32, 64, 96, 128, 512]))
def test_a_recipes_images_are_shared_by_micro_batches_as_large_as_they_can_be(share, micro, ranks):
    config = tiny_config(
        data={"micro_batch_size": micro, "num_streams": "auto"}, train={"images_per_step": share * ranks}
    )
    scaled = scale_to_ranks(config, ranks)
    size = scaled.data.micro_batch_size
    assert size == max(number for number in range(1, micro + 1) if share % number == 0)
    assert size * scaled.train.gradient_accumulation == share
    assert scaled.data.num_streams % ranks == 0
    line = shrunk_line(config, ranks)
    assert bool(line) == (size < micro)
    if line:
        assert passed(line)[0] % (micro * ranks) == 0
        for number in re.findall(r"\d+", re.search(r"to keep \d+ (take [^p]+)?", line)[1] or ""):
            assert scale_to_ranks(config, int(number)).data.micro_batch_size == micro
    # A run that goes on with other ranks keeps the order that it began with.
    assert scale_to_ranks(keep_streams(config, 48), ranks).data.num_streams == 48
