"""Training: the same twice, loaders under spawn, what is recorded, and batches that fit the number of pictures."""
import json
import os
import re
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
from vegc.core import DatasetError, UsageError, sha256_hex
from vegc.data.dataset import ImageDataset, snapshot
from vegc.data.folder import Gone
from vegc.features.backbones import image_body, weights_hash
from vegc.training.fit import enough_steps, fit_body, fit_head, head_learner, overfit_since
from vegc.training.learner import image_learner
from vegc.training.loaders import dataloaders
from vegc.training.probes import first_of_chain, out_of_fold, unlearned_body
from vegc.training.stages import load_model, stage_info, stages, trained_on
from vegc.training.train import load_stage, train

SPAWNED = '''
import json, multiprocessing, sys
import torch
from vegc.training.loaders import dataloaders

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
            part = 'train' if i < 40 else 'valid' if i < 50 else 'test'
            run.add(dict(key=str(i), url=str(i), given_label=label, status='ok', path=f'images/{label}/{i}.png',
                         split=part, sha256=sha256_hex(path.read_bytes())))
    return ds


@pytest.mark.parametrize('cached', [True, False])
def test_two_runs_with_one_seed_are_the_same(squares, cached):
    def once(seed):
        how = dict(arch='efficientnet_lite0', size=48, bs=16, epochs=(2, 1), cached=cached)
        learn = train(squares, seed=seed, stage='same', overwrite=True, **how)
        for name in ('same', 'same-1'):  # else the second run would go on from the first part
            (squares.path/'models'/name/'stage.json').unlink()
        return learn.info.history, weights_hash(learn.model)
    first = once(3)
    assert once(3) == first
    assert once(4)[1] != first[1]


def test_a_checkpoint_is_read_again(squares, tmp_path):
    "Whatever number types rates come in: else a stopped run would begin again, with the same result, unnoticed."
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
from fastai.learner import defaults
from vegc.training.train import train

class Kill(Callback):  # nobody says goodbye: the process is gone in the middle of the third epoch of the second part
    order = 70
    def after_batch(self):
        if self.training and self.epoch == 2 and self.iter == 1: os.kill(os.getpid(), signal.SIGKILL)

defaults.callbacks.append(Kill)
train(sys.argv[1], arch='efficientnet_lite0', size=48, bs=16, epochs=(1, 4), stage='broken')
'''


def test_a_killed_run_goes_on_from_its_last_epoch_and_ends_where_an_unbroken_one_does(squares, tmp_path, capsys):
    script = tmp_path/'killed.py'
    script.write_text(KILLED)
    done = subprocess.run([sys.executable, script, squares.path], capture_output=True, text=True, timeout=300,
                          env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert 'unfrozen 2: ' in done.stderr and 'unfrozen 3: ' not in done.stderr, done.stderr[-2000:]
    how = dict(arch='efficientnet_lite0', size=48, bs=16, epochs=(1, 4))
    train(squares, stage='broken', **how)
    said = capsys.readouterr().err
    assert 'broken-1 is there already' in said and 'unfrozen: going on after epoch 2 of 4.' in said, said
    assert len(re.findall(r'unfrozen \d+: train loss', said)) == 2, said
    train(squares, stage='unbroken', **how)
    one, other = (stage_info(squares, name) for name in ('unbroken', 'broken'))
    assert one.history == other.history and len(other.history) == 5 and one.best == other.best
    same = [(squares.path/'models'/name/'weights.safetensors').read_bytes() for name in ('unbroken', 'broken')]
    assert same[0] == same[1] and not (squares.path/'models/broken/unfinished.pt').exists()


@pytest.mark.parametrize('balance', ['sampling', 'oversampling', 'weights', 'focal', None])
def test_no_way_to_balance_touches_what_is_validated_on(squares, balance):
    "A third of one class is left out, so that there is something to balance; valid stays as it is, in order."
    out = squares.path/'decisions.jsonl'
    try:
        images = squares.images
        few = images.path[(images.split == 'train') & (images.given_label == 'a')].tolist()[:12]
        lines = [f'{p},exclude,,ana,looked' for p in few]
        (squares.path/'d.csv').write_text('\n'.join(['path,action,label,who,why', *lines]))
        clean(squares, decisions=squares.path/'d.csv')
        mine = squares.read().items()
        held, fit = mine[mine.split == 'valid'], mine[mine.split == 'train']
        assert fit.label.value_counts().to_dict() == {'b': 20, 'a': 8}
        learn = image_learner(dataloaders(squares, 48, 8, balance=balance, augment=False), 'efficientnet_lite0')
        for dls in (learn.dls, head_learner(learn, 8).dls):
            assert dls.valid.n == len(held), 'no row more, none less'
            assert torch.cat([y for _, y in dls.valid]).tolist() == [int(v == 'b') for v in held.label]
            seen = torch.cat([y for _ in range(40) for _, y in dls.train]).float().mean()
            assert abs(seen - (.5 if balance in ('sampling', 'oversampling') else 20/28)) < .06, seen
        assert set(learn.dls.train.items.path) == set(fit.path)
        assert set(learn.dls.valid.items.path) == set(held.path)
    finally: out.unlink(missing_ok=True)


def test_loaders_work_with_processes_that_are_spawned(squares, tmp_path):
    script = tmp_path/'spawned.py'
    script.write_text(SPAWNED)
    done = subprocess.run([sys.executable, script, squares.path], capture_output=True, text=True, timeout=300,
                          env=os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == dict(batches=6, same=True, started='spawn')


@pytest.mark.parametrize('head', ['linear', 'mlp'])
@pytest.mark.parametrize('how', ['cached', 'through the body', 'both parts', 'from a stage'])
def test_recorder_knows_every_epoch(squares, how, head):
    learn = image_learner(dataloaders(squares, 48, 16), 'efficientnet_lite0', head=head)
    if how == 'from a stage':
        same = dict(arch='efficientnet_lite0', size=48, bs=16, head=head, stage='recorded', overwrite=True)
        for epochs in ((2, 0), (2, 1)): learn = train(squares, epochs=epochs, **same)
    else: fit_head(learn, 2, cached=how != 'through the body', bs=16)
    if how == 'both parts': fit_body(learn, 1)
    rows, rec = learn.info.history, learn.recorder
    solved = head == 'linear' and how != 'through the body'
    assert len(rows) == (1 if solved else 2) + (how in ('both parts', 'from a stage'))
    assert [list(v) for v in rec.values] == [[r['train_loss'], r['valid_loss'], r['accuracy']] for r in rows]
    assert len(rec.losses) == rec.iters[-1] and len(rec.iters) == len(rows) and list(rec.iters) == sorted(rec.iters)
    if not solved or len(rows) > 1: assert len(rec.losses) > len(rows)  # a loss a batch, where this process has trained


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
    def row(epoch, train_loss, valid_loss):
        return dict(part='frozen', epoch=epoch, train_loss=train_loss, valid_loss=valid_loss, accuracy=.5)
    assert overfit_since([row(1, 1., .9), row(2, .7, .6), row(3, .4, .9)]) == 2
    assert overfit_since([row(1, 1., .9), row(2, .7, .6), row(3, .8, .9)]) is None  # the training loss rose as well
    monkeypatch.setattr(vegc.training.fit, 'overfit_since', lambda rows: rows[0]['epoch'])
    fit_head(image_learner(dataloaders(squares, 48, 16), 'efficientnet_lite0', head='mlp'), 1)
    assert 'frozen: over-fitting since epoch 1' in capsys.readouterr().err


def test_bfloat16_is_remembered(squares, monkeypatch):
    seen = []
    monkeypatch.setattr(vegc.training.fit, 'bf16_trains', lambda *_: True)
    learn = image_learner(dataloaders(squares, 48, 16), 'efficientnet_lite0')
    learn.model[0].register_forward_hook(lambda m, x, out: seen.append((m.training, out.dtype)))
    fit_body(learn, 1)
    assert learn.info.bf16
    if learn.dls.device.type == 'cpu':  # judged in the numbers that `evaluate` prints
        assert {(True, torch.bfloat16), (False, torch.float32)} == set(seen)


def test_stage_from_before_bfloat16_still_loads(squares):
    train(squares, arch='efficientnet_lite0', size=48, bs=16, epochs=(1, 0), stage='old', overwrite=True)
    file = Path(squares.path/'models/old/stage.json')
    told = json.loads(file.read_text())
    del told['bf16']
    file.write_text(json.dumps(told))
    assert stage_info(squares, 'old').bf16 is False


@pytest.fixture
def stage(squares):
    "A stage, and what writes other things into its record."
    how = dict(arch='small_cnn', size=28, bs=16, epochs=(0, 1))
    train(squares, stage='told', **how, overwrite=True)
    file = squares.path/'models/told/stage.json'
    good = json.loads(file.read_text())
    def tell(**fields): file.write_text(json.dumps(good | fields))
    yield tell
    file.unlink()


WRONG = [
    dict(arch=7), dict(classes='ab'), dict(classes=[]), dict(classes=['a', '../b']), dict(classes=['a', 1]),
    dict(size=[28]), dict(size=[28, 0]), dict(size=['28', '28']), dict(history={}), dict(history=[['x']]),
    dict(history=[dict(part='frozen')]), dict(best=dict(accuracy='high')), dict(trained_on=[1]), dict(start=['raw']),
    dict(channels=2), dict(more='x'), dict(seed='1')]


@pytest.mark.parametrize('fields', WRONG)
def test_a_record_is_believed_only_as_far_as_it_is_one(squares, stage, fields):
    stage(**fields)
    with pytest.raises(DatasetError, match='stage.json is damaged'): stage_info(squares, 'told')
    assert trained_on(squares.path, Gone(hashes=frozenset(['not there']))) == ['told'], 'nobody can say that it has not'


def test_a_record_goes_by_the_name_of_its_folder(squares, stage):
    stage(stage='../../elsewhere')
    assert stage_info(squares, 'told').stage == 'told'


def test_a_stage_lies_inside_the_dataset(squares, tmp_path):
    (squares.path/'models/away').symlink_to(tmp_path)
    try:
        (tmp_path/'stage.json').write_text('{}')
        for name in ('away', '../models/told', '.hidden', '', 'a/b'):
            with pytest.raises((DatasetError, UsageError)): stage_info(squares, name)
    finally: (squares.path/'models/away').unlink()


BODY = '''
from pathlib import Path
from torch import nn
Path(__file__).with_name('imported').touch()
def make(): return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU())
'''


def test_a_body_of_somebody_else_is_imported_only_for_who_names_it(squares, tmp_path, monkeypatch):
    (tmp_path/'somebodys.py').write_text(BODY)
    monkeypatch.syspath_prepend(tmp_path)
    train(squares, arch='somebodys:make', size=32, bs=16, epochs=(1, 1), stage='own', weights=None, overwrite=True)
    assert (tmp_path/'imported').exists(), 'who trains it has named it'
    monkeypatch.delitem(sys.modules, 'somebodys')
    (tmp_path/'imported').unlink()
    asks = [lambda: load_model(squares.path, 'own'), lambda: load_stage(squares.path, 'own'),
            lambda: unlearned_body(squares, 'own'), lambda: train(squares, start='own', stage='more', epochs=(0, 1))]
    for ask in asks:
        with pytest.raises(UsageError, match=r'trust=.somebodys:make. \(--trust somebodys:make\)'): ask()
    assert not (tmp_path/'imported').exists()
    load_model(snapshot(squares, trust='somebodys:make'), 'own')
    load_stage(squares.path, 'own', trust=['somebodys:make'])
    assert (tmp_path/'imported').exists()


def test_a_chain_of_starts_ends_in_a_circle(squares):
    "As after `train --start e --stage e --overwrite`, and where two stages were each trained from the other."
    how = dict(arch='efficientnet_lite0', size=48, bs=16, epochs=(1, 0))
    train(squares, stage='e', **how)
    train(squares, stage='e', start='e', overwrite=True, epochs=(1, 0))
    info, body = unlearned_body(squares, 'e')
    assert info.start == 'e' and weights_hash(body) == weights_hash(image_body('efficientnet_lite0'))
    train(squares, stage='f', start='e', epochs=(1, 0))
    train(squares, stage='e', start='f', overwrite=True, epochs=(1, 0))
    assert (first_of_chain(squares, 'e').stage, first_of_chain(squares, 'f').stage) == ('f', 'e')


def test_the_unlearned_body_is_not_that_of_another_run_with_the_same_name(squares):
    "A first part of another architecture may still lie beside a stage that was trained from scratch, or otherwise."
    train(squares, stage='two', arch='efficientnet_lite0', size=48, bs=16, epochs=(1, 0))
    file = squares.path/'models/two/stage.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(recipe='another', history=[
        dict(part='unfrozen', epoch=1, train_loss=1., valid_loss=1., accuracy=.5)])))
    weights = squares.path/'models/two-1/weights.safetensors'
    weights.write_bytes(b'not asked')
    assert weights_hash(unlearned_body(squares, 'two')[1]) == weights_hash(image_body('efficientnet_lite0'))


def test_training_deals_what_has_no_split_and_loaders_do_not(tmp_path, capsys):
    ds = ImageDataset(tmp_path/'new', subject='other')
    rng = np.random.default_rng(1)
    with ds.run() as run:
        for i in range(30):
            name = f'images/{"ab"[i % 2]}/{i}.png'
            (ds.path/name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(ds.path/name)
            run.add(dict(key=str(i), url=str(i), given_label='ab'[i % 2], status='ok', path=name, width=32, height=32,
                         sha256=sha256_hex((ds.path/name).read_bytes())))
    with pytest.raises(DatasetError, match='has no splits yet'): dataloaders(ds, 32)
    assert ds.images.split.isna().all()
    learn = train(ds, arch='efficientnet_lite0', size=32, epochs=(1, 0))
    assert '30 images had no split; now there are train ' in capsys.readouterr().err
    assert ds.images.split.notna().all() and sum(learn.info.counts.values()) == 30
    assert len([*ds.path.glob('features/*.safetensors')]) == 1, 'the body looked once, for splits and for its head'
    train(ds, arch='small_cnn', size=28, epochs=(0, 1), stage='again')
    assert 'had no split' not in capsys.readouterr().err
    assert stages(ds) == ['again', 'raw', 'raw-1']


def test_out_of_fold_where_groups_are_few():
    x, labels = np.random.default_rng(0).normal(size=(12, 8)), np.array([0]*6 + [1]*4 + [2, -1])
    groups = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])
    p = out_of_fold(x, labels, groups)
    assert np.allclose(p.sum(1), 1) and p[10, 2] == 0, 'a class of one group is unknown to whoever judges it'
    assert np.array_equal(p, out_of_fold(x, labels, groups))
    with pytest.raises(DatasetError, match='duplicates of one another'): out_of_fold(x, labels, np.zeros(12))
    with pytest.raises(DatasetError, match='One class alone'): out_of_fold(x, np.zeros(12, int), groups)
