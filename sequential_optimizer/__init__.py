"""Change the optimizer in the middle of training, inside one XLA graph."""

from sequential_optimizer.lbfgs import LBFGS
from sequential_optimizer.optimizer import SequentialOptimizer
from sequential_optimizer.phase_logger import PhaseLogger
from sequential_optimizer.plotting import plot_history
from sequential_optimizer.ssbroyden import SSBroyden
from sequential_optimizer.switch_on_plateau import SwitchOnPlateau

__version__ = "0.1.0"

__all__ = [
    "LBFGS",
    "PhaseLogger",
    "SSBroyden",
    "SequentialOptimizer",
    "SwitchOnPlateau",
    "plot_history",
]
