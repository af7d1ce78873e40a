"""What only looks writes nothing but its own cache: every verb and function that reads a dataset, on its bytes."""
import inspect
import subprocess
import warnings

import pandas as pd
import pytest
import tiny
from conftest import PROGRAM

import vegc.all
from vegc.core import DatasetError, VegcError
from vegc.data.dataset import ImageDataset, snapshot

# What a reader may write: its own cache. All of these files are made of the others and may be thrown away.
PREDICTIONS = {'predictions/raw-valid.parquet', 'predictions/raw-test.parquet', 'predictions/raw-train.parquet',
               'predictions/more-test.parquet', 'predictions/more-valid.parquet'}
JUDGED = {'predictions/cross-validated.parquet', 'predictions/out-of-fold.parquet'}
LOOKS = {'predictions/test-looks.jsonl'}
ISSUES = {'predictions/issues.parquet'}
FEATURES = 'features/'  # any file there

# name -> (call, what it may write); a call takes the dataset's folder and a folder for what it hands out
A = vegc.all
READERS = {
    'predictions': (lambda ds, out: A.predictions(ds, 'raw'), PREDICTIONS),
    'embeddings': (lambda ds, out: A.embeddings(ds, 'raw'), {FEATURES}),
    'evaluate': (lambda ds, out: A.evaluate(ds, 'raw', 'test'), PREDICTIONS | JUDGED | LOOKS | {FEATURES}),
    'compare': (lambda ds, out: A.compare(ds, 'raw', 'more'), PREDICTIONS | LOOKS),
    'cross_validate': (lambda ds, out: A.cross_validate(ds, 'frozen'), JUDGED | {FEATURES}),
    'cross_validated_predictions': (lambda ds, out: A.cross_validated_predictions(ds, 'frozen'), JUDGED | {FEATURES}),
    'out_of_fold_predictions': (lambda ds, out: A.out_of_fold_predictions(ds), JUDGED | {FEATURES}),
    'baselines': (lambda ds, out: A.baselines(ds, 'raw'), PREDICTIONS | {FEATURES}),
    'compare_imbalance': (lambda ds, out: A.compare_imbalance(ds, seeds=(0,), epochs=1), {FEATURES}),
    'accuracy_by_n': (lambda ds, out: A.accuracy_by_n(ds, 'raw'), {FEATURES}),
    'would_more_help': (lambda ds, out: A.would_more_help(ds, 'raw'), {FEATURES}),
    'find_issues': (lambda ds, out: A.find_issues(ds), ISSUES | {FEATURES}),
    'saved_issues': (lambda ds, out: A.saved_issues(ds), set()),
    'duplicates': (lambda ds, out: A.duplicates(ds), {FEATURES}),
    'class_facts': (lambda ds, out: A.class_facts(ds), set()),
    'worst_table': (lambda ds, out: A.worst_table(ds), set()),
    'review_page': (lambda ds, out: A.review_page(ds, out/'review.html'), set()),
    'report': (lambda ds, out: A.report(ds, 'raw', out=out/'report.html', before='more'),
               PREDICTIONS | JUDGED | LOOKS | {FEATURES}),
    'export': (lambda ds, out: A.export(ds, 'raw', out/'model.safetensors'), PREDICTIONS | {FEATURES}),
    'split_counts': (lambda ds, out: A.split_counts(ds), set()),
    'split_log': (lambda ds, out: A.split_log(ds), set()),
    'folds': (lambda ds, out: A.folds(ds), set()),
    'cached_features': (lambda ds, out: A.cached_features(ds, 'efficientnet_lite0', 32), {FEATURES}),
    'datablock': (lambda ds, out: A.datablock(ds, 32), set()),
    'dataloaders': (lambda ds, out: A.dataloaders(ds, 32), set()),
    'load_stage': (lambda ds, out: A.load_stage(ds, 'raw'), set()),
    'stage_info': (lambda ds, out: A.stage_info(ds, 'raw'), set()),
    'stages': (lambda ds, out: A.stages(ds), set()),
    'plot_samples': (lambda ds, out: A.plot_samples(ds), set()),
    'duplicate_pairs': (lambda ds, out: A.duplicate_pairs(snapshot(ds), snapshot(ds).images), {FEATURES}),
    'snapshot': (lambda ds, out: [getattr(snapshot(ds), name)
                                  for name in ('df', 'images', 'labels', 'classes', 'vocab')], set()),
    'export_folder': (lambda ds, out: snapshot(ds).export_folder(out/'folder'), set()),
    'to_hf': (lambda ds, out: snapshot(ds).to_hf(), set()),
    'ClassifierInterpretation': (lambda ds, out: look_around(A.ClassifierInterpretation.from_stage(ds, 'raw')),
                                 PREDICTIONS),
}
WRITERS = {'ingest', 'add', 'split', 'train', 'clean', 'forget', 'ImageDataset', 'Session', 'ImageCleaner', 'demo',
           'save_stage'}


def look_around(interp):
    "What an interpretation draws and says."
    for name in ('plot_confusion_matrix', 'plot_most_confused', 'plot_per_class', 'plot_top_losses', 'explain'):
        getattr(interp, name)()


def test_every_function_that_takes_a_dataset_is_known_as_a_reader_or_a_writer():
    public = {n: getattr(A, n) for n in A.__all__ if n not in ('LeakError',)}
    functions = {n: f for n, f in public.items() if inspect.isfunction(f) or n in ('ImageDataset', 'Session')}
    first = {n: next(iter(inspect.signature(f).parameters), '') for n, f in functions.items()}
    takes = {n for n, parameter in first.items() if parameter == 'dataset'}
    assert takes - set(READERS) - WRITERS == set()
    assert {n for n in READERS if hasattr(A, n)} == set(READERS)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A dataset with a stage that has a frozen part, too: what is judged out of fold needs one."
    ds = tiny.make(tmp_path_factory.mktemp('whole'))
    A.train(ds, arch='efficientnet_lite0', size=48, epochs=(1, 0), stage='frozen')
    return ds


@pytest.fixture(scope='module')
def bare(whole, tmp_path_factory):
    "The same with stages and issues, but without splits."
    ds = tiny.copy(whole, tmp_path_factory.mktemp('bare'))
    ds.update(ds.images.assign(split=pd.NA, duplicate_group=pd.NA), ['split', 'duplicate_group'], reassign=True)
    return ds


def changed(before, after):
    "Files that were made, altered or removed."
    return {f for f in before.keys() | after.keys() if before.get(f) != after.get(f)}


def strange(files, may):
    "Those among files that a reader does not own."
    return {f for f in files if f not in may and not any(f.startswith(m) for m in may if m.endswith('/'))}


@pytest.mark.parametrize('name', READERS)
def test_a_reader_writes_nothing_but_its_own_cache(name, whole, tmp_path):
    call, may = READERS[name]
    ds = tiny.copy(whole, tmp_path)
    before = tiny.contents(ds.path)
    (tmp_path/'out').mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        call(ds.path, tmp_path/'out')
    assert strange(changed(before, tiny.contents(ds.path)), may) == set()


GO_BY_SPLITS = {'predictions', 'embeddings', 'evaluate', 'compare', 'baselines', 'compare_imbalance', 'accuracy_by_n',
                'would_more_help', 'folds', 'dataloaders', 'load_stage', 'report', 'ClassifierInterpretation',
                'export_folder',
                'out_of_fold_predictions'}


@pytest.mark.parametrize('name', READERS)
def test_a_reader_deals_no_splits(name, bare, tmp_path):
    call, may = READERS[name]
    ds = tiny.copy(bare, tmp_path)
    before, refused = tiny.contents(ds.path), None
    (tmp_path/'out').mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: call(ds.path, tmp_path/'out')
        except VegcError as e: refused = str(e)
    if name in GO_BY_SPLITS: assert 'split' in refused
    assert strange(changed(before, tiny.contents(ds.path)), may) == set()
    assert ds.images.split.isna().all()


def test_without_splits_one_sentence_says_what_to_do(bare):
    for call in (lambda: A.dataloaders(bare, 32), lambda: A.folds(bare), lambda: snapshot(bare).items()):
        with pytest.raises(VegcError, match='has no splits yet; `vegc split` deals them'): call()


VERBS = {
    'manifest': (['manifest', 'DS', '--csv'], set()),
    'duplicates': (['duplicates', 'DS', '--csv', 'OUT/copies.csv'], {FEATURES}),
    'evaluate': (['evaluate', 'DS', '--stage', 'raw', '--json'], PREDICTIONS | JUDGED | {FEATURES}),
    'find-issues': (['find-issues', 'DS', '--stage', 'raw', '--csv', 'OUT/issues.csv'], ISSUES | {FEATURES}),
    'compare': (['compare', 'DS', 'raw', 'more'], PREDICTIONS | LOOKS),
    'report': (['report', 'DS', '--stage', 'raw', '--out', 'OUT/report.html'],
               PREDICTIONS | JUDGED | LOOKS | {FEATURES}),
    'export': (['export', 'DS', 'raw', 'OUT/model.safetensors'], PREDICTIONS | {FEATURES}),
}


@pytest.mark.parametrize('verb', VERBS)
def test_a_reading_verb_writes_nothing_but_its_own_cache(verb, whole, tmp_path):
    words, may = VERBS[verb]
    ds = tiny.copy(whole, tmp_path)
    before = tiny.contents(ds.path)
    (tmp_path/'OUT').mkdir()
    words = [w.replace('DS', str(ds.path)).replace('OUT', str(tmp_path/'OUT')) for w in words]
    done = subprocess.run([PROGRAM, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert strange(changed(before, tiny.contents(ds.path)), may) == set()


def test_a_path_that_is_no_dataset_is_said_and_nothing_is_made(tmp_path):
    for name, (call, _) in READERS.items():
        with pytest.raises(VegcError, match='is not a dataset|There is no'): call(tmp_path/'typo', tmp_path)
        assert not (tmp_path/'typo').exists(), name
    (tmp_path/'file').write_text('no folder')
    with pytest.raises(DatasetError, match='is not a dataset'): snapshot(tmp_path/'file')


def test_a_snapshot_stays_as_it_was_read(whole, tmp_path):
    ds = tiny.copy(whole, tmp_path)
    data = ds.read()
    labels = data.labels.copy()
    mine = data.images
    mine.loc[:, 'given_label'] = 'mine'
    ds.update(ds.images.assign(split='train'), ['split'], reassign=True)
    assert data.labels.equals(labels) and set(data.images.split) == {'train', 'valid', 'test'}
    with pytest.raises(AttributeError): data.path = tmp_path


def test_the_handle_shows_what_is_there_now(whole, tmp_path):
    ds = ImageDataset(tiny.copy(whole, tmp_path).path)
    ds.update(ds.images.assign(split='train'), ['split'], reassign=True)
    assert set(ds.images.split) == {'train'}
