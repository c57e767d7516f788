"""Sharding, optimising, stepping, saving, resuming."""
