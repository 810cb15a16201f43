"""Estimators from weighted draws, each saying what it is: unbiased, consistent, a bound, or invalid."""
