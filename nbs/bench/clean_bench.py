"""What finds planted flaws first, and what cleaning them buys: the usual ways, cleanlab, fastai's order and vegc on the
same photographs.

    python nbs/bench/clean_bench.py --photos DIR [--seeds 0 1 2 3 4] [--junk spread clumped] [--out clean.jsonl]
                                    [--work FOLDER]

DIR holds a folder of images a class; the figures in the docs are on the public "clothing dataset small" (CC0, 3,068
photographs). Each planting adds to them, at random: 289 wrong labels, 107 off-topic images (drawn digits, pieces of
scikit-learn's sample photographs, textures, blanks), 153 exact duplicates and 153 near-duplicates. A line of results is
appended as it is known, and what is there already is not measured again, so the program can be stopped and continued.
FOLDER keeps images and features between runs. Models are heads on features of a frozen network, computed once. CPU
seconds are of this process, which should run on one thread (OMP_NUM_THREADS=1); memory is the most that a step needed
beyond what was there before it (Linux)."""
import argparse
import functools
import json
import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from cleanlab.outlier import OutOfDistribution
from cleanlab.rank import get_label_quality_scores
from PIL import Image, ImageDraw
from planting import plant_near_copies
from sklearn.datasets import load_digits, load_sample_image
from sklearn.decomposition import PCA
from torch import nn

from vegc.cleaning.clean import rule_decisions
from vegc.data.dataset import ImageDataset
from vegc.data.manifest import manifest_frame, write_manifest
from vegc.splits.duplicates import group_numbers, whiten
from vegc.features.features import cached_features
from vegc.data.images import phash_mirrored, prepare
from vegc.acquire.add import add
from vegc.cleaning.issues import find_issues, merge_queues
from vegc.training.probes import out_of_fold
from vegc.splits.copies import duplicate_pairs

WRONG, JUNK, COPIES = 289, 107, 153
VIEWS = list(range(0, 1201, 20))   # where the curve of flaws seen is noted
BINS = [0, .1, .3, .5, .7, .8, .9, .95, 1.01]


# What is planted

@functools.cache
def load_digits_once(): return load_digits().images


def digit(rng, alike):
    "A drawn digit: white on black and all of one size, or any ink on any ground."
    pixels = load_digits_once()[0 if alike else rng.integers(1797)]
    mask = Image.fromarray((pixels*15.9).astype(np.uint8)).resize((160, 160), Image.Resampling.BICUBIC)
    ground, ink = ((8, 8, 8), (240, 240, 240)) if alike else (tuple(map(int, c)) for c in rng.integers(0, 256, (2, 3)))
    im = Image.new('RGB', (300, 300) if alike else tuple(map(int, rng.integers(220, 420, 2))), ground)
    im.paste(ink, tuple(int(rng.integers(0, side - 159)) for side in im.size), mask)
    return im


def piece(rng, alike):
    "A piece of a sample photograph: always the same one, or either, near or far."
    photo = Image.fromarray(load_sample_image('china.jpg' if alike or rng.random() < .5 else 'flower.jpg'))
    w = int(rng.integers(200, 260) if alike else rng.integers(80, 420))
    x, y = (int(rng.integers(0, room + 1)) for room in (photo.width - w, photo.height - w))
    return photo.crop((x, y, x + w, y + w)).resize((300, 300), Image.Resampling.BICUBIC)


def texture(rng, alike):
    "Noise of one grain, stripes, rings or blotches, in colours of their own."
    y, x = np.mgrid[:300, :300]/300.
    turn = rng.uniform(0, 2*np.pi)

    def stripes(): return np.sin(rng.uniform(20, 120)*(x*np.cos(turn) + y*np.sin(turn)))
    def rings(): return np.sin(rng.uniform(20, 120)*np.hypot(x - rng.random(), y - rng.random()))
    def blotches():
        n = int(rng.integers(3, 80))
        grain = Image.fromarray(rng.normal(0, 1, (n, n)).astype(np.float32))
        return np.asarray(grain.resize((300, 300), Image.Resampling.BICUBIC))
    a, b = rng.uniform(0, 255, (2, 3))
    wave = blotches() if alike else (stripes, rings, blotches)[rng.integers(3)]()
    return Image.fromarray((a + (b - a)*(.5 + wave[..., None]/2)).clip(0, 255).astype(np.uint8))


def blank(rng, alike):
    "One colour."
    return Image.new('RGB', (300, 300), (255, 255, 255) if alike else tuple(map(int, rng.integers(0, 256, 3))))


def screen(rng, alike):
    "Lines of boxes like words, with a bar on top: what is saved where a page said no."
    im = Image.new('RGB', (400, 300), tuple(map(int, rng.integers(200, 256, 3))))
    draw = ImageDraw.Draw(im)
    draw.rectangle((0, 0, 400, int(rng.integers(20, 60))), fill=tuple(map(int, rng.integers(0, 200, 3))))
    for top in range(80, 280, int(rng.integers(14, 30))):
        x = 20
        while x < 360:
            w = int(rng.integers(10, 60))
            draw.rectangle((x, top, min(x + w, 380), top + 8), fill=(60, 60, 60))
            x += w + 8
    return im


# how many of each; clumped ones are alike, as things are that were scraped in bulk
KINDS = dict(
    spread=((digit, 40, False), (piece, 30, False), (texture, 27, False), (blank, 10, False)),
    clumped=((digit, 50, True), (piece, 37, True), (blank, 20, True)),
    mixed=((digit, 20, True), (screen, 40, False), (piece, 17, False), (texture, 20, True), (blank, 10, False)))


def base(photos, work):
    "The photographs as a dataset, with features; made once."
    if not (work/'photos'/'done').exists():
        add(photos, work/'photos', subject='objects')
        cached_features(ImageDataset(work/'photos'), 'efficientnet_lite0', 160)
        (work/'photos'/'done').touch()
    return ImageDataset(work/'photos')


def plant(source, work, junk, seed):
    "A dataset with flaws, and what they are: row by row true class (empty: junk), original and change of a copy."
    rng = np.random.default_rng([seed, sorted(KINDS).index(junk)])
    ds = ImageDataset(work/f'{junk}-{seed}', subject='objects')
    if not (ds.path/'images').exists():  # the same files by another name: a dataset follows no link out of its folder
        shutil.copytree(source.path/'images', ds.path/'images', copy_function=os.link)
        shutil.copytree(source.path/'features', ds.path/'features')
    rows = source.images.to_dict('records')
    classes = sorted({r['given_label'] for r in rows})
    for r in rows: r |= dict(true=r['given_label'], original='')
    share = np.array([sum(r['true'] == c for r in rows) for c in classes])/len(rows)
    def store(data, label, **more):
        p = prepare(data)
        # equal bytes stay two images, as for every other tool
        path = Path('images')/label/f'{p.sha256[:16]}+{junk}-{seed}-{len(rows)}.{p.ext}'
        if not (ds.path/path).exists(): (ds.path/path).write_bytes(p.data)
        about = dict(width=p.width, height=p.height, sha256=p.sha256, phash=p.phash, flags=';'.join(p.flags))
        rows.append(dict(given_label=label, path=str(path)) | about | more)
    near = plant_near_copies([ds.path/r['path'] for r in rows], ds.path/'new', seed=rng.integers(2**31), n=COPIES)
    for r in near.itertuples():
        original = str(Path(r.original).relative_to(ds.path))
        store(Path(r.copy).read_bytes(), r.label, true=r.label, original=original, change=r.change)
    for r in [rows[i] for i in rng.choice(len(source.images), COPIES, replace=False)]:
        path = f'{r["path"][:-4]}+{junk}-{seed}{r["path"][-4:]}'
        if not (ds.path/path).exists(): os.link(ds.path/r['path'], ds.path/path)
        rows.append(r | dict(path=path, original=r['path'], change='exact'))
    for draw, n, alike in KINDS[junk]:
        for _ in range(n):
            im, buf = draw(rng, alike), ds.path/'new'/'one.jpg'
            im.save(buf, quality=88)
            store(buf.read_bytes(), classes[rng.choice(len(classes), p=share)], true='', original='')
    shutil.rmtree(ds.path/'new')
    for i in rng.choice(np.flatnonzero([r['true'] != '' for r in rows]), WRONG, replace=False):
        rows[i]['given_label'] = rng.choice([c for c in classes if c != rows[i]['true']])
    table = pd.DataFrame(rows).fillna(dict(change=''))
    fresh = table.assign(key=table.index.astype(str), url=table.path, status='ok', split=None, duplicate_group=None)
    write_manifest(ds.path/'manifest.parquet', manifest_frame(fresh))
    return ds, table.set_index('path').loc[ds.stored().path].reset_index()


# How well something is found

@contextmanager
def cost():
    "CPU seconds and megabytes of a step."
    res, linux = {}, Path('/proc/self/clear_refs').exists()
    def memory(what):
        with open('/proc/self/status') as f:
            return next(int(line.split()[1])/1024 for line in f if line.startswith(what))
    if linux:
        Path('/proc/self/clear_refs').write_text('5')  # forgets the peak
        before = memory('VmRSS')
    start = time.process_time()
    yield res
    res |= dict(cpu=round(time.process_time() - start, 2), memory=round(memory('VmHWM') - before) if linux else None)


def average_precision(order, hit, total=None):
    "Area under precision and recall; what an order leaves out is never found."
    found = np.cumsum(hit := np.asarray(hit)[order])
    return float((hit*found/np.arange(1, len(hit) + 1)).sum()/(total or hit.sum()))


def needed(order, hit, share, total=None):
    "How many to look at until that share was seen; None where the order ends before."
    found = np.cumsum(np.asarray(hit)[order])
    want = int(np.ceil(share*(total or found[-1])))
    return int(np.searchsorted(found, want)) + 1 if found[-1] >= want else None


def head(k, d, regularised):
    "A head as fastai builds it, without its first batch norm; or one with nothing against learning by heart."
    if not regularised: return nn.Sequential(nn.Linear(d, 512), nn.ReLU(), nn.Linear(512, k))
    first = nn.Dropout(.25), nn.Linear(d, 512, bias=False), nn.ReLU(), nn.BatchNorm1d(512)
    return nn.Sequential(*first, nn.Dropout(.5), nn.Linear(512, k))


def trained(x, y, epochs, seed, regularised=True, lr=1e-3):
    "A head trained on features: one-cycle AdamW with dropout and smoothed labels, or plain Adam without."
    torch.manual_seed(seed)
    net, bs = head(int(y.max()) + 1, x.shape[1], regularised), 64
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=.01 if regularised else 0, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=epochs*(len(x)//bs)) if regularised else None
    loss = nn.CrossEntropyLoss(label_smoothing=.1 if regularised else 0)
    net.train()
    for _ in range(epochs):
        for i in torch.randperm(len(x))[:len(x)//bs*bs].view(-1, bs):
            opt.zero_grad()
            loss(net(x[i]), y[i]).backward()
            opt.step()
            if rate: rate.step()
    return net.eval()


@torch.inference_mode()
def losses(net, x, y):
    return nn.functional.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y), reduction='none').numpy()


# The ways to look

def fastai_order(x, y, seed, most=30):
    """What ImageClassifierCleaner shows: by class and part the thirty with the greatest loss of a model that trained on
    four fifths; here, to its advantage, all menus merged by loss."""
    valid = np.random.default_rng(seed).random(len(y)) < .2
    loss = losses(trained(x[~valid], y[~valid], 4, seed), x, y)
    menus = [np.flatnonzero((y == c) & (valid == part)) for c in np.unique(y) for part in (False, True)]
    shown = np.concatenate([m[np.argsort(-loss[m])[:most]] for m in menus])
    return shown[np.argsort(-loss[shown])]


def vegc_ranks(ds, x, y, pairs, copies):
    "Out-of-fold probabilities, the table of issues, and what either cost; the search for duplicates is added."
    with cost() as folds: p = out_of_fold(x, y, pd.factorize(ds.stored().duplicate_group)[0])
    p = p/p.sum(1, keepdims=True)
    with cost() as rest, patch('vegc.cleaning.issues.duplicate_pairs', lambda *_, **kw: pairs):
        issues = find_issues(ds, pred_probs=p, features=x)
    steps = folds, rest, copies
    spent = dict(cpu=round(sum(c['cpu'] for c in steps), 2), memory=max(c['memory'] or 0 for c in steps))
    return p, issues, folds, spent


def ways(ds, x, z, y, p, seed):
    "Each other way to rank images: name, cost, score of labels and of junk (low is bad), order; None: it gives none."
    for epochs in (1, 4, 30):
        with cost() as c: loss = losses(trained(z, y, epochs, seed), z, y)
        yield f'loss in sample, {epochs} epochs', c, -loss, None, np.argsort(-loss)
    with cost() as c: order = fastai_order(z, y, seed)
    yield 'fastai ImageClassifierCleaner', c, None, None, order
    with cost() as c: knn = OutOfDistribution().fit_score(features=x.astype(np.float32))
    yield 'cleanlab outlier score', c, None, knn, np.argsort(knn)
    with cost() as c: once = out_of_fold(x, y, pd.factorize(ds.stored().duplicate_group)[0], looks=1)
    for said, probs in (('', once/once.sum(1, keepdims=True)), (" on vegc's probabilities", p)):
        for method in ('self_confidence', 'normalized_margin', 'confidence_weighted_entropy'):
            q = get_label_quality_scores(y, probs, method=method)
            yield f'cleanlab {method}{said}', {} if said else c, q, None, np.argsort(q)
            if said or method != 'self_confidence': continue
            merged = merge_queues([np.argsort(q).tolist(), np.argsort(knn).tolist()], [4, 1])
            yield 'cleanlab, labels and outliers 4 : 1', c, q, knn, np.array(merged)


def precision_of(score, hit):
    "Average precision of a score, low is bad; None for none."
    return None if score is None else average_precision(np.argsort(score, kind='stable'), hit)


def rank_rows(ds, table, x, z, y, p, issues, spent, seed):
    "One line a way: average precision, pictures to look at, the curve."
    junk = (table.true == '').to_numpy()
    wrong = (table.true != table.given_label).to_numpy() & ~junk
    flaw, t = wrong | junk, issues.set_index('path').loc[table.path]
    ours = 'vegc', spent, t.label_score.to_numpy(), -t.outlier.to_numpy(), np.argsort(t['rank'].to_numpy())
    for way, c, labels, outliers, order in [*ways(ds, x, z, y, p, seed), ours]:
        seen = np.cumsum(flaw[order])/flaw.sum()
        yield dict(way=way, ap_labels=precision_of(labels, wrong), ap_junk=precision_of(outliers, junk),
                   views_80=needed(order, flaw, .8, flaw.sum()), views_95=needed(order, flaw, .95, flaw.sum()),
                   curve=[round(float(seen[min(v, len(seen)) - 1]), 3) if v else 0. for v in VIEWS]) | c


def sure_rows(table, p, issues):
    "How often suggested labels are right, by what was said of them: vegc's chance, and the plain probability."
    t = issues.set_index('path').loc[table.path].reset_index()
    right, asked = (t.predicted_label == table.true).to_numpy(), (t.predicted_label != t.given_label).to_numpy()
    for name, said in (('chance', t.confidence.to_numpy()), ('probability', p.max(1))):
        for low, high in pairwise(BINS):
            some = asked & (said >= low) & (said < high)
            if not some.any(): continue
            yield dict(way=name, low=low, n=int(some.sum()), said=float(said[some].sum()), right=int(right[some].sum()))
    true = dict(zip(table.path, table.true, strict=True))
    for at in (.5, .8, .9, .95):
        new = [r for r in rule_decisions(t.assign(split='train'), at) if r['action'] == 'relabel']
        said = t.confidence[t.path.isin([r['path'] for r in new])]
        right = sum(r['label'] == true[r['path']] for r in new)
        yield dict(way='clean --auto', low=at, n=len(new), said=float(sum(said)), right=right)


def pair_rows(table, x, pairs, spent):
    """One line a way to rank pairs with a planted near-duplicate in them. Whether two of the photographs are duplicates
    nobody knows, so their pairs are left out; exact duplicates are taken out before."""
    t = table[table.change != 'exact']
    at = {p: i for i, p in enumerate(t.path)}
    n, copies = len(t), t[t.change != '']
    want = {tuple(sorted((at[a], at[b]))) for a, b in zip(copies.path, copies.original, strict=True)}
    a, b = np.triu_indices(n, 1)
    planted = (t.change != '').to_numpy()
    a, b = (i[planted[a] | planted[b]] for i in (a, b))
    hit = np.zeros((n, n), bool)
    hit[tuple(np.array(sorted(want)).T)] = True
    rows = x[table.index[table.change != 'exact']].astype(np.float32)
    def bits(hashes):
        data = np.frombuffer(bytes.fromhex(''.join(hashes)), np.uint8).reshape(n, -1)
        return np.unpackbits(data, axis=1).astype(np.float32)*2 - 1
    def hashed():
        plain = bits(t.phash)
        return np.maximum(plain @ plain.T, plain @ bits([phash_mirrored(h) for h in t.phash]).T)
    def cosine():
        unit = rows/np.linalg.norm(rows, axis=1, keepdims=True)
        return unit @ unit.T
    def whitened():
        w = whiten(rows)
        return w @ w.T
    ways = {'perceptual hash, 256 bits, mirrored too': hashed, 'cosine': cosine, 'cosine, whitened': whitened}
    for way, similar in ways.items():
        with cost() as c: order = np.argsort(-similar()[a, b], kind='stable')
        yield dict(way=way, ap_pairs=average_precision(order, hit[a, b]), pairs_95=needed(order, hit[a, b], .95)) | c
    found = pairs.assign(**{c: table.path[pairs[c]].map(at).to_numpy() for c in 'ab'}).dropna()
    found = found.sort_values('similarity', ascending=False, kind='stable').astype(dict(a=int, b=int))
    found = found[planted[found.a] | planted[found.b]]
    ours = np.array([tuple(sorted(ab)) in want for ab in zip(found.a, found.b, strict=True)])
    order = np.arange(len(ours))
    yield dict(way='vegc', ap_pairs=average_precision(order, ours, len(want)),
               pairs_95=needed(order, ours, .95, len(want)), found=int(ours.sum())) | spent


# What cleaning buys

def effect_rows(ds, table, z, y, issues, seed, views=(0, 620)):
    "Accuracy on photographs kept apart, by a head that learns by heart and one that does not, after so many views."
    groups, rng = ds.stored().duplicate_group.to_numpy(), np.random.default_rng([seed, 7])
    apart = np.isin(groups, rng.permutation(np.unique(groups))[:len(np.unique(groups))//5])
    true = pd.Categorical(table.true, sorted(table.given_label.unique())).codes.astype(int)
    held = np.flatnonzero(apart & (table.change == '') & (true >= 0))
    rank = issues.set_index('path')['rank'].loc[table.path].to_numpy()
    def accuracy(net, i, want): return float((net(torch.from_numpy(z[i])).argmax(1).numpy() == want[i]).mean())
    for k in views:
        seen = rank <= k
        label, used = np.where(seen & (true >= 0), true, y), ~apart & ~(seen & (true < 0))
        for way, epochs, regularised in (('learns by heart', 40, False), ('regularised', 8, True)):
            lr = 3e-4 if regularised else 1e-3
            with cost() as c: net = trained(z[used], label[used], epochs, seed, regularised, lr=lr)
            by_heart = accuracy(net, np.flatnonzero(used), label)
            yield dict(way=way, views=k, n=len(held), accuracy=accuracy(net, held, true), by_heart=by_heart) | c


def measure(work, source, junk, seed, known):
    "All lines of one planting, but of those parts that are known."
    ds, table = plant(source, work, junk, seed)
    with cost() as c: x = cached_features(ds, 'efficientnet_lite0', 160, paths=table.path)
    with cost() as copies: pairs = duplicate_pairs(ds, ds.stored())
    yield 'pairs', pair_rows(table, x, pairs, copies)
    if 'rank' in known: return
    group_of = dict(zip(table.path, group_numbers(len(table), pairs).astype(str), strict=True))
    grouped = ds.df.assign(duplicate_group=ds.df.path.map(group_of))
    write_manifest(ds.path/'manifest.parquet', manifest_frame(grouped))
    y = pd.Categorical(table.given_label, sorted(table.given_label.unique())).codes.astype(int)
    spread = np.maximum(x.std(0, dtype=np.float32), 1e-3)
    z = PCA(512, iterated_power=2, random_state=0).fit_transform((x - x.mean(0, dtype=np.float32))/spread)
    z = z.astype(np.float32)
    z /= z.std()
    p, issues, folds, spent = vegc_ranks(ds, x, y, pairs, copies)
    yield 'cost', [dict(way='features of what was planted', n=JUNK + COPIES) | c,
                   dict(way='out of fold, ten folds, two looks', n=len(y)) | folds]
    yield 'effect', effect_rows(ds, table, z, y, issues, seed)
    yield 'sure', sure_rows(table, p, issues)
    yield 'rank', rank_rows(ds, table, x, z, y, p, issues, spent, seed)


def rounded(row): return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def interval(values):
    "Mean and 95 % interval over plantings, Student's t; without an interval for one."
    from scipy.stats import t
    v = np.array([x for x in values if x is not None and x == x], float)
    half = t.ppf(.975, len(v) - 1)*v.std(ddof=1)/np.sqrt(len(v)) if len(v) > 1 else np.nan
    return v.mean() if len(v) else np.nan, half


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = dict(photos=dict(required=True), seeds=dict(type=int, nargs='+', default=[0, 1, 2, 3, 4]),
                   junk=dict(nargs='+', default=['spread', 'clumped'], choices=sorted(KINDS)),
                   out=dict(default=str(Path(__file__).with_name('clean.jsonl'))), work={})
    for name, kw in options.items(): parser.add_argument(f'--{name}', **kw)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work, out = Path(args.work or folder), Path(args.out)
        lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        for seed in args.seeds:
            for junk in args.junk:
                known = {r['what'] for r in lines if (r['junk'], r['seed']) == (junk, seed)}
                if {'pairs', 'rank'} <= known: continue
                for what, rows in measure(work, base(args.photos, work), junk, seed, known):
                    if what in known: continue
                    new = [rounded(dict(junk=junk, seed=seed, what=what) | r) for r in rows]
                    with open(out, 'a') as f: f.writelines(json.dumps(r) + '\n' for r in new)
                    for r in new:
                        if r['way'] not in ('vegc', 'clean --auto', 'learns by heart', 'regularised'): continue
                        print({k: v for k, v in r.items() if k != 'curve'}, flush=True)
