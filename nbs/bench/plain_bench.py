"""What plain methods get, what balancing buys and what more pictures would bring, on photographs: python nbs/bench/plain_bench.py --photos DIR

DIR has a folder of pictures for each class; the figures in docs are from the "clothing dataset small" (CC0), 3,068 photographs of ten classes.
The body is EfficientNet-Lite0 at 160 pixels (extra `offline`), frozen; about ten minutes of one core.
"""
import argparse
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from vegc.baselines import baselines, compare_imbalance
from vegc.dataset import ImageDataset
from vegc.evaluate import cross_validate
from vegc.growth import would_more_help
from vegc.ingest import add
from vegc.split import split
from vegc.train import train


@contextmanager
def cpu(what):
    start = time.process_time()
    yield
    print(f'{what}: {time.process_time() - start:.0f} CPU s\n', flush=True)


def shown(table, score):
    cols = [c for c in ('method', 'features', 'n', 'seeds', score, f'{score}_low', f'{score}_high', 'difference', 'difference_low', 'difference_high') if c in table]
    print(table[cols].round(3).to_string(index=False), flush=True)


if __name__ == '__main__':
    args = argparse.ArgumentParser()
    args.add_argument('--photos', type=Path, required=True)
    args.add_argument('--work', type=Path, default=None, help='an empty folder, or that of an earlier run')
    args = args.parse_args()
    pd.set_option('display.width', 160)
    dataset = ImageDataset((args.work or Path(tempfile.mkdtemp()))/'photos', subject='objects')
    if dataset.df.empty: add(args.photos, dataset)
    with cpu('features and splits'): print(split(dataset))
    if not (dataset.path/'models/plain').exists():
        with cpu('eight frozen epochs'): train(dataset, arch='efficientnet_lite0', size=160, epochs=(8, 0), stage='plain')
    with cpu('cross-validation'): print(cross_validate(dataset, 'plain').headline)
    with cpu('ways to balance'): shown(compare_imbalance(dataset, 'plain'), 'macro_f1')
    with cpu('more pictures'): print(would_more_help(dataset, 'plain'))
    with cpu('baselines on valid'): shown(baselines(dataset, 'plain'), 'accuracy')
