"""A dataset's folder that came from somebody else: nothing outside it is read, written or removed, and nothing runs."""
import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import tiny
from conftest import PROGRAM

import vegc.all as A
from vegc.acquire.add import add
from vegc.core import DatasetError, UsageError, VegcError
from vegc.data.dataset import ImageDataset
from vegc.data.folder import place
from vegc.data.forget import forget
from vegc.data.manifest import manifest_frame, write_manifest


@pytest.fixture(scope='module')
def whole(tmp_path_factory): return tiny.make(tmp_path_factory.mktemp('stranger'))


@pytest.fixture
def ds(whole, tmp_path):
    "A copy of a dataset, and files of a victim beside it."
    (tmp_path/'victim/dir').mkdir(parents=True)
    for name in ('thesis.txt', 'lock', 'looks', 'log', 'dir/a.png'):
        (tmp_path/'victim'/name).write_text('mine\nwithout end')
    return tiny.copy(whole, tmp_path)


def verbs(ds, tmp_path):
    "Everything that reads, writes or removes, one after another; each may refuse in a sentence."
    more = tiny.draw(tmp_path/'more', 3, first=100)
    (tmp_path/'decide.csv').write_text(f'path,action,label,who,why\n{next(iter(ds_paths(ds)), "x")},keep,,,\n')
    calls = [lambda: add(more, ds.path), lambda: A.split(ds.path), lambda: A.evaluate(ds.path, 'raw', 'test'),
             lambda: A.find_issues(ds.path), lambda: A.clean(ds.path, decisions=tmp_path/'decide.csv'),
             lambda: A.clean(ds.path, auto=.9), lambda: A.report(ds.path, 'raw'),
             lambda: A.compare(ds.path, 'raw', 'more'),
             lambda: A.export(ds.path, 'raw', tmp_path/'m.safetensors'), lambda: A.embeddings(ds.path, 'raw'),
             lambda: A.train(ds.path, arch='small_cnn', size=32, epochs=(0, 1), stage='new'),
             lambda: ImageDataset(ds.path).export_folder(tmp_path/'out'), lambda: ImageDataset(ds.path).write_cleaned(),
             lambda: A.worst_table(ds.path), lambda: forget(ds.path, 'zero/001.png')]
    said = []
    for call in calls:
        try: call()
        except VegcError as e: said.append(str(e))
    return said


def ds_paths(ds):
    try: return ds.images.path
    except VegcError: return []


def set_cell(ds, **cells):
    "One row of the manifest as a stranger would write it."
    file = ds.path/'manifest.parquet'
    df = pd.read_parquet(file)
    for column, value in cells.items(): df.loc[0, column] = value
    write_manifest(file, manifest_frame(df))


def append(file, **line):
    with open(file, 'a') as f: f.write(json.dumps(line) + '\n')


def to_victim(ds, where, name):
    "A link in the dataset's folder that leads to the victim's file."
    link = ds.path/where
    link.parent.mkdir(exist_ok=True)
    if link.is_dir() and not link.is_symlink(): link.rename(ds.path.parent/f'was-{link.name}')
    else: link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(ds.path.parent/'victim'/name, link.parent))


HOSTILE = {
    'manifest: path up': lambda ds: set_cell(ds, path='../victim/thesis.txt'),
    'manifest: absolute path': lambda ds: set_cell(ds, path=str(ds.path.parent/'victim/thesis.txt')),
    'manifest: path of another owner': lambda ds: set_cell(ds, path='dataset.toml'),
    'manifest: label is a path': lambda ds: set_cell(ds, given_label=str(ds.path.parent/'victim')),
    'manifest: label goes up': lambda ds: set_cell(ds, given_label='..'),
    'journal: path up': lambda ds: append(ds.path/'journal.jsonl', key='0123456789abcdef', url='x', given_label='zero',
                                          status='ok',
                                          path='../victim/thesis.txt'),
    'decisions: path up': lambda ds: append(ds.path/'decisions.jsonl', id=99, path='../victim/thesis.txt',
                                            action='keep'),
    'decisions: label goes up': lambda ds: append(ds.path/'decisions.jsonl', id=99, path=ds.images.path.iloc[3],
                                                  action='relabel',
                                                  label='../../victim'),
    'classes.csv: slug goes up': lambda ds: (ds.path/'classes.csv').write_text('slug,merge_into\nzero,../../victim\n'),
    'link: .lock': lambda ds: to_victim(ds, '.lock', 'lock'),
    'link: .decisions.lock': lambda ds: to_victim(ds, '.decisions.lock', 'lock'),
    'link: decisions.jsonl': lambda ds: to_victim(ds, 'decisions.jsonl', 'log'),
    'link: splits.jsonl': lambda ds: to_victim(ds, 'splits.jsonl', 'log'),
    'link: journal.jsonl': lambda ds: to_victim(ds, 'journal.jsonl', 'log'),
    'link: test-looks.jsonl': lambda ds: to_victim(ds, 'predictions/test-looks.jsonl', 'looks'),
    'link: a class': lambda ds: to_victim(ds, 'images/one', 'dir'),
    'link: a new class': lambda ds: to_victim(ds, 'images/three', 'dir'),
    'link: images': lambda ds: to_victim(ds, 'images', 'dir'),
    'link: predictions': lambda ds: to_victim(ds, 'predictions', 'dir'),
    'link: features': lambda ds: to_victim(ds, 'features', 'dir'),
    'link: models': lambda ds: to_victim(ds, 'models', 'dir'),
    'link: a stage': lambda ds: to_victim(ds, 'models/new', 'dir'),
    'link: labels.csv': lambda ds: to_victim(ds, 'labels.csv', 'thesis.txt'),
    'link: report.html': lambda ds: to_victim(ds, 'report.html', 'thesis.txt'),
}


@pytest.mark.parametrize('what', HOSTILE)
def test_nothing_outside_is_changed_or_taken_in(what, ds, tmp_path):
    HOSTILE[what](ds)
    victim, inside = tiny.contents(tmp_path/'victim'), {tiny.contents(tmp_path/'victim')['thesis.txt']}
    said = verbs(ds, tmp_path)
    assert tiny.contents(tmp_path/'victim') == victim
    if (tmp_path/'out').exists(): assert not inside & set(tiny.contents(tmp_path/'out').values())
    if not what.startswith('link') or what in ('link: images', 'link: models', 'link: decisions.jsonl'):
        assert said, 'it is refused'


def test_a_manifest_that_leads_outside_is_refused_in_a_sentence(ds):
    set_cell(ds, path='../victim/thesis.txt')
    with pytest.raises(DatasetError, match="'../victim/thesis.txt' as path, which vegc never writes"): ds.read()


@pytest.mark.parametrize('arch', ['evil:make', 'os:abort'])
def test_code_that_a_stage_names_is_not_imported(arch, ds, tmp_path, monkeypatch):
    (tmp_path/'evil.py').write_text("open('PWNED', 'w').close()\ndef make(): open('PWNED', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for stage in ('raw', 'more'):
        record = ds.path/f'models/{stage}/stage.json'
        record.write_text(json.dumps(json.loads(record.read_text()) | dict(arch=arch)))
    said = verbs(ds, tmp_path)
    with pytest.raises(UsageError, match='trust'): A.evaluate(ds.path, 'raw')
    with pytest.raises(UsageError, match='trust'): A.train(ds.path, start='raw', stage='onwards')
    assert not (tmp_path/'PWNED').exists() and 'evil' not in sys.modules
    assert any('trust' in s for s in said)


def test_the_command_line_does_not_import_it_either(ds, tmp_path):
    (tmp_path/'evil.py').write_text("open('PWNED', 'w').close()\ndef make(): pass\n")
    record = ds.path/'models/raw/stage.json'
    record.write_text(json.dumps(json.loads(record.read_text()) | dict(arch='evil:make')))
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')]))
    for words in (['evaluate', ds.path, '--stage', 'raw'], ['report', ds.path],
                  ['find-issues', ds.path, '--stage', 'raw']):
        done = subprocess.run([PROGRAM, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode in (1, 2) or words[0] == 'report', done.stderr
        assert 'Traceback' not in done.stderr
    assert not (tmp_path/'PWNED').exists()


@pytest.mark.parametrize('change', [dict(classes='zero'), dict(classes=['../x', 'one', 'two']), dict(size=[0]),
                                    dict(history={}),
                                    dict(arch=7), dict(trained_on='all'), dict(start=['raw'])])
def test_a_stage_record_of_other_types_is_refused(change, ds):
    record = ds.path/'models/raw/stage.json'
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    with pytest.raises(DatasetError, match='stage.json'): A.stage_info(ds.path, 'raw')


def test_a_stage_that_starts_from_itself_ends(ds):
    for stage, start in (('raw', 'more'), ('more', 'raw')):
        record = ds.path/f'models/{stage}/stage.json'
        record.write_text(json.dumps(json.loads(record.read_text()) | dict(start=start)))
    assert A.evaluate(ds.path, 'raw').n > 0


@pytest.mark.parametrize('where', ['../x', '/etc/passwd', 'a/../../x', 'a\\..\\x', 'a\0b'])
def test_a_place_stays_inside(where, tmp_path):
    with pytest.raises(DatasetError, match='no path inside'): place(tmp_path, where)


def test_a_table_with_other_columns_is_refused(ds):
    A.find_issues(ds.path)
    file = ds.path/'predictions/issues.parquet'
    pd.read_parquet(file).drop(columns='rank').to_parquet(file)
    with pytest.raises(DatasetError, match='rank'): A.saved_issues(ds.path)
