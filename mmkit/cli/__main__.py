"""`python -m mmkit.cli`, the same as `mmkit`."""

from mmkit.cli import app

app()
