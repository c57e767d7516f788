"""Trained models for others: loaded by three lines of Python, exported for the hub, served over HTTP."""
