"""Baselines: what a cohort gives away without any representation learning, as feature tables by name."""

from mmjepa.baselines.features import BASELINES, FeatureState, features

__all__ = ["BASELINES", "FeatureState", "features"]
