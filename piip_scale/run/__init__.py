"""A run is a directory: its files, heartbeats, environment and endings; the engine writes it, launch reads it."""
