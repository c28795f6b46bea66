"""Non-leaking augmentation: random image transforms, with labels that tell the network which ones it sees.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", appendix F.2. The transforms
and the wavelet resampling are those of Karras et al. 2020, "Training Generative Adversarial Networks with Limited
Data", appendix B.

Best read from the bottom up: `AugmentPipe` runs three tables in order. The pixel table moves pixels at once. The
geometry table multiplies up one 3×3 matrix per sample, and `warp` resamples the images once. The colour table does
the same with a 3×4 matrix, which `recolour` applies. Every transform is a function

    (images or matrices, rand, pipe) → (images or matrices, label columns)

Network pickles carry this file as source text, so of the project it imports `torch_utils.persistence` and no more.
"""

import numpy as np
import torch
from torch.nn.functional import affine_grid, conv2d, conv_transpose2d, grid_sample, pad

from torch_utils import persistence

# Low-pass analysis filters of orthogonal wavelets: Σ h = √2, and h is orthonormal to its own even shifts.
wavelets = {
    'sym6': [
        0.015404109327027373,
        0.0034907120842174702,
        -0.11799011114819057,
        -0.048311742585633,
        0.4910559419267466,
        0.787641141030194,
        0.3379294217276218,
        -0.07263752278646252,
        -0.021060292512300564,
        0.04472490177066578,
        0.0017677118642428036,
        -0.007800708325034148,
    ],
}

# How many pixels of the image the filters of `warp` reach: half the taps, and those at twice the resolution.
REACH = len(wavelets['sym6']) // 4


class Draws:
    """Random variates for one batch, float32, one per sample, from the default generator of the images' device.

    Labels and images are reproducible only if the variates are asked for in a fixed order: a transform draws its values
    first, then the gates that decide which samples keep them.
    """

    def __init__(self, images, p):
        self.p = p
        self.height, self.width = images.shape[2:]
        self.size = images.shape[0]
        self.like = {'device': images.device, 'dtype': torch.float32}

    def integer(self, count):
        """Uniform over 0 … count−1."""
        return torch.randint(count, [self.size], device=self.like['device'])

    def normal(self, *lead):
        """Standard normal, shape [*lead, N]."""
        return torch.randn([*lead, self.size], **self.like)

    def uniform(self, *lead):
        """Uniform over (−1, 1), shape [*lead, N]."""
        return torch.rand([*lead, self.size], **self.like) * 2 - 1

    def keep(self, value, probability):
        """`value` [..., N] for a sample with the given probability, else 0; what leads N shares the gate."""
        gate = torch.rand([self.size], **self.like) < probability
        return torch.where(gate, value, torch.zeros_like(value))

    def gate(self, value, multiplier):
        """`keep` with the probability of a transform, multiplier · p."""
        return self.keep(value, multiplier * self.p)


# Pixel transforms: images [N, C, H, W] → images.


def mirror(images, chosen, dim):
    """Flip the samples for which `chosen` [N] holds along one axis."""
    return torch.where(chosen[:, None, None, None], images.flip(dim), images)


def xflip(images, rand, pipe):
    w = rand.gate(rand.integer(2), pipe.xflip)
    return mirror(images, w == 1, 3), (w,)


def yflip(images, rand, pipe):
    w = rand.gate(rand.integer(2), pipe.yflip)
    return mirror(images, w == 1, 2), (w,)


def rotate_int(images, rand, pipe):
    if rand.height != rand.width:
        raise ValueError(f'rotate_int needs square images, got {rand.height}×{rand.width}: set rotate_int=0')
    w = rand.gate(rand.integer(4), pipe.rotate_int)
    x_mirrored, y_mirrored = (w == 1) | (w == 2), (w == 2) | (w == 3)
    images = mirror(mirror(images, x_mirrored, 3), y_mirrored, 2)
    transposed = (w % 2 == 1)[:, None, None, None]
    return torch.where(transposed, images.transpose(2, 3), images), (x_mirrored, y_mirrored)


def reflected(index, length):
    """Fold any integer into 0 … length−1 by mirroring at the centres of the first and last pixel."""
    last = length - 1
    return last - (last - index % max(2 * last, 1)).abs()


def translate_int(images, rand, pipe):
    w = rand.gate(rand.uniform(2), pipe.translate_int)
    reach_x, reach_y = rand.width * pipe.translate_int_max, rand.height * pipe.translate_int_max
    tx, ty = (w[0] * reach_x).round(), (w[1] * reach_y).round()
    x = torch.arange(rand.width, device=images.device) - tx.long()[:, None]
    y = torch.arange(rand.height, device=images.device) + ty.long()[:, None]
    images = images.take_along_dim(reflected(x, rand.width)[:, None, None, :], 3)
    images = images.take_along_dim(reflected(y, rand.height)[:, None, :, None], 2)
    return images, (tx / reach_x, ty / reach_y)


# Geometric transforms: G_inv [N, 3, 3] takes a point (x, y, 1) of the output, in pixels from the image centre with y
# downwards, to the point of the input that is shown there. A later transform therefore multiplies on the right.


def identity(like):
    return torch.eye(like.shape[1], dtype=like.dtype, device=like.device).repeat(like.shape[0], 1, 1)


def translation(like, tx, ty):
    """T(tx, ty), a batch of matrices shaped like `like`; the entries are numbers or tensors [N]."""
    matrix = identity(like)
    matrix[:, 0, 2] = tx
    matrix[:, 1, 2] = ty
    return matrix


def scaling(like, sx, sy):
    """S(sx, sy) = diag(sx, sy, 1)."""
    matrix = identity(like)
    matrix[:, 0, 0] = sx
    matrix[:, 1, 1] = sy
    return matrix


def rotation(like, theta):
    """R(θ) = [[cos θ, −sin θ, 0], [sin θ, cos θ, 0], [0, 0, 1]]."""
    matrix = scaling(like, theta.cos(), theta.cos())
    matrix[:, 0, 1] = -theta.sin()
    matrix[:, 1, 0] = theta.sin()
    return matrix


def scale(G_inv, rand, pipe):
    w = rand.gate(rand.normal(), pipe.scale)
    s = (w * pipe.scale_std).exp2()
    return G_inv @ scaling(G_inv, 1 / s, 1 / s), (w,)


def rotate_frac(G_inv, rand, pipe):
    w = rand.gate(rand.uniform() * (np.pi * pipe.rotate_frac_max), pipe.rotate_frac)
    return G_inv @ rotation(G_inv, w), (w.cos() - 1, w.sin())


def aniso(G_inv, rand, pipe):
    w, r = rand.normal(), rand.uniform() * np.pi
    w = rand.gate(w, pipe.aniso)
    r = rand.keep(r, pipe.aniso_rotate_prob)
    s = (w * pipe.aniso_std).exp2()
    G_inv = G_inv @ rotation(G_inv, -r) @ scaling(G_inv, 1 / s, s) @ rotation(G_inv, r)
    return G_inv, (w * r.cos(), w * r.sin())


def translate_frac(G_inv, rand, pipe):
    w = rand.gate(rand.normal(2), pipe.translate_frac)
    tx, ty = w[0] * (rand.width * pipe.translate_frac_std), w[1] * (rand.height * pipe.translate_frac_std)
    return G_inv @ translation(G_inv, -tx, -ty), (w[0], w[1])


# Colour transforms: M [N, 3, 4] = [A | t] takes rgb to A·rgb + t. A later transform multiplies on the left. The luma
# axis is v = (1, 1, 1)/√3, so vvᵀ·M is the mean over the rows of M, and no 3×3 matrix has to be written out.


def luma(M):
    """vvᵀ·M, as one row."""
    return M.mean(dim=1, keepdim=True)


def brightness(M, rand, pipe):
    w = rand.gate(rand.normal(), pipe.brightness)
    b = (w * pipe.brightness_std)[:, None, None]
    return torch.cat([M[:, :, :3], M[:, :, 3:] + b], dim=2), (w,)


def contrast(M, rand, pipe):
    w = rand.gate(rand.normal(), pipe.contrast)
    c = (w * pipe.contrast_std).exp2()[:, None, None]
    return c * M, (w,)


def lumaflip(M, rand, pipe):
    w = rand.gate(rand.integer(2), pipe.lumaflip)
    return M - 2 * w[:, None, None] * luma(M), (w,)


def hue(M, rand, pipe):
    w = rand.gate(rand.uniform() * (np.pi * pipe.hue_max), pipe.hue)
    cos, sin = w.cos()[:, None, None], w.sin()[:, None, None]
    # Rodrigues: R = vvᵀ + cos w·(I − vvᵀ) + sin w·[v]×, where [v]× is a difference of two cyclic shifts over √3.
    cross = (M.roll(1, dims=1) - M.roll(-1, dims=1)) * 3**-0.5
    return luma(M) + cos * (M - luma(M)) + sin * cross, (w.cos() - 1, w.sin())


def saturation(M, rand, pipe):
    w = rand.gate(rand.normal(), pipe.saturation)
    s = (w * pipe.saturation_std).exp2()[:, None, None]
    return luma(M) + (M - luma(M)) * s, (w,)


# Execution of the accumulated matrices. `warp` pads by reflection, doubles the resolution, samples bilinearly at twice
# the output's resolution and halves that. Doubling is the adjoint of halving and the wavelet is orthogonal, so
# G_inv = I gives the images back up to rounding.


def resample(convolution, images, dim):
    """Filter one axis with sym6. `conv2d` halves its length L, the adjoint `conv_transpose2d` doubles it."""
    taps = images.new_tensor(wavelets['sym6'])
    weight, stride, padding = (taps[None, :], (1, 2), (0, 5)) if dim == 3 else (taps[:, None], (2, 1), (5, 0))
    planes = convolution(images.flatten(0, 1)[:, None], weight[None, None], stride=stride, padding=padding)
    return planes.reshape(*images.shape[:2], *planes.shape[2:])


def margins(G_inv, width, height):
    """Pixels (left, top, right, bottom) that the batch reads outside the image, at most what reflection supplies."""
    cx, cy = (width - 1) / 2, (height - 1) / 2
    corners = G_inv.new_tensor([[-cx, -cx, cx, cx], [-cy, cy, -cy, cy], [1, 1, 1, 1]])
    x, y = (G_inv @ corners)[:, :2].unbind(1)
    limit = G_inv.new_tensor([width - 1, height - 1] * 2)
    overhang = torch.stack([-x, -y, x, y]).amax(dim=(1, 2)) + 2 * REACH - limit / 2
    return [int(side) for side in overhang.clamp(min=0).minimum(limit).ceil().tolist()]


def source_grid(G_inv, source, target):
    """Sampling grid [N, H, W, 2] for G_inv between images of sizes (H, W) `source` and `target`, pixels to [−1, 1]."""
    to_unit = scaling(G_inv, 2 / source[1], 2 / source[0])
    to_pixels = scaling(G_inv, target[1] / 2, target[0] / 2)
    theta = to_unit @ G_inv @ to_pixels
    return affine_grid(theta[:, :2], [len(G_inv), 1, *target], align_corners=False)


def warp(images, G_inv):
    """Show at each output pixel what lies at G_inv·(x, y, 1) in the input: [N, C, H, W] → the same shape.

    G_inv [N, 3, 3] in pixels from the image centre. Beyond its edges the image continues reflected once, then zero.
    """
    height, width = images.shape[2:]
    left, top, right, bottom = margins(G_inv, width, height)
    images = pad(images, [left, right, top, bottom], mode='reflect')
    G_inv = translation(G_inv, (left - right) / 2, (top - bottom) / 2) @ G_inv

    for dim in (3, 2):
        images = resample(conv_transpose2d, images, dim)
    G_inv = scaling(G_inv, 2, 2) @ G_inv @ scaling(G_inv, 0.5, 0.5)
    # The filters have an even number of taps, which puts the finer grid half of its pixels off centre.
    G_inv = translation(G_inv, -0.5, -0.5) @ G_inv @ translation(G_inv, 0.5, 0.5)

    target = (2 * (height + 2 * REACH), 2 * (width + 2 * REACH))
    grid = source_grid(G_inv, images.shape[2:], target).to(images.dtype)
    images = grid_sample(images, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
    for dim in (3, 2):
        images = resample(conv2d, images, dim)
    return images[:, :, REACH:-REACH, REACH:-REACH]


def recolour(images, M):
    """A·rgb + t for M = [A | t] [N, 3, 4]. A grey image counts as r = g = b, and the mean of the result is kept."""
    if images.shape[1] == 1:
        M = luma(M)
        M = torch.cat([M[:, :, :3].sum(dim=2, keepdim=True), M[:, :, 3:]], dim=2)
    M = M.to(images.dtype)
    return (M[:, :, :-1] @ images.flatten(2) + M[:, :, -1:]).reshape(images.shape)


# The order here is that of the draws and of the label columns. A multiplier of the pipe has its function's name.
PIXEL = (xflip, yflip, rotate_int, translate_int)
GEOMETRY = (scale, rotate_frac, aniso, translate_frac)
COLOUR = (brightness, contrast, lumaflip, hue, saturation)


@persistence.persistent_class
class AugmentPipe:
    """Random augmentation: pipe(images) → (augmented images, labels).

    images  [N, C, H, W], any floating dtype and device, nominally in [−1, 1]; the result has the same shape and dtype.
    labels  [N, columns] float32, the parameters that were applied. A row of zeros says "not augmented", which is also
            what a network assumes when it is given no augmentation labels.

    Each transform has a multiplier m. It takes part only if m > 0, and then happens to each sample with probability
    m·p; a sample that it passes over has w = 0, which changes nothing. U is uniform, 𝒩 normal, W and H are in pixels.

        multiplier, in order   w of a sample     effect                                          label columns
        xflip                  0, 1              mirror left–right                               w
        yflip                  0, 1              mirror top–bottom                               w
        rotate_int             0, 1, 2, 3        rotate by w·90° anticlockwise                   w ∈ {1, 2}, w ∈ {2, 3}
        translate_int          U(−1, 1) twice    move right by t₀ = round(w₀·W·max) and          t₀ / (W·max),
                                                 up by t₁ = round(w₁·H·max), edges reflected     t₁ / (H·max)
        scale                  𝒩(0, 1)           zoom by 2^(w·std)                               w
        rotate_frac            π·max·U(−1, 1)    rotate by w anticlockwise                       cos w − 1, sin w
        aniso                  𝒩(0, 1)           stretch by 2^(w·std) and, across, its inverse   w·cos r, w·sin r
                                                 along axes turned by an angle r
        translate_frac         𝒩(0, 1) twice     move right by w₀·W·std, down by w₁·H·std        w₀, w₁
        brightness             𝒩(0, 1)           add w·std                                       w
        contrast               𝒩(0, 1)           multiply by 2^(w·std)                           w
        lumaflip               0, 1              mirror colours in the plane of zero luma        w
        hue                    π·max·U(−1, 1)    rotate colours about the grey axis by w         cos w − 1, sin w
        saturation             𝒩(0, 1)           multiply the distance from grey by 2^(w·std)    w

    p                   overall probability, 0 … 1. A multiplier above 1/p means "always"; EDM mirrors with xflip = 1e8.
    translate_int_max   fraction of the image size, > 0.
    rotate_frac_max     half turns; so is hue_max.
    aniso_rotate_prob   probability, 0 … 1 and not multiplied by p, of r = π·U(−1, 1); else r = 0.
    translate_frac_std  fraction of the image size.
    brightness_std      image units.
    scale_std           octaves; so are aniso_std, contrast_std and saturation_std.

    Raises ValueError for images that are not [N, C, H, W] of a floating dtype, for colour transforms unless C is 1
    or 3, and for rotate_int unless H = W. The draws come from torch's default generator of the images' device.

    Source: Karras et al. 2022, appendix F.2, which uses xflip, yflip, scale, rotate_frac, aniso and translate_frac
    (9 label columns); Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", appendix B,
    for the others (19 columns in all).
    """

    # Options are kept as Python floats: a numpy scalar in a pickle ties it to the numpy version that wrote it.
    p: float

    def __init__(
        self,
        p=1,
        xflip=0,
        yflip=0,
        rotate_int=0,
        translate_int=0,
        translate_int_max=0.125,
        scale=0,
        rotate_frac=0,
        aniso=0,
        translate_frac=0,
        scale_std=0.2,
        rotate_frac_max=1,
        aniso_std=0.2,
        aniso_rotate_prob=0.5,
        translate_frac_std=0.125,
        brightness=0,
        contrast=0,
        lumaflip=0,
        hue=0,
        saturation=0,
        brightness_std=0.2,
        contrast_std=0.5,
        hue_max=1,
        saturation_std=1,
    ):
        if not translate_int_max > 0:
            raise ValueError(f'translate_int_max={translate_int_max} must be above 0; translate_int=0 turns it off')
        self.__dict__.update({name: float(value) for name, value in locals().items() if name != 'self'})

    def __call__(self, images):
        self.check(images)
        rand = Draws(images, self.p)
        # Half precision cannot hold a pixel coordinate.
        result = images.to(torch.promote_types(images.dtype, torch.float32))

        result, moved = self.run(PIXEL, result, rand)
        G_inv, warped = self.run(GEOMETRY, torch.eye(3, **rand.like).repeat(len(images), 1, 1), rand)
        if warped:
            result = warp(result, G_inv)
        M, coloured = self.run(COLOUR, torch.eye(3, 4, **rand.like).repeat(len(images), 1, 1), rand)
        if coloured:
            result = recolour(result, M)

        none = torch.zeros([len(images), 0], **rand.like)
        columns = [column.to(torch.float32)[:, None] for column in moved + warped + coloured]
        return result.to(images.dtype), torch.cat([none, *columns], dim=1)

    def enabled(self, transforms):
        return [transform for transform in transforms if getattr(self, transform.__name__) > 0]

    def run(self, transforms, target, rand):
        """Pass images or matrices through the enabled transforms → (target, label columns)."""
        columns = []
        for transform in self.enabled(transforms):
            target, labels = transform(target, rand, self)
            columns += labels
        return target, columns

    def check(self, images):
        if images.ndim != 4 or not images.is_floating_point():
            shape = list(images.shape)
            raise ValueError(f'images must be [N, C, H, W] of a floating dtype, got {images.dtype} {shape}')
        colours = ', '.join(transform.__name__ for transform in self.enabled(COLOUR))
        if colours and images.shape[1] not in (1, 3):
            raise ValueError(f'{colours}: needs images of 1 or 3 channels, got {images.shape[1]}; set them to 0')
