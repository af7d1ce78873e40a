"""Training: the same twice, loaders under spawn, what is recorded, and batches that fit the number of pictures."""
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import vegc.training.fit
from vegc.cleaning.clean import clean
from vegc.core import sha256_hex
from vegc.training.loaders import dataloaders, items
from vegc.data.dataset import ImageDataset
from vegc.features.backbones import weights_hash
from vegc.training.stages import stage_info
from vegc.training.fit import enough_steps, fit_body, fit_head, overfit_since
from vegc.training.learner import image_learner
from vegc.training.train import train

SPAWNED = '''
import json, multiprocessing, sys
import torch
from vegc.data import dataloaders

if __name__ == '__main__':
    multiprocessing.set_start_method('spawn')
    def seen(workers):
        dls = dataloaders(sys.argv[1], 32, bs=4, num_workers=workers, augment=False)
        return [[float(x.double().sum()), y.tolist()] for _ in range(2) for x, y in dls.valid]
    here, there = seen(0), seen(2)
    print(json.dumps(dict(batches=len(here), same=here == there, started=torch.multiprocessing.get_start_method())))
'''


@pytest.fixture(scope='module')
def squares(tmp_path_factory):
    "Sixty pictures of 48 pixels: bright or dark half above, in two colours."
    ds = ImageDataset(tmp_path_factory.mktemp('train')/'squares', subject='other')
    rng = np.random.default_rng(0)
    with ds.run() as run:
        for i in range(60):
            label = 'ab'[i % 2]
            pixels = rng.integers(0, 120, (48, 48, 3), dtype=np.uint8)
            pixels[:24] += np.uint8(60*(i % 2))
            path = ds.path/f'images/{label}/{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            run.add(dict(key=str(i), url=str(i), given_label=label, status='ok', path=f'images/{label}/{i}.png', sha256=sha256_hex(path.read_bytes()),
                         split='train' if i < 40 else 'valid' if i < 50 else 'test'))
    return ds


@pytest.mark.parametrize('cached', [True, False])
def test_two_runs_with_one_seed_are_the_same(squares, cached):
    def once(seed):
        learn = train(squares, arch='efficientnet_lite0', size=48, bs=16, epochs=(2, 1), seed=seed, stage='same', cached=cached, overwrite=True)
        for name in ('same', 'same-1'): (squares.path/'models'/name/'stage.json').unlink()  # else the second run would go on from the first part
        return learn.info.history, weights_hash(learn.model)
    first = once(3)
    assert once(3) == first
    assert once(4)[1] != first[1]


def test_a_checkpoint_is_read_again(squares, tmp_path):
    "Whatever number types rates come in: else a stopped run would begin anew, with the same result and nobody the wiser."
    learn = image_learner(dataloaders(squares, 48, 16), 'efficientnet_lite0')
    learn.checkpoint = tmp_path/'unfinished.pt'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit_body(learn, 2)
        again = image_learner(dataloaders(squares, 48, 16), 'efficientnet_lite0')
        again.checkpoint = learn.checkpoint
        fit_body(again, 2)
    assert again.batch_losses == {} and again.info.history == learn.info.history
    assert weights_hash(again.model) == weights_hash(learn.model)


KILLED = '''
import os, signal, sys
from fastai.callback.core import Callback
from vegc.training import train as t

class Kill(Callback):  # nobody says goodbye: the process is gone in the middle of the third epoch
    order = 70
    def after_batch(self):
        if self.training and self.epoch == 2 and self.iter == 1: os.kill(os.getpid(), signal.SIGKILL)

plain = t._fit_once
t._fit_once = lambda learn, part, epochs, lr, cbs, patience: plain(learn, part, epochs, lr, [*cbs, *([Kill()] if part == 'unfrozen' else [])], patience)
t.train(sys.argv[1], arch='efficientnet_lite0', size=48, bs=16, epochs=(1, 4), stage='broken')
'''


def test_a_killed_run_goes_on_from_its_last_epoch_and_ends_where_an_unbroken_one_does(squares, tmp_path, capsys):
    script = tmp_path/'killed.py'
    script.write_text(KILLED)
    done = subprocess.run([sys.executable, script, squares.path], capture_output=True, text=True, timeout=300, env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert done.returncode == -signal.SIGKILL and 'unfrozen 2: ' in done.stderr and 'unfrozen 3: ' not in done.stderr, done.stderr[-2000:]
    how = dict(arch='efficientnet_lite0', size=48, bs=16, epochs=(1, 4))
    train(squares, stage='broken', **how)
    said = capsys.readouterr().err
    assert 'broken-1 is there already' in said and 'unfrozen: going on after epoch 2 of 4.' in said and said.count('unfrozen ') == 2, said
    train(squares, stage='unbroken', **how)
    one, other = (stage_info(squares, name) for name in ('unbroken', 'broken'))
    assert one.history == other.history and len(other.history) == 5 and one.best == other.best
    same = [(squares.path/'models'/name/'weights.safetensors').read_bytes() for name in ('unbroken', 'broken')]
    assert same[0] == same[1] and not (squares.path/'models/broken/unfinished.pt').exists()


@pytest.mark.parametrize('balance', ['sampling', 'oversampling', 'weights', 'focal', None])
def test_no_way_to_balance_touches_what_is_validated_on(squares, balance):
    "Of sixty pictures a third of one class is left out, so that there is something to balance; valid stays as it is, in order, and train sees train alone."
    out = squares.path/'decisions.jsonl'
    try:
        few = [p for p, part in zip(squares.images.path, squares.images.split, strict=True) if part == 'train' and '/a/' in p][:12]
        (squares.path/'d.csv').write_text('path,action,label,who,why\n' + ''.join(f'{p},exclude,,ana,looked\n' for p in few))
        clean(squares, decisions=squares.path/'d.csv')
        mine = items(squares)
        held, fit = mine[mine.split == 'valid'], mine[mine.split == 'train']
        assert fit.label.value_counts().to_dict() == {'b': 20, 'a': 8}
        learn = image_learner(dataloaders(squares, 48, 8, balance=balance, augment=False), 'efficientnet_lite0')
        for dls in (learn.dls, vegc.training.fit._head_learner(learn, 8).dls):
            assert dls.valid.n == len(held), 'no row more, none less'
            assert torch.cat([y for _, y in dls.valid]).tolist() == [int(v == 'b') for v in held.label]
            seen = torch.cat([y for _ in range(40) for _, y in dls.train]).float().mean()
            assert abs(seen - (.5 if balance in ('sampling', 'oversampling') else 20/28)) < .06, seen
        assert set(learn.dls.train.items.path) == set(fit.path) and set(learn.dls.valid.items.path) == set(held.path)
    finally: out.unlink(missing_ok=True)


def test_loaders_work_with_processes_that_are_spawned(squares, tmp_path):
    script = tmp_path/'spawned.py'
    script.write_text(SPAWNED)
    done = subprocess.run([sys.executable, script, squares.path], capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == dict(batches=6, same=True, started='spawn')


@pytest.mark.parametrize('how', ['cached', 'through the body', 'both parts', 'from a stage'])
def test_recorder_knows_every_epoch(squares, how):
    learn = image_learner(dataloaders(squares, 48, 16), 'efficientnet_lite0')
    if how == 'from a stage':
        for epochs in ((2, 0), (2, 1)): learn = train(squares, arch='efficientnet_lite0', size=48, bs=16, epochs=epochs, stage='recorded', overwrite=True)
    else: fit_head(learn, 2, cached=how != 'through the body', bs=16)
    if how == 'both parts': fit_body(learn, 1)
    rows, rec = learn.info.history, learn.recorder
    assert len(rows) == 3 if how in ('both parts', 'from a stage') else 2
    assert [list(v) for v in rec.values] == [[r['train_loss'], r['valid_loss'], r['accuracy']] for r in rows]
    assert len(rec.losses) == rec.iters[-1] and len(rec.iters) == len(rows) and list(rec.iters) == sorted(rec.iters)
    assert len(rec.losses) > len(rows)  # a loss a batch, where this process has trained


def test_batches_are_small_where_pictures_are_few(squares):
    learn = image_learner(dataloaders(squares, 48, 64), 'efficientnet_lite0')
    assert learn.dls.train.bs == 40
    fit_body(learn, 1)
    assert learn.dls.train.bs == 16
    assert all(enough_steps(n) == 16 or n//enough_steps(n) >= 128 for n in range(1, 20_000, 37))
    learn = image_learner(dataloaders(squares, 48, 8), 'efficientnet_lite0')
    fit_body(learn, 1)
    assert learn.dls.train.bs == 8  # what was asked for stays the most


def test_over_fitting_is_said_with_its_epoch(squares, capsys, monkeypatch):
    import vegc.training.train
    row = lambda e, t, v: dict(part='frozen', epoch=e, train_loss=t, valid_loss=v, accuracy=.5)  # noqa: E731
    assert overfit_since([row(1, 1., .9), row(2, .7, .6), row(3, .4, .9)]) == 2
    assert overfit_since([row(1, 1., .9), row(2, .7, .6), row(3, .8, .9)]) is None  # the training loss rose as well
    monkeypatch.setattr(vegc.train, 'overfit_since', lambda rows: rows[0]['epoch'])
    fit_head(image_learner(dataloaders(squares, 48, 16), 'efficientnet_lite0'), 1)
    assert 'frozen: over-fitting since epoch 1' in capsys.readouterr().err


def test_bfloat16_is_remembered(squares, monkeypatch):
    import vegc.training.train
    seen = []
    monkeypatch.setattr(vegc.train, 'bf16_trains', lambda *_: True)
    learn = image_learner(dataloaders(squares, 48, 16), 'efficientnet_lite0')
    learn.model[0].register_forward_hook(lambda m, x, out: seen.append((m.training, out.dtype)))
    fit_body(learn, 1)
    assert learn.info.bf16
    if learn.dls.device.type == 'cpu': assert {(True, torch.bfloat16), (False, torch.float32)} == set(seen)  # judged in the numbers that `evaluate` prints


def test_stage_from_before_bfloat16_still_loads(squares):
    train(squares, arch='efficientnet_lite0', size=48, bs=16, epochs=(1, 0), stage='old', overwrite=True)
    file = Path(squares.path/'models/old/stage.json')
    told = json.loads(file.read_text())
    del told['bf16']
    file.write_text(json.dumps(told))
    assert stage_info(squares, 'old').bf16 is False
