"""Objectives: pure functions, float32 inside, tensors out. They know neither trainer nor data.

Under several ranks a *local* term (a weighted sum over rows) is the rank's own share of the global sum; a *gathered* term
(VICReg, SIGReg) is computed from all ranks' rows on every rank.
"""
