"""Training: paired draws, an averaged network, a loop that resumes to the bit."""

from .draws import Draws
from .loop import Diverged, TrainConfig, Trainee, Trainer, Validation

__all__ = ["Diverged", "Draws", "TrainConfig", "Trainee", "Trainer", "Validation"]
