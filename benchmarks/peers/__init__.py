"""Whole models of others that a training step is timed against; the scans of others are in `ssmtune.measure.peers`."""
