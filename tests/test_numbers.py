"""Numbers that are numbers: training that runs away, weights that hold NaN, files that say what the network says."""
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from vegc.acquire.add import add
from vegc.cleaning.clean import clean
from vegc.cleaning.issues import find_issues
from vegc.core import DatasetError, UsageError, VegcError, VegcWarning, if_writable, no_numbers
from vegc.data.dataset import ImageDataset
from vegc.data.manifest import SPLITS
from vegc.evaluation.compare import compare
from vegc.evaluation.evaluate import evaluate
from vegc.evaluation.predictions import predictions
from vegc.features.backbones import find_arch, fold_batchnorm, image_body, image_model
from vegc.plots.report import report
from vegc.sharing.export import export
from vegc.sharing.model_file import GraphModel, graph_of, load_model_file, predict, write_model_file
from vegc.training.learner import DivergedError, quality
from vegc.training.stages import load_model, save_stage, split_remarks, stage_remarks, stages
from vegc.training.train import load_stage, train

NAN, INF = float('nan'), float('inf')


@pytest.fixture(scope='module')
def staged(tmp_path_factory): return tiny.make(tmp_path_factory.mktemp('staged'), decisions=False)


# --- training ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arch,epochs', [('small_cnn', (0, 2)), ('efficientnet_lite0', (1, 1))])
def test_a_training_that_runs_away_saves_no_stage(staged, tmp_path, arch, epochs):
    ds = tiny.copy(staged, tmp_path)
    with pytest.raises(DivergedError, match='unfrozen part diverged.*no stage is saved.*--lr'):
        train(ds, arch=arch, size=32, epochs=epochs, lr=1e30, stage='bad')
    assert 'bad' not in stages(ds)


def test_an_epoch_without_a_number_is_never_the_best():
    row = dict(part='unfrozen', epoch=1, train_loss=1., valid_loss=2., accuracy=.5)
    for bad in (dict(train_loss=NAN), dict(valid_loss=INF), dict(accuracy=NAN), dict(valid_loss=NAN, accuracy=1.)):
        assert quality(row | bad) < quality({}) < quality(row)


def test_weights_that_are_no_numbers_are_neither_saved_nor_read(staged, tmp_path):
    ds = tiny.copy(staged, tmp_path)
    learn = load_stage(ds, 'raw')
    with torch.no_grad(): next(learn.model.parameters()).view(-1)[3] = NAN
    with pytest.raises(VegcError, match='no numbers.*not saved'): save_stage(learn, 'odd')
    assert 'odd' not in stages(ds)
    file = ds.path/'models/raw/weights.safetensors'
    tensors = load_file(file)
    next(t for t in tensors.values() if t.dim() == 4).view(-1)[0] = INF
    save_file(tensors, file)
    for ask in (lambda: load_model(ds, 'raw'), lambda: predictions(ds, 'raw'), lambda: export(ds, 'raw', tmp_path/'m')):
        with pytest.raises(DatasetError, match='no numbers'): ask()


def test_a_mask_of_attention_is_no_broken_weight():
    mask, broken = torch.tensor([0., -INF, 0.]), torch.tensor([1., -INF])
    assert no_numbers(dict(mask=mask, whole=torch.tensor([3]))) is None
    assert no_numbers(dict(mask=mask, broken=broken)) == 'broken'
    assert no_numbers(dict(nan=torch.tensor([NAN]))) == 'nan' and no_numbers(dict(inf=torch.tensor([INF]))) == 'inf'


# --- model files ------------------------------------------------------------------------------------------------

class Overflowing(nn.Module):
    "Finite weights; what is bright has no score."
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1e30, -1e30]))

    def forward(self, x): return (x.mean((1, 2, 3))**40*1e30)[:, None]*self.w


ABOUT = dict(name='odd', size=[16, 16], classes=['a', 'b'])


def test_predict_never_says_ok_without_a_number(tmp_path):
    file = write_model_file(tmp_path/'m.safetensors', Overflowing(), ABOUT)
    for name, tone in (('dark', 0), ('bright', 255)): Image.new('RGB', (16, 16), (tone,)*3).save(tmp_path/f'{name}.png')
    table = predict(file, [tmp_path/'dark.png', tmp_path/'bright.png'])
    assert table.status.tolist() == ['ok', 'failed'] and table.confidence.isna().tolist() == [False, True]
    assert table.error_message[1].startswith('no_number') and table.predicted_label.isna()[1]


def test_a_file_with_weights_that_are_no_numbers_is_neither_written_nor_read(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 2))
    file = write_model_file(tmp_path/'m.safetensors', model, ABOUT)
    tensors, (old,) = load_file(file), [load_model_file(file)]
    from safetensors import safe_open
    with safe_open(file, 'pt') as f: meta = f.metadata()
    tensors['1.bias'][0] = NAN
    save_file(tensors, tmp_path/'bad.safetensors', metadata=meta)
    with pytest.raises(UsageError, match='no numbers'): load_model_file(tmp_path/'bad.safetensors')
    with torch.no_grad(): model[1].bias[0] = NAN
    with pytest.raises(VegcError, match='not written'): write_model_file(file, model, ABOUT)
    assert load_model_file(file).about == old.about, 'the file of before stays'


class Words(nn.Module):
    "Operations with keywords that JSON has no word for."
    def forward(self, x):
        total = x.sum((1, 2, 3), dtype=torch.float64)
        zeros = torch.zeros(x.shape[0], 2, dtype=torch.float32, device=x.device)
        ramp = torch.arange(2, dtype=torch.float32, device=x.device)
        rows = (x.shape[0]*2)//2
        return zeros.reshape(rows, 2).to(memory_format=torch.contiguous_format) + total.float()[:, None]*ramp/1000


def test_keywords_named_dtype_are_written_and_read(tmp_path):
    model = load_model_file(write_model_file(tmp_path/'m.safetensors', Words(), ABOUT))
    x = torch.rand(5, 3, 16, 16)
    torch.testing.assert_close(model.model(x)[0], Words()(x))


def test_a_file_that_says_something_else_is_not_left_behind(tmp_path, monkeypatch):
    "Were a keyword lost on the way, nobody would see it until a colleague did."
    real = GraphModel.forward
    monkeypatch.setattr(GraphModel, 'forward', lambda self, x: tuple(v if v is None else v + .1 for v in real(self, x)))
    with pytest.raises(VegcError, match='does not say what the network says'):
        write_model_file(tmp_path/'m.safetensors', nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 2)), ABOUT)
    assert not list(tmp_path.iterdir())


FAMILIES = ['alexnet', 'convnext_tiny', 'densenet121', 'efficientnet_b0', 'mnasnet0_5', 'mobilenet_v3_small',
            'resnet18', 'regnet_y_400mf', 'shufflenet_v2_x0_5', 'squeezenet1_1', 'swin_t', 'vgg11', 'small_cnn',
            'efficientnet_lite0', 'lcnet_035', 'convnextv2_atto']


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', FAMILIES)
def test_every_family_can_be_written_and_read(name):
    "Random weights and small pictures; the file is asked about another number of pictures than it was traced with."
    torch.manual_seed(0)
    model = image_model(image_body(name, None), 3, (64, 64), flat=find_arch(name).from_scratch)
    model = fold_batchnorm(model, (64, 64))
    copy, x = GraphModel(*graph_of(model, (64, 64))), torch.rand(3, 3, 64, 64)
    with torch.inference_mode():
        for some in (x, x[:1]): np.testing.assert_allclose(copy(some)[0], model(some), rtol=1e-3, atol=1e-3)


def test_a_class_called_unsure_is_not_mistaken_for_the_answer(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 2))
    file = write_model_file(tmp_path/'m.safetensors', model, ABOUT | dict(classes=['ok', 'unsure']))
    Image.new('RGB', (16, 16)).save(tmp_path/'x.png')
    assert predict(file, tmp_path/'x.png').status[0] == 'ok'
    with pytest.raises(UsageError, match="class called 'unsure'.*--unsure-below.*classes.csv"):
        predict(file, tmp_path/'x.png', unsure_below=.9)


# --- what is said beside the figures ----------------------------------------------------------------------------

def relabelled(staged, tmp_path, **relabel):  # split → new class for its first images of class zero
    ds = tiny.copy(staged, tmp_path)
    (ds.path/'classes.csv').write_text('slug,name\nfour,Four\n')
    zero = ds.images[ds.images.given_label == 'zero']
    rows = [f'{p},relabel,four,me,looked' for s, n in relabel.items() for p in zero.path[zero.split == s][:n]]
    (tmp_path/'d.csv').write_text('\n'.join(['path,action,label,who,why', *rows]) + '\n')
    clean(ds, decisions=tmp_path/'d.csv')
    return ds


def test_a_new_class_grows_the_head_or_is_named(staged, tmp_path):
    ds = relabelled(staged, tmp_path, train=4, valid=2, test=1)
    unknown = 'does not know the class four.*--start raw.*classes.csv'
    with pytest.raises(UsageError, match=unknown): load_stage(ds, 'raw')
    with pytest.warns(VegcWarning, match='does not know four: it is wrong on 2 of the 12 valid images'):
        old = evaluate(ds, 'raw')
    assert old.per_class.set_index('class').recall['four'] == 0
    info = train(ds, start='raw', stage='grown', epochs=(1, 1)).info
    assert info.classes == ['one', 'two', 'zero', 'four']
    with warnings.catch_warnings():
        warnings.simplefilter('error', VegcWarning)
        assert 'four' in set(evaluate(ds, 'grown').per_class['class'])
        assert compare(ds, 'raw', 'grown').n > 0
    model = load_model_file(export(ds, 'grown', tmp_path/'m.safetensors'))
    assert model.classes[-1] == 'four'


def test_an_unknown_class_in_decisions_names_the_class_table(staged, tmp_path):
    ds = tiny.copy(staged, tmp_path)
    (tmp_path/'d.csv').write_text(f'path,action,label,who,why\n{ds.images.path[0]},relabel,five,me,x\n')
    with pytest.raises(DatasetError, match="no class 'five'.*add a row.*classes.csv"):
        clean(ds, decisions=tmp_path/'d.csv')


def test_what_empties_a_figure_is_said_where_it_is_read(staged, tmp_path, capsys):
    "A class that nothing can be learned of; two parts larger than train; an unfrozen part that came to nothing."
    ds = relabelled(staged, tmp_path, valid=2)
    said = 'Classes without an image in train, which nothing can learn: four (2)'
    learn = train(ds, arch='small_cnn', size=32, epochs=(0, 1), stage='s')
    assert said in capsys.readouterr().err
    m = evaluate(ds, 's')
    assert said in str(m) and m.to_dict()['remarks'] == m.remarks
    assert said in report(ds, 's', out=tmp_path/'r.html').read_text('utf-8')
    row = dict(epoch=1, train_loss=1., valid_loss=1., accuracy=.5)
    learn.info.history = [row | dict(part='frozen'), row | dict(part='unfrozen')]
    for part, n in (('frozen', 1), ('unfrozen', 0)):
        learn.info.best = row | dict(part=part)
        assert len(stage_remarks(learn.info)) == n


LOPSIDED = {(189, 47, 8): 'Very few images in test', (20, 47, 30): 'More images in valid', (70, 20, 10): '',
            (80, 20, 0): ''}


@pytest.mark.parametrize('sizes,said', LOPSIDED.items(), ids=str)
def test_lopsided_splits_are_said(sizes, said):
    items = pd.DataFrame(dict(label='a', split=np.repeat(SPLITS, sizes)))
    items.loc[::2, 'label'] = 'b'
    assert ' '.join(split_remarks(items)).startswith(said) and bool(split_remarks(items)) == bool(said)


def test_one_class_is_said(tmp_path):
    ds = ImageDataset(tmp_path/'ds', subject='characters')
    src = tiny.draw(tmp_path/'pictures')
    for c in ('one', 'two'): shutil.rmtree(src/c)
    add(src, ds)
    train(ds, arch='small_cnn', size=32, epochs=(0, 1))
    assert 'There is one class' in str(evaluate(ds, 'raw'))


def test_issues_where_every_class_is_under_ten(tmp_path):
    "Fewer folds, not a refusal."
    ds = ImageDataset(tmp_path/'ds', subject='characters')
    add(tiny.draw(tmp_path/'pictures', n=6), ds)
    issues = find_issues(ds)
    assert len(issues) == 18 and issues.label_score.notna().all()


# --- a dataset that nobody may write to -------------------------------------------------------------------------

def test_what_changes_a_dataset_is_refused_before_the_work(staged, tmp_path, monkeypatch):
    "As the system says it; root may write anywhere, so the system's answer is given here."
    ds = tiny.copy(staged, tmp_path)
    before = tiny.contents(ds.path)
    monkeypatch.setattr(os, 'access', lambda path, mode: not Path(path).is_relative_to(ds.path))
    for ask in (lambda: train(ds, arch='small_cnn', size=32, epochs=(0, 1), stage='x'), lambda: report(ds, 'raw'),
                lambda: clean(ds, undo=True), lambda: export(ds, 'raw', ds.path/'m.safetensors'),
                lambda: add(tmp_path/'ds/images', ds)):
        with pytest.raises(DatasetError, match='cannot be written to, so nothing was begun'): ask()
    before |= {k: v for k, v in tiny.contents(ds.path).items() if k.startswith(('features/', 'predictions/'))}
    assert tiny.contents(ds.path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_what_only_looks_works_where_nobody_may_write(staged, tmp_path):
    ds = tiny.copy(staged, tmp_path)
    want = predictions(ds, 'more')
    shutil.rmtree(ds.path/'predictions')
    for folder in [ds.path, *filter(Path.is_dir, ds.path.rglob('*'))]: folder.chmod(0o555)
    try:
        with pytest.warns(VegcWarning, match='cannot be written to.*is not kept'): again = predictions(ds, 'more')
        assert again.equals(want)
    finally:
        for folder in [ds.path, *filter(Path.is_dir, ds.path.rglob('*'))]: folder.chmod(0o755)


def test_only_a_refusal_of_the_system_is_passed_over(tmp_path):
    with pytest.warns(VegcWarning, match='cannot be written to, so x is not kept'), if_writable(tmp_path/'x'):
        raise PermissionError(13, 'Permission denied')
    with pytest.raises(OSError), if_writable(tmp_path/'x'): raise OSError(28, 'No space left on device')


def test_a_failed_row_without_an_address_is_reported(tmp_path):
    from vegc.plots.report import report
    ds = ImageDataset(tmp_path/'ds', subject='objects')
    with ds.run() as run: run.add(dict(key='x', given_label='a', status='failed', error_message='empty: no bytes'))
    assert ds.failures().iloc[0].to_dict() == dict(reason='empty', count=1, example='')
    assert '<code>empty</code>' in report(ds).read_text('utf-8')
