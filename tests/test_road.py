"""From a trained stage on: leaks are refused, decisions survive, the exported file says what the stage says."""
import ast
import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from vegc.cleaning.clean import clean, rule_decisions
from vegc.cleaning.session import Session
from vegc.cli import app
from vegc.core import DatasetError, UsageError, sha256_hex
from vegc.data.dataset import ImageDataset
from vegc.evaluation.compare import compare
from vegc.evaluation.evaluate import evaluate, evaluate_file
from vegc.evaluation.predictions import predictions
from vegc.sharing.export import export
from vegc.sharing.model_file import load_model_file, predict
from vegc.cleaning.issues import find_issues
from vegc.evaluation.metrics import scaled
from vegc.splits.deal import assign_splits
from vegc.splits.split import split
from vegc.training.stages import LeakError, stage_info
from vegc.training.train import load_stage, train

N = 160
WRONG = {3, 50, 77}  # digits under another class


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "Digits as pictures of 48 pixels with splits, a stage of three frozen epochs and one unfrozen, and issues."
    ds = ImageDataset(tmp_path_factory.mktemp('road') / 'digits', subject='characters')
    digits = load_digits()
    with ds.run() as run:
        for i in range(N):
            true = int(digits.target[i]) % 4
            label = f'digit {(true + 1) % 4 if i in WRONG else true}'
            path = ds.path / f'images/{label}/{i:03}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[i] * 15.9).astype(np.uint8)).convert('RGB').resize((48, 48)).save(path)
            run.add(
                dict(
                    key=str(i),
                    url=str(i),
                    given_label=label,
                    status='ok',
                    path=str(path.relative_to(ds.path)),
                    width=48,
                    height=48,
                    sha256=sha256_hex(path.read_bytes()),
                    split=['train', 'train', 'valid', 'train', 'test'][i % 5],
                    duplicate_group=f'g{i}',
                )
            )
    train(ds, arch='efficientnet_lite0', size=48, bs=32, epochs=(3, 1), stage='raw')
    find_issues(ds, stage='raw')
    return ds


@pytest.fixture
def copy(trained, tmp_path):
    "A copy that a test may change."
    return ImageDataset(shutil.copytree(trained.path, tmp_path / 'digits'))


def test_the_recipe_of_splitting_again_is_refused(copy):
    "Train, split anew, load the old weights: what made 23 % into 36 % in the project that this one grew from."
    split(copy, seed=7, reassign=True)
    seen = set(stage_info(copy, 'raw').trained_on)
    held = copy.images[copy.images.split.isin(['valid', 'test'])]
    n = int(held.sha256.isin(seen).sum())
    assert n > 0
    for attempt in (
        lambda: load_stage(copy, 'raw'),
        lambda: train(copy, arch='efficientnet_lite0', start='raw', stage='again', epochs=(0, 1)),
    ):
        with pytest.raises(LeakError, match=f'trained on {n} of the {len(held)} images'): attempt()
    for part in ('valid', 'test'):
        with pytest.raises(LeakError): evaluate(copy, 'raw', part)


def test_the_whole_recipe_on_the_command_line_is_refused(copy, tmp_path):
    """First stage, clean all pictures whatever their split, split what is left with the same seed as ever,
    start the second stage from the old weights."""
    worst = find_issues(copy, stage='raw').path[:12]
    (tmp_path / 'd.csv').write_text(
        'path,action,label,who,why\n'
        + ''.join(f'{p},{"relabel,digit 0" if i % 3 else "exclude,"},ana,by hand\n' for i, p in enumerate(worst))
    )
    vegc = lambda *args: CliRunner().invoke(app, list(map(str, args)))
    for args in (
        ('clean', copy.path, '--decisions', tmp_path / 'd.csv'),
        ('split', copy.path, '--seed', 42, '--reassign'),
    ):
        assert vegc(*args).exit_code == 0, args
    seen, held = set(stage_info(copy, 'raw').trained_on), copy.images[copy.images.split.isin(['valid', 'test'])]
    held = held[held.path.isin(copy.labels.path)]  # what was excluded is judged by nobody
    n, before = int(held.sha256.isin(seen).sum()), sorted((copy.path / 'models').iterdir())
    assert n > 0 and len(copy.labels) < len(copy.images)
    for args in (
        (
            'train',
            copy.path,
            '--arch',
            'efficientnet_lite0',
            '--size',
            48,
            '--start',
            'raw',
            '--stage',
            'stage-2',
            '--epochs',
            '0,1',
        ),
        ('train', copy.path, '--arch', 'efficientnet_lite0', '--size', 48, '--start', 'raw-1', '--stage', 'stage-2'),
        ('evaluate', copy.path, '--stage', 'raw'),
    ):
        done = vegc(*args)
        assert done.exit_code == 1 and re.search(
            r'trained on \d+ of the \d+ images that are now in .*Train again on these splits',
            done.stderr.replace('\n', ' '),
        ), done.stderr
        if args[0] == 'train': assert f'trained on {n} of the {len(held)} images' in done.stderr
    assert sorted((copy.path / 'models').iterdir()) == before
    assert (
        vegc(
            'train', copy.path, '--arch', 'efficientnet_lite0', '--size', 48, '--stage', 'anew', '--epochs', '1,0'
        ).exit_code
        == 0
    ), 'what the message says to do'


def test_a_copy_of_a_training_picture_leaks_too(copy):
    "A validation picture of a group that was trained on is refused, whatever its bytes."
    images = copy.images
    group = images.duplicate_group[images.split == 'train'].iloc[0]
    victim = images[images.split == 'valid'].iloc[:1].assign(duplicate_group=group)
    copy.update(victim, ['duplicate_group'])
    with pytest.raises(LeakError, match='1 of the'): evaluate(copy, 'raw', 'valid')


def test_a_stage_remembers_what_the_one_before_was_trained_on(copy):
    """The second stage starts from the first and leaves a picture out;
    what its weights know of that picture they still know."""
    path = copy.images.path[copy.images.split == 'train'].iloc[0]
    (copy.path / 'd.csv').write_text(f'path,action,label,who,why\n{path},exclude,,ana,looked\n')
    clean(copy, decisions=copy.path / 'd.csv')
    train(copy, arch='efficientnet_lite0', bs=32, start='raw', stage='second', epochs=(1, 0))
    first, second = stage_info(copy, 'raw'), stage_info(copy, 'second')
    assert set(first.trained_on) <= set(second.trained_on) and set(first.groups) <= set(second.groups)
    clean(copy, undo=True)
    copy.update(copy.images[copy.images.path == path].assign(split='valid'), ['split'], reassign=True)
    with pytest.raises(LeakError, match="'second' was trained on 1 of the"): evaluate(copy, 'second', 'valid')


def test_cleaning_changes_no_split(copy):
    before = copy.images.set_index('path').split
    session = Session(copy, test=True)
    for i, path in enumerate(session.items.path[:20]):
        session.decide(path, ['exclude', 'keep', 'relabel'][i % 3], 'digit 0' if i % 3 == 2 else '')
    session.close()
    split(copy)
    assert copy.images.set_index('path').split.equals(before)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.sampled_from('ab'), st.integers(0, 3)), min_size=3, max_size=60),
    st.integers(0, 10),
)
def test_assigned_splits_stay_whatever_comes(steps, seed):
    "Pictures come in any order and link to others in any way: no stored split changes, no group straddles."
    frame = pd.DataFrame(columns=['path', 'given_label', 'split', 'duplicate_group', 'sha256'])
    numbers, shares = np.zeros(0, int), np.array([.6, .2, .2])
    for k, (link, label, count) in enumerate(steps):
        new = pd.DataFrame(
            [
                dict(path=f'{k}-{j}', given_label=label, split=None, duplicate_group=None, sha256=f'{k}-{j}')
                for j in range(count + 1)
            ]
        )
        frame = pd.concat([frame, new], ignore_index=True).astype(object).where(lambda x: x.notna(), None)
        # link 0–3: the new pictures are copies of an earlier group; otherwise groups of their own
        fresh = np.arange(len(new)) + 1000 * (k + 1)
        if link < 4 and len(numbers): fresh[:1] = numbers[link % len(numbers)]
        numbers = np.concatenate([numbers, fresh])
        done = assign_splits(frame, numbers, shares, seed)
        old = frame.split.notna()
        assert (done.split[old].to_numpy(object) == frame.split[old].to_numpy(object)).all()
        frame = frame.assign(split=done.split.astype(object), duplicate_group=done.duplicate_group.astype(object))
        settled = frame[frame.split != 'none']
        assert (settled.groupby(numbers[settled.index]).split.nunique() <= 1).all()


def test_rules_leave_test_and_people_alone(copy):
    session = Session(copy, test=True)
    held = set(copy.images.path[copy.images.split == 'test'])
    mine = session.items.path[0]
    session.decide(mine, 'keep', who='ana')
    session.close()
    done = clean(copy, auto=.01)  # so low that every doubted label is changed
    assert len(done) and not set(done.path) & held and mine not in set(done.path)
    assert set(copy.decisions.who) == {'ana', 'rule'}
    clean(copy, undo=True)
    assert copy.decisions.path.tolist() == [mine]


def test_decisions_survive_a_kill(copy):
    "A process that decides one picture after the other is killed; what it reported as decided is there."
    code = textwrap.dedent(f'''
        from vegc.cleaning.session import Session
        s = Session({str(copy.path)!r}, test=True)
        for path in s.items.path:
            s.decide(path, 'exclude')
            print(path, flush=True)
    ''')
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) as p:
        said = [p.stdout.readline().strip() for _ in range(25)]
        p.send_signal(signal.SIGKILL)
        said += [line.strip() for line in p.stdout if line.endswith('\n')]
    with open(copy.path / 'decisions.jsonl', 'a') as f: f.write('{"id": 999, "path": "imag')  # a torn last line
    standing = Session(copy, test=True).standing()
    assert set(said) <= set(standing) and len(standing) <= len(said) + 1
    assert len(pd.read_csv(copy.write_cleaned())) == N - len(standing)
    assert len(list((copy.path / 'images').rglob('*.png'))) == N  # nothing was deleted


def test_decisions_for_another_dataset_are_refused(copy):
    (copy.path / 'decisions.jsonl').write_text(json.dumps(dict(dataset='cats', schema=1)) + '\n')
    with pytest.raises(DatasetError, match="belongs to the dataset 'cats'"): Session(copy)
    with pytest.raises(DatasetError, match='nothing was applied'):
        (copy.path / 'd.csv').write_text('path,action\nimages/no.png,exclude\n')
        (copy.path / 'decisions.jsonl').unlink()
        clean(copy, decisions=copy.path / 'd.csv')
    assert copy.decisions.empty


def test_a_relabel_changes_what_is_trained_and_judged(copy):
    path = predictions(copy, 'raw', 'test').path[0]
    (copy.path / 'd.csv').write_text(f'path,action,label,who,why\n{path},relabel,digit 3,ana,looked\n')
    clean(copy, decisions=copy.path / 'd.csv')
    table = predictions(copy, 'raw', 'test').set_index('path')
    assert (
        table.label[path] == 'digit 3'
        and predictions(copy, 'raw', 'test', labels='given').set_index('path').label[path] == table.given_label[path]
    )
    both = compare(copy, 'raw-1', 'raw', 'test')
    assert both.n == both.on_corrected.n == len(table)
    assert both.low <= both.difference <= both.high and both.sentence


def test_without_decisions_there_is_nothing_corrected(copy):
    assert compare(copy, 'raw-1', 'raw', 'test').on_corrected is None
    with pytest.raises(UsageError, match='named twice'): compare(copy, 'raw', 'raw', 'test')


def test_looks_at_test_are_counted(copy):
    first = evaluate(copy, 'raw', 'test').looks
    assert evaluate(copy, 'raw', 'test').to_dict()['test_looks'] == first + 1
    assert evaluate(copy, 'raw', 'valid').looks == first + 1


def test_issues_without_a_list_say_which_call_makes_them(copy):
    shutil.rmtree(copy.path / 'predictions')
    with pytest.raises(UsageError, match='find-issues'): Session(copy)
    with pytest.raises(UsageError, match='find-issues'): clean(copy, auto=.9)


def test_rule_decisions_need_a_probable_other_label():
    row = dict(
        path='p', split='train', issue_types='label', predicted_label='b', confidence=0.8, label_score=0.1, outlier=0.2
    )
    issues = pd.DataFrame(
        [
            row,
            row | dict(path='q', split='test'),
            row | dict(path='r', confidence=0.5),
            row | dict(path='s', issue_types='blank'),
        ]
    )
    assert [(r['path'], r['action']) for r in rule_decisions(issues, .7)] == [('p', 'relabel'), ('s', 'exclude')]


BARE = '''
import sys
allowed = {{'torch', 'numpy', 'PIL', 'safetensors', 'vegc'}}
class Refuse:
    "Nothing that a bare environment would lack can be imported from here on."
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {{'fastai', 'fastcore', 'torchvision', 'timm', 'pandas', 'scipy', 'sklearn',
                                  'matplotlib', 'tqdm', 'aiohttp', 'filelock', 'pyarrow'}}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import json
from vegc.sharing.model_file import predict
print(json.dumps(predict({file!r}, [open(p, 'rb').read() for p in {paths!r}])))
'''


def test_a_bare_environment_predicts_the_same_from_bytes(trained, tmp_path):
    file = export(trained, 'raw', tmp_path / 'digits.safetensors')
    table = predictions(trained, 'raw', 'valid')
    paths = [str(trained.path / p) for p in table.path[:12]]
    out = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', BARE.format(file=str(file), paths=paths)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert out.returncode == 0, out.stderr
    told = json.loads(out.stdout)
    cols = [c for c in table if c.startswith('p_')]
    calibrated = scaled(table[cols].to_numpy(), load_model_file(file).temperature)
    np.testing.assert_allclose([[r[c] for c in cols] for r in told], calibrated[:12], atol=1e-5)
    assert [r['predicted_label'] for r in told] == table.predicted_label[:12].tolist()
    here = predict(file, [trained.path / p for p in table.path[:12]])
    np.testing.assert_allclose([r['outlier'] for r in told], here.outlier, atol=1e-6)
    assert list(told[0]) == list(here)


def test_an_exported_model_is_judged_on_a_folder(trained, tmp_path):
    file = export(trained, 'raw', tmp_path / 'digits.safetensors')
    table = predictions(trained, 'raw', 'test')
    for i, row in table.iterrows():
        to = tmp_path / 'mine' / row.label / f'{i}.png'
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(trained.path / row.path, to)
    (tmp_path / 'mine/digit 0/notes.txt').write_text('no picture')
    with pytest.warns(match='1 files'): m = evaluate_file(load_model_file(file), tmp_path / 'mine')
    assert (m.n, m.accuracy) == (len(table), float((table.label == table.predicted_label).mean()))
    assert predict(file, tmp_path / 'mine').path.is_monotonic_increasing


# Whoever may remove or move a file, and why: everything else that lies in a dataset stays.
MAY_UNLINK = {
    'core': {'replacing'},              # its own temporary file
    'data/dataset': {'run', 'update'},  # the journal, once it is folded into the manifest
    # its own temporary file where writing failed; those of a killed run, and half files
    'acquire/store': {'put', 'clear'},
    'acquire/shards': {'take_over'},    # the folder of a shard, once everything in it was taken over
    'training/stages': {'save_stage'},  # the checkpoint of a run that is now finished
}
ERASE = {'erase', '_erased'}  # what an owner of files is asked to take out on request


def removes_files(call):
    "Does a call remove or move a file? pandas' rename has keywords or a plain string; a file's has neither."
    owner, name = call.func.value, call.func.attr
    if name == 'rename': return not call.keywords and not isinstance(call.args[0], ast.Constant)
    if name in ('remove', 'move'): return isinstance(owner, ast.Name) and owner.id in ('os', 'shutil')
    return name in ('unlink', 'rmtree', 'rmdir')


def removers(source):
    "Functions of a module that remove or move files."
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    calls = {f.name: [c for c in ast.walk(f) if isinstance(c, ast.Call) and isinstance(c.func, ast.Attribute)]
             for f in functions}
    return {name for name, made in calls.items() if any(map(removes_files, made))}


@pytest.mark.parametrize('module', sorted(p.relative_to(ROOT / 'vegc') for p in (ROOT / 'vegc').rglob('*.py')), ids=str)
def test_no_code_path_removes_or_moves_a_picture(module):
    found = removers((ROOT / 'vegc' / module).read_text('utf-8'))
    assert found - ERASE <= MAY_UNLINK.get(module.with_suffix('').as_posix(), set())


@pytest.mark.parametrize('line', ['path.unlink()', 'shutil.rmtree(p)', 'os.remove(p)', 'shutil.move(a, b)',
                                  'a.rename(b)'])
def test_that_rule_sees_what_removes(line): assert removers(f'def f():\n    {line}') == {'f'}
