"""How often is damage in the middle of a JPEG noticed, and how often is a whole one called damaged?

    python nbs/bench/jpeg_damage.py --photos DIR [--n 400] [--seed 0]

Random bytes are written over the middle of photographs, as they are and coded anew as progressive. Noticed means
refused by `vegc.data.images.prepare`, or flagged `corrupt?`; each rate has its 95 % interval (exact). False
alarms are counted over all photographs as they are, and over codings anew: qualities, subsamplings, restart
markers, progressive, grey."""
import argparse
import io
import itertools
import random
from pathlib import Path

import numpy as np
from PIL import Image

from vegc.core import table_text
from vegc.data.images import ImageProblem, prepare
from vegc.evaluation.metrics import share_interval

SIZES = (16, 100, 200, 1000)  # bytes
CODINGS = [
    dict(quality=q, subsampling=s) | more
    for q, s, more in itertools.product(
        (30, 75, 90, 98), (0, 1, 2), ({}, dict(progressive=True), dict(restart_marker_rows=1), dict(optimize=True))
    )
]


def noticed(data: bytes) -> bool:
    "Is this picture refused, or flagged as damaged?"
    try: return 'corrupt?' in prepare(data).flags
    except ImageProblem: return True


def coded(data: bytes, grey: bool=False, **kw) -> bytes:
    "The picture as another JPEG."
    out, im = io.BytesIO(), Image.open(io.BytesIO(data))
    (im.convert('L') if grey else im).save(out, 'JPEG', **kw)
    return out.getvalue()


def damaged(data: bytes, n: int, rng: np.random.Generator) -> bytes:
    "`n` random bytes over the middle."
    start = len(data)//2
    return data[:start] + rng.bytes(n) + data[start + n:]


def share(found: int, of: int) -> str:
    low, high = share_interval(found, of)
    return f'{found/of:.1%} ({low:.1%}–{high:.1%})'


def damage(photos, n=400, seed=0):
    "A line a kind and number of bytes; and a sentence on false alarms."
    files, rng = (
        sorted(p for p in Path(photos).glob('*/*') if p.suffix.lower() in ('.jpg', '.jpeg')),
        np.random.default_rng(seed),
    )
    some, res = [p.read_bytes() for p in random.Random(seed).sample(files, min(n, len(files)))], []
    for kind, kw in dict(sequential=None, progressive=dict(quality=90, progressive=True)).items():
        whole = some if kw is None else [coded(d, **kw) for d in some]
        for size in SIZES:
            res.append(
                dict(
                    kind=kind,
                    bytes=size,
                    photographs=len(whole),
                    noticed=share(sum(noticed(damaged(d, size, rng)) for d in whole), len(whole)),
                )
            )
    alarms = sum(noticed(p.read_bytes()) for p in files)
    again = [coded(d, grey=i % 5 == 0, **kw) for i, (d, kw) in enumerate(zip(some, itertools.cycle(CODINGS)))]
    coded_anew = f'{sum(map(noticed, again))} of {len(again):,} coded anew in {len(CODINGS)} ways'
    return res, f'False alarms: {alarms} of {len(files):,} photographs as they are, {coded_anew}.'


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--photos', required=True)
    parser.add_argument('--n', type=int, default=400)
    parser.add_argument('--seed', type=int, default=0)
    a = parser.parse_args()
    table, sentence = damage(a.photos, a.n, a.seed)
    print(table_text(table), sentence, sep='\n\n')
