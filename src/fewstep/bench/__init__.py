"""Benchmarks: each module has a `main` that measures, writes JSON and returns it; the docs tables are made from the JSON."""
