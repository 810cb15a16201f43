"""What the commands of `fewstep.cli` do, one file each; imported when a command runs."""
