"""The five backbones of arXiv 2309.05375, for training from scratch on small data sets: ViT, CaiT, T2T-ViT, PiT, Swin.

Each takes `mask="gmm"`, `"elm"` (element-wise learnable) or `"none"`. Inputs are normalised float images `(B, in_chans, H, W)`,
outputs logits `(B, num_classes)`. Parameter names follow timm; `load_official_checkpoint` maps those of the authors' code.
"""
