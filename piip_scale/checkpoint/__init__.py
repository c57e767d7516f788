"""Sharded checkpoints: committing, reading, converting."""
