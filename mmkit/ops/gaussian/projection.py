"""Projection of Gaussians on the CPU: forward and backward, one job per image and block of Gaussians, in double precision.

With m = R mu + t, the camera matrix J of the perspective at m and A = J R Rq diag(s), the picture of a Gaussian has the covariance
C = A A^T + eps2d I around (fx x / z + cx, fy y / z + cy) (EWA splatting, arXiv 2308.04079 section 4). Rows of the results are
packed as in gsplat (`packed=True`: visible Gaussians only, by image and index) or one per image and Gaussian.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from mmkit.ops.gaussian.settings import LARGEST_RADIUS, LONGEST_QUAT, SHARPEST_CONIC, Settings
from mmkit.ops.numba_kernels import FAST_MATH, kernel, run_jobs

BLOCK = 4096
"""Gaussians per job; fixed, so that sums over blocks do not depend on the number of threads."""

_inline = numba.njit(fastmath=FAST_MATH, error_model="numpy")


@_inline
def _rotation(w, x, y, z):
    """Rows of the rotation matrix of a unit quaternion."""
    return (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip


@_inline
def _slope(p, z, near, far):
    """p / z kept within the picture and 30 % of half its size around it, and whether it had to be."""
    s = p / z
    return min(max(s, near), far), s < near or s > far


@_inline
def _jacobian(x, y, z, k, width, height, ortho):
    """J's four entries j00, j02, j11, j12, and whether x and y lie outside the limits."""
    fx, cx, fy, cy = np.float64(k[0]), np.float64(k[2]), np.float64(k[4]), np.float64(k[5])
    if ortho:
        return fx, 0.0, fy, 0.0, False, False
    mx, my = 0.15 * width / fx, 0.15 * height / fy
    u, cut_x = _slope(x, z, -(cx / fx + mx), (width - cx) / fx + mx)
    v, cut_y = _slope(y, z, -(cy / fy + my), (height - cy) / fy + my)
    return fx / z, -fx * u / z, fy / z, -fy * v / z, cut_x, cut_y


@_inline
def _in_camera(mean, v):
    a, b, c = np.float64(mean[0]), np.float64(mean[1]), np.float64(mean[2])
    return (
        v[0] * a + v[1] * b + v[2] * c + v[3],
        v[4] * a + v[5] * b + v[6] * c + v[7],
        v[8] * a + v[9] * b + v[10] * c + v[11],
    )


@_inline
def _through(j00, j02, j11, j12, v):
    """J R, 2 x 3."""
    return (
        j00 * v[0] + j02 * v[8], j00 * v[1] + j02 * v[9], j00 * v[2] + j02 * v[10],
        j11 * v[4] + j12 * v[8], j11 * v[5] + j12 * v[9], j11 * v[6] + j12 * v[10],
    )  # fmt: skip


@_inline
def _axes(quat, scale):
    """Rq, the scales, 1 / |q|, and q normalised."""
    w, x, y, z = np.float64(quat[0]), np.float64(quat[1]), np.float64(quat[2]), np.float64(quat[3])
    n = 1 / math.sqrt(w * w + x * x + y * y + z * z)
    w, x, y, z = w * n, x * n, y * n, z * n
    return _rotation(w, x, y, z), np.float64(scale[0]), np.float64(scale[1]), np.float64(scale[2]), n, (w, x, y, z)


@_inline
def _times_axes(t, r, s0, s1, s2):
    """A = T Rq diag(s), 2 x 3."""
    return (
        (t[0] * r[0] + t[1] * r[3] + t[2] * r[6]) * s0,
        (t[0] * r[1] + t[1] * r[4] + t[2] * r[7]) * s1,
        (t[0] * r[2] + t[1] * r[5] + t[2] * r[8]) * s2,
        (t[3] * r[0] + t[4] * r[3] + t[5] * r[6]) * s0,
        (t[3] * r[1] + t[4] * r[4] + t[5] * r[7]) * s1,
        (t[3] * r[2] + t[4] * r[5] + t[5] * r[8]) * s2,
    )


@_inline
def _symmetric(covar, t0, t1, t2):
    """Sigma t; only the upper triangle of `covar` is read."""
    return (
        covar[0] * t0 + covar[1] * t1 + covar[2] * t2,
        covar[1] * t0 + covar[4] * t1 + covar[5] * t2,
        covar[2] * t0 + covar[5] * t1 + covar[8] * t2,
    )


@_inline
def _compensation(xx, xy, yy, det, floor):
    """det C0 / det C, and its root, not below `floor`."""
    ratio = (xx * yy - xy * xy) / det
    return ratio, math.sqrt(max(ratio, floor * floor))


@kernel(
    "i8(f4[:,::1], f4[:,::1], f4[:,::1], f4[:,::1], f4[::1], f8[::1], f4[::1], i8, i8, i8, i8, "
    "f8, f8, f8, f8, f8, f8, f8, b1, b1, b1, b1, b1, i4[:,::1], f4[:,::1], f4[::1], f4[:,::1], f4[::1], i8[::1])"
)
def _forward(
    means, quats, scales, covars, opacities, v, k, first, last, g0, row, width, height, near, far, clip, eps, floor,
    antialiased, ortho, packed, bounded, by_axes, radii, means2d, depths, conics, row_opacities, ids,
):  # fmt: skip
    """Gaussians `first` to `last`, rows from `row` on; returns how many rows were written."""
    start = row
    for i in range(first, last):
        seen = False
        x, y, z = _in_camera(means[g0 + i], v)
        o = np.float64(opacities[g0 + i])
        if z >= near and z <= far and np.isfinite(o):
            j00, j02, j11, j12, _, _ = _jacobian(x, y, z, k, width, height, ortho)
            t = _through(j00, j02, j11, j12, v)
            turned = True
            if by_axes:
                r, s0, s1, s2, n, _ = _axes(quats[g0 + i], scales[g0 + i])
                turned = n >= 1 / LONGEST_QUAT and n <= LONGEST_QUAT
                a = _times_axes(t, r, s0, s1, s2)
                xx = a[0] * a[0] + a[1] * a[1] + a[2] * a[2]
                xy = a[0] * a[3] + a[1] * a[4] + a[2] * a[5]
                yy = a[3] * a[3] + a[4] * a[4] + a[5] * a[5]
            else:
                p = _symmetric(covars[g0 + i], t[0], t[1], t[2])
                q = _symmetric(covars[g0 + i], t[3], t[4], t[5])
                xx = t[0] * p[0] + t[1] * p[1] + t[2] * p[2]
                xy = t[3] * p[0] + t[4] * p[1] + t[5] * p[2]
                yy = t[3] * q[0] + t[4] * q[1] + t[5] * q[2]
            cxx, cyy = xx + eps, yy + eps
            det = cxx * cyy - xy * xy
            if turned and det > 0 and max(cxx, cyy) < SHARPEST_CONIC * det:
                if antialiased:
                    o *= _compensation(xx, xy, yy, det, floor)[1]
                extent = 3.33
                if bounded:
                    extent = min(3.33, math.sqrt(2 * math.log(255 * o))) if o >= 1 / 255 else 0.0
                rx, ry = np.ceil(extent * math.sqrt(cxx)), np.ceil(extent * math.sqrt(cyy))
                if ortho:
                    mx, my = k[0] * x + k[2], k[4] * y + k[5]
                else:
                    mx, my = k[0] * x / z + k[2], k[4] * y / z + k[5]
                inside = mx + rx > 0 and mx - rx < width and my + ry > 0 and my - ry < height
                seen = extent > 0 and (rx > clip or ry > clip) and inside and max(rx, ry) < LARGEST_RADIUS
        if seen:
            radii[row, 0], radii[row, 1] = rx, ry
            means2d[row, 0], means2d[row, 1] = mx, my
            depths[row] = z
            conics[row, 0], conics[row, 1], conics[row, 2] = cyy / det, -xy / det, cxx / det
            row_opacities[row] = o
        elif not packed:
            radii[row, 0], radii[row, 1] = 0, 0
            means2d[row, 0], means2d[row, 1] = 0, 0
            depths[row] = 0
            conics[row, 0], conics[row, 1], conics[row, 2] = 0, 0, 0
            row_opacities[row] = 0
        if seen or not packed:
            ids[row] = i
            row += 1
    return row - start


@_inline
def _to_axes(t, d, r, s0, s1, s2, n, q, g_quat, g_scale):
    """From dA = `d` to scales and quaternion: dM = T^T dA with M = Rq diag(s)."""
    m00, m01, m02 = t[0] * d[0] + t[3] * d[3], t[0] * d[1] + t[3] * d[4], t[0] * d[2] + t[3] * d[5]
    m10, m11, m12 = t[1] * d[0] + t[4] * d[3], t[1] * d[1] + t[4] * d[4], t[1] * d[2] + t[4] * d[5]
    m20, m21, m22 = t[2] * d[0] + t[5] * d[3], t[2] * d[1] + t[5] * d[4], t[2] * d[2] + t[5] * d[5]
    g_scale[0] += r[0] * m00 + r[3] * m10 + r[6] * m20
    g_scale[1] += r[1] * m01 + r[4] * m11 + r[7] * m21
    g_scale[2] += r[2] * m02 + r[5] * m12 + r[8] * m22
    m00, m10, m20, m01, m11, m21 = m00 * s0, m10 * s0, m20 * s0, m01 * s1, m11 * s1, m21 * s1
    m02, m12, m22 = m02 * s2, m12 * s2, m22 * s2
    w, x, y, z = q
    dw = 2 * (x * (m21 - m12) + y * (m02 - m20) + z * (m10 - m01))
    dx = 2 * (-2 * x * (m11 + m22) + y * (m01 + m10) + z * (m02 + m20) + w * (m21 - m12))
    dy = 2 * (x * (m01 + m10) - 2 * y * (m00 + m22) + z * (m12 + m21) + w * (m02 - m20))
    dz = 2 * (x * (m02 + m20) + y * (m12 + m21) - 2 * z * (m00 + m11) + w * (m10 - m01))
    along = dw * w + dx * x + dy * y + dz * z  # what only changes the length is not seen
    g_quat[0] += (dw - along * w) * n
    g_quat[1] += (dx - along * x) * n
    g_quat[2] += (dy - along * y) * n
    g_quat[3] += (dz - along * z) * n


@_inline
def _to_covariance(t, dxx, dxy, dyy, g_covar):
    """T^T dC T in the upper triangle, which stands for both halves."""
    u0, u1, u2 = dxx * t[0] + dxy * t[3], dxx * t[1] + dxy * t[4], dxx * t[2] + dxy * t[5]
    w0, w1, w2 = dxy * t[0] + dyy * t[3], dxy * t[1] + dyy * t[4], dxy * t[2] + dyy * t[5]
    g_covar[0] += t[0] * u0 + t[3] * w0
    g_covar[1] += t[0] * u1 + t[3] * w1 + t[1] * u0 + t[4] * w0
    g_covar[2] += t[0] * u2 + t[3] * w2 + t[2] * u0 + t[5] * w0
    g_covar[4] += t[1] * u1 + t[4] * w1
    g_covar[5] += t[1] * u2 + t[4] * w2 + t[2] * u1 + t[5] * w1
    g_covar[8] += t[2] * u2 + t[5] * w2


@kernel(
    "void(f4[:,::1], f4[:,::1], f4[:,::1], f4[:,::1], f4[::1], f8[::1], f4[::1], i8[::1], i4[:,::1], i8, i8, i8, f8, f8, f8, f8, "
    "b1, b1, b1, f4[:,::1], f4[::1], f4[:,::1], f4[::1], f4[:,::1], f4[:,::1], f4[:,::1], f4[:,::1], f4[::1], f8[::1])"
)
def _backward(
    means, quats, scales, covars, opacities, v, k, ids, radii, first, last, g0, width, height, eps, floor, antialiased, ortho,
    by_axes, g_means2d, g_depths, g_conics, g_row_opacities, g_means, g_quats, g_scales, g_covars, g_opacities, g_view,
):  # fmt: skip
    """Rows `first` to `last`: adds to the Gaussians' gradients and to `g_view`, the upper three rows of the view matrix's."""
    for row in range(first, last):
        if radii[row, 0] <= 0 and radii[row, 1] <= 0:
            continue
        gx, gy = np.float64(g_means2d[row, 0]), np.float64(g_means2d[row, 1])
        ga, gb, gc = np.float64(g_conics[row, 0]), 0.5 * np.float64(g_conics[row, 1]), np.float64(g_conics[row, 2])
        gz, go = np.float64(g_depths[row]), np.float64(g_row_opacities[row])
        if gx == 0 and gy == 0 and ga == 0 and gb == 0 and gc == 0 and gz == 0 and go == 0:
            continue  # hidden behind others
        i = g0 + ids[row]
        x, y, z = _in_camera(means[i], v)
        j00, j02, j11, j12, cut_x, cut_y = _jacobian(x, y, z, k, width, height, ortho)
        t = _through(j00, j02, j11, j12, v)
        if by_axes:
            r, s0, s1, s2, n, q = _axes(quats[i], scales[i])
            a = _times_axes(t, r, s0, s1, s2)
            xx = a[0] * a[0] + a[1] * a[1] + a[2] * a[2]
            xy = a[0] * a[3] + a[1] * a[4] + a[2] * a[5]
            yy = a[3] * a[3] + a[4] * a[4] + a[5] * a[5]
        else:
            p0 = _symmetric(covars[i], t[0], t[1], t[2])
            p1 = _symmetric(covars[i], t[3], t[4], t[5])
            xx = t[0] * p0[0] + t[1] * p0[1] + t[2] * p0[2]
            xy = t[3] * p0[0] + t[4] * p0[1] + t[5] * p0[2]
            yy = t[3] * p1[0] + t[4] * p1[1] + t[5] * p1[2]
        cxx, cyy = xx + eps, yy + eps
        det = cxx * cyy - xy * xy
        # the inverse: dC = -X G X with X the conic
        ca, cb, cc = cyy / det, -xy / det, cxx / det
        h00, h01, h10, h11 = ca * ga + cb * gb, ca * gb + cb * gc, cb * ga + cc * gb, cb * gb + cc * gc
        dxx, dxy, dyy = -(h00 * ca + h01 * cb), -(h00 * cb + h01 * cc), -(h10 * cb + h11 * cc)
        if antialiased:
            ratio, rho = _compensation(xx, xy, yy, det, floor)
            if ratio > floor * floor:
                f = go * np.float64(opacities[i]) / (2 * rho * det)
                dxx += f * (yy - ratio * cyy)
                dxy -= f * (xy - ratio * xy)
                dyy += f * (xx - ratio * cxx)
            go *= rho
        g_opacities[i] += go
        if by_axes:
            d = (
                2 * (dxx * a[0] + dxy * a[3]), 2 * (dxx * a[1] + dxy * a[4]), 2 * (dxx * a[2] + dxy * a[5]),
                2 * (dxy * a[0] + dyy * a[3]), 2 * (dxy * a[1] + dyy * a[4]), 2 * (dxy * a[2] + dyy * a[5]),
            )  # fmt: skip
            _to_axes(t, d, r, s0, s1, s2, n, q, g_quats[i], g_scales[i])
            e0, e1, e2, e3, e4, e5 = d[0] * s0, d[1] * s1, d[2] * s2, d[3] * s0, d[4] * s1, d[5] * s2
            dt0, dt1, dt2 = (
                e0 * r[0] + e1 * r[1] + e2 * r[2], e0 * r[3] + e1 * r[4] + e2 * r[5], e0 * r[6] + e1 * r[7] + e2 * r[8]
            )  # fmt: skip
            dt3, dt4, dt5 = (
                e3 * r[0] + e4 * r[1] + e5 * r[2], e3 * r[3] + e4 * r[4] + e5 * r[5], e3 * r[6] + e4 * r[7] + e5 * r[8]
            )  # fmt: skip
        else:
            _to_covariance(t, dxx, dxy, dyy, g_covars[i])
            dt0, dt1, dt2 = (
                2 * (dxx * p0[0] + dxy * p1[0]),
                2 * (dxx * p0[1] + dxy * p1[1]),
                2 * (dxx * p0[2] + dxy * p1[2]),
            )
            dt3, dt4, dt5 = (
                2 * (dxy * p0[0] + dyy * p1[0]),
                2 * (dxy * p0[1] + dyy * p1[1]),
                2 * (dxy * p0[2] + dyy * p1[2]),
            )
        if ortho:
            dx, dy, dz = k[0] * gx, k[4] * gy, gz
        else:
            dj00, dj02 = dt0 * v[0] + dt1 * v[1] + dt2 * v[2], dt0 * v[8] + dt1 * v[9] + dt2 * v[10]
            dj11, dj12 = dt3 * v[4] + dt4 * v[5] + dt5 * v[6], dt3 * v[8] + dt4 * v[9] + dt5 * v[10]
            dx, dy = j00 * gx, j11 * gy
            dz = gz - (j00 * x * gx + j11 * y * gy + j00 * dj00 + j11 * dj11) / z
            # j02 = -fx u / z^2: within the limits u is x, beyond them a multiple of z
            dz -= (j02 * dj02 * (1 if cut_x else 2) + j12 * dj12 * (1 if cut_y else 2)) / z
            dx -= 0 if cut_x else j00 / z * dj02
            dy -= 0 if cut_y else j11 / z * dj12
        g_means[i, 0] += dx * v[0] + dy * v[4] + dz * v[8]
        g_means[i, 1] += dx * v[1] + dy * v[5] + dz * v[9]
        g_means[i, 2] += dx * v[2] + dy * v[6] + dz * v[10]
        m0, m1, m2 = np.float64(means[i, 0]), np.float64(means[i, 1]), np.float64(means[i, 2])
        g_view[0] += dx * m0 + j00 * dt0
        g_view[1] += dx * m1 + j00 * dt1
        g_view[2] += dx * m2 + j00 * dt2
        g_view[3] += dx
        g_view[4] += dy * m0 + j11 * dt3
        g_view[5] += dy * m1 + j11 * dt4
        g_view[6] += dy * m2 + j11 * dt5
        g_view[7] += dy
        g_view[8] += dz * m0 + j02 * dt0 + j12 * dt3
        g_view[9] += dz * m1 + j02 * dt1 + j12 * dt4
        g_view[10] += dz * m2 + j02 * dt2 + j12 * dt5
        g_view[11] += dz


def _flat(x: Tensor | None, *shape: int) -> np.ndarray:
    """A float32 array of `shape` that shares memory where it can; empty when there is none."""
    if x is None:
        return np.empty((0, *shape[1:]), np.float32)
    return x.detach().reshape(shape).contiguous().numpy()


class _Inputs:
    """The kernels' view of (B, N) Gaussians and (B, C) cameras."""

    def __init__(
        self, means: Tensor, quats: Tensor | None, scales: Tensor | None, covars: Tensor | None, opacities: Tensor,
        viewmats: Tensor, ks: Tensor,
    ):  # fmt: skip
        self.batch, self.n = means.shape[:2]
        self.cameras = viewmats.shape[1]
        total = self.batch * self.n
        self.by_axes = covars is None
        self.gaussians = (
            _flat(means, total, 3), _flat(quats, total, 4), _flat(scales, total, 3), _flat(covars, total, 9), _flat(opacities, total)
        )  # fmt: skip
        self.views = viewmats.detach().double().reshape(-1, 16).contiguous().numpy()
        self.ks = _flat(ks, self.batch * self.cameras, 9)
        self.blocks = max(1, -(-self.n // BLOCK))

    def jobs(self) -> list[tuple[int, int, int, int]]:
        """(image, first Gaussian, end, slot) for every image and block."""
        spans = [(b * BLOCK, min(self.n, (b + 1) * BLOCK)) for b in range(self.blocks)]
        return [
            (image, *span, image * self.blocks + b)
            for image in range(self.batch * self.cameras)
            for b, span in enumerate(spans)
        ]


def _project(inputs: _Inputs, s: Settings) -> tuple[list[np.ndarray], np.ndarray]:
    """radii, means2d, depths, conics, opacities and Gaussian ids of the rows, and the rows before each (image, block)."""
    images = inputs.batch * inputs.cameras
    rows = images * inputs.n
    shapes = ((rows, 2), (rows, 2), (rows,), (rows, 3), (rows,), (rows,))
    kinds = (np.int32, np.float32, np.float32, np.float32, np.float32, np.int64)
    out = [np.empty(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
    counts = np.zeros(images * inputs.blocks, np.int64)

    def run(image: int, first: int, last: int, slot: int) -> None:
        counts[slot] = _forward(
            *inputs.gaussians, inputs.views[image], inputs.ks[image], first, last, image // inputs.cameras * inputs.n,
            image * inputs.n + first, float(s.width), float(s.height), s.near, s.far, s.radius_clip, s.eps2d,
            s.numerics.compensation_floor, s.antialiased, s.ortho, s.packed, s.bounded, inputs.by_axes, *out,
        )  # fmt: skip

    jobs = inputs.jobs()
    run_jobs(run, jobs)
    starts = np.concatenate(([0], np.cumsum(counts)))
    if starts[-1] < rows:  # packed: close the gaps that invisible Gaussians left
        pieces = [slice(i * inputs.n + a, i * inputs.n + a + counts[slot]) for i, a, _, slot in jobs]
        out = [np.concatenate([x[piece] for piece in pieces]) for x in out]
    return out, starts


class Project(torch.autograd.Function):
    """(B, N) Gaussians and (B, C) cameras -> rows: radii, means2d, depths, conics, opacities, Gaussian ids, image starts."""

    @staticmethod
    def forward(ctx, means, quats, scales, covars, opacities, viewmats, ks, s: Settings):  # type: ignore[override]
        inputs = _Inputs(means, quats, scales, covars, opacities, viewmats, ks)
        out, starts = _project(inputs, s)
        radii, means2d, depths, conics, row_opacities, ids = (torch.from_numpy(x) for x in out)
        image_starts = torch.from_numpy(starts[:: inputs.blocks].copy())
        ctx.save_for_backward(means, quats, scales, covars, opacities, viewmats, ks, radii, ids)
        ctx.starts, ctx.settings = starts, s
        ctx.mark_non_differentiable(radii, ids, image_starts)
        return radii, means2d, depths, conics, row_opacities, ids, image_starts

    @staticmethod
    def backward(ctx, _radii, g_means2d, g_depths, g_conics, g_row_opacities, _ids, _starts):  # type: ignore[override]
        *given, radii, ids = ctx.saved_tensors
        means, quats, scales, covars, opacities, viewmats, _ = given
        inputs, s = _Inputs(*given), ctx.settings
        g_rows = [g.contiguous().numpy() for g in (g_means2d, g_depths, g_conics, g_row_opacities)]
        grads = [np.zeros_like(x) for x in inputs.gaussians]
        parts = np.zeros((inputs.batch * inputs.cameras * inputs.blocks, 12))

        def run(batch: int, block: int) -> None:
            for camera in range(inputs.cameras):  # one after the other: they add to the same Gaussians
                image = batch * inputs.cameras + camera
                slot = image * inputs.blocks + block
                _backward(
                    *inputs.gaussians, inputs.views[image], inputs.ks[image], ids.numpy(), radii.numpy(), ctx.starts[slot],
                    ctx.starts[slot + 1], batch * inputs.n, float(s.width), float(s.height), s.eps2d,
                    s.numerics.compensation_floor, s.antialiased, s.ortho, inputs.by_axes, *g_rows, *grads, parts[slot],
                )  # fmt: skip

        run_jobs(run, [(b, k) for b in range(inputs.batch) for k in range(inputs.blocks)])
        view = np.zeros((inputs.batch * inputs.cameras, 16), np.float32)
        view[:, :12] = parts.reshape(-1, inputs.blocks, 12).sum(1)
        g_means, g_quats, g_scales, g_covars, g_opacities = (torch.from_numpy(g) for g in grads)
        by_axes = covars is None
        return (
            g_means.view_as(means), g_quats.view_as(quats) if by_axes else None, g_scales.view_as(scales) if by_axes else None,
            None if by_axes else g_covars.view_as(covars), g_opacities.view_as(opacities),
            torch.from_numpy(view).view_as(viewmats), None, None,
        )  # fmt: skip
