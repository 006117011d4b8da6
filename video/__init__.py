"""Video: reading, sampling and data sets, and ZeroI2V, which turns an image transformer into a video recogniser."""
