"""Training-free posterior samplers, one file each: the folder is the list."""
