"""The leakage audit: rules over a cohort and its labels, and over any function from (events up to t) to a latent."""

from mmjepa.audit.finding import Finding
from mmjepa.audit.model import future_swap, prefix_invariance
from mmjepa.audit.run import audit

__all__ = ["Finding", "audit", "future_swap", "prefix_invariance"]
