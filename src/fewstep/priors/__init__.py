"""Diffusion priors: exact ones, networks and their loaders."""
