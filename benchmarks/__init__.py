"""Benchmarks. `pytest benchmarks --benchmark-json benchmarks/results/NAME.json` runs all of them."""
