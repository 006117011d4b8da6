"""ZeroI2V (arXiv 2310.01324): an image transformer recognises videos, with adapters that fold away."""
