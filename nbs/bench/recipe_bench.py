"""What each part of the unfrozen recipe is good for: accuracy on valid after each epoch, several seeds and sizes of the
training set, and one epoch at rates from tiny to large.

    python nbs/bench/recipe_bench.py --photos DIR [--train 700 1900] [--valid 1200] [--size 128] [--seeds 1 2]
        [--plan rates curves] [--jobs 1] [--seconds 0] [--out nbs/bench/recipe.jsonl]

DIR holds a folder of images a class, or `train` and `valid` with one each; the public "clothing dataset small" (CC0) is
meant. Every run adds a line to the file, and runs that it holds are not run again. On a GPU several jobs share it.
`--seconds` ends the bench after so long: a run that has not ended by then is not counted."""
import argparse
import json
import multiprocessing
import os
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

# what each variant changes: the head, and arguments of `fit_body`
NEW = dict(linear=True, lr=(1e-4, 1e-3))
OLD = dict(hold=False, clip=0., average=0, small=.7, lr=[2e-4, 6e-4, 1e-3])
VARIANTS = {
    'new': NEW,
    'as it was': OLD,
    'new, norms free': NEW | dict(hold=False),
    'new, not clipped': NEW | dict(clip=0.),
    'new, not averaged': NEW | dict(average=0),
    'new, head of two layers': NEW | dict(linear=False),
    'new, small first': NEW | dict(small=.5),
    'new, 2e-4 to 2e-3': NEW | dict(lr=(2e-4, 2e-3)),
    'new, 5e-5 to 5e-4': NEW | dict(lr=(5e-5, 5e-4)),
    'new, 3e-5 to 3e-4': NEW | dict(lr=(3e-5, 3e-4)),
    'new, short warm-up': NEW | dict(warm=.1),
    'new, average of 20': NEW | dict(average=20),
    'new, not smoothed': NEW | dict(smoothing=0.),
    'new, ten epochs': NEW | dict(epochs=10),
    'as it was, ten epochs': OLD | dict(epochs=10),
}
RATES = [(1e-6, 1e-5), (1e-5, 1e-4), (3e-5, 3e-4), (1e-4, 1e-3)]


def planned(args):
    "All runs asked for."
    runs = []
    if 'rates' in args.plan:
        heads = {'one epoch': dict(linear=True), 'one epoch, head of two layers': dict(linear=False)}
        runs += [dict(variant=name, n=n, seed=seed, epochs=1, lr=lr, **how) for seed in range(1, 6) for n in args.train
                 for lr in RATES for name, how in heads.items()]
    if 'curves' in args.plan:
        runs += [dict(variant=name, n=n, seed=seed, **dict(epochs=6) | how) for seed in args.seeds
                 for n in args.train for name, how in VARIANTS.items()]
    return runs


def prepare(photos, work, valid, size):
    from vegc.acquire.add import add
    from vegc.data.dataset import ImageDataset
    from vegc.features.features import cached_features
    from vegc.splits.split import split
    ds = ImageDataset(Path(work)/'ds', subject='objects')
    add(photos, ds)
    if ds.images.split.isna().any():
        split(ds, valid=valid/len(ds.images), test=0.)
    cached_features(ds, 'efficientnet_lite0', size)
    (Path(work)/'ready').touch()


@cache
def loaders(path, n, size):
    "Of n training images, the same for every run, and of all valid ones."
    from vegc.data.dataset import ImageDataset
    from vegc.training.loaders import dataloaders
    data = ImageDataset(path).read()
    train = data.images[data.images.split == 'train'].sort_values('sha256')
    few = replace(data, rows=data.rows[~data.rows.path.isin(train.path.iloc[n:])])
    return dataloaders(few, size, 64)


def measured(path, size, run):
    "One run's line."
    from vegc.training.fit import fit_body, fit_head
    from vegc.training.learner import image_learner
    dls = loaders(path, run['n'], size)
    dls.train.bs = 64
    how = {k: v for k, v in run.items() if k not in ('variant', 'n', 'seed', 'linear', 'smoothing')}
    if isinstance(how.get('lr'), tuple): how['lr'] = slice(*how['lr'])
    start, cpu = time.perf_counter(), time.process_time()
    head = 'linear' if run.get('linear') else 'mlp'
    how_made = dict(seed=run['seed'], head=head, smoothing=run.get('smoothing', .1))
    learn = fit_head(image_learner(dls, 'efficientnet_lite0', **how_made))
    frozen = learn.info.best['accuracy']
    fit_body(learn, **how)
    rows = [row for row in learn.info.history if row['part'] == 'unfrozen']
    return run | dict(
        frozen=round(frozen, 4),
        accuracy=[round(row['accuracy'], 4) for row in rows],
        valid_loss=[round(row['valid_loss'], 4) for row in rows],
        train_loss=[round(row['train_loss'], 4) for row in rows],
        n_train=len(dls.train_ds),
        n_valid=len(dls.valid_ds),
        seconds=round(time.perf_counter() - start, 2),
        cpu=round(time.process_time() - cpu, 2),
    )


def key(run): return json.dumps({k: run.get(k) for k in ('variant', 'n', 'seed', 'epochs', 'lr')})


def work(path, size, todo, out, lock):
    sys.stderr = open(os.devnull, 'w')
    while (run := todo.get()) is not None:
        try: line = measured(path, size, run)
        except Exception as e: line = run | dict(error=f'{type(e).__name__}: {e}')
        with lock, open(out, 'a', encoding='utf-8') as f: f.write(json.dumps(line) + '\n')
        print(line['variant'], line['n'], line['seed'], line.get('lr'), line.get('frozen'), line.get('accuracy'),
              line.get('error', ''), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--photos', required=True)
    parser.add_argument('--work', default='recipe-bench', help='where the dataset is kept')
    parser.add_argument('--train', type=int, nargs='+', default=[700, 1900])
    parser.add_argument('--valid', type=int, default=1200)
    parser.add_argument('--size', type=int, default=128)
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--plan', nargs='+', default=['rates', 'curves'], choices=['rates', 'curves'])
    parser.add_argument('--only', help='variants whose name holds this')
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--seconds', type=float, default=0.)
    parser.add_argument('--out', default='recipe.jsonl')
    args = parser.parse_args()
    start = time.monotonic()
    make, path, out = multiprocessing.get_context('spawn'), Path(args.work)/'ds', Path(args.out)
    if not (Path(args.work)/'ready').exists():
        first = make.Process(target=prepare, args=(args.photos, args.work, args.valid, args.size))
        first.start()
        first.join()
        if first.exitcode: sys.exit('the dataset could not be made')
    print(f'ready after {time.monotonic() - start:.0f} s', flush=True)
    done = {key(json.loads(line)) for line in out.read_text().splitlines()} if out.exists() else set()
    runs = [run for run in planned(args) if json.loads(json.dumps(key(run))) not in done]
    runs = [run for run in runs if not args.only or args.only in run['variant']]
    todo, lock = make.Queue(), make.Lock()
    jobs = [make.Process(target=work, args=(path, args.size, todo, out, lock), daemon=True) for _ in range(args.jobs)]
    for run in runs + [None]*args.jobs: todo.put(run)
    for job in jobs: job.start()
    for job in jobs: job.join(max(0, start + args.seconds - time.monotonic()) if args.seconds else None)
    for job in jobs:
        if job.is_alive(): job.terminate()


if __name__ == '__main__': main()
