"""What ``benchmarks/ct.py`` measures."""
