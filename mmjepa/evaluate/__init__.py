"""Judging any embedding: tables and labels in, probes, intervals, collapse panel and rollout metrics out."""
