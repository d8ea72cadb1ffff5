"""The learning rate's course over a training."""

import math
from collections.abc import Callable


def warmup_cosine(total: int, warmup: float) -> Callable[[int], float]:
    """The rate's factor by step: up to 1 over the first share `warmup` of `total` steps, then along a cosine to 0."""
    rise = max(1, round(total * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))))

    return factor
