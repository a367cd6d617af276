"""Scenes in the manner of CLEVR from a ray caster of our own: pure functions of (seed, index).

An imitation: it shares CLEVR's recipe (Johnson et al., 2017), but no picture and no model: spheres,
cubes and cylinders on a grey plane, two sizes, eight colours, two materials, three lamps.
The random numbers are those of common/scenes.py, and the kernels use nothing but + - * / and square
roots, so that golden hashes hold. Lengths are in CLEVR's units; vectors are (x, y, z) with z up.
Dimension key: B scenes, K objects at most, H = W canvas.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numba import njit

from common.backend import THREADS
from common.errors import Fail
from common.processes import threads
from common.scenes import below, key, stream, uniform

VARIANTS = {    # fewest and most objects, radii, half the side of the field, pixels seen of 96 x 96
    "3": (2, 3, (0.9, 0.55), 1.7, 10),
    "5": (3, 5, (0.7, 0.35), 3.0, 50),
    "5-vbg": (3, 5, (0.7, 0.35), 3.0, 50),
}
SPHERE, CUBE, CYLINDER = 0, 1, 2
REACH = np.sqrt([1.0, 3.0, 2.0])    # radius of the ball around a solid of half height 1
COLOURS = np.array([            # grey, red, blue, green, brown, purple, cyan, yellow: reflectance
    [87, 87, 87], [173, 35, 35], [42, 75, 215], [29, 105, 20], [129, 74, 25], [129, 38, 192],
    [41, 208, 208], [255, 238, 51]]) / 255
APART = 0.25                    # between the circles around two objects
PLACINGS, REDRAWS = 50, 5000    # tries before other objects, hope are given up

EYE, EYE_JITTER = np.array([7.4, -6.5, 5.3]), 0.5
TAN = 0.31                      # of half the angle of view
LAMPS = np.array([              # key, fill, rim: where, and how bright at the distance 1
    [0.5, -6.5, 6.5, 46.0], [6.5, 3.0, 4.5, 10.0], [-5.0, 3.5, 6.0, 18.0]])
LAMP_JITTER, LAMP_SIDE = 1.0, 1.6
SAMPLES = np.array([[i, 4 * i % 9] for i in range(9)]) / 9 - 4 / 9      # of a lamp's square
SKY = 0.25                      # how bright all the rest is
GROUND = np.array([0.46, 0.442, 0.42])
DIMMER = np.array([0.1, 0.17, 0.3, 0.53, 0.92, 1.6])         # of the ground in 5-vbg
SMOOTH, CONTRAST = 0.015, 0.06  # neighbours differ by less: no ray; by more: four rays more
CORNERS = (0.35, 0.1), (0.9, 0.35), (0.65, 0.9), (0.1, 0.65)            # of a pixel, nearly


class Factors(NamedTuple):
    """What scenes were made of; -1 or NaN where an object is absent."""
    kinds: np.ndarray           # (B, K) SPHERE, CUBE, CYLINDER
    colours: np.ndarray         # (B, K) row of COLOURS
    shiny: np.ndarray           # (B, K) 0 matte, 1 polished
    sizes: np.ndarray           # (B, K) radius, or half of a cube's diagonal
    places: np.ndarray          # (B, K, 2) where on the ground
    turns: np.ndarray           # (B, K, 2) cosine and sine of its angle
    eyes: np.ndarray            # (B, 3) the camera, which looks at the origin
    grounds: np.ndarray         # (B,) brightness of the ground, 1 but in 5-vbg


class Pictures(NamedTuple):
    images: np.ndarray          # (B, 3, H, H) float32 in [0, 1]
    counts: np.ndarray          # (B,)
    masks: np.ndarray           # (B, H, H) who is seen: 0 background, k + 1 object k
    amodal: np.ndarray          # (B, K, H, H) bool: all that an object covers, seen or hidden
    order: np.ndarray           # (B, K) 0 is nearest, -1 absent
    depth: np.ndarray           # (B, H, H) float32, of what is seen, along the camera's axis
    factors: Factors


jit = njit(cache=True, nogil=True, error_model="numpy")
hot = njit(cache=True, nogil=True, error_model="numpy", forceinline=True)  # a fifth faster


# ---------------------------------------------------------------- vectors

@jit
def vector(rows, i):
    """The first three numbers of a row. (A view, rows[i], would cost more than what follows.)"""
    return rows[i, 0], rows[i, 1], rows[i, 2]


@jit
def dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@jit
def along(a, t, b):
    """a + t b"""
    return a[0] + t * b[0], a[1] + t * b[1], a[2] + t * b[2]


@jit
def unit(a):
    return along((0.0, 0.0, 0.0), 1 / np.sqrt(dot(a, a)), a)


@jit
def power15(x):
    x3 = x * x * x
    return x3 * x3 * x3 * x3 * x3


# ---------------------------------------------------------------- solids
# A row of `solids`: centre x, y, z; half height; cosine and sine of its angle; kind; radius of the
# ball around it. Row 0 stands for the ground and is empty, so that numbers are those of the masks.

@hot
def inward(solids, k, v):
    """A direction in the frame of solid k, where its half height is 1."""
    r, cos, sin = solids[k, 3], solids[k, 4], solids[k, 5]
    return (cos * v[0] + sin * v[1]) / r, (cos * v[1] - sin * v[0]) / r, v[2] / r


@jit
def enter(solids, k, o, d):
    """The t > 0 where the ray o + t d enters solid k, inf if it does not."""
    p = along(o, -1.0, vector(solids, k))
    a, b = dot(d, d), dot(p, d)
    if b >= 0 or b * b - a * (dot(p, p) - solids[k, 7]**2) < 0:
        return np.inf
    return meet(solids, k, p, inward(solids, k, p), d)


@hot
def meet(solids, k, o, p, d):
    """`enter` for a ray that begins at o from the solid's centre, which is p in its frame."""
    kind, a, b = solids[k, 6], dot(d, d), dot(o, d)
    inside = b * b - a * (dot(o, o) - solids[k, 7]**2)
    if b >= 0 or inside < 0:
        return np.inf
    if kind == SPHERE:
        return (-b - np.sqrt(inside)) / a
    v = inward(solids, k, d)
    wide = abs(1 / v[2])
    near, far = -p[2] / v[2] - wide, -p[2] / v[2] + wide
    if kind == CUBE:
        for i in range(2):
            middle, wide = -p[i] / v[i], abs(1 / v[i])
            near, far = max(near, middle - wide), min(far, middle + wide)
    else:
        a, b = v[0] * v[0] + v[1] * v[1], p[0] * v[0] + p[1] * v[1]
        inside = b * b - a * (p[0] * p[0] + p[1] * p[1] - 1)
        if inside < 0:
            return np.inf
        near, far = max(near, (-b - np.sqrt(inside)) / a), min(far, (-b + np.sqrt(inside)) / a)
    return near if 0 < near < far else np.inf


@jit
def normal(solids, k, p):
    """The normal at a point p of the surface of solid k; edges are a little round."""
    x, y, z = inward(solids, k, along(p, -1.0, vector(solids, k)))
    kind, cos, sin = solids[k, 6], solids[k, 4], solids[k, 5]
    if kind == CUBE:
        x, y, z = power15(x), power15(y), power15(z)
    elif kind == CYLINDER:
        steep = power15(np.sqrt(x * x + y * y))
        x, y, z = x * steep, y * steep, power15(z)
    return unit((cos * x - sin * y, sin * x + cos * y, z))


@jit
def first_hit(solids, o, d, skip):
    """t and number of what the ray meets first: a solid but `skip`, the ground 0, the sky -1."""
    t, hit = (-o[2] / d[2], 0) if d[2] < 0 else (np.inf, -1)
    for k in range(1, len(solids)):
        s = enter(solids, k, o, d) if k != skip else np.inf
        if s < t:
            t, hit = s, k
    return t, hit


# ---------------------------------------------------------------- light

@jit
def lit(solids, p, to, far2, skip):
    """The part of a lamp, a level square at p + to, that is seen from p."""
    part = 1.0
    for k in range(1, len(solids)):
        away = along(vector(solids, k), -1.0, p)
        t = dot(away, to) / far2
        reach = solids[k, 7] + 0.7 * t * LAMP_SIDE
        if k != skip and t > 0 and dot(away, away) - t * t * far2 < reach * reach:
            hidden, o = 0, along(p, -1.0, vector(solids, k))
            within = inward(solids, k, o)
            for i in range(len(SAMPLES)):
                x, y = to[0] + LAMP_SIDE * SAMPLES[i, 0], to[1] + LAMP_SIDE * SAMPLES[i, 1]
                hidden += meet(solids, k, o, within, (x, y, to[2])) < np.inf
            part *= 1 - hidden / len(SAMPLES)
            if part == 0:
                break
    return part


@jit
def light(solids, lamps, p, n, d, skip):
    """What arrives at p with normal n, and the lamps' gloss there, seen along d."""
    openness = 1.0
    for k in range(1, len(solids)):
        away = along(vector(solids, k), -1.0, p)
        far2, r = dot(away, away), solids[k, 3]
        if k != skip and far2 < 25 * r * r:
            openness *= 1 - max(0.0, dot(n, away)) / np.sqrt(far2) * min(1.0, r * r / far2)
    diffuse, gloss = SKY * openness * (0.65 + 0.35 * n[2]), 0.0
    for i in range(len(lamps)):
        to = along(vector(lamps, i), -1.0, p)
        cos, far2 = dot(n, to), dot(to, to)
        if cos > 0:
            strength = lamps[i, 3] / far2 * lit(solids, p, to, far2, skip)
            diffuse += strength * cos / np.sqrt(far2)
            if skip:
                gloss += strength * power15(dot(n, unit(along(unit(to), -1.0, unit(d)))))**4
    return diffuse, gloss


@jit
def radiance(solids, coats, lamps, o, d, t, hit):
    """The colour of what the ray meets at t, with one reflection in polished surfaces."""
    colour, weight = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    for bounce in range(2):
        if hit < 0:
            return along(colour, 0.12 + 0.5 * unit(d)[2], weight)
        p, coat = along(o, t, d), vector(coats, hit)
        n = normal(solids, hit, p) if hit else (0.0, 0.0, 1.0)
        diffuse, gloss = light(solids, lamps, p, n, d, hit)
        polished = bounce == 0 and coats[hit, 3] > 0
        diffuse *= 0.35 if polished else 1.0
        gloss *= 1.5 if polished else 0.04
        colour = (colour[0] + weight[0] * (coat[0] * diffuse + gloss),
                  colour[1] + weight[1] * (coat[1] * diffuse + gloss),
                  colour[2] + weight[2] * (coat[2] * diffuse + gloss))
        if not polished:
            break
        weight = along((0.05, 0.05, 0.05), 0.9, coat)
        o, d = p, along(d, -2 * dot(d, n), n)
        t, hit = first_hit(solids, o, d, hit)
    return colour


# ---------------------------------------------------------------- the camera
# Rows of `camera`: the eye, and from it forward, right and down to the canvas's edges at depth 1.

@jit
def ray(camera, x, y, size):
    """The direction, 1 forward, through the point (x, y) of a canvas of size x size pixels."""
    d = along(vector(camera, 1), 2 * x / size - 1, vector(camera, 2))
    return along(d, 2 * y / size - 1, vector(camera, 3))


@jit
def project(camera, p, size):
    """Where on the canvas p is seen, how deep it lies, and pixels for a length there."""
    v = along(p, -1.0, vector(camera, 0))
    z = dot(v, vector(camera, 1))
    scale = 0.5 * size / (TAN * z)
    return (0.5 * size + scale * dot(v, vector(camera, 2)) / TAN,
            0.5 * size + scale * dot(v, vector(camera, 3)) / TAN, z, scale)


@jit
def cover(camera, solids, least, depth, masks, amodal, order):
    """Fill the last four. False if an object shows less than `least` pixels or touches the
    canvas's edge, or if the middle of one lies before, but itself behind another."""
    size, eye = len(depth), vector(camera, 0)
    seen, far = np.zeros(len(solids)), np.empty(len(solids))
    masks[:], amodal[:], depth[:], order[:] = 0, False, np.inf, -1
    for k in range(1, len(solids)):
        x, y, far[k], scale = project(camera, vector(solids, k), size)
        reach = 1.1 * scale * solids[k, 7] * far[k] / (far[k] - solids[k, 7]) + 1
        for i in range(max(0, int(y - reach)), min(size, int(y + reach) + 1)):
            for j in range(max(0, int(x - reach)), min(size, int(x + reach) + 1)):
                t, owner = enter(solids, k, eye, ray(camera, j + 0.5, i + 0.5, size)), masks[i, j]
                if t < np.inf:
                    nearer, edge = t < depth[i, j], min(i, j) == 0 or max(i, j) == size - 1
                    if edge or (owner and nearer != (far[k] < far[owner])):
                        return False
                    amodal[k - 1, i, j] = True
                    if nearer:
                        masks[i, j], depth[i, j] = k, t
                        seen[owner] -= 1
                        seen[k] += 1
    for k in range(1, len(solids)):
        order[k - 1] = (far[1:] < far[k]).sum()
    return seen[1:].min() >= least


@jit
def spread(image, i, j, colour):
    """How far the four neighbours of a pixel differ from the colour, at most."""
    size, most = len(image), 0.0
    for k in range(4):
        y, x = i + (k == 1) - (k == 0), j + (k == 3) - (k == 2)
        if 0 <= y < size and 0 <= x < size:
            for c in range(3):
                most = max(most, abs(image[y, x, c] - colour[c]))
    return most


@jit
def develop(camera, solids, coats, lamps, masks, depth, rough, image):
    """Draw the picture: every other pixel from a ray through its middle; between them too, but
    where all neighbours are nearly alike; with four rays more where neighbours differ much."""
    size, eye = len(masks), vector(camera, 0)
    for parity in range(2):
        for i in range(size):
            for j in range((i + parity) % 2, size, 2):
                d, hit = ray(camera, j + 0.5, i + 0.5, size), masks[i, j]
                t = depth[i, j] = depth[i, j] if hit else -eye[2] / d[2]
                plain = parity and not hit and min(i, j) > 0 and max(i, j) < size - 1
                if plain and spread(rough, i, j, vector(rough[i - 1], j)) < SMOOTH:
                    for c in range(3):
                        rough[i, j, c] = (rough[i - 1, j, c] + rough[i + 1, j, c]
                                          + rough[i, j - 1, c] + rough[i, j + 1, c]) / 4
                else:
                    rough[i, j] = radiance(solids, coats, lamps, eye, d, t, hit)
    for i in range(size):
        for j in range(size):
            colour = vector(rough[i], j)
            if spread(rough, i, j, colour) > CONTRAST:
                for x, y in CORNERS:
                    d = ray(camera, j + x, i + y, size)
                    t, hit = first_hit(solids, eye, d, -1)
                    colour = along(colour, 1.0, radiance(solids, coats, lamps, eye, d, t, hit))
                colour = along((0.0, 0.0, 0.0), 0.2, colour)
            for c in range(3):
                image[c, i, j] = np.sqrt(min(1.0, colour[c]))


# ---------------------------------------------------------------- scenes

@jit
def look(eye):
    """A camera that looks from the eye at the origin."""
    x, y, z = unit((-eye[0], -eye[1], -eye[2]))
    wide = np.sqrt(x * x + y * y)
    tan = TAN / wide
    return np.array([(eye[0], eye[1], eye[2]), (x, y, z), (tan * y, -tan * x, 0.0),
                     (tan * z * x, tan * z * y, -TAN * wide)])


@jit
def settle(state, camera, radii, field, solids, traits):
    """Draw kinds, colours, materials and sizes, and find places; False if there are none."""
    for k in range(1, len(solids)):
        for i, n in enumerate((3, len(COLOURS), 2, len(radii))):
            traits[k, i] = below(state, n)
        kind, radius, s = traits[k, 0], radii[traits[k, 3]], solids[k]
        cos, sin, free = 1.0, 1.0, False
        while not 0.01 < cos * cos + sin * sin <= 1:
            cos, sin = uniform(state, -1.0, 1.0), uniform(state, -1.0, 1.0)
        length = np.sqrt(cos * cos + sin * sin)
        s[2] = s[3] = radius * np.sqrt(0.5) if kind == CUBE else radius
        s[4], s[5], s[6], s[7] = cos / length, sin / length, kind, s[3] * REACH[kind]
        for _ in range(PLACINGS):
            s[0], s[1] = uniform(state, -field, field), uniform(state, -field, field)
            x, y, _, scale = project(camera, vector(solids, k), 1)
            free = scale * s[3] < min(x, y) and max(x, y) < 1 - scale * s[3]
            for j in range(1, k):
                x, y, far = solids[j, 0] - s[0], solids[j, 1] - s[1], radii[traits[j, 3]] + radius
                free = free and x * x + y * y > (far + APART)**2
            if free:
                break
        if not free:
            return False
    return True


def draw_scene(seed, index, variant, s, b):
    """Fill row b of s; False if its objects find no places."""
    low, high, radii, field, least = VARIANTS[variant]
    f, size, state = s.factors, len(s.masks[b]), stream(seed, index)
    s.counts[b] = n = low + below(state, high - low + 1)
    f.grounds[b] = DIMMER[below(state, len(DIMMER))] if variant == "5-vbg" else 1
    jitter = np.array([uniform(state, -1.0, 1.0) for _ in range(12)]).reshape(4, 3)
    eye, lamps = EYE + EYE_JITTER * jitter[0], LAMPS.copy()
    lamps[:, :3] += LAMP_JITTER * jitter[1:]
    camera, f.eyes[b] = look(eye), eye
    solids, coats, traits = np.zeros((n + 1, 8)), np.zeros((n + 1, 4)), np.zeros((n + 1, 4), int)
    for _ in range(REDRAWS):
        if settle(state, camera, radii, field, solids, traits) and cover(
                camera, solids, least * (size / 96)**2, s.depth[b], s.masks[b], s.amodal[b],
                s.order[b]):
            break
    else:
        return False
    f.kinds[b, :n], f.colours[b, :n], f.shiny[b, :n], size_of = traits[1:].T
    f.sizes[b, :n], f.places[b, :n] = np.take(radii, size_of), solids[1:, :2]
    f.turns[b, :n] = solids[1:, 4:6]
    coats[0, :3], coats[1:, :3] = GROUND * f.grounds[b], COLOURS[traits[1:, 1]]
    coats[1:, 3] = traits[1:, 2]
    develop(camera, solids, coats, lamps, s.masks[b], s.depth[b], np.empty((size, size, 3)),
            s.images[b])
    return True


def blank(count, K, size):
    """Pictures with nothing in them yet."""
    kinds, colours, shiny, order = np.full((4, count, K), -1)       # ..., ..., ..., (B, K)
    sizes = np.full((count, K), np.nan, np.float32)                 # (B, K)
    places, turns = np.full((2, count, K, 2), np.nan, np.float32)   # (B, K, 2), (B, K, 2)
    factors = Factors(kinds, colours, shiny, sizes, places, turns,
                      np.empty((count, 3), np.float32), np.empty(count, np.float32))
    images = np.empty((count, 3, size, size), np.float32)           # (B, 3, H, H)
    masks = np.empty((count, size, size), np.int64)                 # (B, H, H)
    amodal = np.zeros((count, K, size, size), bool)                 # (B, K, H, H)
    depth = np.empty((count, size, size), np.float32)               # (B, H, H)
    return Pictures(images, np.empty(count, np.int64), masks, amodal, order, depth, factors)


pool = ThreadPoolExecutor(THREADS)      # the kernels leave Python alone


def clevr(seed, start, count, size=64, variant="3"):
    """Scenes start .. start + count - 1 of the stream `seed`, imitations of CLEVR.

    Variants: "3" has 2 or 3 objects, larger and closer together; "5" has 3 to 5; so has "5-vbg",
    on a ground of six brightnesses. Every object shows at least 10 ("3") or 50 pixels of 96 x 96,
    or as much of the area at other sizes, and lies within the canvas; else all are drawn again.
    """
    if variant not in VARIANTS:
        raise Fail(f"variant {variant!r} is unknown, choose from {', '.join(VARIANTS)}")
    if count < 1 or size < 1:
        raise Fail(f"count and size must be at least 1, got {count} and {size}")
    s, (seed, start) = blank(count, VARIANTS[variant][1], size), key(seed, start)

    def draw(first):
        return all(draw_scene(seed, start + np.uint64(b), variant, s, b)
                   for b in range(first, count, threads()))

    if not all((pool.map if threads() > 1 else map)(draw, range(threads()))):
        raise Fail(f"found no places for the objects of CLEVR-{variant} on {size} x {size} pixels")
    return s
