"""Schedules fitted to a prior and a number of network calls: one file per method."""
