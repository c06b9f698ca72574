"""Change the optimizer in the middle of training, inside one XLA graph."""

from sequential_optimizer.optimizer import SequentialOptimizer

__version__ = "0.1.0"

__all__ = ["SequentialOptimizer"]
