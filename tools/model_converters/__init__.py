"""Checkpoints from and to other classifiers."""
