"""Geometry, masks and colour of training samples."""
