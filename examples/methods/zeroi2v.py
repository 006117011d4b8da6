"""ZeroI2V: an image transformer that sees which way something moves, and that a clip played backwards is another.

python examples/methods/zeroi2v.py motion.png
"""

import sys
import tempfile

import torch

import mmkit
from mmkit.data.drawn.motion import drawn_motion
from mmkit.video import write_video


def main(picture: str = "zeroi2v.png") -> None:
    """Draw a clip, ask, turn it round, ask again."""
    clips, _ = drawn_motion(1, torch.Generator().manual_seed(0), num_frames=24, label=1)
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(f"{folder}/clip.mp4", (255 * clips[0]).byte().permute(0, 2, 3, 1))
        video = mmkit.pipeline("video-classification")
        result = video(path, top_k=3)
        print(result.label, "- and backwards:", video(path, backwards=True).label)
    result.plot().save(picture)


if __name__ == "__main__":
    main(*sys.argv[1:2])
