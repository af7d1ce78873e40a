"""Two processes that torchrun starts end where one does: equal weights, the same figures, and one writes and speaks."""
import json
import os
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from conftest import PROGRAM
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

from vegc.core import sha256_hex
from vegc.data.dataset import ImageDataset
from vegc.evaluation.predictions import predictions
from vegc.splits.split import split, split_log
from vegc.training.stages import stage_info, stages

N = 300
# What a process was left with, after the recipe in one call.
SCRIPT = textwrap.dedent('''
    import json, sys
    import torch
    from safetensors.torch import save_file
    from vegc.training.ranks import ranks, this_rank
    from vegc.training.train import train
    dataset, out, how = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    learn = train(dataset, **how)
    assert not isinstance(learn.model, torch.nn.parallel.DistributedDataParallel)
    assert learn.dls.train.bs == 16, 'the batch is what it was: as small as few pictures ask for'
    weights = {k: v.contiguous().cpu() for k, v in learn.model.state_dict().items()}
    save_file(weights, f'{out}-{this_rank()}-of-{ranks()}.safetensors')
''')


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    "Three hundred digits of 32 pixels, four classes, no split yet."
    ds, given = ImageDataset(tmp_path_factory.mktemp('several') / 'digits', subject='characters'), load_digits()
    some = np.flatnonzero(given.target < 4)[:N]
    with ds.run() as run:
        for i in some:
            label = f'digit {given.target[i]}'
            path = ds.path / f'images/{label}/{i:04}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((given.images[i] * 15.9).astype(np.uint8)).convert('RGB').resize((32, 32)).save(path)
            run.add(dict(key=str(i), url=str(i), given_label=label, status='ok', path=f'images/{label}/{i:04}.png',
                         width=32, height=32, sha256=sha256_hex(path.read_bytes())))
    return ds


def start(n, *command, **kw):
    "A program on n processes of this machine, that meet on loopback."
    env = {k: v for k, v in os.environ.items() if k not in ('WORLD_SIZE', 'RANK')}
    env |= {'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo'}
    meet = ['--rdzv_backend', 'c10d', '--rdzv_endpoint', '127.0.0.1:0', '--local_addr', '127.0.0.1']
    several = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', str(n), *meet]
    run = [*(several if n > 1 else [sys.executable]), *map(str, command)]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=500, **kw)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def test_two_processes_end_with_equal_weights_and_the_figures_of_one(digits, tmp_path):
    script = tmp_path / 'several.py'
    script.write_text(SCRIPT)
    how = dict(arch='small_cnn', size=32, bs=32, epochs=[0, 6])
    two = start(2, script, digits.path, tmp_path / 'two', json.dumps(how | dict(stage='two')))
    start(1, script, digits.path, tmp_path / 'one', json.dumps(how | dict(stage='one')))
    a, b, one = (load_file(tmp_path / f'{name}.safetensors') for name in ('two-0-of-2', 'two-1-of-2', 'one-0-of-1'))
    assert all(np.array_equal(a[k], b[k]) for k in a), 'both processes hold the same weights'
    saved = load_file(digits.path / 'models/two/weights.safetensors')
    assert all(np.array_equal(a[k], v) for k, v in saved.items()), 'and those were saved'
    differ = any(not np.array_equal(a[k], one[k]) for k in a)
    assert differ, 'dropout and augmentation are drawn by each process: not bit for bit those of one'
    assert two.stderr.count('unfrozen 1: ') == 1, 'one of them speaks'
    here, there = stage_info(digits, 'one'), stage_info(digits, 'two')
    assert here.counts == there.counts and here.trained_on == there.trained_on, 'the same splits'
    assert len(there.history) == 6
    best = [i.best['accuracy'] for i in (here, there)]
    assert min(best) > .8 and abs(best[0] - best[1]) < .07, best
    # what was added up over processes is what one pass over all of valid gives
    table = predictions(digits, 'two', 'valid')
    assert there.best['accuracy'] == pytest.approx((table.label == table.predicted_label).mean(), abs=1e-6)


def test_batch_norms_are_those_of_all_processes(digits, tmp_path):
    "Each process counts means and variances of its own halves of batches; they end with one and the same."
    script = tmp_path / 'norms.py'
    script.write_text(SCRIPT)
    how = dict(arch='efficientnet_lite0', size=32, bs=32, epochs=[0, 1], stage='norms')
    start(2, script, digits.path, tmp_path / 'norms', json.dumps(how))
    a, b = (load_file(tmp_path / f'norms-{rank}-of-2.safetensors') for rank in (0, 1))
    assert any(k.endswith('running_var') for k in a) and all(np.array_equal(a[k], b[k]) for k in a)


def test_without_chance_two_processes_follow_the_path_of_one(digits, tmp_path):
    """No dropout, no augmentation: the gradient of a batch is the mean of those of its halves.
    Started as a notebook starts them."""
    split(digits)  # loaders do not; a test before this one may have
    script = tmp_path / 'plain.py'
    script.write_text(textwrap.dedent('''
        import sys
        from accelerate import notebook_launcher
        from safetensors.torch import save_file
        from vegc.training.fit import fit_body
        from vegc.training.learner import image_learner
        from vegc.training.loaders import dataloaders
        from vegc.training.ranks import join_ranks, ranks, this_rank

        def work(dataset, out):
            join_ranks()
            learn = image_learner(dataloaders(dataset, 32, 30, augment=False), 'small_cnn', smoothing=0.)
            learn.model[1][1].p = 0.
            fit_body(learn, 2)
            weights = {k: v.contiguous() for k, v in learn.model.state_dict().items()}
            save_file(weights, f'{out}-{this_rank()}-of-{ranks()}.safetensors')

        dataset, out, n, port = sys.argv[1:]
        if n == '1': work(dataset, out)
        else: notebook_launcher(work, (dataset, out), num_processes=int(n), use_port=port)
    '''))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    said = [start(1, script, digits.path, tmp_path / 'plain', n, port).stderr.splitlines() for n in (1, 2)]
    losses = [[line for line in lines if line.startswith('unfrozen')] for lines in said]
    assert len(losses[0]) == 2 and losses[0] == losses[1], losses
    one, two = (load_file(tmp_path / f'plain-0-of-{n}.safetensors') for n in (1, 2))
    # Adam divides by the size of a gradient: where it is about nothing, another order of sums may turn a step around
    far = {k: np.abs(two[k] - one[k]) for k in one}
    assert max((d > 2e-4).mean() for d in far.values()) < 2e-3 and max(d.max() for d in far.values()) < 6e-3, far


def test_the_program_under_torchrun_writes_once_and_prints_once(digits):
    how = ['--arch', 'efficientnet_lite0', '--size', '32', '--bs', '32', '--epochs', '2,1', '--stage', 'cli', '--json']
    done = start(2, PROGRAM, 'train', digits.path, *how)
    info = json.loads(done.stdout)
    assert info['stage'] == 'cli' and [r['part'] for r in info['history']] == ['frozen', 'unfrozen']
    assert info['cross_validated']['n'] == info['counts']['train'] + info['counts']['valid']
    assert {'cli', 'cli-1'} <= set(stages(digits)) and not list(digits.path.glob('models/cli/unfinished*'))
    files = [p.name for p in (digits.path / 'features').glob('*-32x32-*')]
    assert len(files) == 1, files
    assert len(split_log(digits)) == 1, 'splits were dealt once, by the first process of the first run'
    table = predictions(digits, 'cli-1', 'valid')
    accuracy = (table.label == table.predicted_label).mean()
    assert stage_info(digits, 'cli-1').best['accuracy'] == pytest.approx(accuracy, abs=.02)  # features may be bf16
