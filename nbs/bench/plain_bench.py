"""What plain methods get, what balancing buys and what more pictures would bring, on photographs: python
nbs/bench/plain_bench.py --photos DIR [--out nbs/bench/plain.json]

DIR has a folder of pictures for each class; the figures in docs are from the "clothing dataset small" (CC0),
3,068 photographs of ten classes. The body is EfficientNet-Lite0 at 160 pixels (extra `offline`), frozen; three to
four minutes of one core."""
import argparse
import json
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from vegc.evaluation.baselines import baselines, compare_imbalance
from vegc.data.dataset import ImageDataset
from vegc.evaluation.crossval import cross_validate
from vegc.evaluation.growth import would_more_help
from vegc.acquire.add import add
from vegc.splits.split import split
from vegc.training.train import train


COSTS = {}


@contextmanager
def cpu(what):
    start = time.process_time()
    yield
    COSTS[what] = round(time.process_time() - start)
    print(f'{what}: {COSTS[what]} CPU s\n', flush=True)


def rows_of(table, score):
    "What the docs show of a table of methods: the score, and what it differs by, each with its interval."

    def span(row, name):
        return '' if pd.isna(row[name]) else f'{row[name]:.3f} ({row[name + "_low"]:.3f} to {row[name + "_high"]:.3f})'

    return [
        dict(
            method=r['method'],
            **({'learns from': r['features']} if 'features' in r else {}),
            **{score: span(r, score), 'difference': span(r, 'difference')},
        )
        for r in table.to_dict('records')
    ]


if __name__ == '__main__':
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument('--photos', type=Path, required=True)
    args.add_argument('--work', type=Path, default=None, help='an empty folder, or that of an earlier run')
    args.add_argument('--out', type=Path, default=None, help='a JSON file for the figures')
    args = args.parse_args()
    dataset = ImageDataset((args.work or Path(tempfile.mkdtemp()))/'photos', subject='objects')
    if dataset.df.empty: add(args.photos, dataset)
    with cpu('features and splits'): print(split(dataset))
    if not (dataset.path/'models/plain').exists():
        with cpu('eight frozen epochs'):
            train(dataset, arch='efficientnet_lite0', size=160, epochs=(8, 0), stage='plain')
    with cpu('cross-validation'): said = cross_validate(dataset, 'plain').headline
    with cpu('ways to balance'): balanced = compare_imbalance(dataset, 'plain')
    with cpu('more pictures'): growth = would_more_help(dataset, 'plain')
    with cpu('plain methods'): plain = baselines(dataset, 'plain')
    found = {
        'cross-validation': said,
        'more pictures': str(growth),
        'curve': growth.curve.round(4).to_dict('records'),
        'ways to balance': rows_of(balanced, 'macro_f1'),
        'plain methods': rows_of(plain, 'accuracy'),
        'pictures judged': int(plain.n.max()),
        'CPU seconds': COSTS,
    }
    print(json.dumps(found, indent=1, ensure_ascii=False))
    if args.out: args.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
