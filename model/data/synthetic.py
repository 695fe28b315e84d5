"""Ten shapes in place of CIFAR-10: procedural images for a machine that has no data set.

A picture is a coloured texture, two pieces of clutter, and one shape of random place, size, turn, colour and
opacity, under noise. Pixels do not give the class away (a linear classifier stays near chance), a small
convolutional network learns it in a few epochs. The class survives what training does to an image: no shape is
another's mirror image, and each is larger than a cutout square.

Bit-identical everywhere: random numbers are the raw stream of a counter-based generator, and the arithmetic is
float32 addition, multiplication, division, square root and rounding, element by element, which IEEE 754 fixes.
No sine, no exponential, no sum whose order a library chooses.
"""

from functools import partial

import numpy as np

SHAPES = ("disc", "ring", "square", "diamond", "triangle", "plus", "saltire", "crescent", "dome", "bars")
"""Names of the labels 0 to 9."""

SIZE = 32
MAX_SHIFT = 5  # of a centre from the image's, in pixels
MAX_TURN = 0.15  # tangent of half the angle: 17 degrees, less than half of what turns a square into a diamond
RADIUS = (6, 11)  # of the shape, in pixels
CLUTTER, CLUTTER_RADIUS, CLUTTER_OPACITY = 2, (3, 6), (0.2, 0.65)
OPACITY = (0.5, 1.0)
SHADE = 100  # range of the shading within a shape, in pixel values
NOISE = 0.3  # the largest share of white noise

Array = np.ndarray
f32 = np.float32


def generate(train: int = 5_000, test: int = 2_000, seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """Training images and labels, then test images and labels: uint8 [N, 32, 32, 3] and int64 [N].

    Image i has the label i mod 10. The same arguments give the same bytes on every machine.
    """
    return *_split(train, seed, 0), *_split(test, seed, 1)


def _split(count: int, seed: int, stream: int) -> tuple[Array, Array]:
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    labels = np.arange(count, dtype=np.int64) % len(SHAPES)
    for label in range(len(SHAPES)):
        bits = np.random.Philox(key=[seed, stream * len(SHAPES) + label])
        mine = images[label :: len(SHAPES)]
        mine[:] = _pictures(bits, label, len(mine))
    return images, labels


def _pictures(bits: np.random.Philox, label: int, n: int) -> Array:
    """n images of one class, uint8 [n, 32, 32, 3]."""
    uniform = partial(_uniform, bits)
    first, second = uniform((n, 1, 1, 3), 0, 255), uniform((n, 1, 1, 3), 0, 255)
    image = first + _texture(bits, n, cells=4)[..., None] * (second - first)

    for _ in range(CLUTTER):
        u, v, radius = _place(bits, n, CLUTTER_RADIUS, max_turn=1)
        stroke = uniform((n, 1, 1), 0, 1) < f32(0.5)  # across the whole image; otherwise a small square
        outside = np.where(stroke, np.abs(u) - f32(0.3), np.maximum(np.abs(u), np.abs(v)) - f32(0.8))
        coverage = np.clip(f32(0.5) - outside * radius, 0, 1) * uniform((n, 1, 1), *CLUTTER_OPACITY)
        image += coverage[..., None] * (uniform((n, 1, 1, 3), 0, 255) - image)

    u, v, radius = _place(bits, n, RADIUS, MAX_TURN)
    coverage = np.clip(f32(0.5) - _outside(SHAPES[label], u, v) * radius, 0, 1) * uniform((n, 1, 1), *OPACITY)
    # A quarter to three quarters of the way round the scale from the background, so that every shape can be seen.
    colour = (first + second) * f32(0.5) + uniform((n, 1, 1, 3), 64, 192)
    colour -= np.floor(colour * f32(1 / 256)) * f32(256)
    shade = (_texture(bits, n, cells=2) - f32(0.5)) * f32(SHADE)
    image += coverage[..., None] * (colour + shade[..., None] - image)

    noise = _bytes(bits, image.size).reshape(image.shape).astype(f32) - f32(127.5)
    image += noise * uniform((n, 1, 1, 1), 0, NOISE)
    return np.clip(image, 0, 255).astype(np.uint8)


def _outside(shape: str, u: Array, v: Array) -> Array:
    """Roughly the distance from a shape of radius 1, negative inside; u to the right, v downwards."""
    a, b = np.abs(u), np.abs(v)
    match shape:
        case "disc":
            return np.sqrt(u * u + v * v) - f32(0.9)
        case "ring":
            return np.abs(np.sqrt(u * u + v * v) - f32(0.78)) - f32(0.22)
        case "square":
            return np.maximum(a, b) - f32(0.8)
        case "diamond":
            return (a + b - f32(1.15)) * f32(0.7)
        case "triangle":
            return np.maximum(v - f32(0.7), a * f32(0.9) - v * f32(0.45) - f32(0.5))
        case "plus":
            return np.minimum(np.maximum(a - f32(0.3), b - f32(1)), np.maximum(a - f32(1), b - f32(0.3)))
        case "saltire":
            p, q = np.abs(u + v), np.abs(u - v)
            arms = np.minimum(np.maximum(p - f32(0.42), q - f32(1.5)), np.maximum(p - f32(1.5), q - f32(0.42)))
            return arms * f32(0.7)
        case "crescent":
            w = u - f32(0.5)
            return np.maximum(np.sqrt(u * u + v * v) - f32(1), f32(0.75) - np.sqrt(w * w + v * v))
        case "dome":
            return np.maximum(np.sqrt(u * u + v * v) - f32(1), v - f32(0.2))
        case "bars":
            return np.maximum(a - f32(0.95), np.abs(b - f32(0.6)) - f32(0.3))
    raise ValueError(f"unknown shape {shape!r}")


def _place(bits: np.random.Philox, n: int, radii: tuple[int, int], max_turn: float) -> tuple[Array, Array, Array]:
    """Each pixel in the frame of a shape of radius 1, u and v [n, 32, 32], and its radius in pixels [n, 1, 1]."""
    radius = _uniform(bits, (n, 1, 1), *radii)
    middle = (SIZE - 1) / 2
    centre = _uniform(bits, (2, n, 1, 1), middle - MAX_SHIFT, middle + MAX_SHIFT)
    # (1 - t^2, 2t) / (1 + t^2) is a point of the unit circle, without a sine
    t = _uniform(bits, (n, 1, 1), -max_turn, max_turn)
    cosine, sine = (f32(1) - t * t) / (f32(1) + t * t) / radius, f32(2) * t / (f32(1) + t * t) / radius
    pixels = np.arange(SIZE, dtype=f32)
    dx, dy = pixels - centre[0], pixels[:, None] - centre[1]
    return dx * cosine + dy * sine, (dy * cosine - dx * sine) * _uniform(bits, (n, 1, 1), 0.8, 1.2), radius


def _texture(bits: np.random.Philox, n: int, cells: int) -> Array:
    """Smooth random values in 0..1, [n, 32, 32]: a lattice of cells x cells squares, interpolated bilinearly."""
    lattice = _uniform(bits, (n, cells + 1, cells + 1), 0, 1)
    position = np.arange(SIZE) * cells
    cell, weight = position // SIZE, (position % SIZE).astype(f32) * f32(1 / SIZE)
    rows = lattice[:, cell] + (lattice[:, cell + 1] - lattice[:, cell]) * weight[:, None]
    return rows[:, :, cell] + (rows[:, :, cell + 1] - rows[:, :, cell]) * weight


def _uniform(bits: np.random.Philox, shape: tuple[int, ...], low: float, high: float) -> Array:
    """float32 in low..high, from 24 bits each."""
    words = bits.random_raw(int(np.prod(shape))) >> np.uint64(40)
    return f32(low) + words.astype(f32).reshape(shape) * (f32(2**-24) * f32(high - low))


def _bytes(bits: np.random.Philox, count: int) -> Array:
    """uint8 [count], all eight of each word."""
    return bits.random_raw(-(-count // 8)).astype("<u8", copy=False).view(np.uint8)[:count]
