"""mmjepa: joint-embedding predictive pretraining on CT scans and electronic health records."""

__version__ = "0.1.0"
