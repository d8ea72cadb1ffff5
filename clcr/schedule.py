"""The learning rate over a training: a linear rise, then a cosine to zero."""

import math
from collections.abc import Callable


def warmup_cosine(total: int, warmup: float) -> Callable[[int], float]:
    """The factor of the peak learning rate at each of `total` steps; warmup: the share of them over which it rises."""
    rise = max(1, round(total * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))))

    return factor
