"""What only a GPU can show: these tests are skipped without one."""
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from tiny import draw

from vegc.acquire.add import add
from vegc.data.dataset import ImageDataset
from vegc.evaluation.predictions import probabilities
from vegc.splits.split import split
from vegc.training.fit import fit_body, fit_head
from vegc.training.learner import image_learner
from vegc.training.loaders import dataloaders
from vegc.training.stages import load_model
from vegc.training.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU that CUDA knows')
SIZE = 64


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('gpu')
    ds = ImageDataset(folder/'ds', subject='characters')
    add(draw(folder/'pictures', n=60, px=SIZE), ds)
    split(ds)
    return ds


class Seen(Callback):
    "What the network is given and gives, while it is trained."
    order = 70

    def after_pred(self):
        self.devices = {p.device.type for p in self.model.parameters()} | {self.x.device.type}
        self.weights = {p.dtype for p in self.model.parameters()}
        conv = next(m for m in self.model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size != (1, 1))
        self.last = conv.weight.is_contiguous(memory_format=torch.channels_last)
        self.pred_dtype = self.pred.dtype


class Inside(Callback):
    "The types of the convolutions' outputs."
    order = 71

    def before_fit(self):
        self.types = set()
        def note(module, x, out): self.types.add(out.dtype)
        self.hooks = [m.register_forward_hook(note) for m in self.model.modules() if isinstance(m, torch.nn.Conv2d)]

    def after_fit(self):
        for h in self.hooks: h.remove()


def learner(ds, bs=16, **kw):
    return image_learner(dataloaders(ds, SIZE, bs, num_workers=0), 'resnet18', weights=None, **kw)


def test_both_parts_run_there_in_mixed_precision_with_channels_last(pictures):
    learn = learner(pictures, cbs=[seen := Seen(), inside := Inside()])
    fit_head(learn, 2)
    fit_body(learn, 2)
    assert seen.devices == {'cuda'} and seen.weights == {torch.float32} and seen.last
    assert torch.bfloat16 in inside.types and seen.pred_dtype == torch.float32
    assert all(np.isfinite(row['train_loss']) and np.isfinite(row['valid_loss']) for row in learn.info.history)
    assert [row['part'] for row in learn.info.history] == ['frozen']*2 + ['unfrozen']*2


def test_features_on_disk_leave_the_body_where_it_was(pictures):
    fit_head(learner(pictures), 1)
    learn = learner(pictures)  # its body is asked about nothing: what it says is on disk
    fit_head(learn, 1)
    fit_body(learn, 1)
    assert [row['part'] for row in learn.info.history][-1] == 'unfrozen' and not learn.info.bf16


def test_a_stage_says_the_same_on_both_devices(pictures):
    train(pictures, arch='resnet18', size=SIZE, weights=None, epochs=(0, 2), stage='there')
    model, info = load_model(pictures, 'there')
    files = [pictures.path/p for p in pictures.images.path]
    there = probabilities(model, files, info.size)
    from vegc.features.pixels import pixel_batches
    with torch.inference_mode():
        here = torch.cat([model.cpu().eval()(x).softmax(1) for x in pixel_batches(files, SIZE)]).numpy()
    assert np.abs(there - here).max() < .02 and (there.argmax(1) == here.argmax(1)).mean() > .98


class OnlySoMany(Callback):
    "A GPU on which no more than so many pictures fit at once: what is asked for beyond is refused by CUDA itself."
    order = 4

    def __init__(self, n): self.n = n

    def before_batch(self):
        if self.training and len(self.x) > self.n: torch.empty(2**46, dtype=torch.uint8, device='cuda')


def test_a_batch_that_does_not_fit_is_halved(pictures):
    learn = learner(pictures, bs=64, cbs=OnlySoMany(20))
    learn.dls.train.bs = 64
    with pytest.warns(UserWarning, match='do not fit into memory'): fit_head(learn, 1, cached=False)
    assert learn.dls.train.bs == 16 and len(learn.info.history) == 1


class Stop(Callback):
    "As if somebody pressed Ctrl-C in the third epoch."
    order = 80

    def before_epoch(self):
        if self.epoch == 2: raise KeyboardInterrupt


def test_a_stopped_run_goes_on(pictures, tmp_path, capsys):
    def run(cbs=(), checkpoint=tmp_path/'unfinished.pt'):
        learn = learner(pictures, cbs=list(cbs))
        learn.checkpoint = checkpoint
        return fit_body(learn, 4)
    with pytest.raises(KeyboardInterrupt): run([Stop()])
    resumed, whole = run(), run(checkpoint=None)
    assert 'going on after epoch 2 of 4' in capsys.readouterr().err
    a, b = (np.array([row['valid_loss'] for row in learn.info.history]) for learn in (resumed, whole))
    assert len(a) == 4 and np.allclose(a, b, rtol=.05)
