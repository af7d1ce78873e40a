"""The calls that a fastai course teaches, each tried on a learner of ours; every way to hand in an image is one."""
import io
import warnings

import numpy as np
import pytest
import torch
from fastai.data.transforms import get_image_files
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.learner import load_learner
from fastai.vision.core import PILImage
from PIL import Image
from tiny import NAMES, make

from vegc.training.loaders import dataloaders
from vegc.training.learner import image_learner


@pytest.fixture(scope='module')
def ds(tmp_path_factory): return make(tmp_path_factory.mktemp('fastai'), stages=False, decisions=False)


@pytest.fixture(scope='module')
def learn(ds): return image_learner(dataloaders(ds, size=24, bs=8), 'small_cnn', wd=.1)


@pytest.fixture(scope='module')
def odd(tmp_path_factory):
    "A grey picture with an alpha channel that is no square: what a careless reader gets wrong."
    im = Image.new('LA', (40, 60), (0, 0))
    im.paste((200, 255), (5, 5, 30, 40))
    path = tmp_path_factory.mktemp('odd') / 'odd.png'
    im.save(path)
    return path


def ways(path):
    return dict(str=str(path), path=path, bytes=path.read_bytes(), pillow=Image.open(path),
                array=np.asarray(Image.open(path).convert('RGBA')))


@pytest.mark.parametrize('way', ['path', 'bytes', 'pillow', 'array'])
def test_every_way_in_gives_the_same_tensor(learn, odd, way):
    def tensor(item): return learn.dls.test_dl([item], num_workers=0).one_batch()[0].cpu()
    want, got = tensor(str(odd)), tensor(ways(odd)[way])
    assert want.shape == (1, 3, 24, 24) and torch.equal(want, got)
    assert torch.equal(learn.predict(str(odd))[2], learn.predict(ways(odd)[way])[2])


def test_an_image_of_fastai_is_read_like_its_file(learn, tmp_path):
    "fastai's own reader drops what is clear, so here nothing is."
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    a, b = (learn.predict(item)[2] for item in (tmp_path / 'a.png', PILImage.create(tmp_path / 'a.png')))
    assert torch.equal(a, b)


def test_a_path_of_the_dataset_and_a_path_on_disk_are_one_image(learn, ds):
    path = ds.images.path[0]
    a, b = (learn.predict(p)[2] for p in (path, ds.path / path))
    assert torch.equal(a, b)


CALLS = {
    'show_batch': lambda learn, files: learn.dls.show_batch(max_n=2),
    'one_batch': lambda learn, files: learn.dls.one_batch(),
    'vocab': lambda learn, files: list(learn.dls.vocab) == sorted(NAMES),
    'test_dl of files': lambda learn, files: learn.get_preds(dl=learn.dls.test_dl(files[:3], num_workers=0)),
    'predict': lambda learn, files: learn.predict(files[0]),
    'get_preds': lambda learn, files: learn.get_preds(),
    'validate': lambda learn, files: learn.validate(),
    'summary': lambda learn, files: learn.summary(),
    'freeze': lambda learn, files: (learn.freeze(), learn.unfreeze(), learn.freeze_to(-1)),
    'fit_one_cycle': lambda learn, files: learn.fit_one_cycle(1, 1e-3),
    'fine_tune': lambda learn, files: learn.fine_tune(1),
    'lr_find': lambda learn, files: learn.lr_find(num_it=6, show_plot=False),
    'show_results': lambda learn, files: learn.show_results(max_n=2),
    'save and load': lambda learn, files: (learn.save('again'), learn.load('again')),
    'Interpretation': lambda learn, files: Interpretation.from_learner(learn).top_losses(3),
    'confusion_matrix': lambda learn, files: ClassificationInterpretation.from_learner(learn).confusion_matrix(),
    'most_confused': lambda learn, files: ClassificationInterpretation.from_learner(learn).most_confused(),
    'plot_top_losses': lambda learn, files: ClassificationInterpretation.from_learner(learn).plot_top_losses(
        2, nrows=1),
}


@pytest.mark.parametrize('call', CALLS)
def test_a_call_of_the_course_works(learn, ds, call, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        CALLS[call](learn, get_image_files(ds.path / 'images'))


def test_an_exported_learner_is_loaded_and_predicts_the_same(learn, odd, tmp_path):
    learn.export(tmp_path / 'model.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path / 'model.pkl')
    out = io.BytesIO(odd.read_bytes()).getvalue()
    for item in (odd, out): assert torch.allclose(again.predict(item)[2], learn.predict(str(odd))[2], atol=1e-6)
