"""What a missed objective weighs in the cost of a placement."""

import numpy as np

from memserve.scheduler.cost import Floats

SLO_WEIGHT = 10.0
"""Seconds that a missed SLO is worth, and again for each time that it is missed over."""


def missed(seconds: Floats, slo: float) -> Floats:
    """The weight of predicted times beside an objective; 0 where it is kept."""
    over = seconds / slo
    return np.where(over > 1.0, SLO_WEIGHT * over, 0.0)
