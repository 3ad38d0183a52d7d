"""Checkpoints: reading the published formats, converting, storing and exporting."""
