"""Samplers that are trained on a density alone, one file each; the folder is the list of names that `fit` takes."""
