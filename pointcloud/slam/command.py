"""What `mmkit slam` does. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def slam(
    data: Annotated[
        str,
        typer.Argument(
            help="An RGB-D recording (Replica, ScanNet, TUM, 7-Scenes, your own folder); 'drawn': a drawn room."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="A folder for map.ply, report.json, trajectory.png, and the state.")],
    depth: Annotated[Path | None, typer.Option(help="If DATA is a film: the folder of its depth pictures.")] = None,
    preset: Annotated[str, typer.Option(help="cpu_small, cpu_live, replica, scannet or tum.")] = "cpu_small",
    tree: Annotated[Path | None, typer.Option(help="The label tree (.json), if the folder has none.")] = None,
    tracker: Annotated[str, typer.Option(help="auto, gicp, photometric, constant or given.")] = "auto",
    every: Annotated[int | None, typer.Option(min=1, help="Take every so many frames. Default: all.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Of the drawn room. Default: 24.")] = None,
    map_iters: Annotated[int | None, typer.Option(min=0, help="Iterations of a mapping round.")] = None,
    track_iters: Annotated[int | None, typer.Option(min=0, help="Photometric steps a frame.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Start over instead of continuing in the folder.")] = False,
    seed: int = 0,
) -> None:
    """Map a recording of a depth camera: its path, a labelled map of Gaussians, and a report. An interrupted run goes on."""
    from mmkit.errors import InputError, in_words
    from mmkit.pointcloud.slam.gicp import gicp_available
    from mmkit.pointcloud.slam.pipeline import SemanticSLAMPipeline
    from mmkit.pointcloud.slam.synthetic import SyntheticRoom
    from mmkit.storage.files import absolute, check_writable

    drawn, room = data == "drawn", {"--every": every, "--depth": depth, "--tree": tree}
    unused = [name for name, value in (room if drawn else {"--frames": frames}).items() if value is not None]
    if track_iters is not None and tracker == "auto" and gicp_available():
        raise InputError("--track-iters means nothing for the tracker taken here, gicp. Add --tracker photometric.")
    if track_iters is not None and tracker in ("gicp", "constant", "given"):
        unused.append("--track-iters")
    if unused:
        what = f"--tracker {tracker}" if unused[0] == "--track-iters" else "the drawn room" if drawn else "a recording"
        raise InputError(f"{unused[0]} means nothing for {what}. Leave it out.")
    output, names = absolute(output), ("map.ply", "report.json", "trajectory.png")
    for name in names:
        check_writable(output / name)
    chosen: dict[str, Any] = {
        k: v for k, v in (("map_iters", map_iters), ("track_iters", track_iters)) if v is not None
    }
    run = SemanticSLAMPipeline(preset, tree=tree, tracker=tracker, seed=seed, **chosen)
    recording = SyntheticRoom(frames=frames or 24) if drawn else data
    words = {"data": "DATA, --every or --frames"} | {
        k: f"--{k.replace('_', '-')}" for k in (*chosen, "tracker", "tree", "seed")
    }
    with in_words(words, "Use the same to continue, --restart to start over, or another OUTPUT."):
        result = run(recording, every=every or 1, depth=depth, output=output / "state", resume=not restart)
    for name in names:
        result.save(output / name)
    report = result.report
    print(f"{report['frames']} frames, {report['lost']} lost, {report['gaussians']} Gaussians. Saved to {output}.")
    if "ate_rmse" in report:
        print(f"ATE RMSE {100 * report['ate_rmse']:.2f} cm on a path of {report['path_length']:.2f} m.")
    if "psnr" in report:
        print(f"PSNR {report['psnr']:.2f} dB" + (f", mIoU {report['miou']:.3f}" if "miou" in report else "") + ".")
