"""Hi-SLAM cases: tree, losses and their gradients, poses, new Gaussians, pruning, overlap, trajectories, SSIM.

The official pictures were made with integer pixel centres and the constants of the first Gaussian rasteriser, which ours does not have;
`_render` is a dense renderer with those, for this file only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmkit.pointcloud.similarity import ssim
from mmkit.pointcloud.slam import (
    HierarchicalSemanticLoss,
    SemanticGaussians,
    SemanticHead,
    SemanticTree,
    ate_official,
    ate_rmse,
)
from mmkit.pointcloud.slam.keyframes import sampled_points, share_inside
from mmkit.pointcloud.slam.losses import densify_mask, mapping_terms, silhouette_mask, tracking_terms
from mmkit.pointcloud.slam.model import new_gaussians
from mmkit.pointcloud.slam.poses import constant_velocity, inverse, matrix, rotation_matrix


def run(case: Path, meta: dict[str, Any]) -> None:
    given, weights, expected = (load_file(case / f"{n}.safetensors") for n in ("inputs", "weights", "outputs"))
    tree = SemanticTree.from_dict(meta["tree_annotation"])
    _tree(tree, given, expected, meta)
    _poses(given, weights, expected)
    _tracking(given, weights, expected, meta)
    for late in (False, True):
        _mapping(tree, given, weights, expected, meta, late)
    _surgery(given, weights, expected, meta)
    _keyframes(given, expected, meta)
    assert abs(float(ssim(given["ssim.a"][0], given["ssim.b"][0]) - expected["ssim"])) <= 1e-5
    _trajectory(given, expected)


def _tree(tree: SemanticTree, given: dict[str, Tensor], expected: dict[str, Tensor], meta: dict[str, Any]) -> None:
    config = meta["config"]
    assert [*tree.level_sizes, tree.num_classes] == config["num_semantic"]
    assert (tree.levels, tree.code_dim) == (config["levels"], config["code_dim"])
    assert torch.equal(tree.paths, given["paths"].clamp_min(0))  # ours are padded
    assert torch.equal(tree.level_labels(given["labels"][-1]).permute(2, 0, 1), given["labels"][:-1])
    hot = tree.encode(given["labels"][-1])
    assert torch.equal(hot.permute(2, 0, 1), expected["encode.multi_hot"])
    assert torch.equal(tree.level_argmax(hot).permute(2, 0, 1), expected["decode.level_labels_from_multi_hot"])
    features = given["decode.features"].permute(1, 2, 0)
    assert torch.equal(tree.level_argmax(features).permute(2, 0, 1), expected["decode.level_argmax"])
    leaves = tree.decode(features, "argmax")
    short = (given["paths"] < 0).any(1)[
        leaves.clamp_min(0)
    ]  # classes on shorter paths, which the official look-up never finds
    assert torch.equal(torch.where(short, -1, leaves), expected["decode.leaf_from_levels"])


def _poses(given: dict[str, Tensor], weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    quats, shifts = weights["params.cam_unnorm_rots"][0].T, weights["params.cam_trans"][0].T
    at = _moment(expected)
    quat, shift = quats[at], shifts[at]
    assert (rotation_matrix(quat) - expected["pose.rotmat"][0]).abs().max() <= 1e-6
    moved = weights["params.means3D"] @ rotation_matrix(quat).T + shift
    assert (moved - expected["pose.means_cam"]).abs().max() <= 1e-5
    guesses = [
        constant_velocity(quats[t], shifts[t], quats[t - 1], shifts[t - 1], align_signs=False)
        for t in range(1, len(quats))
    ]
    errors = [
        max(
            float((q - expected["pose.const_velocity_rot"][0]).abs().max()),
            float((s - expected["pose.const_velocity_trans"][0]).abs().max()),
        )
        for q, s in guesses
    ]
    assert min(errors) <= 1e-6


def _moment(expected: dict[str, Tensor]) -> int:
    """The frame of the case: the only one whose pose is given a gradient."""
    return int(expected["track.grad.cam_trans"][0].abs().sum(0).argmax())


def _render(
    weights: dict[str, Tensor], view: Tensor, K: Tensor, width: int, height: int, features: Tensor
) -> tuple[Tensor, Tensor]:
    """Features (H, W, X) and opacity (H, W): every Gaussian at every pixel of its square of tiles."""
    means = weights["params.means3D"] @ view[:3, :3].T + view[:3, 3]
    scale = weights["params.log_scales"].exp()
    x, y, z = means.unbind(1)
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    tan_x, tan_y = width / (2 * fx), height / (2 * fy)
    u = (x / z).clamp(-1.3 * tan_x, 1.3 * tan_x) * z
    v = (y / z).clamp(-1.3 * tan_y, 1.3 * tan_y) * z
    zero = torch.zeros_like(z)
    J = torch.stack([torch.stack([fx / z, zero, -fx * u / z**2], 1), torch.stack([zero, fy / z, -fy * v / z**2], 1)], 1)
    cov = (scale**2)[:, :, None] * (J @ J.transpose(1, 2)) + 0.3 * torch.eye(2)
    det = cov[:, 0, 0] * cov[:, 1, 1] - cov[:, 0, 1] ** 2
    conic = torch.stack([cov[:, 1, 1], -cov[:, 0, 1], cov[:, 0, 0]], 1) / det[:, None]
    centre = torch.stack([fx * x / z + cx - 0.5, fy * y / z + cy - 0.5], 1)
    with torch.no_grad():
        mid = 0.5 * (cov[:, 0, 0] + cov[:, 1, 1])
        radius = (3 * (mid + (mid**2 - det).clamp_min(0.1).sqrt()).sqrt()).ceil()
        first = ((centre - radius[:, None]) / 16).to(torch.int64)
        last = ((centre + radius[:, None] + 15) / 16).to(torch.int64)
        order = z.argsort(stable=True)
        order = order[z[order] > 0.2]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    light, stopped = torch.ones(height, width), torch.zeros(height, width, dtype=torch.bool)
    out, opacity = torch.zeros(height, width, features.shape[1]), torch.zeros(height, width)
    opacities = weights["params.logit_opacities"].sigmoid()[:, 0]
    for i in order.tolist():
        dx, dy = centre[i, 0] - columns, centre[i, 1] - rows
        power = -0.5 * (conic[i, 0] * dx * dx + conic[i, 2] * dy * dy) - conic[i, 1] * dx * dy
        alpha = (opacities[i] * power.exp()).clamp_max(0.99)
        tile = (
            (columns // 16 >= first[i, 0])
            & (columns // 16 < last[i, 0])
            & (rows // 16 >= first[i, 1])
            & (rows // 16 < last[i, 1])
        )
        on = tile & (alpha >= 1 / 255) & (power <= 0) & ~stopped
        after = light * (1 - alpha)
        stopped = stopped | (on & (after < 1e-4))
        on = on & ~stopped
        weight = torch.where(on, alpha * light, 0.0)
        out = out + weight.unsqueeze(-1) * features[i]
        opacity = opacity + weight
        light = torch.where(on, after, light)
    return out, opacity


def _close(got: Tensor, want: Tensor, relative: float, what: str) -> None:
    assert abs(got.item() - float(want)) <= relative * max(abs(float(want)), 1e-6), (what, got.item(), float(want))


def _gradients(
    loss: Tensor, leaves: dict[str, Tensor], expected: dict[str, Tensor], prefix: str, relative: float
) -> None:
    names = [n for n in leaves if f"{prefix}.{n}" in expected]
    got = torch.autograd.grad(loss, [leaves[n] for n in names], allow_unused=True)
    assert names
    for name, g in zip(names, got, strict=True):
        want = expected[f"{prefix}.{name}"]
        g = torch.zeros_like(want) if g is None else g.view_as(want)
        # 1e-7: rotations of round Gaussians, whose gradient is rounding
        assert (g - want).norm() <= relative * want.norm() + 1e-7, (
            prefix,
            name,
            float((g - want).norm()),
            float(want.norm()),
        )


def _picture(
    leaves: dict[str, Tensor], view: Tensor, given: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    height, width = given["depth"].shape[1:]
    z = leaves["params.means3D"] @ view[:3, :3].T[:, 2] + view[2, 3]
    features = torch.cat([leaves["params.rgb_colors"], z[:, None], leaves["params.semantic"]], 1)
    out, alpha = _render(leaves, view, given["K"], width, height, features)
    return out[..., :3], out[..., 3], alpha, out[..., 4:]


def _tracking(
    given: dict[str, Tensor], weights: dict[str, Tensor], expected: dict[str, Tensor], meta: dict[str, Any]
) -> None:
    leaves = {k: v.clone().requires_grad_() for k, v in weights.items()}
    at = _moment(expected)
    view = matrix(leaves["params.cam_unnorm_rots"][0, :, at], leaves["params.cam_trans"][0, :, at])
    rgb, depth, alpha, _ = _picture(leaves, view, given)
    config = meta["config"]
    mask = silhouette_mask(depth, given["depth"][0], alpha, config["tracking_sil_thres"])
    image, far = tracking_terms(rgb, depth, given["im"].permute(1, 2, 0), given["depth"][0], mask.detach())
    image, far = config["tracking_loss_weights"]["im"] * image, config["tracking_loss_weights"]["depth"] * far
    relative = meta["tolerance"]["loss_rel"]
    _close(image, expected["track.weighted.im"], relative, "image")
    _close(far, expected["track.weighted.depth"], relative, "depth")
    _close(image + far, expected["track.loss"], relative, "loss")
    poses = {k.removeprefix("params."): v for k, v in leaves.items() if "cam" in k}
    _gradients(image + far, poses, expected, "track.grad", meta["tolerance"]["grad_rel_norm"])


def _mapping(
    tree: SemanticTree, given: dict[str, Tensor], weights: dict[str, Tensor], expected: dict[str, Tensor], meta: dict[str, Any], late: bool
) -> None:  # fmt: skip
    leaves = {k: v.clone().requires_grad_() for k, v in weights.items()}
    config, name = meta["config"], "map_late" if late else "map_early"
    head = SemanticHead(tree.code_dim, tree.num_classes)
    head.load_state_dict({"weight": weights["mlp.weight"][..., 0, 0], "bias": weights["mlp.bias"]})
    at = _moment(expected)
    view = matrix(weights["params.cam_unnorm_rots"][0, :, at], weights["params.cam_trans"][0, :, at])
    rgb, depth, alpha, code = _picture(leaves, view, given)
    pictures = {
        "rgb": rgb.permute(2, 0, 1),
        "depth": depth[None],
        "opacity": alpha[None],
        "semantic": code.permute(2, 0, 1),
    }
    for key, got in pictures.items():
        assert (got - expected[f"render.{key}"]).abs().max() <= meta["tolerance"]["render_abs"], key
    image, far = mapping_terms(rgb, depth, given["im"].permute(1, 2, 0), given["depth"][0])
    loss = HierarchicalSemanticLoss(tree, config["level_weight"], config["leaf_weight"], config["leaf_loss_from_iter"])
    labels = loss(code, given["labels"][-1], head, config["leaf_loss_from_iter"] if late else 0)
    w = config["mapping_loss_weights"]
    parts = {"im": w["im"] * image, "depth": w["depth"] * far, "sem": w["sem"] * labels}
    for key, got in parts.items():
        _close(got, expected[f"{name}.weighted.{key}"], meta["tolerance"]["loss_rel"], key)
    total = parts["im"] + parts["depth"] + parts["sem"]
    _close(total, expected[f"{name}.loss"], meta["tolerance"]["loss_rel"], "loss")
    learned = {k.removeprefix("params."): v for k, v in leaves.items() if "cam" not in k and "mlp" not in k}
    learned |= {"mlp.weight": head.weight, "mlp.bias": head.bias} if late else {}
    _gradients(total, learned, expected, f"{name}.grad", meta["tolerance"]["grad_rel_norm"])


def _surgery(
    given: dict[str, Tensor], weights: dict[str, Tensor], expected: dict[str, Tensor], meta: dict[str, Any]
) -> None:
    depth, alpha, seen = given["depth"][0], expected["render.opacity"][0], expected["render.depth"][0]
    mask = densify_mask(alpha, seen, depth)
    clear = (alpha - 0.5).abs() > 1e-5
    assert torch.equal(mask[clear], expected["densify.mask"].bool()[clear])
    rgb = given["im"].permute(1, 2, 0)
    views = {"case": given["viewmatrix"][0].T}
    for t in range(weights["params.cam_trans"].shape[2]):
        views[str(t)] = matrix(weights["params.cam_unnorm_rots"][0, :, t], weights["params.cam_trans"][0, :, t])
    made = [
        new_gaussians(rgb, depth, given["K"], v, expected["densify.mask"].bool(), 3, offset=0.0) for v in views.values()
    ]
    assert min(float((m["means"] - expected["densify.new_means3D"]).abs().max()) for m in made) <= 1e-5
    assert torch.equal(made[0]["rgb"], expected["densify.new_rgb"])
    assert (made[0]["scales"] - expected["densify.new_log_scales"]).abs().max() <= 1e-6
    map_ = SemanticGaussians(3)
    n = len(given["prune.log_scales"])
    map_.append(
        {
            "means": torch.zeros(n, 3), "rgb": torch.zeros(n, 3), "codes": torch.zeros(n, 3), "quats": torch.ones(n, 4),
            "birth": torch.arange(n), "opacities": given["prune.logit_opacities"][:, 0], "scales": given["prune.log_scales"],
        }
    )  # fmt: skip
    map_.select(map_.prune_mask(meta["config"]["scene_radius_prune"]))
    assert torch.equal(map_.birth, expected["prune.kept_index"])


def _keyframes(given: dict[str, Tensor], expected: dict[str, Tensor], meta: dict[str, Any]) -> None:
    depth, K, views = given["keyframe.depth"][0], given["keyframe.K"], given["keyframe.w2c"]
    height, width = depth.shape
    points = sampled_points(depth, K, views[0], given["keyframe.sampled_index"], offset=0.0)
    shares = torch.tensor([share_inside(points, K, v, width, height, 20) for v in views])
    assert torch.equal(shares, expected["keyframe.percent_inside"])
    order = expected["keyframe.percent_inside"].argsort(descending=True, stable=True)
    assert set(expected["keyframe.candidates_sorted"].tolist()) <= set(
        order[expected["keyframe.percent_inside"][order] > 0].tolist()
    )


def _trajectory(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    estimate, truth = given["ate.est"], given["ate.gt"]
    assert abs(ate_official(estimate, truth) - float(expected["ate.official_mean"])) <= 1e-5
    either = [ate_rmse(estimate, truth), ate_rmse(inverse(estimate), inverse(truth))]
    assert min(abs(x - float(expected["ate.rmse"])) for x in either) <= 1e-5, (either, float(expected["ate.rmse"]))
