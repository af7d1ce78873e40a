"""Wrong calls from Python are told as on the command line: in one sentence, before any work, with what was meant."""
import time

import pytest
from tiny import make

from vegc.cleaning.session import Session
from vegc.core import DatasetError, UsageError, VegcError, did_you_mean
from vegc.data.dataset import ImageDataset
from vegc.evaluation.compare import compare
from vegc.evaluation.evaluate import evaluate
from vegc.plots.report import report
from vegc.splits.split import split
from vegc.training.stages import stages
from vegc.training.train import train


@pytest.fixture(scope='module')
def ds(tmp_path_factory): return make(tmp_path_factory.mktemp('calls'))


@pytest.mark.parametrize('verb', [split, train, report, ImageDataset, lambda p: evaluate(p, 'raw')])
def test_a_mistyped_path_is_no_dataset(verb, tmp_path):
    with pytest.raises(VegcError, match='is not a dataset: it has no dataset.toml'): verb(tmp_path / 'typo')
    assert not (tmp_path / 'typo').exists()


@pytest.mark.parametrize('wrong', [dict(epochs=(1,)), dict(epochs=5), dict(epochs=(1, 2, 3)), dict(epochs='12'),
                                   dict(epochs=(1, -1)), dict(epochs=(0, 0)), dict(epochs=(1.5, 2)), dict(bs=0),
                                   dict(arch=lambda: None), dict(start='rwa')])
def test_a_call_is_checked_before_it_trains(ds, wrong):
    before, began = stages(ds), time.perf_counter()
    with pytest.raises(UsageError): train(ds, stage='new', **dict(arch='small_cnn', size=32) | wrong)
    assert stages(ds) == before and time.perf_counter() - began < 5


def test_names_that_are_nearly_right_are_told(ds):
    for call in (lambda: report(ds, before='rwa'), lambda: report(ds, 'rwa'), lambda: evaluate(ds, 'rwa', 'valid'),
                 lambda: compare(ds, 'rwa', 'more', 'valid'), lambda: train(ds, start='rwa', stage='new')):
        began = time.perf_counter()
        with pytest.raises(UsageError, match=r"no stage 'rwa'.* Did you mean raw\?"): call()
        assert time.perf_counter() - began < 5
    session = Session(ds)
    with pytest.raises(UsageError, match=r'Did you mean two\?'): session.decide(session.items.path[0], 'relabel', 'tow')
    assert did_you_mean('qqq', ['raw']) == ''
    assert issubclass(DatasetError, VegcError)
