"""What a GPU does with ResNet50 at 224 pixels: pictures a second, peak memory and the share of time spent waiting
for data, training and predicting.

    python nbs/bench/gpu_bench.py --photos DIR [--arch resnet50] [--size 224] [--bs 64] [--out nbs/bench/gpu.json]

DIR holds a folder of JPEGs a class; the public "clothing dataset small" (CC0) is meant. Weights are random: they
change no time. Without a GPU it says so and writes nothing."""
import argparse
import json
import tempfile
import time
from pathlib import Path

import torch


def wait_for(device):
    "Until the device has done all it was given, so that a clock tells whose time it was."
    getattr(torch, device).synchronize()


def stopwatch(device):
    """A callback that tells waiting for data from work, from the second epoch on: the first one warms up and fills
    the pixel cache."""
    from fastai.callback.core import Callback

    class Stopwatch(Callback):
        order = 99
        waiting = working = pictures = 0

        def now(self):
            wait_for(device)
            return time.perf_counter()

        def before_train(self): self.last = self.now()

        def before_batch(self): self.got = self.now()

        def after_batch(self):
            if not self.training: return
            done = self.now()
            if self.epoch:
                self.waiting += self.got - self.last
                self.working += done - self.got
                self.pictures += len(self.x)
            self.last = done
    return Stopwatch()


def row(what, device, waiting, working, pictures):
    peak = torch.cuda.max_memory_allocated() if device == 'cuda' else torch.mps.driver_allocated_memory()
    total = waiting + working
    return dict(
        what=what,
        pictures=pictures,
        per_second=round(pictures / total, 1),
        peak_mb=round(peak / 2**20),
        waiting=round(waiting / total, 3),
    )


def training(ds, arch, size, bs, device):
    from vegc.training.loaders import dataloaders
    from vegc.training.fit import fit_body
    from vegc.training.learner import image_learner
    watch = stopwatch(device)
    learn = image_learner(dataloaders(ds, size, bs), arch, weights=None, cbs=watch)
    fit_body(learn, 3)
    return row('training', device, watch.waiting, watch.working, watch.pictures), learn.model


def predicting(ds, model, size, bs, device):
    "As `probabilities` does it, with a clock around its two halves."
    from vegc.features.pixels import pixel_batches
    from vegc.features.backbones import fold_batchnorm
    net = fold_batchnorm(model, (size, size)).to(device, memory_format=torch.channels_last)
    waiting = working = pictures = 0
    start = time.perf_counter()
    with torch.inference_mode():
        for x in pixel_batches([ds.path/p for p in ds.images.path], size, bs):
            got = time.perf_counter()
            net(x.to(device)).softmax(1).cpu()
            done = time.perf_counter()
            waiting, working, pictures, start = waiting + got - start, working + done - got, pictures + len(x), done
    return row('predicting', device, waiting, working, pictures)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kw in {
        'photos': {},
        'arch': dict(default='resnet50'),
        'size': dict(type=int, default=224),
        'bs': dict(type=int, default=64),
        'out': dict(default='gpu.json'),
    }.items():
        parser.add_argument(f'--{name}', **kw)
    args = parser.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else None
    if device is None:
        return print(
            'This bench needs a GPU that torch can use; there is none here, so nothing was measured or written.'
        )
    if not args.photos: parser.error('--photos DIR is needed')
    from vegc.data.dataset import ImageDataset
    from vegc.acquire.add import add
    from vegc.splits.split import split
    with tempfile.TemporaryDirectory() as tmp:
        ds = ImageDataset(Path(tmp)/'photos')
        add(args.photos, ds, subject='objects')
        split(ds)
        rows, model = training(ds, args.arch, args.size, args.bs, device)
        if device == 'cuda': torch.cuda.reset_peak_memory_stats()
        rows = [rows, predicting(ds, model, args.size, args.bs, device)]
    about = dict(
        gpu=torch.cuda.get_device_name() if device == 'cuda' else 'mps',
        torch=torch.__version__,
        arch=args.arch,
        size=args.size,
        bs=args.bs,
    )
    Path(args.out).write_text(json.dumps([about | r for r in rows], indent=1), encoding='utf-8')
    for r in rows: print(about | r)


if __name__ == '__main__': main()
