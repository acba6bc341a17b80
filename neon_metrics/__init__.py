"""FID, Inception Score, KID, precision, recall, density and coverage, from images in memory, on any number of ranks."""

from neon_metrics.accumulator import METRICS, MetricAccumulator, MetricSettings, extract_features
from neon_metrics.detector import Detector, FunctionDetector, InceptionDetector, load_inception
from neon_metrics.neighbours import NeighbourScores, prdc
from neon_metrics.reference import Reference, load_reference, write_reference
from neon_metrics.scores import (
    BiasedFidWarning,
    fid,
    fid_from_features,
    frechet_distance,
    inception_score,
    kid,
)
from neon_metrics.statistics import FeatureStatistics, InceptionScoreStatistics

__all__ = [
    "METRICS",
    "BiasedFidWarning",
    "Detector",
    "FeatureStatistics",
    "FunctionDetector",
    "InceptionDetector",
    "InceptionScoreStatistics",
    "MetricAccumulator",
    "MetricSettings",
    "NeighbourScores",
    "Reference",
    "extract_features",
    "fid",
    "fid_from_features",
    "frechet_distance",
    "inception_score",
    "kid",
    "load_inception",
    "load_reference",
    "prdc",
    "write_reference",
]
