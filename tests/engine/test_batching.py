import math
import re
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from ranks import tiny_config

from piip_scale.config.loading import load_config
from piip_scale.engine.batching import (
    accumulation_for,
    batch_line,
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
MIXED = load_config(Path(__file__).parents[2] / "configs" / "demo" / "digit_classes.py")


@given(small, small, small)
def test_a_step_has_as_many_images_on_any_ranks_that_fit(accumulation, micro, ranks):
    images = accumulation * micro * ranks
    config = tiny_config(data={"micro_batch_size": micro}, train={"images_per_step": images})
    scaled = scale_to_ranks(config, ranks)
    assert scaled.train.gradient_accumulation == accumulation
    assert images_per_step(scaled, ranks) == images_per_step(config, ranks) == images
    assert scale_to_ranks(scaled, ranks) == scaled


@given(st.integers(1, 60), small, small)
def test_what_does_not_fit_names_only_what_does(images, micro, ranks):
    assume(images % (micro * ranks))
    with pytest.raises(ConfigError, match=r"train\.images_per_step: got") as caught:
        accumulation_for(images, micro, ranks)
    for way in caught.value.fix.removeprefix("what fits: ").split("; or "):
        numbers = [int(number) for number in re.findall(r"\d+", way.split(" with ")[0])]
        assert numbers
        for number in numbers:
            if "micro_batch_size" in way:
                accumulation_for(images, number, ranks)
            elif "images_per_step" in way:
                accumulation_for(number, micro, ranks)
            else:
                size = images // number if " with " in way else micro
                assert " with " not in way or str(size) in way.split(" with ")[1]
                accumulation_for(images, size, number)


@given(st.integers(1, 60), small, small)
def test_a_plan_of_ranks_that_cannot_share_a_step_takes_the_next_larger_one_and_says_so(images, micro, ranks):
    config = tiny_config(data={"micro_batch_size": micro}, train={"images_per_step": images})
    planned, line = planned_batch(config, ranks)
    found = images_per_step(scale_to_ranks(planned, ranks), ranks)
    assert 0 <= found - images < ranks
    assert bool(line) == (found != images)


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
    assert bool(shrunk_line(config, ranks)) == (size < micro)
    # A run that goes on with other ranks keeps the order that it began with.
    assert scale_to_ranks(keep_streams(config, 48), ranks).data.num_streams == 48
