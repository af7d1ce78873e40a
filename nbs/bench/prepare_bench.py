"""Where does the time of preparing a photograph go, and do two threads do twice as much as one?

    python nbs/bench/prepare_bench.py --photos DIR [--n 150]

Each step of `vegc.data.images.prepare` alone, on photographs in memory: milliseconds a photograph, the best of
three, by one thread; and how much more two threads do in the same time. Nothing else may run."""
import argparse
import io
import random
import threading
import time
from pathlib import Path

from PIL import Image

from vegc.data import images
from vegc.core import reuse_memory, sha256_hex, table_text


def seconds(step, what, threads):
    "The best of three."
    def work():
        for x in what: step(x)
    best = float('inf')
    for _ in range(3):
        team = [threading.Thread(target=work) for _ in range(threads)]
        t = time.perf_counter()
        for one in team: one.start()
        for one in team: one.join()
        best = min(best, time.perf_counter() - t)
    return best


@reuse_memory()
def steps(photos, n=150):
    "A line a step: milliseconds by one thread, and how much more two do."
    files = sorted(p for p in Path(photos).glob('*/*') if p.suffix.lower() in ('.jpg', '.jpeg'))
    data = [p.read_bytes() for p in random.Random(0).sample(files, min(n, len(files)))]
    full = [Image.open(io.BytesIO(d)).convert('RGB') for d in data]
    small = [images.resized(im, images.fit_within(im.size, 500)) for im in full]
    def decode(d): return images.decode(d, images.open_image(d), images.jpeg_parts(d))
    def resize(im): return images.resized(im, images.fit_within(im.size, 500))
    def encode(im): return images.encode(im, False)
    table = dict(decode=(decode, data), resize=(resize, full), encode=(encode, small), phash=(images.phash, small),
                 sha256=(sha256_hex, data), prepare=(images.prepare, data))
    res = []
    for name, (step, what) in table.items():
        one, two = seconds(step, what, 1), seconds(step, what, 2)
        res.append(dict(step=name, ms=round(1000*one/len(what), 2), two_threads=round(2*one/two, 2)))
    return res


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--photos', required=True)
    parser.add_argument('--n', type=int, default=150)
    a = parser.parse_args()
    print(table_text(steps(a.photos, a.n)))
