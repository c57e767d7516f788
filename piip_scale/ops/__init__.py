"""Attention, deformable attention and resizing: each a plain reference and its fast twin."""
