"""The command line: it says what the functions say, nothing else on standard output, one sentence on error."""
import csv
import importlib
import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import typer
from conftest import PROGRAM, ROOT, hears_ctrl_c
from PIL import Image
from typer.testing import CliRunner

from vegc import cli
from vegc.core import UsageError, VegcError, VegcWarning

# Each verb that is one function: the function, parameters of the verb that are not keywords of it,
# keywords that are not flags.
FUNCTIONS = {
    'plan': ('vegc.acquire.lists:plan', {'as_json', 'robots', 'allow_hosts', 'plot'}, set()),
    'ingest': ('vegc.acquire.ingest:ingest', {'as_json', 'ray', 'shards'}, set()),
    'add': ('vegc.acquire.add:add', {'as_json'}, set()),
    'search': ('vegc.acquire.sources:search', {'as_json', 'lists'}, set()),
    'harvest': ('vegc.acquire.sources:read_page', {'as_json', 'page', 'lists'}, {'path'}),
    'split': ('vegc.splits.split:split', {'as_json'}, {'features_of'}),
    'train': ('vegc.training.train:train', {'as_json'}, set()),
    'evaluate': ('vegc.evaluation.evaluate:evaluate', {'as_json'}, set()),
    'find-issues': ('vegc.cleaning.issues:find_issues', {'as_json', 'csv'}, {'pred_probs', 'label_scores', 'features'}),
    'clean': ('vegc.cleaning.clean:clean', {'as_json', 'page', 'worst', 'limit'}, set()),
    'compare': ('vegc.evaluation.compare:compare', {'as_json'}, set()),
    'demo': ('vegc.demo:demo', {'as_json'}, set()),
    'report': ('vegc.plots.report:report', {'as_json'}, set()),
    'export': ('vegc.sharing.export:export', {'as_json'}, set()),
    'predict': ('vegc.sharing.model_file:predict', {'as_json', 'csv'}, set()),
}


def verbs():
    "Every verb's own function by name."
    return {c.name: inspect.unwrap(c.callback) for c in cli.app.registered_commands}


def run(*args, **env):
    "The real program in a process of its own."
    return subprocess.run([PROGRAM, *map(str, args)], capture_output=True, text=True, env=os.environ | env)


def call(*args):
    "The program in this process, which has loaded torch already."
    return CliRunner().invoke(cli.app, list(map(str, args)))


@pytest.fixture
def lists(tmp_path):
    folder = tmp_path / 'lists'
    folder.mkdir()
    (folder / 'pho.csv').write_text('https://example.org/images?q=1\n\nhttps://example.org/images?q=2\n')
    (folder / 'bun.csv').write_text('https://example.org/images?q=2\nhttps://example.org/images?q=3')
    return folder


@pytest.mark.parametrize('verb', FUNCTIONS)
def test_a_verb_has_the_keywords_and_defaults_of_its_function(verb):
    where, only_verb, only_function = FUNCTIONS[verb]
    module, name = where.split(':')
    takes = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    flags = inspect.signature(verbs()[verb]).parameters
    assert {n for n, p in takes.items() if p.kind != p.VAR_KEYWORD} - only_function == set(flags) - only_verb
    for n in takes.keys() & flags.keys():
        if (flags[n].default, takes[n].default) in [(None, ())]: continue  # a flag that may be repeated
        if flags[n].default != takes[n].default: assert as_typed(takes[n].default) == flags[n].default, n


def as_typed(value):
    "A default as a person would type it: 8,4 for (8, 4)."
    if isinstance(value, tuple): return ','.join(map(str, value))
    return '' if value is None else str(value)


def typed(option, kind):
    "How a flag is typed so that it is not its default, and what its function then gets."
    if option == 'epochs': return ['--epochs', '3,4'], (3, 4)
    if option == 'lr': return ['--lr', '1e-5,1e-4'], slice(1e-5, 1e-4)
    if option == 'trust': return ['--trust', 'a:b', '--trust', 'c:d'], ('a:b', 'c:d')
    if option in ('cached', 'pixels'): return [f'--no-{option}'], False
    flag = '--' + option.replace('_', '-')
    if 'bool' in kind: return [flag], True
    if 'int' in kind: return [flag, '7'], 7
    if 'float' in kind: return [flag, '0.5'], .5
    return [flag, 'word'], Path('word') if 'Path' in kind else 'word'


@pytest.mark.parametrize('verb', sorted(FUNCTIONS.keys() - {'clean', 'predict'}))  # one flag a call; needs a model
def test_what_is_typed_arrives_at_the_function(verb, monkeypatch, tmp_path):
    from vegc.data.dataset import ImageDataset
    where, only_verb, _ = FUNCTIONS[verb]
    module, name = where.split(':')
    module = importlib.import_module(module)
    signature, got = inspect.signature(getattr(module, name)), {}

    def record(*args, **kw):
        got.update(signature.bind(*args, **kw).arguments)
        raise UsageError('recorded')
    monkeypatch.setattr(module, name, record)
    ImageDataset(tmp_path, subject='other')
    words, want = [], {}
    for option, p in inspect.signature(verbs()[verb]).parameters.items():
        if option in ('page', 'lists', 'src') or option == 'dataset': words.append(str(tmp_path))
        elif option in only_verb: continue
        elif option in ('query', 'path') or p.default is p.empty and verb in ('export', 'compare'): words.append('word')
        else:
            more, want[option] = typed(option, str(p.annotation))
            words += more
    done = CliRunner().invoke(cli.app, [verb, *words])
    assert 'recorded' in done.stderr, done.output
    assert {k: got[k] for k in want} == want and want


def test_every_verb_has_help_and_every_flag_a_sentence():
    commands = typer.main.get_command(cli.app).commands
    for name in verbs():
        done = CliRunner().invoke(cli.app, [name, '--help'])
        assert done.exit_code == 0
        assert verbs()[name].__doc__, name
        command = commands[name]
        with command.make_context(name, [], resilient_parsing=True) as context: text = command.get_help(context)
        assert '  --json' in text
        for p in command.params: assert p.help and p.help.endswith(('.', '?')), f'{name}: {p.name} has no comment'


def test_help_of_a_flag_is_the_comment_of_the_keyword():
    comment = cli.source_comments('vegc.acquire.lists:plan')['max_per_class']
    text = ' '.join(call('plan', '--help').stdout.split())
    assert comment and comment[1:] in text


def test_help_of_a_verb_imports_nothing_heavy():
    code = ('import sys\nfrom vegc.cli import main\nsys.argv = ["vegc", "train", "--help"]\n'
            'try: main()\nexcept SystemExit: print(sorted({"torch", "numpy", "pandas"} & set(sys.modules)))')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert '--overwrite' in done.stdout and done.stdout.splitlines()[-1] == '[]'


def test_comments_are_read_as_they_stand(tmp_path, monkeypatch):
    (tmp_path / 'commented.py').write_text(
        'raise ImportError("only its text is read")\n# not about f\n'
        'def f(\n    a: int,  # behind it\n    # above it,\n    # in two lines\n    b: str="#no",\n'
        '    *, c=(1, 2),  # behind its default\n    d=None,\n) -> int:  # what comes back\n'
        '    # inside\n    return 1\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.source_comments('commented:f') == dict(
        a='behind it', b='above it, in two lines', c='behind its default', d='')


def documented():
    "Every `vegc …` line in fenced blocks of the documentation."
    files = [ROOT / 'README.md', ROOT / 'data/README.md', *sorted((ROOT / 'docs').glob('*.md'))]
    for file in files:
        for block in re.findall(r'```\w*\n(.*?)```', file.read_text(encoding='utf-8'), re.DOTALL):
            for line in block.splitlines():
                if line.startswith('vegc '): yield f'{file.name}: {line}'


@pytest.mark.parametrize('line', list(documented()))
def test_a_documented_command_exists(line):
    verb, *args = shlex.split(line.partition(': vegc ')[2], comments=True)
    assert verb in verbs()
    command = typer.main.get_command(cli.app).commands[verb]
    known = {o for p in command.params for o in [*p.opts, *p.secondary_opts]}
    assert {a for a in args if a.startswith('--')} <= known, line


def test_readme_python_names_exist():
    import vegc.all as vegc_all
    code, = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(encoding='utf-8'), re.DOTALL)
    for name, arguments in re.findall(r'\b(\w+)\((.*)\)', code):
        if name == 'print': name, arguments = re.match(r'(\w+)\((.*)\)', arguments).groups()
        keywords = re.findall(r'(\w+)=', arguments)
        assert set(keywords) <= set(inspect.signature(getattr(vegc_all, name)).parameters), name


def test_version():
    done = run('--version')
    assert done.returncode == 0 and re.fullmatch(r'\d+\.\d+\.\d+\S*\n', done.stdout)


def test_a_plan_is_a_table_of_classes_a_picture_and_json(lists, tmp_path):
    done = run('plan', lists, '--plot', tmp_path/'plan.png')
    assert done.returncode == 0 and 'plan.png written' in done.stderr
    assert (tmp_path/'plan.png').read_bytes().startswith(b'\x89PNG')
    classes = json.loads(run('plan', lists, '--json').stdout)['classes']
    assert sorted(classes[0]) == ['class', 'distinct', 'repeats', 'selected', 'shared', 'urls']
    for c in classes:
        row = ' +'.join(str(c[k]) for k in ('class', 'urls', 'distinct', 'repeats', 'shared', 'selected'))
        assert re.search(rf'^{row}$', done.stdout, re.MULTILINE), done.stdout
    refused = run('plan', lists, '--plot', tmp_path/'plan.xyz')
    assert refused.returncode == 2 and 'xyz' in refused.stderr and 'png' in refused.stderr


def test_json_is_one_object_and_people_get_a_table(lists):
    done = run('plan', lists, '--json')
    assert json.loads(done.stdout)['shared_across'] == 1 and done.stdout.count('\n') == 1
    done = run('plan', lists)
    assert 'shared' in done.stdout and '{' not in done.stdout and done.stderr == ''


@pytest.mark.parametrize('args,code', [
    (['no-such-verb'], 2), (['plan'], 2), (['plan', 'x', '--no-such-flag'], 2),
    (['plan', 'x', '--max-per-class', 'many'], 2),
    (['plan', 'no/such/folder'], 2), (['manifest', 'no/such/dataset'], 1),
])
def test_a_wrong_call_is_one_sentence_and_a_code(args, code):
    done = run(*args)
    assert done.returncode == code and done.stdout == ''
    assert 'Traceback' not in done.stderr and done.stderr.strip()


@pytest.fixture
def failing(monkeypatch, lists):
    "Call `vegc plan` with a function that raises or warns as told."
    def call(effect, *args, debug=''):
        def plan(*a, **k):
            print('a line that a library prints')
            if isinstance(effect, BaseException): raise effect
            for w in effect: warnings.warn(w, stacklevel=1)
            return original(*a, **k)
        import vegc.acquire.lists
        original = vegc.acquire.lists.plan
        monkeypatch.setattr(vegc.acquire.lists, 'plan', plan)
        monkeypatch.setenv('VEGC_DEBUG', debug)
        return CliRunner().invoke(cli.app, ['plan', str(lists), *args])
    return call


@pytest.mark.parametrize('error,code,says', [
    (VegcError('The disk is full.'), 1, 'error: The disk is full.\n'),
    (UsageError('Say what the pictures show.'), 2, 'error: Say what the pictures show.\n'),
    (KeyboardInterrupt(), 130, 'Stopped.'),
    (PermissionError(13, 'Permission denied', '/x/y'), 1, 'error: /x/y: Permission denied.\n'),
    (ZeroDivisionError('division by zero'), 1, 'ZeroDivisionError: division by zero'),
])
def test_an_exception_becomes_a_sentence(failing, error, code, says):
    done = failing(error, '--json')
    assert done.exit_code == code and done.stdout == ''
    assert says in done.stderr and 'Traceback' not in done.stderr


def test_debugging_shows_where(failing):
    done = failing(ZeroDivisionError('division by zero'), debug='1')
    assert 'Traceback' in done.stderr and done.exit_code == 1


def test_warnings_for_people_once_and_nothing_else_on_standard_output(failing):
    twice = [VegcWarning('Look at this.'), VegcWarning('Look at this.')]
    done = failing([*twice, DeprecationWarning('not for people')], '--json')
    assert json.loads(done.stdout)['urls'] == 4
    assert done.stderr.count('warning: Look at this.\n') == 1 and 'not for people' not in done.stderr
    assert 'a line that a library prints' in done.stderr


def test_a_reader_that_goes_away_is_not_an_error(lists):
    command = f'{shlex.quote(str(PROGRAM))} plan {shlex.quote(str(lists))} | true'
    done = subprocess.run(['bash', '-c', command], capture_output=True, text=True)
    assert done.stderr == ''


@pytest.mark.skipif(os.name == 'nt', reason='signals are sent otherwise there')
def test_ctrl_c_ends_with_a_sentence(tmp_path):
    code = ('import time, vegc.acquire.lists\n'
            'def plan(*a, **k):\n    print("started", flush=True)\n    time.sleep(60)\n'
            'vegc.acquire.lists.plan = plan\n'
            'import sys\nfrom vegc.cli import main\nsys.argv = ["vegc", "plan", "x"]\nmain()')
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=hears_ctrl_c)
    process.stderr.readline()  # `started`, turned to standard error
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err.startswith('Stopped.') and out == ''


def test_every_path_argument_takes_any_letters(tmp_path):
    folder = Path(tmp_path / 'phở bò')
    folder.mkdir()
    (folder / 'bánh mì.csv').write_text('https://example.org/1\n', encoding='utf-8')
    assert json.loads(run('plan', folder, '--json').stdout)['urls'] == 1


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Thirty drawn pictures in three folders: one filed under two classes, one cut short, one a copy in another size."
    folder = tmp_path_factory.mktemp('photos') / 'drawn'
    draw = np.random.default_rng(0)
    for i in range(30):
        label = ('red', 'green', 'blue')[i % 3]
        (folder / label).mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 90, (12, 16, 3), dtype=np.uint8)
        pixels[..., i % 3] += 150
        Image.fromarray(pixels).resize((96, 72), Image.Resampling.BICUBIC).save(folder / label / f'{i:02}.png')
    shutil.copy(folder / 'red/00.png', folder / 'green/shared.png')
    (folder / 'blue/short.png').write_bytes((folder / 'blue/02.png').read_bytes()[:500])
    Image.open(folder / 'red/03.png').resize((64, 48)).save(folder / 'red/smaller.png')
    return folder


@pytest.fixture(scope='module')
def dataset(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp('dataset') / 'colours'
    done = call('add', photos, folder, '--subject', 'other', '--json')
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts['rows'], facts['ok'], facts['review'], facts['failed']) == (33, 30, 2, 1)
    return folder


def test_add_asks_for_the_subject_and_makes_nothing_without_it(photos, tmp_path):
    done = call('add', photos, tmp_path / 'new')
    assert done.exit_code == 2 and 'subject' in done.stderr and not (tmp_path / 'new').exists()


def test_manifest_counts_for_people_and_gives_the_table_as_csv(dataset):
    table = call('manifest', dataset).stdout
    assert re.search(r'failed +truncated', table) and re.search(r'review +conflict', table)
    from vegc.data.manifest import MANIFEST_COLUMNS
    rows = list(csv.DictReader(io.StringIO(call('manifest', dataset, '--csv').stdout)))
    assert len(rows) == 33 and list(rows[0]) == MANIFEST_COLUMNS


def test_duplicates_writes_pairs_of_paths(dataset, tmp_path):
    assert call('duplicates', dataset, '--csv', tmp_path / 'pairs.csv').exit_code == 0
    with open(tmp_path / 'pairs.csv', newline='') as file: rows = list(csv.DictReader(file))
    assert list(rows[0]) == ['path_a', 'path_b', 'kind', 'similarity']
    assert all((dataset / row[k]).is_file() for row in rows for k in ('path_a', 'path_b'))
    pairs = {frozenset((row['path_a'], row['path_b'])) for row in rows}
    kept = {row['url']: row['path'] for row in csv.DictReader(io.StringIO(call('manifest', dataset, '--csv').stdout))}
    assert frozenset((kept['red/03.png'], kept['red/smaller.png'])) in pairs


def test_the_whole_road_with_random_resnet50_weights(dataset, photos, tmp_path):
    import torch
    import torchvision
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / 'random.pth')
    counts = json.loads(call('split', dataset, '--valid', '0.3', '--test', '0.2', '--json').stdout)
    assert set(counts['counts']) == {'train', 'valid', 'test'}
    size = ('--arch', 'resnet50', '--weights', tmp_path / 'random.pth', '--size', 32, '--bs', 8, '--epochs', '1,1')
    done = call('train', dataset, *size, '--lr', '1e-5,1e-4', '--json')
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert [r['part'] for r in facts['history']] == ['frozen', 'unfrozen'] and facts['stage'] == 'raw'
    again = call('train', dataset, *size)
    assert again.exit_code == 2 and "'raw'" in again.stderr and 'Traceback' not in again.stderr
    done = call('evaluate', dataset, '--stage', 'raw', '--split', 'test', '--json')
    facts = json.loads(done.stdout)
    assert facts['accuracy_low'] <= facts['accuracy'] <= facts['accuracy_high']
    assert (facts['stage'], facts['split']) == ('raw', 'test')
    assert call('evaluate', dataset, '--stage', 'raw').stdout.count('accuracy')
    assert call('export', dataset, 'raw', tmp_path / 'model.safetensors').exit_code == 0
    done = call('predict', tmp_path / 'model.safetensors', photos, '--csv', tmp_path / 'out.csv', '--json')
    assert done.exit_code == 0, done.stderr
    with open(tmp_path / 'out.csv', newline='') as file: rows = list(csv.DictReader(file))
    assert {'path', 'status', 'error_message', 'predicted_label', 'confidence'} <= rows[0].keys()
    assert {'p_red', 'p_green', 'p_blue'} <= rows[0].keys()
    assert len(rows) == 33 and [r['path'] for r in rows] == [r['path'] for r in json.loads(done.stdout)['rows']]
    assert [Path(r['path']).name for r in rows if r['status'] != 'ok'] == ['short.png']


@pytest.fixture
def reviewed(tmp_path):
    "Four images of two classes, the last of them for testing, each with a likely wrong label."
    import pandas as pd

    from vegc.data.dataset import ImageDataset
    from vegc.data.manifest import manifest_frame, write_manifest
    ds = ImageDataset(tmp_path / 'my set', subject='objects')
    rows = [dict(key=str(i), url=f'u{i}', given_label='ab'[i % 2], status='ok',
                 path=f'images/{"ab"[i % 2]}/{i:016}.png',
                 sha256=f'{i:064}', split='test' if i == 3 else 'train') for i in range(4)]
    for r in rows:
        (ds.path / r['path']).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40, 30), (60, 20, 90)).save(ds.path / r['path'])
    write_manifest(ds.path / 'manifest.parquet', manifest_frame(rows))
    issues = pd.DataFrame(rows)[['path', 'url', 'given_label', 'split']].assign(
        predicted_label='a', label_score=.1, issue_types='label', score=.9, rank=[1, 2, 3, 4],
        confidence=[.99, .7, .6, .9], outlier=.1)
    (ds.path / 'predictions').mkdir()
    issues.to_parquet(ds.path / 'predictions/issues.parquet')
    return ds.path


def test_clean_hands_out_a_page_takes_in_what_comes_back_and_says_what_it_did(reviewed, tmp_path):
    done = call('clean', reviewed, '--page', tmp_path / 'review.html', '--limit', 2)
    assert done.exit_code == 0, done.output
    assert f"vegc clean '{reviewed}' --decisions FILE" in done.output
    assert (tmp_path / 'review.html').read_text('utf-8').count('<article') == 2
    row = f'images/b/{1:016}.png,relabel,a,ana,an a'
    (tmp_path / 'd.csv').write_text(f'path,action,label,who,why\n{row}\n', 'utf-8')
    done = call('clean', reviewed, '--decisions', tmp_path / 'd.csv')
    assert 'an a' in done.output and '1 decision written: 1 relabel' in done.output
    again = call('clean', reviewed, '--decisions', tmp_path / 'd.csv')
    assert 'Left alone: 1 decided so already' in again.output
    facts = json.loads(call('clean', reviewed, '--auto', .8, '--json').stdout)
    assert [r['path'] for r in facts['rows']] == [f'images/a/{0:016}.png']
    assert facts['left_alone'] == {'test pictures': 1, 'decided already': 1, 'not sure enough': 1}
    table = json.loads(call('clean', reviewed, '--worst', 3, '--json').stdout)['rows']
    assert [table[1][k] for k in ('rank', 'decision', 'who', 'why')] == [2, 'relabel → a', 'ana', 'an a']
    assert 'looks like a' in table[2]['reason'] and table[2]['decision'] == 'undecided'
    wrong = call('clean', reviewed, '--worst', 3, '--undo')
    assert wrong.exit_code == 2 and 'Say one of' in wrong.output
