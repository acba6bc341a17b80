"""Non-leaking augmentation (Karras et al. 2022, appendix F.2; the geometric filter of Karras et al. 2020, appendix B).

The pipe returns the augmented images and, per image, the vector that tells the network what was done to them, so that
samples drawn with a vector of zeros show no trace of it. Every draw comes from a `Random`; a stage with multiplier 0
draws nothing and adds no label.
Shapes: B batch, C channels, H W pixels. Geometric matrices are [B, 3, 3] and map output to input pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from neon_edm.loss import Random

# Symlet of order 6, low-pass, and how far the kernel reaches beyond the image after the final decimation.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
REACH = len(SYM6) // 4

LUMA = (1 / math.sqrt(3), 1 / math.sqrt(3), 1 / math.sqrt(3))  # the grey axis of RGB


@dataclass(frozen=True)
class AugmentPipe:
    """Probabilities multiply `p`; 0 switches a stage off, 1e8 makes it certain at any p."""

    p: float = 1
    # pixel blitting
    xflip: float = 0
    yflip: float = 0
    rotate_int: float = 0
    translate_int: float = 0
    translate_int_max: float = 0.125  # of the image side
    # geometry
    scale: float = 0
    rotate_frac: float = 0
    aniso: float = 0
    translate_frac: float = 0
    scale_std: float = 0.2  # octaves
    rotate_frac_max: float = 1  # of a half turn
    aniso_std: float = 0.2  # octaves
    aniso_rotate_prob: float = 0.5
    translate_frac_std: float = 0.125  # of the image side
    # colour
    brightness: float = 0
    contrast: float = 0
    lumaflip: float = 0
    hue: float = 0
    saturation: float = 0
    brightness_std: float = 0.2
    contrast_std: float = 0.5  # octaves
    hue_max: float = 1  # of a half turn
    saturation_std: float = 1  # octaves

    def __call__(self, images: Tensor, random: Random) -> tuple[Tensor, Tensor]:
        """(augmented [B, C, H, W], labels float32 [B, A]) of float images. Raises ValueError if a colour stage meets
        anything but 1 or 3 channels, or a quarter turn an image that is not square."""
        labels: list[Tensor] = []
        images = self._blit(images, random, labels)
        if self.scale or self.rotate_frac or self.aniso or self.translate_frac:
            images = resample(images, self._geometry(images, random, labels))
        if self.brightness or self.contrast or self.lumaflip or self.hue or self.saturation:
            images = recolour(images, self._colour(images, random, labels))
        columns = [label.to(torch.float32).reshape(images.shape[0], 1) for label in labels]
        return images, torch.cat(columns, dim=1) if columns else images.new_zeros(images.shape[0], 0)

    def _gate(self, value: Tensor, multiplier: float, random: Random, shape: tuple[int, ...]) -> Tensor:
        """`value` where a uniform draw falls below multiplier * p, else 0."""
        return torch.where(random.rand(shape) < multiplier * self.p, value, torch.zeros_like(value))

    def _blit(self, images: Tensor, random: Random, labels: list[Tensor]) -> Tensor:
        """Flips, quarter turns and whole-pixel shifts: exact copies of pixels."""
        B, _, H, W = images.shape
        one_each = (B, 1, 1, 1)
        if self.xflip:
            w = self._gate(random.randint(2, one_each), self.xflip, random, one_each)
            images = torch.where(w == 1, images.flip(3), images)
            labels.append(w)
        if self.yflip:
            w = self._gate(random.randint(2, one_each), self.yflip, random, one_each)
            images = torch.where(w == 1, images.flip(2), images)
            labels.append(w)
        if self.rotate_int:
            if H != W:
                raise ValueError(f"quarter turns need square images, not {H} x {W}")
            w = self._gate(random.randint(4, one_each), self.rotate_int, random, one_each)
            flip_x, flip_y, turned = (w == 1) | (w == 2), (w == 2) | (w == 3), (w == 1) | (w == 3)
            images = torch.where(flip_x, images.flip(3), images)
            images = torch.where(flip_y, images.flip(2), images)
            images = torch.where(turned, images.transpose(2, 3), images)
            labels += [flip_x, flip_y]
        if self.translate_int:
            w = random.rand((2, *one_each)) * 2 - 1
            w = self._gate(w, self.translate_int, random, (1, *one_each)).reshape(2, B, 1)
            side = constant((float(W), float(H)), w.device).reshape(2, 1, 1) * self.translate_int_max
            t = (w * side).round()  # pixels to the right, pixels up
            columns = mirrored(torch.arange(W, device=w.device) - t[0].long(), W)  # [B, W]
            rows = mirrored(torch.arange(H, device=w.device) + t[1].long(), H)  # [B, H]
            images = images.take_along_dim(columns[:, None, None, :], dim=3)
            images = images.take_along_dim(rows[:, None, :, None], dim=2)
            labels += list(t / side)
        return images

    def _geometry(self, images: Tensor, random: Random, labels: list[Tensor]) -> Tensor:
        """[B, 3, 3]: from pixels of the result to pixels of `images`, about the image centre."""
        B, _, H, W = images.shape
        M = torch.eye(3, device=images.device).expand(B, 3, 3)
        if self.scale:
            w = self._gate(random.randn((B,)), self.scale, random, (B,))
            s = (w * self.scale_std).exp2()
            M = M @ scale_2d(1 / s, 1 / s)
            labels.append(w)
        if self.rotate_frac:
            w = (random.rand((B,)) * 2 - 1) * (math.pi * self.rotate_frac_max)
            w = self._gate(w, self.rotate_frac, random, (B,))
            M = M @ rotate_2d(w)
            labels += [w.cos() - 1, w.sin()]
        if self.aniso:
            w = random.randn((B,))
            r = (random.rand((B,)) * 2 - 1) * math.pi
            w = self._gate(w, self.aniso, random, (B,))
            r = torch.where(random.rand((B,)) < self.aniso_rotate_prob, r, torch.zeros_like(r))
            s = (w * self.aniso_std).exp2()
            M = M @ rotate_2d(-r) @ scale_2d(1 / s, s) @ rotate_2d(r)
            labels += [w * r.cos(), w * r.sin()]
        if self.translate_frac:
            w = self._gate(random.randn((2, B)), self.translate_frac, random, (1, B))
            M = M @ translate_2d(-w[0] * (W * self.translate_frac_std), -w[1] * (H * self.translate_frac_std))
            labels += [w[0], w[1]]
        return M

    def _colour(self, images: Tensor, random: Random, labels: list[Tensor]) -> Tensor:
        """[B, 4, 4]: affine map of RGB."""
        B = images.shape[0]
        C = torch.eye(4, device=images.device).expand(B, 4, 4)
        grey = constant((*LUMA, 0.0), images.device)
        onto_grey = torch.outer(grey, grey)  # [4, 4]
        identity = torch.eye(4, device=images.device)
        if self.brightness:
            w = self._gate(random.randn((B,)), self.brightness, random, (B,))
            shift = identity.repeat(B, 1, 1)
            shift[:, :3, 3] = (w * self.brightness_std)[:, None]
            C = shift @ C
            labels.append(w)
        if self.contrast:
            w = self._gate(random.randn((B,)), self.contrast, random, (B,))
            stretch = identity.repeat(B, 1, 1)
            stretch[:, :3, :3] *= (w * self.contrast_std).exp2()[:, None, None]
            C = stretch @ C
            labels.append(w)
        if self.lumaflip:
            w = self._gate(random.randint(2, (B, 1, 1)), self.lumaflip, random, (B, 1, 1))
            C = (identity - 2 * onto_grey * w) @ C
            labels.append(w)
        if self.hue:
            w = (random.rand((B,)) * 2 - 1) * (math.pi * self.hue_max)
            w = self._gate(w, self.hue, random, (B,))
            C = rotate_about_grey(w) @ C
            labels += [w.cos() - 1, w.sin()]
        if self.saturation:
            w = self._gate(random.randn((B, 1, 1)), self.saturation, random, (B, 1, 1))
            C = (onto_grey + (identity - onto_grey) * (w * self.saturation_std).exp2()) @ C
            labels.append(w)
        return C


def mirrored(index: Tensor, size: int) -> Tensor:
    """Any integer index reflected into 0 .. size-1 without repeating the edge pixel."""
    if size == 1:
        return torch.zeros_like(index)
    last = size - 1
    return last - (last - index % (2 * last)).abs()


def matrix_2d(rows: list[list[Tensor | float]], like: Tensor) -> Tensor:
    """[B, 3, 3] from entries that are numbers or [B]."""
    numbers = {e: torch.full_like(like, e) for row in rows for e in row if not isinstance(e, Tensor)}
    entries = [e if isinstance(e, Tensor) else numbers[e] for row in rows for e in row]
    return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))


def scale_2d(x: Tensor, y: Tensor) -> Tensor:
    return matrix_2d([[x, 0, 0], [0, y, 0], [0, 0, 1]], like=x)


def rotate_2d(a: Tensor) -> Tensor:
    cos, sin = a.cos(), a.sin()
    return matrix_2d([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], like=a)


def translate_2d(x: Tensor, y: Tensor) -> Tensor:
    return matrix_2d([[1, 0, x], [0, 1, y], [0, 0, 1]], like=x)


@cache
def constant(values: tuple, device: torch.device) -> Tensor:
    """A float32 tensor of numbers, copied to a device once in the life of the process."""
    with torch.inference_mode(False):  # it serves training too
        return torch.tensor(values, device=device)


def fixed_scale(x: float, y: float, device: torch.device) -> Tensor:
    """[3, 3], the same for all images."""
    return constant(((x, 0.0, 0.0), (0.0, y, 0.0), (0.0, 0.0, 1.0)), device)


def fixed_shift(x: float, y: float, device: torch.device) -> Tensor:
    """[3, 3], the same for all images."""
    return constant(((1.0, 0.0, x), (0.0, 1.0, y), (0.0, 0.0, 1.0)), device)


def rotate_about_grey(a: Tensor) -> Tensor:
    """[B, 4, 4], right-handed: a third of a turn sends red to green, green to blue, blue to red (Rodrigues)."""
    v = constant(LUMA, a.device)
    x, y, z = LUMA
    cross = constant(((0.0, -z, y), (z, 0.0, -x), (-y, x, 0.0)), a.device)
    a = a[:, None, None]
    R = torch.eye(4, device=a.device).repeat(a.shape[0], 1, 1)
    R[:, :3, :3] = torch.eye(3, device=a.device) * a.cos() + cross * a.sin() + torch.outer(v, v) * (1 - a.cos())
    return R


def recolour(images: Tensor, C: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] through C [B, 4, 4]; grey ones [B, 1, H, W] through the mean of its first three rows."""
    if images.shape[1] == 3:
        return torch.einsum("bij,bjhw->bihw", C[:, :3, :3], images) + C[:, :3, 3][:, :, None, None]
    if images.shape[1] == 1:
        mean = C[:, :3].mean(dim=1)[:, :, None, None, None]  # [B, 4, 1, 1, 1]
        return images * mean[:, :3].sum(dim=1) + mean[:, 3]
    raise ValueError(f"colour augmentation needs 1 or 3 channels, not {images.shape[1]}")


def resample(images: Tensor, M: Tensor) -> Tensor:
    """images [B, C, H, W] seen through M [B, 3, 3], without aliasing: padded by reflection, doubled with the symlet,
    read bilinearly at twice the resolution, and halved with the symlet."""
    B, C, H, W = images.shape
    device = images.device
    symlet = constant(SYM6, device).to(images.dtype)

    x0, y0, x1, y1 = margins(M, H, W)
    x = F.pad(images, [x0, x1, y0, y1], mode="reflect").reshape(B * C, 1, H + y0 + y1, W + x0 + x1)
    M = fixed_shift((x0 - x1) / 2, (y0 - y1) / 2, device) @ M

    # Twice the resolution; pixel centres move by half a pixel.
    x = F.conv_transpose2d(x, symlet[None, None, None, :], stride=(1, 2), padding=(0, 5))
    x = F.conv_transpose2d(x, symlet[None, None, :, None], stride=(2, 1), padding=(5, 0))
    M = fixed_scale(2, 2, device) @ M @ fixed_scale(0.5, 0.5, device)
    M = fixed_shift(-0.5, -0.5, device) @ M @ fixed_shift(0.5, 0.5, device)

    # Bilinear reading, in the coordinates of affine_grid: [-1, 1] from edge to edge.
    h, w = 2 * (H + 2 * REACH), 2 * (W + 2 * REACH)
    M = fixed_scale(2 / x.shape[3], 2 / x.shape[2], device) @ M @ fixed_scale(w / 2, h / 2, device)
    grid = F.affine_grid(M[:, :2], [B, C, h, w], align_corners=False)
    x = F.grid_sample(x.reshape(B, C, *x.shape[2:]), grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    # Half the resolution, and the filter's reach cut off.
    x = x.reshape(B * C, 1, h, w)
    x = F.conv2d(x, symlet[None, None, None, :], stride=(1, 2), padding=(0, 5))[:, :, :, REACH:-REACH]
    x = F.conv2d(x, symlet[None, None, :, None], stride=(2, 1), padding=(5, 0))[:, :, REACH:-REACH, :]
    return x.reshape(B, C, H, W)


def margins(M: Tensor, height: int, width: int) -> tuple[int, int, int, int]:
    """Pixels to add at the left, top, right and bottom: what the corners of the whole batch reach beyond the image, and
    the filter beyond them. On a GPU as many as reflection can give: the host does not wait for numbers."""
    if M.is_cuda:
        return width - 1, height - 1, width - 1, height - 1
    cx, cy = (width - 1) / 2, (height - 1) / 2
    corners = M.new_tensor([[-cx, -cy, 1], [cx, -cy, 1], [cx, cy, 1], [-cx, cy, 1]])
    reached = M @ corners.T  # [B, 3, 4]
    sides = torch.stack([-reached[:, 0], -reached[:, 1], reached[:, 0], reached[:, 1]]).amax(dim=(1, 2))  # [4]
    margin = sides + M.new_tensor([2 * REACH - cx, 2 * REACH - cy] * 2)
    most = M.new_tensor([width - 1, height - 1] * 2)
    left, top, right, bottom = (int(m) for m in margin.clamp(min=0).minimum(most).ceil())
    return left, top, right, bottom
