"""Training: paired draws, averaged networks, a loop that resumes to the bit."""

from .averages import Averages
from .config import TrainConfig
from .draws import Draws
from .engine import Accelerated, Engine
from .loop import Diverged, Trainee, Trainer
from .validation import Validation

__all__ = [
    "Accelerated",
    "Averages",
    "Diverged",
    "Draws",
    "Engine",
    "TrainConfig",
    "Trainee",
    "Trainer",
    "Validation",
]
