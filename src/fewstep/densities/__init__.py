"""Samplers of an unnormalised density: diffusion teachers, few-step students, and weights that are valid."""
