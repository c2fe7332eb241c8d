"""Random numbers that depend on a recorded seed and on what they are for, and on nothing else."""

import numpy as np
from torch import Generator


def seed_of(*numbers: int) -> int:
    """A seed of its own for each tuple of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seeded(*numbers: int) -> Generator:
    """A generator of its own for each tuple of numbers."""
    return Generator().manual_seed(seed_of(*numbers))
