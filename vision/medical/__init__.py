"""LightM-UNet (arXiv 2403.05246): a light U-Net of state-space blocks, and segmentation of medical pictures and volumes."""
