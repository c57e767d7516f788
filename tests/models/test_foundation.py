"""Foundation models as branches, against the libraries that own them: random weights, through the files' own names."""

import pytest
from foundation import CASES, SIZES, TOLERANCE, compare


@pytest.mark.parametrize("size", ["odd", *(pytest.param(size, marks=pytest.mark.slow) for size in ("wide", "its own"))])
@pytest.mark.parametrize("case", CASES)
def test_tokens_and_gradients_are_the_librarys_after_every_block(tmp_path, case, size):
    tokens, gradients = compare(case, SIZES[size], tmp_path)
    assert tokens <= TOLERANCE
    assert gradients <= TOLERANCE
