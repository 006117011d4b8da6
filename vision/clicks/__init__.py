"""SqueezeSAM (arXiv 2312.06736) and interactive segmentation: clicks and boxes in, masks out."""
