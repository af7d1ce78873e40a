"""What training and predicting cost and give: stock fastai and vegc on the same photographs, in paired rounds.

    # frozen, then all layers: stock, vegc fp32, vegc bf16
    python nbs/bench/train_bench.py rounds --photos DIR [--limit 400] [--unfrozen 4]
    # frozen epochs through the body, with augmentation
    python nbs/bench/train_bench.py augmented --photos DIR [--limit 400] [--seeds 1]
    # importing alone, which is in all other seconds
    python nbs/bench/train_bench.py start --photos DIR [--seeds 1 2 3]
    # all photographs from files, and the floor
    python nbs/bench/train_bench.py predict --photos DIR [--seeds 1 2 3]
    # the command `vegc train` on all photographs
    python nbs/bench/train_bench.py full --photos DIR [--seeds 1 2 3]
    # what helps the unfrozen part
    python nbs/bench/train_bench.py ablation --photos DIR [--seeds 1] [--only NAME ...]

DIR holds a folder of JPEGs a class; the figures in the docs are on the public "clothing dataset small" (CC0,
3,068 photographs of 400×533). Every measurement is a process of its own, on one thread, and a line in --out
(train.jsonl); what is there is not measured again, so a stopped bench goes on. CPU seconds are user and system
time of the whole process, import included. Datasets are made under --work and stay there."""
import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ARCH, SIZE = 'efficientnet_lite0', 160
# The unfrozen part as it is: epochs, the first of them on smaller pictures; batch; rates of early layers, late
# layers and head; side that training pictures are read at; first blocks that stay frozen; decay; statistics of
# batch norm.
NOW = dict(epochs=10, small=7, bs=16, rates=(2e-4, 6e-4, 1e-3), read=192, frozen=0, decay=.01, norm='batch')


def cpu(): return sum(os.times()[:4])


def dataset(photos, work, limit=None):
    """The photographs with splits; with `limit`, so many to train on and a fifth of that to choose the epoch by, all
    other held-out ones for test."""
    from vegc.data.dataset import ImageDataset
    from vegc.acquire.add import add
    from vegc.splits.split import split
    path = Path(work)/f'photos-{limit or "all"}'
    if path.exists(): return ImageDataset(path)
    if not limit:
        add(photos, path, subject='objects')
        split(ds := ImageDataset(path))
        return ds
    ds = ImageDataset(shutil.copytree(dataset(photos, work).path, path))
    rows, rng = ds.images, random.Random(0)
    train, valid = (
        set(rng.sample(sorted(rows.path[rows.split == part]), n))
        for part, n in (('train', limit), ('valid', limit // 5))
    )
    part = [
        ('train' if p in train else 'unused') if s == 'train' else 'valid' if p in valid else 'test'
        for p, s in zip(rows.path, rows.split, strict=True)
    ]
    ds.update(rows.assign(split=part), ['split'])
    return ds


def right(p, labels, classes):
    "Which test pictures were told right, as a string of 0 and 1."
    return ''.join('01'[classes[i] == label] for i, label in zip(p.argmax(1).tolist(), labels, strict=True))


def stock_learner(ds, seed):
    "fastai's usual way, the body and its scaling apart, which it cannot load."
    from fastai.vision.all import (
        CrossEntropyLossFlat,
        ImageDataLoaders,
        Learner,
        Resize,
        accuracy,
        aug_transforms,
        set_seed,
    )
    from vegc.features.backbones import image_body, image_model
    set_seed(seed, reproducible=True)
    rows = ds.images
    used = rows[rows.split.isin(['train', 'valid'])].assign(held=lambda r: r.split == 'valid')
    dls = ImageDataLoaders.from_df(
        used,
        path=ds.path,
        fn_col='path',
        label_col='given_label',
        valid_col='held',
        item_tfms=Resize(SIZE, method='squish'),
        batch_tfms=aug_transforms(),
        bs=16,
        num_workers=0,
        seed=seed,
    )
    model = image_model(image_body(ARCH), len(dls.vocab), (SIZE, SIZE))
    split = lambda m: [list(m[0].parameters()), list(m[1].parameters())]
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), splitter=split, metrics=accuracy)


def stock(ds, seed, frozen, unfrozen):
    "The two parts of `fine_tune`."
    learn = stock_learner(ds, seed)
    test = ds.images[ds.images.split == 'test']
    def judge():
        with learn.no_bar(): p = learn.get_preds(dl=learn.dls.test_dl(test))[0]
        return right(p, test.given_label, list(learn.dls.vocab))
    with learn.no_bar(), learn.no_logging():
        learn.freeze()
        learn.fit_one_cycle(frozen, slice(2e-3), pct_start=.99)
        yield 'frozen', judge
        if not unfrozen: return
        learn.unfreeze()
        learn.fit_one_cycle(unfrozen, slice(1e-5, 1e-3), pct_start=.3, div=5.)
        yield 'unfrozen', judge


def ours(ds, seed, frozen, unfrozen, bf16=False, cached=True):
    import vegc.features.features
    import vegc.training.train
    from vegc.evaluation.predictions import probabilities
    vegc.features.features.bf16_helps = lambda device='cpu': bf16
    for part in ('frozen', 'unfrozen')[:1 + bool(unfrozen)]:  # the second call goes on from the first one's stage
        learn = vegc.training.train.train(
            ds,
            arch=ARCH,
            size=SIZE,
            epochs=(frozen, unfrozen * (part == 'unfrozen')),
            seed=seed,
            stage='bench',
            cached=cached,
            overwrite=True,
        )
        test = learn.dls.source.items.query('split == "test"')

        def judge(learn=learn, test=test):
            p = probabilities(learn.model, [ds.path/p for p in test.path], (SIZE, SIZE))
            return right(p, test.label, list(learn.dls.vocab))
        yield part, judge


def measured(run):
    "A line a part: CPU seconds up to its end less what judging has cost, and which test pictures were told right."
    judging = 0.
    for part, judge in run:
        now = cpu()
        yield dict(part=part, cpu=round(now - judging, 2), right=judge())
        judging += cpu() - now


def start(how):
    "Python with what a training run imports."
    if how == 'stock': import fastai.vision.all  # noqa: F401
    else: import vegc.training.train  # noqa: F401
    yield dict(cpu=round(cpu(), 2))


def predict(ds, how):
    "All photographs from their files."
    files = [ds.path/p for p in ds.images.path]
    if how == 'stock':
        learn = stock_learner(ds, 1)
        with learn.no_bar(): learn.get_preds(dl=learn.dls.test_dl(files))
    elif how == 'vegc model file':
        from vegc.sharing.model_file import predict
        predict(model_file(ds.path), files)
    else:
        from vegc.evaluation.predictions import probabilities
        from vegc.features.backbones import image_body, image_model
        probabilities(image_model(image_body(ARCH), 10, (SIZE, SIZE)), files, (SIZE, SIZE))
    yield dict(n=len(files), cpu=round(cpu(), 2))


def model_file(folder):
    "A model file beside a dataset, made once: of an untrained head, since only its cost is asked."
    path = folder.with_suffix('.safetensors')
    if not path.exists():
        from vegc.sharing.model_file import write_model_file
        from vegc.features.backbones import fold_batchnorm, image_body, image_model

        write_model_file(
            path,
            fold_batchnorm(image_model(image_body(ARCH), 10, (SIZE, SIZE))),
            dict(name='bench', size=(SIZE, SIZE), classes=list('0123456789')),
        )
    return path


def floor(ds):
    "CPU milliseconds a picture of the forward pass alone, on tensors in memory."
    import torch
    from vegc.core import reuse_memory
    from vegc.features.backbones import fold_batchnorm, image_body
    body = image_body(ARCH).eval()
    fast = fold_batchnorm(body).to(memory_format=torch.channels_last)
    x = torch.rand(32, 3, SIZE, SIZE)
    def ms(model, x, bf16, n=6):
        with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            model(x)
            start = cpu()
            for _ in range(n): model(x)
        return round((cpu() - start)/n/len(x)*1000, 2)
    last = x.contiguous(memory_format=torch.channels_last)
    plain = ms(body, x, False)
    with reuse_memory(): yield dict(plain=plain, fp32=ms(fast, last, False), bf16=ms(fast, last, True))


def ablation(ds, seed, **way):
    """One way through the unfrozen part, in a bare loop, all ways from the same trained head. The last epoch counts:
    none is chosen by what it is judged on."""
    import numpy as np
    import torch
    from fastai.vision.core import TensorImage
    from fasttransform import Pipeline
    from torch import nn
    from vegc.training.loaders import default_augment
    from vegc.features.features import cached_features
    from vegc.features.pixels import pixel_batches
    from vegc.features.backbones import fold_batchnorm, image_body, image_model, param_groups
    way = NOW | way
    rows = ds.read().items()
    classes = sorted(rows.label.unique())
    y = torch.tensor([classes.index(c) for c in rows.label])
    train, held = (torch.from_numpy(np.flatnonzero(where)) for where in (rows.split == 'train', rows.split != 'train'))
    loss_of = lambda out, y: nn.functional.cross_entropy(out, y, label_smoothing=.1)
    read = lambda idx, size: (
        torch.cat(list(pixel_batches([ds.path / rows.path[int(i)] for i in idx], size))).mul_(255).byte()
    )
    batch = lambda x: x.float().div_(255).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(seed)
    model = image_model(image_body(ARCH), len(classes), (SIZE, SIZE)).to(memory_format=torch.channels_last)
    x = torch.from_numpy(cached_features(ds, ARCH, SIZE, paths=rows.path, body=model[0])).float()

    def fit(params, rates, epochs, bs, decay, data, forward):
        opt = torch.optim.AdamW(
            [dict(params=p, lr=r) for p, r in zip(params, rates, strict=True) if p], weight_decay=decay, fused=True
        )
        steps = len(train)//bs
        rate = torch.optim.lr_scheduler.OneCycleLR(
            opt,
            [g['lr'] for g in opt.param_groups],
            total_steps=epochs * steps + 1,
            pct_start=0.25,
            div_factor=25.0,
            final_div_factor=1e4,
        )
        for epoch in range(epochs):
            for b in torch.randperm(len(train))[:steps*bs].split(bs):
                opt.zero_grad()
                loss_of(forward(data(b, epoch)), y[train[b]]).backward()
                opt.step()
                rate.step()
    fit([list(model[1].parameters())], [2e-3], 8, 64, .01, lambda b, epoch: x[train[b]], model[1][2:].train())
    pixels, test = read(train, way['read']), read(held, SIZE)

    def judge():
        net = fold_batchnorm(model, (SIZE, SIZE)).to(memory_format=torch.channels_last)
        with torch.inference_mode(): p = torch.cat([net(batch(test[i:i + 64])) for i in range(0, len(test), 64)])
        return ''.join('01'[int(v)] for v in p.argmax(1) == y[held])
    yield dict(part='frozen', right=judge())
    start = cpu()
    model.train()
    if way['frozen']:  # the first blocks, as they take as much time as all others
        net = model[0][1].model
        (
            net.conv_stem.requires_grad_(False),
            net.bn1.requires_grad_(False),
            net.blocks[: way['frozen']].requires_grad_(False),
        )
    if way['norm'] == 'stored':
        for m in model[0].modules():
            if isinstance(m, nn.BatchNorm2d): m.eval()
    augment = [Pipeline(default_augment(ds, size), split_idx=0) for size in (SIZE, SIZE*4//5)]
    data = lambda b, epoch: batch(
        augment[epoch < way['small']](TensorImage(pixels[b].float().div_(255))).as_subclass(torch.Tensor).mul(255)
    )
    fit(
        [[p for p in g if p.requires_grad] for g in param_groups(model)],
        way['rates'],
        way['epochs'],
        way['bs'],
        way['decay'],
        data,
        model,
    )
    yield dict(part='unfrozen', cpu=round(cpu() - start, 1), right=judge())


def full(ds, seed):
    "The two commands a user gives."
    vegc = Path(sys.executable).with_name('vegc')
    how = ['--arch', ARCH, '--size', str(SIZE), '--seed', str(seed), '--stage', 'bench', '--overwrite', '--json']
    start = cpu()
    stage = json.loads(subprocess.run([vegc, 'train', ds.path, *how], check=True, stdout=subprocess.PIPE).stdout)
    used = cpu() - start
    res = {
        name: json.loads(
            subprocess.run(
                [vegc, 'evaluate', ds.path, '--stage', name, '--split', 'test', '--json'],
                check=True,
                stdout=subprocess.PIPE,
            ).stdout
        )
        for name in ('bench-1', 'bench')
    }
    yield dict(
        cpu=round(used, 1),
        best=stage['best'],
        epochs=len(stage['history']),
        **{
            f'{k}{suffix}': res[name][k]
            for name, suffix in (('bench-1', '_frozen'), ('bench', ''))
            for k in ('n', 'accuracy', 'accuracy_low', 'accuracy_high')
        },
    )


WAYS = {
    'once: 4 epochs, batches of 64, read at 160': dict(epochs=4, small=0, bs=64, rates=(2e-4, 4.5e-4, 1e-3), read=160),
    'batches of 32, read at 192, 6 epochs': dict(epochs=6, small=0, bs=32),
    'batches of 32: 10 epochs, 7 of them at 128': dict(bs=32),
    'now: 10 epochs, 7 of them at 128': {},
    'first blocks frozen: 14 epochs, 10 of them at 128': dict(epochs=14, small=10, frozen=2, bs=32),
    'stored batch norm: 10 epochs, 7 of them at 128': dict(norm='stored'),
    'more decay: 10 epochs, 7 of them at 128': dict(decay=.05)}


def plan(kind, seeds, limit, unfrozen, only):
    "What to measure, each a dict that names it."
    for seed in seeds:
        base = dict(kind=kind, seed=seed)
        if kind == 'rounds':
            yield from (
                base | dict(limit=limit, unfrozen=unfrozen, tool=t) for t in ('stock', 'vegc fp32', 'vegc bf16')
            )
        elif kind == 'augmented': yield from (base | dict(limit=limit, tool=t) for t in ('vegc',))
        elif kind == 'start': yield from (base | dict(tool=t) for t in ('stock', 'vegc'))
        elif kind == 'predict':
            yield from (base | dict(tool=t) for t in ('stock', 'vegc stage', 'vegc model file', 'floor'))
        elif kind == 'ablation': yield from (base | dict(way=name) for name in WAYS if not only or name in only)
        else: yield base


def rows_of(what, ds):
    "The measurements that `what` names."
    kind, tool = what['kind'], what.get('tool', '')
    if kind == 'rounds':
        return measured(
            stock(ds, what['seed'], 8, what['unfrozen'])
            if tool == 'stock'
            else ours(ds, what['seed'], 8, 10 * (what['unfrozen'] > 0), bf16=tool == 'vegc bf16')
        )
    if kind == 'augmented': return measured(ours(ds, what['seed'], 8, 0, cached=False))
    if kind == 'start': return start(tool)
    if kind == 'predict': return floor(ds) if tool == 'floor' else predict(ds, tool)
    return ablation(ds, what['seed'], **WAYS[what['way']]) if kind == 'ablation' else full(ds, what['seed'])


def told(rows):
    "Share of seeds that told each test picture right."
    import numpy as np
    return np.mean([[c == '1' for c in r['right']] for r in rows], 0)


def with_interval(values):
    "Mean over pictures, and its 95 % interval."
    return f'{values.mean():.3f} ± {1.96*values.std(ddof=1)/len(values)**.5:.3f}'


def table(rows, by, base, started=None):
    """A line a way: median CPU seconds, how many times fewer than `base`, accuracy, and the difference picture by
    picture.
    With `started`, seconds that Python and the imports took by tool, also how many times fewer without them."""
    names = dict.fromkeys((r['part'], r[by]) for r in rows)
    some = lambda part, name: [r for r in rows if (r['part'], r[by]) == (part, name)]
    cost = lambda rows: statistics.median(r['cpu'] for r in rows) if all('cpu' in r for r in rows) else None
    for part, name in names:
        mine, other = some(part, name), some(part, base)
        line = {
            'part': part,
            by: name,
            'seeds': len(mine),
            'pictures': len(mine[0]['right']),
            'CPU s': cost(mine),
            'accuracy': with_interval(told(mine)),
        }
        if other:
            line['times fewer'] = round(cost(other)/cost(mine), 1) if cost(mine) else None
            if started: line['start apart'] = round((cost(other) - started[base])/(cost(mine) - started[name]), 1)
            line[f'against {base}'] = '' if name == base else with_interval(told(mine) - told(other))
        yield line


def bench(kind, photos, out, work, seeds, limit, unfrozen, only):
    done = [json.loads(line) for line in out.read_text('utf-8').splitlines()] if out.exists() else []
    where = dataset(photos, work, limit if kind in ('rounds', 'augmented') else None).path
    if kind == 'predict': model_file(where)
    for what in plan(kind, seeds, limit, unfrozen, only):
        if any(what.items() <= row.items() for row in done): continue
        for name in ('features', 'models', 'predictions'):
            shutil.rmtree(where / name, ignore_errors=True)  # of the run before
        env = os.environ | dict.fromkeys(('OMP_NUM_THREADS', 'MKL_NUM_THREADS'), '1')
        found = subprocess.run(
            [sys.executable, __file__, '--child', json.dumps(what), '--work', str(where)],
            check=True,
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        with out.open('a', encoding='utf-8') as f:
            for line in found.splitlines():
                if not line.startswith('{'): continue
                f.write(json.dumps(what | json.loads(line)) + '\n')
                print({k: v for k, v in (what | json.loads(line)).items() if k != 'right'}, flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('kind', nargs='?', choices=('rounds', 'augmented', 'start', 'predict', 'full', 'ablation'))
    for name, kw in {
        'photos': {},
        'out': dict(default='train.jsonl'),
        'work': dict(default=f'{tempfile.gettempdir()}/vegc_train_bench'),
        'seeds': dict(type=int, nargs='+', default=[1, 2, 3]),
        'limit': dict(type=int, default=400),
        'unfrozen': dict(type=int, default=4),
        'only': dict(nargs='+'),
        'child': {},
    }.items():
        parser.add_argument(f'--{name}', **kw)
    args = parser.parse_args()
    if args.child:
        what = json.loads(args.child)
        if what['kind'] != 'start': from vegc.data.dataset import ImageDataset
        for row in rows_of(what, None if what['kind'] == 'start' else ImageDataset(args.work)):
            print(json.dumps(row), flush=True)
    elif args.kind and args.photos:
        bench(args.kind, args.photos, Path(args.out), args.work, args.seeds, args.limit, args.unfrozen, args.only)
    else: parser.error('a kind and --photos are needed')
