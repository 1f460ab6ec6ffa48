"""Which held-out rows are measured."""

import numpy as np
import pytest

from postrain.training.evaluate import spread


@pytest.mark.parametrize("total,count", [(10, 3), (100, 7), (7, 7), (5, 9), (4, 1)])
def test_rows_of_the_loss_are_spread_evenly(total, count):
    chosen = spread(range(total), count)
    assert len(chosen) == min(total, count) == len(set(chosen)) and chosen[0] == 0
    if 1 < count < total:
        gaps = np.diff([*chosen, total])
        assert gaps.max() - gaps.min() <= 1


def test_zero_is_all():
    assert spread(range(5), 0) == list(range(5))
