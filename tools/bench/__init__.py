"""Benchmarks; ``run.py`` is the command."""
