"""Losses on the weights of paths, one file each; the folder is the list of names that `fit` takes as `loss`."""
