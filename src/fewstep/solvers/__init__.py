"""Samplers of the prior alone, one file each."""
