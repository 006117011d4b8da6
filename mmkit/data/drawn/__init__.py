"""Drawn data: pictures, clips and scans made by a seed, for tests, examples and bundled weights."""
