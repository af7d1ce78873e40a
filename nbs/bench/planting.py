"""Near-duplicates planted among photographs, as they go around: resized, recompressed, cropped, brightened, mirrored.

    from planting import plant_near_copies
    plant_near_copies(photos, out, seed=0)   # a table of what was planted; `out` is a folder a class, for `vegc add`
    python nbs/bench/planting.py PHOTOS OUT [--n 153] [--seed 0] [--each 1]

PHOTOS is a folder a class, or a list of files. An original is never written to; its copy is
OUT/<class>/<name>+<change>+<seed>.jpg."""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageEnhance, ImageOps

CHANGES = ('resized', 'recompressed', 'cropped', 'brightened', 'mirrored')


def photographs(folder):
    "The images of a folder a class, sorted."
    return sorted(p for p in Path(folder).glob('*/*') if p.suffix.lower() in ('.jpg', '.jpeg', '.png'))


def changed(im, how, rng):
    "To 45–80 % of its size; to 75–92 % of each side; brighter by 20–50 %. Recompressing is done in saving."
    if how == 'resized':
        s = rng.uniform(.45, .8)
        return im.resize((round(im.width*s), round(im.height*s)), Image.Resampling.LANCZOS)
    if how == 'brightened': return ImageEnhance.Brightness(im).enhance(rng.uniform(1.2, 1.5))
    if how == 'mirrored': return ImageOps.mirror(im)
    if how == 'recompressed': return im
    s = rng.uniform(.75, .92)
    w, h = int(im.width*s), int(im.height*s)
    x, y = rng.integers(0, im.width - w + 1), rng.integers(0, im.height - h + 1)
    return im.crop((x, y, x + w, y + h))


def plant_near_copies(
    photos,           # a folder a class, or paths of images whose folder is their class
    out,              # new files go to out/<class>/
    seed=0,
    n=153,            # photographs that get a copy
    *,
    each=1,           # copies of each, every one changed in another way; at most 5
    changes=CHANGES,
):                    # original, copy (paths), label, change: one row a copy
    "Write near-duplicates of n photographs, the ways in turn. The same seed gives the same copies."
    files = photographs(photos) if isinstance(photos, (str, Path)) else [Path(p) for p in photos]
    rng, rows = np.random.default_rng(seed), []
    for k, i in enumerate(rng.permutation(len(files))[:n]):
        for how in (changes[(k + j) % len(changes)] for j in range(each)):
            copy = Path(out)/files[i].parent.name/f'{files[i].stem}+{how}+{seed}.jpg'
            copy.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(files[i]) as im: new = changed(im.convert('RGB'), how, rng)
            new.save(copy, quality=int(rng.integers(25, 60)) if how == 'recompressed' else 88)
            rows.append(dict(original=files[i], copy=copy, label=files[i].parent.name, change=how))
    return pd.DataFrame(rows)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('photos')
    parser.add_argument('out')
    for name, default in dict(n=153, seed=0, each=1).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    args = parser.parse_args()
    print(plant_near_copies(args.photos, args.out, args.seed, args.n, each=args.each).change.value_counts().to_string())
