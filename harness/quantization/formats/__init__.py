"""Checkpoints of our own, and the layouts that other libraries load."""
