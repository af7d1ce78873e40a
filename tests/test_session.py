"""Decisions survive anything: a session is what its log says, whatever was done, killed, torn or shared."""
import json
import os
import subprocess
import sys
import warnings

import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vegc.cleaning import session as module
from vegc.cleaning.clean import clean
from vegc.cleaning.session import Session, worst_table
from vegc.data import decisions as log_module
from vegc.data.decisions import DecisionLog, DecisionState
from vegc.core import DatasetError, DiskFullError, UsageError, VegcWarning
from vegc.data import dataset as dataset_module
from vegc.data.dataset import ImageDataset
from vegc.data.manifest import manifest_frame, write_manifest

LABELS = ["hrê d'or", 'a, "b"', 'Ωβ ゐ']


def make(folder, n=9, name='ds', seed=0, files=True):
    "A dataset whose files are no pictures: a session never looks into them."
    ds = ImageDataset(folder / name, subject='objects')
    rows = [dict(key=str(i), url=f'u{i}', given_label=LABELS[i % 3], status='ok', sha256=f'{seed}-{i}',
                 path=f'images/{LABELS[i % 3]}/{i:05}.jpg', width=100 + i, height=100,
                 split='test' if i % 9 == 8 else 'train', duplicate_group='twins' if i in (3, 6) else None)
            for i in range(n)]
    write_manifest(ds.path / 'manifest.parquet', manifest_frame(rows))
    for r in rows if files else []:
        (ds.path / r['path']).parent.mkdir(parents=True, exist_ok=True)
        (ds.path / r['path']).touch()
    return ds


def decisions_of(ds): return ds.path / 'decisions.jsonl'


def order_of(ds):
    im = ds.images
    return im[['path', 'url', 'given_label', 'split']].assign(
        predicted_label=LABELS[0], label_score=.2, issue_types='label', score=.8, rank=range(1, len(im) + 1),
        confidence=.9, outlier=.1)


@pytest.fixture
def ds(tmp_path): return make(tmp_path)


def actions(decisions): return {p: (r['action'], r['label']) for p, r in decisions.items()}


one = st.tuples(st.sampled_from(['keep', 'exclude', 'relabel']), st.sets(st.integers(0, 5), min_size=1, max_size=3))
other_steps = st.sampled_from(['undo', 'redo', 'undo', 'redo', 'reopen', 'kill', 'other'])
steps = st.lists(st.one_of(one, other_steps), max_size=25)


@pytest.fixture(scope='module')
def shared(tmp_path_factory): return make(tmp_path_factory.mktemp('shared'))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps, st.integers(1, 60))
@example([('keep', {0}), ('exclude', {0, 1}), 'undo', 'undo', 'redo', 'reopen', 'redo'], 9)
@example([('keep', {0}), 'undo', ('exclude', {1}), 'redo', 'kill', 'undo', 'other', 'redo'], 9)
def test_any_sequence_equals_a_replay_of_the_log(shared, steps, torn):
    "Decide, undo, redo, reopen, be killed in the middle of a line, hand over: a simple model, session and log agree."
    decisions_of(shared).unlink(missing_ok=True)
    order = order_of(shared)
    session, done, undone = Session(shared, order, who='me'), [], []
    other = Session(shared, order, who='you')
    for step in steps:
        if step == 'undo':
            assert actions({r['path']: r for r in session.undo_all()}) == (done[-1] if done else {})
            if done: undone.append(done.pop())
        elif step == 'redo':
            assert actions({r['path']: r for r in session.redo_all()}) == (undone[-1] if undone else {})
            if undone: done.append(undone.pop())
        elif step == 'reopen': session = Session(shared, order, who='me')
        elif step == 'kill':  # in the middle of writing a line
            line = dict(id=10**6, step=10**6, path=order.path[0], action='exclude', label='', why='ê', who='me')
            data = json.dumps(line, ensure_ascii=False).encode()
            with open(decisions_of(shared), 'ab') as f: f.write(data[:torn])
            session = Session(shared, order, who='me')
        elif step == 'other': session, other = other, session
        else:
            action, which = step
            label = LABELS[1] if action == 'relabel' else ''
            session.decide_all([dict(path=order.path[i], action=action, label=label) for i in sorted(which)])
            done.append({order.path[i]: (action, label) for i in which})
            undone = []
    want = {p: d for step in done for p, d in step.items()}
    table = shared.decisions
    for reader in (session, other, Session(shared, order)): assert actions(reader.standing()) == want
    assert dict(zip(table.path, zip(table.action, table.label, strict=True), strict=True)) == want
    current = shared.images.set_index('path').given_label.to_dict()
    current = {p: label for p, label in current.items() if want.get(p, ('',))[0] != 'exclude'}
    current |= {p: label for p, (action, label) in want.items() if action == 'relabel'}
    written = pd.read_csv(session.close())
    assert dict(zip(written.name, written.label, strict=True)) == current and written.name.is_monotonic_increasing


def test_ids_are_never_used_twice_and_lines_never_change(ds):
    order, session = order_of(ds), Session(ds, order_of(ds))
    session.decide_all([dict(path=p, action='keep') for p in order.path[:3]])
    before = decisions_of(ds).read_bytes()
    session.undo_all()
    session.redo_all()
    after = decisions_of(ds).read_bytes()
    ids = [json.loads(line)['id'] for line in after.splitlines()[1:]]
    assert after.startswith(before) and ids == list(range(1, 10))


WRITER = '''
import sys
import pandas as pd
from vegc.cleaning.session import Session
order = pd.read_pickle(sys.argv[2])
s = Session(sys.argv[1], order, test=True, who=sys.argv[3])
print('ready', flush=True)
sys.stdin.readline()
for path in order.path: s.decide(path, 'keep')
'''


def test_two_processes_write_one_log(tmp_path):
    ds = make(tmp_path, 60)
    order_of(ds).to_pickle(tmp_path / 'order')

    def start(who):
        command = [sys.executable, '-c', WRITER, str(ds.path), str(tmp_path / 'order'), who]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    both = [start('ana'), start('bo')]
    for p in both: assert p.stdout.readline() == 'ready\n'
    for p in both:
        p.stdin.write('go\n')
        p.stdin.flush()
    for p in both:
        assert p.wait(60) == 0
        p.stdin.close()
        p.stdout.close()
    lines = [json.loads(line) for line in decisions_of(ds).read_text('utf-8').splitlines()]
    assert [r['id'] for r in lines[1:]] == list(range(1, 121)), 'one head, every id once'
    assert {who: sum(r.get('who') == who for r in lines) for who in ('ana', 'bo')} == {'ana': 60, 'bo': 60}


def test_ten_thousand_pictures_stay_quick(tmp_path, monkeypatch):
    "Counts, not seconds: the manifest is read once, a step is one write and one sync, no line is read twice."
    ds = make(tmp_path, 10_000)
    for i in (5, 7): (ds.path / f'images/{LABELS[i % 3]}/{i:05}.jpg').unlink()
    order, count = order_of(ds), dict(manifest=0, sync=0, lines=0, opened=0)

    def counted(name, f):
        def call(*args, **kw):
            count[name] += 1
            return f(*args, **kw)
        return call
    monkeypatch.setattr(dataset_module, 'read_rows', counted('manifest', dataset_module.read_rows))
    with pytest.warns(VegcWarning, match='removed_by_user'): session = Session(ds, order, who='me')
    opening = count['manifest']
    assert opening == 1
    monkeypatch.setattr(os, 'fsync', counted('sync', os.fsync))
    monkeypatch.setattr(DecisionState, 'read', counted('lines', DecisionState.read))
    monkeypatch.setattr(log_module, 'open', counted('opened', open), raising=False)
    for path in session.items.path[:500]: session.decide(path, 'exclude', why='no')
    n = len(session.items)
    assert session.progress() == dict(items=n, decided=501, left=n - 501)  # one of the two gone ones was decided again
    session.undo()
    assert count == dict(manifest=opening, sync=501, lines=501, opened=501)
    session.decide_all([dict(path=p, action='keep') for p in session.items.path])  # all pages at once
    assert count['sync'] == count['opened'] == 502 and session.progress()['left'] == 0
    assert len(session.undo_all()) == len(session.items)
    monkeypatch.undo()
    assert Session(ds, order).progress()['decided'] == 500
    assert len(ds.decisions) == 500 and len(session.groups) == 1


def test_a_file_unlinked_by_hand_is_removed_by_user(ds):
    order = order_of(ds)
    (ds.path / order.path[2]).unlink()
    with pytest.warns(VegcWarning, match='Gone from .*: 1 of 8 images'): session = Session(ds, order)
    line = session.standing()[order.path[2]]
    assert (line['action'], line['who']) == ('exclude', 'file check') and line['why'].startswith('removed_by_user')
    assert order.path[2] not in set(pd.read_csv(session.close()).name) and order.path[2] not in set(ds.labels.path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Session(ds, order)  # said and written once
    assert decisions_of(ds).read_text('utf-8').count('removed_by_user') == 1


def test_a_disk_that_is_not_there_is_no_decision(tmp_path):
    ds = make(tmp_path, files=False)
    with pytest.warns(VegcWarning, match='is the disk there'): Session(ds, order_of(ds))
    assert not decisions_of(ds).exists()


def test_opening_writes_nothing(ds):
    before = {p: p.stat().st_mtime_ns for p in ds.path.rglob('*')}
    session = Session(ds, order_of(ds))
    session.progress(), session.left(), session.groups, session.undo(), session.redo()
    after = {p: p.stat().st_mtime_ns for p in ds.path.rglob('*') if p.name != '.decisions.lock'}
    assert {p: t for p, t in after.items() if p != ds.path} == {p: t for p, t in before.items() if p != ds.path}


def test_decisions_of_another_dataset_are_refused(tmp_path, ds):
    order = order_of(ds)
    Session(ds, order).decide(order.path[0], 'keep')
    same_name = make(tmp_path / 'elsewhere', seed=1)
    decisions_of(same_name).write_bytes(decisions_of(ds).read_bytes())
    with pytest.raises(DatasetError, match='its images are others'): Session(same_name, order_of(same_name))
    with pytest.raises(DatasetError, match='its images are others'):
        (tmp_path / 'd.csv').write_text(f'path,action\n{order.path[1]},exclude\n', 'utf-8')
        clean(same_name, decisions=tmp_path / 'd.csv')


def test_a_grown_or_renamed_dataset_knows_its_own_log(ds):
    order = order_of(ds)
    Session(ds, order).decide(order.path[0], 'keep')
    more = [dict(key=f'new{i}', url=f'n{i}', given_label=LABELS[0], status='ok', path=f'images/x/new{i}.jpg',
                 sha256=f'new{i}') for i in range(500)]
    write_manifest(ds.path / 'manifest.parquet', manifest_frame(ds.df.to_dict('records') + more))
    config = ds.path / 'dataset.toml'
    config.write_text(config.read_text('utf-8').replace('name = "ds"', 'name = "other"'), 'utf-8')
    again = Session(ds.path, order)
    assert again.data.config.name == 'other' and again.progress()['decided'] == 1


def test_a_full_disk_keeps_all_or_nothing_of_a_step(ds, monkeypatch):
    order = order_of(ds)
    session = Session(ds, order)
    session.decide(order.path[0], 'keep')
    before = decisions_of(ds).read_bytes()

    class Full:
        def __init__(self, *args, **kw): self.file = open(*args, **kw)
        def __getattr__(self, name): return getattr(self.file, name)
        def __enter__(self): return self
        def __exit__(self, *e): self.file.close()
        def write(self, data): return self.file.write(data[:len(data)//2])
    with monkeypatch.context() as m:
        m.setattr(log_module, 'open', Full, raising=False)
        rows = [dict(path=p, action='exclude') for p in order.path[:4]]
        with pytest.raises(DiskFullError, match='decisions.jsonl'): session.decide_all(rows)
    assert decisions_of(ds).read_bytes() == before and session.progress()['decided'] == 1
    session.decide(order.path[1], 'exclude')
    assert actions(Session(ds, order).standing()) == {order.path[0]: ('keep', ''), order.path[1]: ('exclude', '')}


def test_a_damaged_line_is_named_and_a_missing_newline_is_none(ds):
    order = order_of(ds)
    session = Session(ds, order)
    session.decide_all([dict(path=p, action='keep') for p in order.path[:2]])
    decisions_of(ds).write_bytes(decisions_of(ds).read_bytes()[:-1])  # an editor that drops the last newline
    again = Session(ds, order)
    assert again.progress()['decided'] == 2
    again.decide(order.path[2], 'exclude')
    assert session.progress()['decided'] == len(ds.decisions) == Session(ds, order).progress()['decided'] == 3
    head, *lines = decisions_of(ds).read_text('utf-8').splitlines()
    decisions_of(ds).write_text('\n'.join([head, '{"id": 1, "pa', *lines]) + '\n', 'utf-8')
    with pytest.raises(DatasetError, match='decisions.jsonl has a damaged line'): Session(ds, order)


def test_a_log_that_was_replaced_is_read_anew(ds):
    order = order_of(ds)
    session = Session(ds, order)
    session.decide_all([dict(path=p, action='keep') for p in order.path[:4]])
    decisions_of(ds).rename(ds.path / 'old.jsonl')
    assert session.progress()['decided'] == 0
    session.decide(order.path[0], 'exclude')
    assert decisions_of(ds).read_text('utf-8').count('fingerprint') == 1 and len(ds.decisions) == 1


def test_what_cannot_be_decided_is_refused_whole(ds):
    order = order_of(ds)
    session = Session(ds, order)
    for bad, said in [(dict(path='x', action='keep'), 'no image'),
                      (dict(path=order.path[1], action='delete'), 'An action'),
                      (dict(path=order.path[1], action='relabel', label='none'), 'no class')]:
        with pytest.raises(UsageError, match=said): session.decide_all([dict(path=order.path[0], action='keep'), bad])
    assert not decisions_of(ds).exists()


def test_groups_and_the_best_of_them(ds):
    order = order_of(ds)
    session = Session(ds, order)
    group, = session.groups
    assert session.best_of(group).endswith('00006.jpg'), 'the larger one'
    session.decide(group[1], 'exclude')
    session.keep_best(group)  # what a person excluded is not brought back
    assert actions(session.standing()) == {group[0]: ('keep', ''), group[1]: ('exclude', '')}


def test_a_step_of_clean_is_one_undo_and_its_own(ds, tmp_path):
    order = order_of(ds)
    from vegc.core import replacing
    with replacing(ds.path / 'predictions/issues.parquet') as f: order.to_parquet(f)
    session = Session(ds, order, who='me')
    session.decide(order.path[4], 'keep')
    done = clean(ds, auto=.8)
    assert set(done.action) == {'relabel'} and set(done.who) == {'rule'} and order.path[4] not in set(done.path)
    assert done.attrs['left_alone'] == {'test pictures': 1, 'decided already': 1}
    session.decide(order.path[5], 'exclude')
    assert len(clean(ds, undo=True)) == len(done)
    assert actions(session.standing()) == {order.path[4]: ('keep', ''), order.path[5]: ('exclude', '')}
    assert session.undo()['path'] == order.path[5]
    table = worst_table(ds, 3, order=order)
    assert table.reason.str.contains('looks like').all() and list(table['rank']) == [1, 2, 3]


@pytest.mark.parametrize('text,said', [
    ('path,action\n"{p},exclude\n', 'never closed'), ('path,action\n{p},delete\n', 'Line 2 of'),
    ('path,do\n{p},keep\n', 'no column action'), ('', 'no column action, path'),
    ('path,action,label\n{p},relabel,none\n', "no class 'none', which"),
    ('path,action\n{p},keep\nx,keep\ny,keep\n', r"'x' \(and 1 more\), which")])
def test_a_file_of_decisions_that_is_not_one_changes_nothing(ds, tmp_path, text, said):
    (tmp_path / 'd.csv').write_text(text.replace('{p}', next(p for p in ds.images.path if ',' not in p)), 'utf-8')
    with pytest.raises(DatasetError, match=said): clean(ds, decisions=tmp_path / 'd.csv')
    assert not decisions_of(ds).exists()


def test_labels_with_quotes_commas_and_accents_go_through_files(ds, tmp_path):
    "A relabelling by CSV, out again by cleaned.csv, for each of the labels."
    paths = ds.images.path[:3].tolist()
    made = dict(path=paths, action='relabel', label=[LABELS[1], LABELS[2], LABELS[0]], why='"é", \'b\'')
    pd.DataFrame(made).to_csv(tmp_path / 'd.csv', index=False)
    clean(ds, decisions=tmp_path / 'd.csv')
    table = pd.read_csv(ds.path / 'cleaned.csv').set_index('name').label
    assert table[paths].tolist() == [LABELS[1], LABELS[2], LABELS[0]] and set(ds.decisions.why) == {'"é", \'b\''}


@pytest.mark.parametrize('n', [0, -3])
def test_no_worst_picture_is_asked_for(ds, n):
    with pytest.raises(UsageError, match='at least 1'): worst_table(ds, n, order=order_of(ds))


def test_the_name_in_the_log(ds, monkeypatch):
    monkeypatch.setattr(module.getpass, 'getuser', lambda: (_ for _ in ()).throw(KeyError('uid')))
    order = order_of(ds)
    Session(ds, order).decide(order.path[0], 'keep', why='Ωβ ゐ, "quoted"')
    line, = Session(ds, order).standing().values()
    assert (line['who'], line['why']) == ('unknown', 'Ωβ ゐ, "quoted"') and line['at'].endswith('Z')
    assert DecisionLog(ds.path).offset == 0
