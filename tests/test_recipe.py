"""The unfrozen part: it harms at no rate, what it holds is held, and what is kept is what was best."""
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from PIL import Image, ImageDraw
from torch import nn

from vegc.core import UsageError, sha256_hex
from vegc.data.dataset import ImageDataset
from vegc.data.images import load_rgb
from vegc.evaluation.predictions import predictions
from vegc.features.backbones import weights_hash
from vegc.training.fit import fit_body, fit_head
from vegc.training.learner import AverageWeights, image_learner
from vegc.training.loaders import KeptPixels, dataloaders
from vegc.training.stages import load_model, stage_info
from vegc.training.train import train

SIDES = ['right', 'bottom', 'left', 'top']


def moon(side, rng, px=48):
    "A disc on grainy ground, dark on one side: the class."
    grain = rng.normal(128, 20, (px//4, px//4, 3)).clip(0, 255).astype(np.uint8)
    im = Image.fromarray(grain).resize((px, px), Image.Resampling.BICUBIC)
    dark, light = (tuple(rng.integers(*span, 3).tolist()) for span in ((0, 70), (190, 256)))
    r, turn = rng.uniform(.2, .35)*px, 90*SIDES.index(side) + rng.uniform(-15, 15)
    x, y = rng.uniform(r, px - r, 2)
    box, draw = (x - r, y - r, x + r, y + r), ImageDraw.Draw(im)
    draw.ellipse(box, fill=light)
    draw.pieslice(box, turn - 90, turn + 90, fill=dark)
    return im


@pytest.fixture(scope='module')
def moons(tmp_path_factory):
    "320 moons, half of them to learn from."
    ds, rng = ImageDataset(tmp_path_factory.mktemp('recipe')/'moons', subject='characters'), np.random.default_rng(0)
    with ds.run() as run:
        for i in range(320):
            side = SIDES[i % 4]
            path = ds.path/f'images/{side}/{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            moon(side, rng).save(path)
            run.add(dict(key=str(i), url=str(i), given_label=side, status='ok', path=f'images/{side}/{i}.png',
                         sha256=sha256_hex(path.read_bytes()), split='train' if i < 160 else 'valid'))
    return ds


@pytest.fixture(scope='module')
def loaders(moons): return dataloaders(moons, 48, 32)


@pytest.mark.parametrize('rates', [(1e-6, 1e-5), (1e-5, 1e-4), (3e-5, 3e-4)])
def test_an_epoch_at_a_low_rate_harms_no_more_than_chance(loaders, rates):
    learn = fit_head(image_learner(loaders, 'efficientnet_lite0'))
    frozen = learn.info.best['accuracy']
    fit_body(learn, 1, lr=slice(*rates))
    assert learn.info.history[-1]['accuracy'] > frozen - .04  # of 160: six more wrong


def test_the_whole_network_is_better_than_its_head(loaders):
    learn = fit_head(image_learner(loaders, 'efficientnet_lite0'))
    frozen = learn.info.best['accuracy']
    fit_body(learn, 4)
    assert learn.info.best['accuracy'] > frozen


def test_norms_of_the_body_hold_and_all_else_moves(loaders):
    learn = fit_head(image_learner(loaders, 'efficientnet_lite0', head='mlp'), 1)
    def stats(part): return {k: v.clone() for k, v in part.state_dict().items() if 'running' in k}
    body, head = stats(learn.model[0]), stats(learn.model[1])
    weights = {k: v.clone() for k, v in learn.model[0].named_parameters()}
    seen = []
    class Modes(Callback):
        def before_batch(self):
            norms = [m for m in self.model[0].modules() if isinstance(m, nn.BatchNorm2d)]
            if self.training: seen.append({m.training for m in norms})
    learn.info.best = {}  # so that the epoch is kept whatever it is worth
    learn.add_cb(Modes())
    fit_body(learn, 1)
    assert seen and all(modes == {False} for modes in seen)
    assert all(torch.equal(v, body[k]) for k, v in stats(learn.model[0]).items())
    assert not all(torch.equal(v, head[k]) for k, v in stats(learn.model[1]).items())
    assert all(not torch.equal(v, weights[k]) for k, v in learn.model[0].named_parameters() if v.dim() == 4)


def test_epochs_are_judged_by_the_average_and_training_goes_on_without(loaders):
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 1))
    average = AverageWeights(2)
    average.model, average.training = net, True
    average.before_fit()
    path = [next(net.parameters()).detach().clone()]
    for step in (1., 3.):
        with torch.no_grad(): next(net.parameters()).add_(step)
        average.after_batch()
        path.append(next(net.parameters()).detach().clone())
    want = (path[0]*.5 + path[1]*.5)*.5 + path[2]*.5
    average.before_validate()
    assert torch.allclose(next(net.parameters()), want)
    average.after_epoch()
    assert torch.equal(next(net.parameters()), path[2])
    average.after_epoch()  # of an epoch that was passed over: nothing was judged
    assert torch.equal(next(net.parameters()), path[2])
    other = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 1))
    average.before_validate()
    other.load_state_dict(net.state_dict())
    again = AverageWeights(2)
    again.go_on(other, average.other)
    assert torch.equal(next(other.parameters()), path[2]) and torch.allclose(again.other[0], want)


def test_kept_pixels_are_those_that_are_read(moons):
    how = dict(augment=False, num_workers=0)
    plain, kept = (dataloaders(moons, (40, 48), 32, cache=cache, **how) for cache in (False, True))
    for a, b in zip(plain.valid, kept.valid, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and type(a[0]) is type(b[0])
    def epoch(dls):
        dls.train.rng.seed(3)
        return [y.tolist() for _, y in dls.train]
    assert epoch(plain) == epoch(kept) == epoch(kept)  # read once, then from memory
    file = moons.path/kept.valid_ds.items.path.iloc[0]
    first = torch.from_numpy(np.asarray(load_rgb(file, (40, 48)))/np.float32(255)).permute(2, 0, 1)
    assert torch.allclose(next(iter(kept.valid))[0][0].as_subclass(torch.Tensor), first)
    others = kept.test_dl(kept.valid_ds.items[:1])  # a loader that is derived reads for itself
    assert torch.allclose(next(iter(others))[0][0].as_subclass(torch.Tensor), first)


def test_a_head_is_of_a_kind_that_there_is(loaders, moons):
    with pytest.raises(UsageError, match='head must be linear or mlp'): image_learner(loaders, head='logistic')
    with pytest.raises(UsageError, match='head must be linear or mlp'): train(moons, arch='resnet18', head='big')
    assert image_learner(loaders, 'resnet18', weights=None).info.head == 'mlp'
    assert image_learner(loaders, 'efficientnet_lite0').info.head == 'linear'


def test_a_stage_remembers_its_head_and_where_it_began(moons, capsys):
    how = dict(size=48, bs=32)
    learn = train(moons, arch='efficientnet_lite0', epochs=(1, 2), stage='good', **how)
    model, info = load_model(moons, 'good')
    assert info.head == 'linear' and weights_hash(model) == weights_hash(learn.model)
    worse = train(moons, start='good', epochs=(0, 1), lr=3., stage='worse', **how)
    assert 'unfrozen 1: the accuracy on valid is' in (said := capsys.readouterr().err) and 'the network forgets' in said
    assert worse.info.best['part'] == 'start' and worse.info.best['accuracy'] == info.best['accuracy']
    assert weights_hash(worse.model) == weights_hash(learn.model) == weights_hash(load_model(moons, 'worse')[0])
    assert stage_info(moons, 'worse').best == worse.info.best
    table = predictions(moons, 'worse')
    assert abs((table.label == table.predicted_label).mean() - info.best['accuracy']) < .01


def test_busy_threads_are_named_only_where_they_matter(monkeypatch):
    from vegc.training import train as module
    for name in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME', 'OMP_NUM_THREADS'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, 'best_device', lambda: 'cpu')
    monkeypatch.setattr('os.getloadavg', lambda: (99., 0., 0.), raising=False)
    monkeypatch.setattr('os.cpu_count', lambda: 4)
    assert 'import vegc first' in module.busy_machine()[0]
    monkeypatch.setenv('GOMP_SPINCOUNT', '5')
    assert module.busy_machine() == []
    monkeypatch.delenv('GOMP_SPINCOUNT')
    monkeypatch.setattr('os.getloadavg', lambda: (1., 0., 0.), raising=False)
    assert module.busy_machine() == []


def test_an_image_is_read_once_however_often_it_is_drawn(moons):
    reads = []
    class Counted(KeptPixels):
        def read(self, row):
            reads.append(row)
            super().read(row)
    kept = Counted([moons.path/p for p in moons.images.path[:3]], 16)
    assert [rows for rows, _ in kept.batches([[0, 1, 0], [1, 0, 2], [2, 2]])] == [[0, 1, 0], [1, 0, 2], [2, 2]]
    assert sorted(reads) == [0, 1, 2]


def test_cross_validation_trains_the_kind_of_head_that_the_stage_has(moons, monkeypatch):
    from vegc.evaluation import crossval
    train(moons, arch='efficientnet_lite0', size=48, bs=32, epochs=(8, 0), stage='head')
    table = crossval.cross_validated_predictions(moons, 'head')
    frozen = stage_info(moons, 'head').best['accuracy']
    assert abs((table.label == table.predicted_label).mean() - frozen) < .12  # 256 to learn from there, 160 here
    def never(*a, **kw): raise AssertionError('a head with a hidden layer')
    monkeypatch.setattr(crossval, 'head_probabilities', never)
    crossval.cross_validated_predictions(moons, 'head', seed=5)
    with pytest.raises(AssertionError, match='hidden layer'):
        crossval.cross_validated_predictions(moons, 'head', epochs=2)
