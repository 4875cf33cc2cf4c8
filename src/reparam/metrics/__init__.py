"""Scores of samples against real data.

A metric is one entry of :data:`METRICS`: when it applies, and how it is computed. Each is
reported beside its floor, the value that as many fresh real data would get.
"""

from __future__ import annotations

from .blocks import block_interval
from .calibration import Calibration, calibration
from .extractors import EXTRACTORS, Extractor, extractor
from .extrapolation import frechet_infinity
from .frechet import Moments, frechet_distance, moments
from .kernel import Discrepancy, kernel_distance, mmd2
from .neighbours import precision_recall
from .reference import Reference, given_reference, save_reference
from .scoring import Score, Scoring
from .sets import SampleSet
from .statistics import Statistics, statistics_of
from .table import METRICS, Metric, classified
from .vectors import nearest, nearest_training, sliced_wasserstein

__all__ = [
    "EXTRACTORS",
    "METRICS",
    "Calibration",
    "Discrepancy",
    "Extractor",
    "Metric",
    "Moments",
    "Reference",
    "SampleSet",
    "Score",
    "Scoring",
    "Statistics",
    "block_interval",
    "calibration",
    "classified",
    "extractor",
    "frechet_distance",
    "frechet_infinity",
    "given_reference",
    "kernel_distance",
    "mmd2",
    "moments",
    "nearest",
    "nearest_training",
    "precision_recall",
    "save_reference",
    "sliced_wasserstein",
    "statistics_of",
]
