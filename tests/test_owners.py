"""Each file in a dataset's folder has one owner: seen in the code, and seen at work."""
import ast
import fnmatch
import importlib
import os
import sys
from pathlib import Path

import pytest
import tiny
from conftest import ROOT

import vegc.all as A
from vegc.data.forget import OWNED, forget
from vegc.data.folder import Gone

# Words in the code that name a file, and the modules that may say them. Made from the table; `data.forget` holds the
# table.
NAMED = {'manifest.parquet', 'journal.jsonl', 'ATTRIBUTION.csv', 'decisions.jsonl', 'labels.csv', 'cleaned.csv',
         'splits.jsonl',
         'dataset.toml', 'classes.csv', 'optout.txt', 'forgotten.json', 'test-looks.jsonl', 'cross-validated.parquet',
         'out-of-fold.parquet', 'issues.parquet', 'stage.json', 'weights.safetensors', 'unfinished.pt', '.lock',
         '.decisions.lock'}
READ_TOO = {'optout.txt': {'data.optout', 'data.dataset', 'acquire.ingest'},  # a user's file; words of a reason
            'dataset.toml': {'core', 'data.dataset'}, 'classes.csv': {'data.dataset'},
            # `run` keeps manifest and journal together under the lock; of the journal ingest asks what a killed run
            # wrote
            'manifest.parquet': {'data.manifest', 'data.dataset'},
            'journal.jsonl': {'data.manifest', 'data.dataset', 'acquire.store'},
            '.lock': {'data.dataset'}, '.decisions.lock': {'data.decisions'},
            'unfinished.pt': {'training.stages', 'training.train'}}
# write such files elsewhere: a folder handed on, a demo's copy, shards
HAND_OUT = {'data.handover', 'demo', 'cli', 'acquire.shards'}


def owner_of(name):
    "The modules that may name a file."
    if name in READ_TOO: return READ_TOO[name]
    return {o.owner for o in OWNED if fnmatch.fnmatch(f'x/{name}', f'*/{o.files.rpartition("/")[2]}')
            and ('*' not in o.files.rpartition('/')[2]
                 or name in ('stage.json', 'weights.safetensors'))} or {'training.stages'}


def modules():
    for file in sorted((ROOT/'vegc').rglob('*.py')):
        if file.name in ('_modidx.py', '__init__.py'): continue
        yield '.'.join(file.relative_to(ROOT/'vegc').with_suffix('').parts), ast.parse(file.read_text(encoding='utf-8'))


def said_in(tree):
    "Text in a module that is no docstring."
    docs = {id(n.body[0].value) for n in ast.walk(tree)
            if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and n.body and isinstance(n.body[0], ast.Expr)}
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
            and id(n) not in docs]


def is_path(text, name): return text == name or text.endswith('/' + name)


def test_only_its_owner_names_a_file():
    wrong = [(module, name) for module, tree in modules() if module != 'data.forget' and module not in HAND_OUT
             for text in said_in(tree) for name in NAMED if is_path(text, name) and module not in owner_of(name)]
    assert wrong == []


def test_every_owner_can_erase():
    for owned in OWNED:
        if not owned.owner: continue
        module = importlib.import_module(f'vegc.{owned.owner}')
        if owned.holds_images: assert callable(getattr(module, 'erase', None)), f'{owned.owner} owns {owned.files}'


def test_no_module_but_the_owners_erases():
    have = {module for module, tree in modules()
            if any(isinstance(n, ast.FunctionDef) and n.name == 'erase' for n in tree.body)}
    assert have <= {o.owner for o in OWNED}


class Writes:
    "Files below a folder that are opened for writing, renamed or removed, and the module of vegc that asked for it."
    def __init__(self, root): self.root, self.seen, self.on = os.path.realpath(root), set(), False

    def __call__(self, event, args):
        if not self.on or event not in ('open', 'os.rename', 'os.remove', 'os.truncate'): return
        if event == 'open' and not (isinstance(args[1], str) and set(args[1]) & set('wax+')): return
        for path in args[:2] if event == 'os.rename' else args[:1]:
            if isinstance(path, (str, os.PathLike)) and os.path.realpath(path).startswith(self.root + os.sep):
                self.note(path)

    def note(self, path):
        where = os.path.relpath(os.path.realpath(path), self.root)
        if '.tmp-' not in where and (module := caller()): self.seen.add((where, module))


def caller():
    "The nearest module of vegc on the stack that is not one of the two everybody writes through."
    frame = sys._getframe(2)
    while frame:
        name = frame.f_globals.get('__name__', '')
        if name.startswith('vegc.') and name not in ('vegc.core', 'vegc.data.folder'): return name.removeprefix('vegc.')
        frame = frame.f_back


def owners(where):
    return {o.owner for o in OWNED if fnmatch.fnmatch(where, o.files)} | {
        '.lock': {'data.dataset'}, '.decisions.lock': {'data.decisions'}}.get(where, set())


@pytest.fixture(scope='module')
def hook():
    writes = Writes('/nowhere')
    sys.addaudithook(writes)
    yield writes
    writes.on = False


def test_at_work_only_the_owner_writes(hook, tmp_path):
    hook.root, hook.on = os.path.realpath(tmp_path/'ds'), True
    ds = tiny.make(tmp_path)
    A.evaluate(ds, 'raw', 'test')
    A.report(ds, 'raw')
    A.compare(ds, 'raw', 'more')
    forget(ds, 'zero/001.png')
    hook.on = False
    assert len(hook.seen) > 15
    # the handle folds a run into the manifest; classes.csv and lists are a person's
    allowed = {(name, 'data.dataset') for name in ('manifest.parquet', 'journal.jsonl', 'dataset.toml')}
    wrong = {(where, module) for where, module in hook.seen - allowed if module not in owners(where)}
    assert wrong == set()


def test_what_is_forgotten_is_in_no_file(tmp_path):
    ds = tiny.make(tmp_path)
    A.evaluate(ds, 'raw')
    A.report(ds, 'raw')
    row = ds.images.iloc[5]
    with open(tmp_path/'decide.csv', 'w') as f:
        f.write(f'path,action,label,who,why\n{row.path},keep,,me,my own child\n')
    A.clean(ds, decisions=tmp_path/'decide.csv')
    done = forget(ds, row.path)
    assert done.rows == 1 and row.path in done.files
    for file in ds.path.rglob('*'):
        if not file.is_file() or file.name in ('stage.json',): continue  # stages are named, see below
        data = file.read_bytes()
        assert row.path.encode() not in data and row.sha256.encode() not in data and b'my own child' not in data, file
    if row.split == 'train': assert set(done.stages) == {'raw', 'more'}


def test_erasing_nothing_changes_nothing(tmp_path):
    ds = tiny.make(tmp_path, decisions=False)
    A.predictions(ds, 'raw')
    before = tiny.contents(ds.path)
    for owner in {o.owner for o in OWNED if o.holds_images}:
        assert importlib.import_module(f'vegc.{owner}').erase(ds.path, Gone()) == []
    assert tiny.contents(ds.path) == before


def test_the_table_of_the_docs_is_the_table_of_the_code():
    text = (Path(ROOT)/'docs/architecture.md').read_text(encoding='utf-8')
    for owned in OWNED:
        assert f'`{owned.files}`' in text and (not owned.owner or f'`{owned.owner}`' in text)
