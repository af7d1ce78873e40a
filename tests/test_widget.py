"""The cleaner without a browser: what it sends, in counts and bytes, and what each message does."""
import ast
import asyncio
import builtins
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from ipywidgets import Widget
from PIL import Image

from vegc.cleaning import widget as widgets
from vegc.cleaning.session import Session
from vegc.core import UsageError
from vegc.data.dataset import ImageDataset
from vegc.data.manifest import manifest_frame, write_manifest
from vegc.cleaning.widget import GridCleaner, ImageCleaner, PlainCleaner

LABELS = ["hrê d'or", 'a, "b" <b>', 'Ωβ ゐ']
N = 1000


def make(folder, n, side=(133, 100), noise=True):
    "Pictures of noise: nothing compresses worse."
    ds, rng, rows = ImageDataset(folder, subject='objects'), np.random.default_rng(0), []
    for i in range(n):
        path = f'images/{LABELS[i % 3]}/{i:05}.jpg'
        (ds.path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (side[1], side[0], 3), dtype=np.uint8)).save(ds.path / path, quality=90)
        rows.append(dict(key=str(i), url=f'u{i}', given_label=LABELS[i % 3], status='ok', path=path, sha256=str(i),
                         width=side[0] + i % 5, height=side[1], split=['train', 'valid', 'train', 'test'][i % 4],
                         duplicate_group=f'g{i//10}' if i % 10 in (2, 6) else None))
    write_manifest(ds.path / 'manifest.parquet', manifest_frame(rows))
    im = ds.images
    order = im[['path', 'url', 'given_label', 'split']].assign(
        predicted_label=LABELS[0], label_score=.2, score=.8, rank=range(1, n + 1), confidence=.9, outlier=.4,
        issue_types=['label;near', '', 'off_topic'] * (n // 3) + ['dark'] * (n % 3))
    order.attrs['dataset'] = str(ds.path)
    return ds, order


@pytest.fixture(scope='module')
def thousand(tmp_path_factory): return make(tmp_path_factory.mktemp('thousand') / 'ds', N)


@pytest.fixture
def few(tmp_path): return make(tmp_path / 'ds', 40)


class Comm:
    "What a front end would receive: every comm that is opened and every message with its size."
    def __init__(self, heard, **kw):
        self.heard, self.comm_id = heard, str(len(heard))
        self.heard.append(('open', kw.get('data'), kw.get('buffers') or []))
    def send(self, data=None, metadata=None, buffers=None): self.heard.append(('message', data, buffers or []))
    def on_msg(self, f): pass
    def on_close(self, f): pass
    def close(self, *args, **kw): pass


@pytest.fixture
def heard(monkeypatch):
    "Everything that goes over the wire."
    from ipywidgets.widgets import widget
    wire = []
    monkeypatch.setattr(widget.comm, 'create_comm', lambda **kw: Comm(wire, **kw))
    return wire


def size(messages):
    words = sum(len(json.dumps(data, ensure_ascii=False).encode()) for _, data, _ in messages)
    return words + sum(len(buffer) for _, _, buffers in messages for buffer in buffers)


def said(messages):
    custom = [data for kind, data, _ in messages if kind == 'message' and data.get('method') == 'custom']
    return [data['content'] for data in custom]


def press(cleaner, **message): cleaner._handle_custom_msg(message, [])


@pytest.mark.parametrize('page_size', [48, N])
def test_a_thousand_thumbnails_in_few_messages_and_bytes(thousand, heard, page_size):
    "To the first full view: at most 4 widget models, 40 messages, 3 MB; even for noise, and with all on one page."
    cleaner = ImageCleaner(thousand[1], page_size=page_size, test=True, who='me')
    press(cleaner, do='hello')
    pages = [m for m in said(heard) if m['is'] == 'page']
    pixels = [m for m in said(heard) if m['is'] == 'pixels']
    assert len(pages) == 1 and len(pages[0]['items']) == sum(len(m['ids']) for m in pixels) == page_size
    assert all(n > 500 for m in pixels for n in m['sizes']), 'every picture is there'
    models = sum(kind == 'open' for kind, _, _ in heard)
    print(page_size, 'a page:', models, 'models,', len(heard), 'messages,', size(heard), 'bytes')
    assert models <= 4 and len(heard) <= 40 and size(heard) <= 3_000_000, (models, len(heard), size(heard))


def test_paging_sends_only_the_page(thousand, heard):
    cleaner = ImageCleaner(thousand[1], page_size=50, test=True, who='me')
    press(cleaner, do='hello')
    first = len(heard)
    press(cleaner, do='show', page=7)
    sent = heard[first:]
    assert [m['is'] for m in said(sent)] == ['page', 'pixels', 'pixels', 'pixels'] and 'choices' not in said(sent)[0]
    items, pixels = said(sent)[0]['items'], said(sent)[1:]
    assert [i['id'] for i in items] == [i for m in pixels for i in m['ids']] == list(range(350, 400))
    assert not [k for k, d, _ in sent if k == 'open' or d.get('method') == 'update'], 'no model and no trait changes'
    assert size(sent) < 50 * 25_000


def test_a_decision_is_one_message_each_way_and_on_the_disk_before_the_answer(few, heard):
    ds, order = few
    cleaner = ImageCleaner(order, who='me')
    press(cleaner, do='hello')
    first = len(heard)
    on_disk, send, log = [], cleaner.send, ds.path / 'decisions.jsonl'

    def noted(*args, **kw):
        on_disk.append(log.read_text('utf-8').count('"action"'))
        send(*args, **kw)
    cleaner.send = noted
    press(cleaner, do='decide', n=1, rows=[dict(id=0, action='exclude')])
    assert len(heard) - first == 1 and on_disk == [1] and size(heard[first:]) < 600
    answer, = said(heard[first:])
    assert (answer['n'], answer['decisions']) == (1, {0: ['exclude', '', 'me', '']})
    assert answer['progress'] == dict(items=30, decided=1, left=29)


OPENING = '''
import sys
import pandas as pd
from PIL import Image
opened, real = [], Image.open
Image.open = lambda *a, **kw: (opened.append(a), real(*a, **kw))[1]
from vegc.cleaning.widget import ImageCleaner
order = pd.read_pickle(sys.argv[1] + '/order')
order.attrs['dataset'] = sys.argv[1]
c = ImageCleaner(order)
print(sorted({'torch', 'fastai', 'sklearn', 'timm'} & set(sys.modules)), len(opened))
'''


def test_opening_runs_no_model(few):
    "To open a cleaner on a table of issues neither torch nor fastai is even loaded, and no image is read."
    ds, order = few
    order.to_pickle(ds.path / 'order')
    done = subprocess.run([sys.executable, '-c', OPENING, str(ds.path)], capture_output=True, text=True)
    assert done.stdout.strip() == '[] 0', done.stderr


def test_no_pixel_is_part_of_the_state(few):
    cleaner = ImageCleaner(few[1])
    press(cleaner, do='hello')
    state = cleaner.get_state()
    assert not [k for k, v in state.items() if isinstance(v, (bytes, memoryview))]
    front_end = {'_esm', '_css', '_anywidget_id', 'layout', 'tabbable', 'tooltip', '_dom_classes', '_view_count'}
    names = {f'_{part}_{what}' for part in ('model', 'view') for what in ('module', 'module_version', 'name')}
    assert set(state) <= front_end | names
    bundle = cleaner._repr_mimebundle_()
    bundle = bundle[0] if isinstance(bundle, tuple) else bundle
    assert 'ImageCleaner on Session' in bundle['text/plain'] and not [k for k in bundle if k.startswith('image/')]


def test_what_is_on_the_page(few, heard):
    ds, order = few
    cleaner = ImageCleaner(order, test=True)
    press(cleaner, do='hello')
    page = said(heard)[0]
    choices = page['choices']
    assert [[v, n] for v, _, n in choices['labels']] == [[LABELS[1], 13], [LABELS[0], 14], [LABELS[2], 13]]
    assert {k: n for k, _, n in choices['kinds']} == {'label': 13, 'near': 13, 'off_topic': 13, 'dark': 1}
    assert {k: n for k, _, n in choices['splits']} == {'test': 10, 'train': 20, 'valid': 10}
    assert choices['duplicates'] == 4
    item = next(i for i in page['items'] if 'guess' in i)
    assert item['given'] in LABELS and (item['guess'], item['sure']) == (LABELS[0], .9)
    assert item['name'] == Path(item['path']).name
    assert any(i['split'] == 'test' for i in page['items'])


@pytest.mark.parametrize('view,fits', [
    (dict(label=LABELS[1]), lambda r: r.given_label == LABELS[1]),
    (dict(kind='near'), lambda r: 'near' in r.issue_types),
    (dict(split='test'), lambda r: r.split == 'test'),
    (dict(label=LABELS[2], split='valid'), lambda r: r.given_label == LABELS[2] and r.split == 'valid'),
    (dict(kind='nothing'), lambda r: False)])
def test_filters(few, heard, view, fits):
    order = few[1]
    cleaner = ImageCleaner(order, page_size=100, test=True)
    press(cleaner, do='show', page=0, view=view)
    assert [i['path'] for i in said(heard)[0]['items']] == [r.path for r in order.itertuples() if fits(r)]


def test_what_is_undecided_stays_on_its_page_while_one_decides(few, heard):
    cleaner = ImageCleaner(few[1], page_size=10, test=True)
    press(cleaner, do='show', page=0, view=dict(state='left'))
    press(cleaner, do='decide', n=1, rows=[dict(id=i, action='keep') for i in range(10)])
    press(cleaner, do='show', page=1)
    assert [i['id'] for i in said(heard)[-2]['items']] == list(range(10, 20)), 'no picture is skipped'
    press(cleaner, do='show', page=0, view=dict(state='left'))
    assert [i['id'] for i in said(heard)[-2]['items']] == list(range(10, 20))
    press(cleaner, do='show', page=0, view=dict(state='keep'))
    assert [i['id'] for i in said(heard)[-2]['items']] == list(range(10))


def test_several_at_once_are_one_step(few, heard):
    cleaner = ImageCleaner(few[1], who='me')
    rows = [dict(id=i, action='relabel', label=LABELS[2]) for i in range(3)]
    press(cleaner, do='decide', n=1, rows=rows, why='all Ω')
    press(cleaner, do='undo')
    answer = said(heard)[-1]
    assert answer['decisions'] == {0: None, 1: None, 2: None} and answer['can_redo'] and not answer['can_undo']
    press(cleaner, do='redo')
    assert [d[:2] + d[3:] for d in said(heard)[-1]['decisions'].values()] == [['relabel', LABELS[2], 'all Ω']] * 3
    assert cleaner.change() == [(i, LABELS[2]) for i in range(3)] and cleaner.delete() == []
    assert cleaner.fns == [cleaner.session.data.path / p for p in cleaner.session.items.path]


def test_copies_come_as_groups_and_the_best_is_kept_in_one_step(few, heard):
    cleaner = ImageCleaner(few[1], test=True)
    press(cleaner, do='show', page=0, view=dict(view='duplicates'))
    items = said(heard)[0]['items']
    groups = {g: [i for i in items if i['group'] == g] for g in dict.fromkeys(i['group'] for i in items)}
    assert len(groups) == 4 and all(len(g) == 2 and sum(i['best'] for i in g) == 1 for g in groups.values())
    press(cleaner, do='best', id=items[0]['id'])
    kept = {i: d[0] for i, d in said(heard)[-1]['decisions'].items()}
    assert kept == {i['id']: 'keep' if i['best'] else 'exclude' for i in groups[items[0]['group']]}
    press(cleaner, do='undo')
    assert cleaner.session.progress()['decided'] == 0


def test_a_missing_and_a_damaged_file_are_tiles(few, heard):
    ds, order = few
    (ds.path / order.path[0]).unlink()
    (ds.path / order.path[1]).write_bytes((ds.path / order.path[1]).read_bytes()[:3000])
    (ds.path / order.path[2]).write_text('<html>')
    with pytest.warns(match='removed_by_user'): cleaner = ImageCleaner(order, test=True)
    press(cleaner, do='hello')
    lost = {i: why for m in said(heard) if m['is'] == 'pixels' for i, why in m['lost'].items()}
    assert lost.keys() == {0, 1, 2} and lost[0] == 'the file is gone'
    assert all(why.startswith('cannot be read') for why in (lost[1], lost[2]))
    assert said(heard)[0]['decisions'][0][3].startswith('removed_by_user')
    press(cleaner, do='zoom', id=1)
    assert said(heard)[-1]['lost'] and heard[-1][2] == [b'']
    press(cleaner, do='zoom', id=5)
    assert len(heard[-1][2][0]) > 3000


def test_lists_follow_when_the_keys_rest_and_after_a_kill(few):
    ds, order = few
    table = ds.path / 'cleaned.csv'

    async def quick():
        cleaner = ImageCleaner(order)
        cleaner.finish_soon = lambda: type(cleaner).finish_soon(cleaner, .05)
        for i in range(3): press(cleaner, do='decide', n=i, rows=[dict(id=i, action='exclude')])
        assert not table.exists()
        await asyncio.sleep(.4)
        assert len(pd.read_csv(table)) == 37
    asyncio.run(quick())
    ImageCleaner(order).session.decide(order.path[9], 'exclude')  # and then killed
    assert len(pd.read_csv(table)) == 37
    ImageCleaner(order)
    assert len(pd.read_csv(table)) == 36


def test_what_goes_wrong_is_told_on_the_page(few, heard):
    ds, order = few
    cleaner = ImageCleaner(order)
    press(cleaner, do='decide', n=9, rows=[dict(id=0, action='relabel', label='nobody')])
    answer = said(heard)[-1]
    assert (answer['is'], answer['n']) == ('error', 9) and 'nobody' in answer['text']
    assert not (ds.path / 'decisions.jsonl').exists()


def test_test_pictures_are_left_out_unless_asked_for(few):
    assert set(ImageCleaner(few[1]).session.items.split) == {'train', 'valid'}
    assert set(ImageCleaner(few[1], test=True).session.items.split) == {'train', 'valid', 'test'}


def test_all_it_opens_on(few):
    ds, order = few
    (ds.path / 'predictions').mkdir()
    order.to_parquet(ds.path / 'predictions/issues.parquet')
    learn = SimpleNamespace(dls=SimpleNamespace(source=SimpleNamespace(dataset=ds)))
    mine = ([3, 1], ['x', 'y'], ds)
    paths = [ImageCleaner(what, test=True).session.items.path.tolist() for what in (order, ds, learn, mine)]
    assert paths[0] == paths[1] == paths[2] and paths[3] == ds.images.path.iloc[[3, 1]].tolist()
    for wrong in ('here', None, (1, 2)):
        with pytest.raises(UsageError, match='ImageCleaner takes a learner'): ImageCleaner(wrong)
    nameless = pd.DataFrame(order.iloc[:3].to_dict('list'))
    with pytest.raises(UsageError, match='does not say which dataset'): ImageCleaner(nameless)


def test_the_plain_form_stands_in_where_anywidget_is_missing(few, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kw):
        if name.split('.')[0] == 'anywidget': raise ImportError(name)
        return real(name, *args, **kw)
    monkeypatch.setattr(builtins, '__import__', without)
    for name in [m for m in sys.modules if m.split('.')[0] == 'anywidget']: monkeypatch.delitem(sys.modules, name)
    try:
        plain = importlib.reload(widgets)
        assert plain.ImageCleaner is plain.PlainCleaner
        cleaner = plain.ImageCleaner(few[1], page_size=10)
        cleaner.cells[0].exclude.click()
        cleaner.cells[1].relabel.value = LABELS[2]
        cleaner.buttons['keep the rest'].click()
        assert cleaner.session.progress()['decided'] == 10
        assert (cleaner.delete(), cleaner.change()) == ([0], [(1, LABELS[2])])
        assert 'Ωβ' in cleaner.cells[2].relabel.options[2][0] + cleaner.cells[2].relabel.options[3][0]
        ours = re.compile(f'<b>(exclude|{LABELS[0]}|hrê d&#x27;or)')
        assert '<b>' not in ours.sub('', cleaner.cells[0].text.value), 'a label is never markup'
        assert str(Session(*(few[0], few[1])).progress()['decided']) in cleaner.status.value
    finally:
        monkeypatch.undo()
        importlib.reload(widgets)


def test_the_front_end_sends_what_the_kernel_answers():
    "Each message that the page sends has a method, each answer a listener; what people wrote is text, never HTML."
    js, py = ((ROOT / f'vegc/cleaning/{name}').read_text('utf-8') for name in ('cleaner.js', 'widget.py'))
    asked = set(re.findall(r"\bdo: '(\w+)'", js)) | set(re.findall(r"do: \w+\.shiftKey \? '(\w+)' : '(\w+)'", js)[0])
    assigned = [n for n in ast.walk(ast.parse(py)) if isinstance(n, ast.Assign)]
    acts = next(n.value for n in assigned if getattr(n.targets[0], 'id', '') == 'acts')
    assert asked == {k.arg for k in acts.keywords}
    assert set(re.findall(r"m\.is === '(\w+)'", js)) == set(re.findall(r"'is': '(\w+)'", py))
    assert not re.search(r'innerHTML|outerHTML|insertAdjacentHTML|https?://', js)


def test_both_forms_offer_the_same(few):
    for name in ('session', 'fns', 'delete', 'change', 'finish'):
        assert hasattr(GridCleaner(few[1]), name) and hasattr(PlainCleaner(few[1], page_size=2), name)
    assert issubclass(ImageCleaner, Widget)
    assert pd.read_csv(ImageCleaner(few[1]).finish()).columns.tolist() == ['name', 'label']


def test_a_learner_opens_it_and_is_not_run(few):
    "A real one, whose network must not be asked; without saved issues it says which call makes them."
    from vegc.training.loaders import dataloaders
    from vegc.training.learner import image_learner
    ds, order = few
    learn = image_learner(dataloaders(ds, size=32, bs=8), 'small_cnn')
    learn.model.register_forward_pre_hook(lambda *a: pytest.fail('the model was run'))
    with pytest.raises(UsageError, match='find_issues'): ImageCleaner(learn)
    (ds.path / 'predictions').mkdir()
    order.to_parquet(ds.path / 'predictions/issues.parquet')
    cleaner = ImageCleaner(learn)
    press(cleaner, do='hello')
    assert cleaner.session.items.path.tolist() == order.path[order.split != 'test'].tolist()
