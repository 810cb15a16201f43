"""Students: maps that go from noise to a target in one step or a few, one file per method."""
