"""Markov chains and annealed particles: references for the other samplers, and teachers that need no network."""
