"""What a GPU does with a two-stage fine-tuning, beside stock fastai and beside the floor that the network itself sets,
in one call: pictures a second, peak memory, the share of time spent waiting for data, and one accuracy.

    python nbs/bench/gpu_bench.py --photos DIR [--arch resnet50] [--size 224] [--bs 64] [--out nbs/bench/gpu.json]

DIR holds a folder of JPEGs a class; the public "clothing dataset small" (CC0) is meant. Each photograph is repeated,
cropped a little otherwise, so that an epoch lasts long enough to be timed. Weights are random but for the accuracy:
they change no time. A row that fails says so and the others go on. Without a GPU it says so and writes nothing.

`floor` is forward, backward and step on pixels that lie on the GPU already; `fastai` is `vision_learner(…).to_fp16()`
on `ImageDataLoaders` with as many workers."""
import argparse
import json
import os
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

EPOCHS = 3  # the first warms up, the second is timed, the third says how long the GPU waited


def wait_for(device):
    "Until the device has done all it was given, so that a clock tells whose time it was."
    if device != 'cpu': getattr(torch, device).synchronize()


def memory(device):
    if device == 'cuda': return torch.cuda.max_memory_allocated()
    return torch.mps.driver_allocated_memory() if device == 'mps' else 0


def reset_memory(device):
    if device == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def stopwatch(device):
    "A callback that times the training part of the second epoch, and the waiting for data in the third."
    from fastai.callback.core import Callback

    class Stopwatch(Callback):
        order = 99
        seconds = pictures = waiting = total = 0

        def now(self):
            wait_for(device)
            return time.perf_counter()

        def before_train(self): self.start = self.last = self.now()

        def before_batch(self):
            if self.training and self.epoch == EPOCHS - 1: self.waiting += time.perf_counter() - self.last

        def after_batch(self):
            if not self.training: return
            if self.epoch == EPOCHS - 2: self.pictures += len(self.x)
            if self.epoch == EPOCHS - 1: self.last = self.now()

        def after_train(self):
            seconds = self.now() - self.start
            if self.epoch == EPOCHS - 2: self.seconds = seconds
            if self.epoch == EPOCHS - 1: self.total = seconds
    return Stopwatch()


def timed(watch):
    return dict(pictures=watch.pictures, seconds=watch.seconds, waiting=round(watch.waiting/watch.total, 3))


# the photographs

def repeated(photos, folder, times):
    "Every photograph so many times, each cropped otherwise; four fifths of each class in `train`, the rest in `valid`."
    def write(file, to):
        with Image.open(file) as im:
            for k in range(times): im.crop((k, k, *im.size)).save(to/f'{file.stem}_{k}.jpg', quality=90)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for of_class in sorted(p for p in Path(photos).iterdir() if p.is_dir()):
            files = sorted(f for f in of_class.iterdir() if f.suffix in ('.jpg', '.webp'))
            for i, file in enumerate(files):
                to = folder/('train' if i < .8*len(files) else 'valid')/of_class.name
                to.mkdir(parents=True, exist_ok=True)
                pool.submit(write, file, to)
    return sum(1 for _ in folder.rglob('*.jpg'))


# rows: each takes what all need and gives a dict with pictures and seconds

def vegc_training(b):
    "In batches of `--bs`, where `fit_body` may choose smaller ones."
    from vegc.training.fit import Part, fit_part
    from vegc.training.learner import image_learner
    from vegc.training.loaders import dataloaders
    watch = stopwatch(b.device)
    learn = image_learner(dataloaders(b.ds, b.size, b.bs), b.arch, weights=None, cbs=watch)
    learn.unfreeze()
    fit_part(learn, Part('unfrozen', EPOCHS, slice(1e-5, 1e-3)))
    b.model = learn.model
    return timed(watch)


def vegc_loader(b):
    from vegc.training.loaders import dataloaders
    dls = dataloaders(b.ds, b.size, b.bs)
    for _ in dls.train: pass
    start, n = time.perf_counter(), 0
    for x, _ in dls.train: n += len(x)
    wait_for(b.device)
    return dict(pictures=n, seconds=time.perf_counter() - start)


def vegc_frozen(b):
    from vegc.training.fit import fit_head
    from vegc.training.learner import image_learner
    from vegc.training.loaders import dataloaders
    learn = image_learner(dataloaders(b.ds, b.size, b.bs), b.arch, weights=None)
    start = time.perf_counter()
    fit_head(learn, 8)
    wait_for(b.device)
    return dict(pictures=8*len(learn.dls.train_ds), seconds=time.perf_counter() - start)


def vegc_predicting(b):
    from vegc.evaluation.predictions import probabilities
    probabilities(b.model, b.files[:256], (b.size, b.size), b.bs)
    start = time.perf_counter()
    probabilities(b.model, b.files, (b.size, b.size), b.bs)
    return dict(pictures=len(b.files), seconds=time.perf_counter() - start)


def decoding(b, threads):
    from vegc.features.pixels import pixel_batches
    start = time.perf_counter()
    n = sum(len(x) for x in pixel_batches(b.files, b.size, b.bs, threads=threads))
    return dict(pictures=n, seconds=time.perf_counter() - start)


def fastai_learner(b, cbs=()):
    import torchvision
    from fastai.vision.all import ImageDataLoaders, Resize, accuracy, aug_transforms, vision_learner
    dls = ImageDataLoaders.from_folder(b.folder, train='train', valid='valid', item_tfms=Resize(b.size),
                                       batch_tfms=aug_transforms(), bs=b.bs, num_workers=b.workers)
    arch = getattr(torchvision.models, b.arch)
    return vision_learner(dls, arch, pretrained=False, metrics=accuracy, cbs=list(cbs)).to_fp16()


def fastai_training(b):
    watch = stopwatch(b.device)
    learn = fastai_learner(b, [watch])
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(EPOCHS, slice(1e-5, 1e-3))
    b.stock = learn
    return timed(watch)


def fastai_frozen(b):
    watch = stopwatch(b.device)
    learn = fastai_learner(b, [watch])
    learn.freeze()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(EPOCHS, 2e-3)
    return timed(watch)


def fastai_predicting(b):
    learn = b.stock
    dl = learn.dls.test_dl(b.files, bs=b.bs, num_workers=b.workers)
    start = time.perf_counter()
    with learn.no_bar(): learn.get_preds(dl=dl)
    return dict(pictures=len(b.files), seconds=time.perf_counter() - start)


@contextmanager
def deterministic(wanted):
    was = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = wanted, not wanted
    try: yield
    finally: torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = was


def network(b):
    from vegc.features.backbones import image_body, image_model
    net = image_model(image_body(b.arch, None), 10, (b.size, b.size)).to(b.device, memory_format=torch.channels_last)
    x = torch.rand(b.bs, 3, b.size, b.size, device=b.device).contiguous(memory_format=torch.channels_last)
    return net, x


def floor_training(b, same):
    "`same`: with cuDNN's deterministic kernels, as vegc asks for them; else with the fastest."
    net, x = network(b)
    net.train()
    y = torch.randint(10, (b.bs,), device=b.device)
    opt = torch.optim.AdamW(net.parameters(), fused=b.device == 'cuda')
    def step():
        with torch.autocast(b.device, torch.bfloat16, enabled=b.device != 'cpu'): pred = net(x)
        torch.nn.functional.cross_entropy(pred.float(), y).backward()
        opt.step()
        opt.zero_grad()
    with deterministic(same): return steps(b, step)


def floor_predicting(b, dtype):
    from vegc.features.backbones import fold_batchnorm
    net, x = network(b)
    net = fold_batchnorm(net, (b.size, b.size))
    @torch.inference_mode()
    def step():
        with torch.autocast(b.device, dtype or torch.bfloat16, enabled=dtype is not None and b.device != 'cpu'): net(x)
    with deterministic(True): return steps(b, step)


def steps(b, step, n=60):
    for _ in range(n//3): step()
    wait_for(b.device)
    start = time.perf_counter()
    for _ in range(n): step()
    wait_for(b.device)
    return dict(pictures=n*b.bs, seconds=time.perf_counter() - start)


def accuracy_of(b):
    "The default recipe on the photographs as they are, with real weights; `--device cpu --only accuracy` asks a CPU."
    from vegc.acquire.add import add
    from vegc.data.dataset import ImageDataset
    from vegc.evaluation.evaluate import evaluate
    from vegc.splits.split import split
    from vegc.training.train import train
    ds = ImageDataset(b.tmp/'once', subject='objects')
    start = time.perf_counter()
    add(b.photos, ds)
    split(ds)
    train(ds, arch='efficientnet_lite0', size=128)
    seconds = time.perf_counter() - start
    res = {}
    for stage in ('raw-1', 'raw'):
        for part in ('valid', 'test'):
            m = evaluate(ds, stage, part)
            res[f'{stage} {part}'] = m.headline
    return dict(pictures=len(ds.images), seconds=seconds, accuracy=res)


def rows(b):
    yield 'accuracy', 'vegc', lambda: accuracy_of(b)
    yield 'training', 'floor', lambda: floor_training(b, True)
    yield 'training, fastest kernels', 'floor', lambda: floor_training(b, False)
    yield 'training', 'vegc', lambda: vegc_training(b)
    yield 'training', 'fastai', lambda: fastai_training(b)
    yield 'loader alone', 'vegc', lambda: vegc_loader(b)
    yield 'frozen part', 'vegc', lambda: vegc_frozen(b)
    yield 'frozen part', 'fastai', lambda: fastai_frozen(b)
    for name, dtype in dict(fp32=None, bf16=torch.bfloat16, fp16=torch.float16).items():
        yield f'predicting, {name}', 'floor', lambda dtype=dtype: floor_predicting(b, dtype)
    for n in sorted({4, 8, os.cpu_count()}):
        yield f'decoding, {n} threads', 'vegc', lambda n=n: decoding(b, n)
    yield 'predicting', 'vegc', lambda: vegc_predicting(b)
    yield 'predicting', 'fastai', lambda: fastai_predicting(b)


def prepared(args, tmp):
    from vegc.acquire.add import add
    from vegc.data.dataset import ImageDataset
    from vegc.splits.split import split
    from vegc.training.loaders import default_workers
    b = args
    b.tmp, b.workers = tmp, default_workers()
    start = time.perf_counter()
    n = repeated(args.photos, tmp/'many', args.times)
    print(f'{n} files written after {time.perf_counter() - start:.1f} s', flush=True)
    b.ds, b.folder = ImageDataset(tmp/'ds', subject='objects'), tmp/'many'
    add(tmp/'many', b.ds)
    print(f'added after {time.perf_counter() - start:.1f} s', flush=True)
    split(b.ds)
    print(f'ready after {time.perf_counter() - start:.1f} s', flush=True)
    b.files = [b.ds.path/p for p in b.ds.images.path]
    return b


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kw in {
        'photos': {},
        'arch': dict(default='resnet50'),
        'size': dict(type=int, default=224),
        'bs': dict(type=int, default=64),
        'times': dict(type=int, default=16, help='how often a photograph is repeated'),
        'only': dict(help='rows whose name holds this'),
        'device': dict(help='cpu: to try the bench, or to ask for the accuracy there'),
        'out': dict(default='gpu.json'),
    }.items():
        parser.add_argument(f'--{name}', **kw)
    args = parser.parse_args()
    found = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else None
    args.device = args.device or found
    if args.device is None:
        return print(
            'This bench needs a GPU that torch can use; there is none here, so nothing was measured or written.'
        )
    if not args.photos: parser.error('--photos DIR is needed')
    about = dict(
        gpu=torch.cuda.get_device_name() if args.device == 'cuda' else args.device,
        cores=os.cpu_count(),
        torch=torch.__version__,
        arch=args.arch,
        size=args.size,
        bs=args.bs,
    )
    print(about, flush=True)
    done = []
    with tempfile.TemporaryDirectory() as tmp:
        b = prepared(args, Path(tmp))
        for what, who, measure in rows(b):
            if args.only and args.only not in what: continue
            reset_memory(args.device)
            try: row = measure()
            except Exception:
                print(f'{what}, {who}: failed\n{traceback.format_exc()}', flush=True)
                continue
            row['per_second'] = round(row['pictures']/row['seconds'], 1)
            row['seconds'] = round(row['seconds'], 2)
            done.append(dict(what=what, who=who) | row | dict(peak_mb=round(memory(args.device)/2**20)))
            print(done[-1], flush=True)
            Path(args.out).write_text(json.dumps(dict(about=about, rows=done), indent=1), encoding='utf-8')


if __name__ == '__main__': main()
