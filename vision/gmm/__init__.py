"""Gaussian mixture masks: distance-dependent attention masks for vision transformers on small data sets."""
