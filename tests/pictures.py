"""Pictures for tests: scenes that are drawn, partly on crops of scikit-learn's sample photographs.

And what happens to copies of them."""
import functools
import io

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

CHANGES = ('resized', 'recompressed', 'cropped', 'brightened', 'mirrored')


@functools.cache
def grounds(): return [Image.fromarray(im) for im in load_sample_images().images]


def scene(seed, size=(200, 160)):
    "A picture like no other: a crop of a photograph or a slope of colours, and on it a few shapes."
    rng = np.random.default_rng(seed)
    if rng.random() < .5:
        whole = grounds()[rng.integers(2)]
        w = int(rng.integers(120, 320))
        x, y = rng.integers(0, whole.width - w), rng.integers(0, whole.height - w * 4 // 5)
        im = whole.crop((x, y, x + w, y + w * 4 // 5)).resize(size)
    else:
        im = Image.fromarray(rng.integers(0, 255, (3, 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(im)
    for _ in range(rng.integers(4, 9)):
        x, y, r = rng.integers(0, size[0]), rng.integers(0, size[1]), rng.integers(12, 50)
        colour = tuple(int(c) for c in rng.integers(0, 255, 3))
        kind = rng.integers(3)
        if kind == 0:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        elif kind == 1:
            draw.regular_polygon(
                (int(x), int(y), int(r)), int(rng.integers(3, 7)), rotation=int(rng.integers(90)), fill=colour
            )
        else: draw.line((x, y, *rng.integers(0, 160, 2).tolist()), fill=colour, width=int(rng.integers(3, 14)))
    return im


def changed(im, how, rng):
    "A copy as it goes around."
    if how == 'resized':
        s = rng.uniform(.5, .8)
        return im.resize((int(im.width * s), int(im.height * s)), Image.Resampling.LANCZOS)
    if how == 'recompressed': return Image.open(io.BytesIO(jpeg(im, int(rng.integers(30, 60)))))
    if how == 'brightened': return ImageEnhance.Brightness(im).enhance(rng.uniform(1.15, 1.35))
    if how == 'mirrored': return ImageOps.mirror(im)
    w, h = int(im.width * (s := rng.uniform(.8, .93))), int(im.height * s)
    x, y = rng.integers(0, im.width - w + 1), rng.integers(0, im.height - h + 1)
    return im.crop((x, y, x + w, y + h))


def jpeg(im, quality=90):
    "The picture's bytes as JPEG."
    out = io.BytesIO()
    im.save(out, 'JPEG', quality=quality)
    return out.getvalue()
