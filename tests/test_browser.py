"""The cleaner where people use it: JupyterLab in a real browser, on a thousand thumbnails."""
import json
import os
import signal
import time
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
from lab import Notebook, chromium, jupyterlab
from PIL import Image, ImageDraw

from vegc.data.dataset import ImageDataset
from vegc.data.manifest import manifest_frame, write_manifest

LABELS = ["hrê d'or", 'a, "b" <i>', 'Ωβ ゐ']
N = 1000


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "One server and one browser for the module: browser, address, folder."
    folder = tmp_path_factory.mktemp('lab')
    with jupyterlab(folder) as url, chromium() as browser: yield browser, url, folder


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    "A thousand drawn pictures, one of them gone and one damaged; worst first is the order of their numbers."
    ds, rows = ImageDataset(tmp_path_factory.mktemp('drawn') / 'ds', subject='objects'), []
    colours = np.random.default_rng(0).integers(0, 255, (N, 2, 3))
    for i in range(N):
        im = Image.new('RGB', (64, 48), tuple(map(int, colours[i, 0])))
        ImageDraw.Draw(im).ellipse((8 + i % 20, 8, 40 + i % 20, 40), fill=tuple(map(int, colours[i, 1])))
        path = f'images/{LABELS[i % 3]}/{i:05}.jpg'
        (ds.path / path).parent.mkdir(parents=True, exist_ok=True)
        im.save(ds.path / path)
        rows.append(dict(key=str(i), url=f'u{i}', given_label=LABELS[i % 3], status='ok', path=path, sha256=str(i),
                         width=64 + i % 7, height=48, split='test' if i % 10 == 9 else 'train',
                         duplicate_group='twins' if i in (20, 21, 23) else None))
    (ds.path / rows[5]['path']).write_bytes(b'no picture')
    (ds.path / rows[7]['path']).unlink()
    write_manifest(ds.path / 'manifest.parquet', manifest_frame(rows))
    df = pd.DataFrame(rows)
    order = df[['path', 'url', 'given_label', 'split']].assign(
        predicted_label=LABELS[0], label_score=.1, score=.9, rank=range(1, N + 1), confidence=.87, outlier=.3,
        issue_types=['label' if g != LABELS[0] else 'dark' for g in df.given_label])
    (ds.path / 'predictions').mkdir()
    order.to_parquet(ds.path / 'predictions/issues.parquet')
    return ds, df


FAKE = """js => {
    const module = URL.createObjectURL(new Blob([js], { type: 'text/javascript' }));
    const kernel = window.kernel = { asked: [], off: () => {} };
    kernel.on = (_, f) => { kernel.answer = f; };
    kernel.send = (m) => kernel.asked.push(m);
    return import(module).then(({ default: cleaner }) => { cleaner.render({ model: kernel, el: document.body }); });
}"""
VIEW = dict(view='images', label='', kind='', split='', state='', sort='', text='')


@pytest.fixture
def page():
    "The grid alone, with a kernel that says what the test says, when the test says it."
    with chromium() as browser:
        tab, said = browser.new_page(), []
        tab.on('pageerror', lambda e: said.append(str(e)))
        tab.evaluate(FAKE, (files('vegc.cleaning') / 'cleaner.js').read_text('utf-8'))
        yield tab
        assert said == []


def answer(tab, **m): tab.evaluate('m => window.kernel.answer(m, [])', m)


def answer_page(tab, ids, decisions=None, items_are=None, **more):
    item = dict(given='a', why='', also='', split='train', guess='b', sure=.3) | (items_are or {})
    items = [dict(id=i, path=f'{i}.jpg', name=f'{i}.jpg') | item for i in ids]
    choices = dict(classes=[['a', 'A'], ['b', 'B']], labels=[['a', 'a', 3], ['b', 'b', 2]], duplicates=0, kept_out=71,
                   sorts=[['', 'worst first'], ['sure', 'surest suggestion']],
                   kinds=[['label', 'label', 3]], splits=[['train', 'train', 4], ['test', 'test', 1]])
    counts = dict(progress=dict(items=5, decided=0, left=5), can_undo=False, can_redo=False)
    facts = dict(view=VIEW, page=0, pages=3, choices=choices) | counts | more
    answer(tab, **{'is': 'page'}, items=items, decisions=decisions or {}, **facts)


def chosen(tab):
    boxes = {name: tab.get_by_role('combobox', name=name, exact=True) for name in ('Class', 'Issue', 'Split')}
    return {name: box.input_value() for name, box in boxes.items()}


def test_an_answer_to_an_earlier_question_takes_back_no_later_choice(page):
    "Two filters in quick succession; the answer to the first comes when the second has been chosen."
    answer_page(page, [0, 1, 2])
    page.get_by_role('combobox', name='Class', exact=True).select_option('b')
    page.get_by_role('combobox', name='Split').select_option('test')
    asked = [m['view'] for m in page.evaluate('() => window.kernel.asked') if m['do'] == 'show']
    want = [VIEW | dict(label='b'), VIEW | dict(label='b', split='test')]
    assert asked == want, 'the second question holds the first choice too'
    answer_page(page, [1, 2], view=asked[0])  # late
    assert chosen(page) == dict(Class='b', Issue='', Split='test')
    page.get_by_role('combobox', name='Issue').select_option('label')
    assert page.evaluate('() => window.kernel.asked.at(-1).view') == VIEW | dict(label='b', split='test', kind='label')
    answer_page(page, [2], view=asked[1])
    answer_page(page, [4], view=asked[1] | dict(kind='label'))
    assert chosen(page) == dict(Class='b', Issue='label', Split='test')
    assert page.locator('.file').all_inner_texts() == ['4.jpg']
    answer_page(page, [0, 1, 2])  # the kernel shows all again: no choice of ours waits any more
    assert chosen(page) == dict(Class='', Issue='', Split='')


def test_a_decision_is_pale_until_the_kernel_says_it_is_on_the_disk(page):
    "Two keys before the first answer; the first is confirmed, the second refused and shown as it was."
    answer_page(page, [0, 1, 2], decisions={1: ['keep', '', 'bo', '']})
    tile = page.locator('.tile')
    tile.nth(0).click()
    page.keyboard.press('x')
    tile.nth(1).click()
    page.keyboard.press('x')
    assert [m['n'] for m in page.evaluate('() => window.kernel.asked') if m['do'] == 'decide'] == [1, 2]
    def pale(): return ['pending' in (tile.nth(i).get_attribute('class') or '') for i in range(3)]
    assert pale() == [True, True, False]
    counts = dict(progress=dict(items=5, decided=2, left=3), can_undo=True, can_redo=False)
    decided = {0: ['exclude', '', 'ana', '']}
    answer(page, **{'is': 'decided'}, n=1, decisions=decided, said='excluded: 0.jpg', **counts)
    assert pale() == [False, True, False] and page.locator('.counter').inner_text() == '2 of 5 decided · 3 left'
    answer(page, **{'is': 'error'}, n=2, text='No space is left.')
    assert pale() == [False, False, False] and page.locator('.alert').inner_text() == 'No space is left.'
    assert [tile.nth(i).get_attribute('data-action') for i in range(3)] == ['exclude', 'keep', '']


def test_the_class_that_begins_with_what_is_typed_comes_before_the_suggestion(page):
    "`shirt` typed where t-shirt is suggested: the shirt; nothing typed: the suggestion."
    classes = [[c, c] for c in ('t-shirt', 'dress', 'shirt', 'shorts', 'Nightshirt')]
    choices = dict(classes=classes, labels=[], duplicates=0, kinds=[], splits=[], sorts=[], kept_out=0)
    answer_page(page, [0], choices=choices)
    answer_page(page, [0], choices=choices, items_are=dict(guess='t-shirt'))
    page.locator('.tile').click()
    page.keyboard.press('r')
    def offered(): return page.locator('.classes [role=option]').evaluate_all('all => all.map(e => e.firstChild.data)')
    assert offered()[0] == 't-shirt'
    for typed, want in dict(shirt=['shirt', 't-shirt', 'Nightshirt'], sh=['shirt', 'shorts', 't-shirt', 'Nightshirt'],
                            T=['t-shirt', 'Nightshirt', 'shirt', 'shorts']).items():
        page.get_by_role('combobox', name='Class').last.fill(typed)
        assert offered() == want, typed
    page.get_by_role('combobox', name='Class').last.fill('shirt')
    page.keyboard.press('Enter')
    assert page.evaluate('() => window.kernel.asked.at(-1).rows') == [dict(id=0, action='relabel', label='shirt')]


def test_order_search_and_size_of_tiles(page):
    "What is typed goes out once the keys rest, with the other choices; an answer does not overwrite what is typed."
    answer_page(page, [0, 1, 2])
    assert page.locator('.out').inner_text() == '71 test images kept out'
    page.get_by_role('combobox', name='Order').select_option('sure')
    search = page.get_by_role('searchbox', name='Search')
    search.press_sequentially('cat')
    page.wait_for_function("() => window.kernel.asked.at(-1).view?.text === 'cat'")
    assert page.evaluate('() => window.kernel.asked.at(-1).view') == VIEW | dict(sort='sure', text='cat')
    search.press_sequentially('s')
    answer_page(page, [1], view=VIEW | dict(sort='sure', text='cat'))
    assert search.input_value() == 'cats'
    wide = page.locator('.tile').first.bounding_box()['width']
    page.get_by_role('combobox', name='Tiles').select_option('large')
    assert page.locator('.vegc-cleaner').evaluate('e => e.style.getPropertyValue("--tile")') == '220px' and wide > 0


def test_a_suggestion_says_what_its_number_is(page):
    answer_page(page, [0], items_are=dict(sure=.04))
    guess = page.locator('.guess')
    def said(): return [e.inner_text() for e in guess.locator('b, span').all()]
    assert said() == ['B?', '4 %'], 'an unlikely one is a question'
    assert '4 % is the chance that this suggestion is right' in guess.get_attribute('title')
    answer_page(page, [0], items_are=dict(sure=.87))
    assert said() == ['B', '87 %']
    answer_page(page, [0], items_are=dict(sure=None))
    assert said() == ['B']


STYLED = '''() => new Promise(done => { const e = document.createElement('style'); e.textContent = CSS_TEXT;
    document.head.append(e); requestAnimationFrame(done); })'''


@pytest.mark.parametrize('shape', [(60, 200), (200, 60), (90, 90)])
def test_a_tile_shows_the_whole_image_and_needs_no_font_for_its_signs(page, shape):
    "A tall image, a wide one: all of it lies inside the frame, corner to corner; signs are drawn, not written."
    import base64
    from io import BytesIO
    css, out = (files('vegc.cleaning') / 'cleaner.css').read_text('utf-8'), BytesIO()
    Image.new('RGB', shape, 'red').save(out, 'PNG')
    page.evaluate(STYLED.replace('CSS_TEXT', json.dumps(css)))
    answer_page(page, [0], decisions={0: ['exclude', '', 'ana', '']})
    page.evaluate(f"""() => {{ const t = document.querySelector('.tile'); t.classList.add('painted');
        t.querySelector('img').src = 'data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}'; }}""")
    img, frame = page.locator('.tile img').bounding_box(), page.locator('.tile .frame').bounding_box()
    assert all(abs(img[k] - frame[k]) < 1 for k in ('x', 'y', 'width', 'height')), (img, frame)
    assert page.locator('.tile img').evaluate('e => getComputedStyle(e).objectFit') == 'contain'
    signs = '✓✕✎⤢→‹›←↑↓'
    texts = page.locator('.vegc-cleaner').evaluate(
        '''e => [e.textContent, ...[...e.querySelectorAll('*')].flatMap(x =>
            ['::before', '::after'].map(p => getComputedStyle(x, p).content))].join('')''')
    assert not set(texts) & set(signs), set(texts) & set(signs)
    assert page.locator('.tile .mark svg').count() == 1 and page.locator('.tile .picks svg').count() == 4


CELL = '''
import warnings
import pandas as pd
from vegc.cleaning.widget import ImageCleaner
warnings.simplefilter('ignore')
issues = pd.read_parquet({path!r} + '/predictions/issues.parquet')
issues.attrs['dataset'] = {path!r}
cleaner = ImageCleaner(issues, who='ana', test=True, page_size={size})
cleaner
'''


def test_a_thousand_thumbnails_in_jupyterlab(lab, drawn):
    "One way through, in this order: what is decided first has to survive what comes later."
    ds, df = drawn
    notebook = Notebook(*lab, [CELL.format(path=str(ds.path), size=N), '6*7'], viewport=dict(width=1280, height=900))
    decide_by_key_and_mouse(notebook, ds, df)
    look_at_filters_duplicates_and_zoom(notebook, ds)
    names_for_those_who_do_not_see_it(notebook)
    for theme in ('JupyterLab Dark', 'JupyterLab Light'): can_be_read(notebook, theme)
    a_killed_kernel_loses_nothing_that_was_confirmed(notebook, ds)
    a_new_kernel_finds_every_decision_and_pages(notebook, ds, df)
    nothing_was_saved_or_asked_outside(notebook, lab[2])


def standing(ds):
    "What the disk says: number of the picture → action and label."
    return {int(r.path.split('/')[-1][:5]): (r.action, r.label) for r in ds.decisions.itertuples()}


def settle(notebook, decided):
    "Wait until the kernel has said how many are decided."
    text = "document.querySelector('.vegc-cleaner .counter')?.textContent"
    notebook.tab.wait_for_function(f"() => {text}.startsWith('{decided:,} of')", timeout=60_000)


def decide_by_key_and_mouse(notebook, ds, df):
    tab, tile = notebook.tab, notebook.tab.locator('.vegc-cleaner .tile')
    tab.wait_for_function(f"() => document.querySelector('.vegc-cleaner')?.dataset.painted === '{N}'", timeout=60_000)
    assert tile.count() == N and tab.locator('.vegc-cleaner .tile.unreadable').count() == 2
    assert 'cannot be read' in tile.nth(5).inner_text() and 'the file is gone' in tile.nth(7).inner_text()
    # the mouse: a click on a tile, its small buttons, the suggestion; then keys, each one decision
    tile.nth(0).click()
    for key in 'kxs': tab.keyboard.press(key)
    tile.nth(10).hover()
    tile.nth(10).locator('.pick.exclude').click()
    tile.nth(11).locator('.guess').click()
    settle(notebook, 6)  # with the file that is gone
    want = {0: ('keep', ''), 1: ('exclude', ''), 2: ('relabel', LABELS[0]), 7: ('exclude', ''), 10: ('exclude', ''),
            11: ('relabel', LABELS[0])}
    assert standing(ds) == want
    # several at once, one undo; relabel by typing; redo
    tile.nth(12).click()
    tile.nth(14).click(modifiers=['Shift'])
    tile.nth(16).click(modifiers=['Control'])
    tab.keyboard.press('x')
    settle(notebook, 10)
    tab.keyboard.press('Control+z')
    settle(notebook, 6)
    tab.keyboard.press('U')
    settle(notebook, 10)
    tile.nth(30).click()
    tab.keyboard.press('r')
    tab.keyboard.type('ωβ')
    tab.keyboard.press('Enter')
    settle(notebook, 11)
    tile.nth(30).click()
    tab.keyboard.press('w')
    tab.keyboard.type('an Ω, clearly')
    tab.keyboard.press('Enter')
    title = "document.querySelectorAll('.vegc-cleaner .tile')[30].querySelector('.mark').title"
    tab.wait_for_function(f"() => {title}.endsWith('by ana: an Ω, clearly')")
    assert ds.decisions.set_index('path').why[df.path[30]] == 'an Ω, clearly'
    want |= dict.fromkeys((12, 13, 14, 16), ('exclude', '')) | {30: ('relabel', LABELS[2])}
    assert standing(ds) == want
    tab.keyboard.press('a')  # no key of ours; of the notebook, it would insert a cell
    tab.wait_for_timeout(300)
    assert tab.locator('.jp-Cell').count() == 2, 'x cuts no cell, a inserts none'


def look_at_filters_duplicates_and_zoom(notebook, ds):
    tab, tile = notebook.tab, notebook.tab.locator('.vegc-cleaner .tile')
    def box(name): return tab.get_by_role('region', name='Image cleaner').get_by_role('combobox', name=name, exact=True)
    box('Class').select_option(LABELS[1])
    box('Split').select_option('test')
    tab.wait_for_function("() => document.querySelectorAll('.vegc-cleaner .tile').length < 100")
    want = [i for i in range(N) if i % 3 == 1 and i % 10 == 9]
    assert [int(f[:5]) for f in tab.locator('.vegc-cleaner .file').all_inner_texts()] == want
    assert tab.locator('.vegc-cleaner .badge.test').count() == len(want)
    for name in ('Class', 'Split'): box(name).select_option('')
    box('Show').select_option('duplicates')
    tab.wait_for_function("() => document.querySelectorAll('.vegc-cleaner .tile').length === 3")
    tile.nth(0).click()
    tab.keyboard.press('b')
    settle(notebook, 14)
    assert {i: standing(ds)[i] for i in (20, 21, 23)} == {20: ('keep', ''), 21: ('exclude', ''), 23: ('exclude', '')}
    tab.keyboard.press('Enter')
    tab.locator('dialog.zoom').wait_for()
    assert tab.locator('dialog.zoom dd').first.inner_text() in LABELS
    tab.keyboard.press('Escape')
    box('Show').select_option('images')
    tab.wait_for_function(f"() => document.querySelectorAll('.vegc-cleaner .tile').length === {N}")


def names_for_those_who_do_not_see_it(notebook):
    grid = notebook.tab.get_by_role('listbox', name='Images that need a look, worst first')
    assert grid.get_attribute('aria-multiselectable') == 'true'
    options = grid.get_by_role('option')
    first = options.first
    assert first.get_attribute('aria-label') == f'{LABELS[0]}, kept, is nearly black, 00000.jpg'
    said = options.nth(3 + 1).get_attribute('aria-label')
    assert said.startswith(f'{LABELS[1]}, perhaps {LABELS[0]} 87 %, undecided')
    first.click()
    assert grid.get_attribute('aria-activedescendant') == first.get_attribute('id')
    notebook.tab.keyboard.press('Space')
    assert first.get_attribute('aria-selected') == 'true'
    notebook.tab.keyboard.press('Escape')
    for name in ('Keep', 'Exclude', 'Undo', 'Redo', 'next page', 'page before', 'keys'):
        region = notebook.tab.get_by_role('region', name='Image cleaner')
        assert region.get_by_role('button', name=name).first.is_visible(), name
    assert notebook.tab.get_by_role('progressbar', name='decided').count() == 1
    assert notebook.tab.locator('.vegc-cleaner [role=status]').get_attribute('aria-live') == 'polite'


def contrast(notebook, selector):
    "Contrast of text and the ground under it, as WCAG reckons it."
    fg, bg = notebook.tab.evaluate("""s => { let e = document.querySelector(s); const fg = getComputedStyle(e).color;
        while (e && /rgba?\\(0, 0, 0, 0\\)|transparent/.test(getComputedStyle(e).backgroundColor)) e = e.parentElement;
        return [fg, getComputedStyle(e).backgroundColor]; }""", selector)

    def light(colour):
        rgba = [float(v) for v in colour[colour.index('(') + 1:-1].replace(',', ' ').split()[:3]]
        c = [v / 255 / 12.92 if v / 255 <= .03928 else ((v / 255 + .055) / 1.055) ** 2.4 for v in rgba]
        return .2126 * c[0] + .7152 * c[1] + .0722 * c[2]
    a, b = sorted((light(fg), light(bg)))
    return (b + .05) / (a + .05)


def can_be_read(notebook, theme):
    "Text and ground at least 4.5 to 1, as WCAG AA asks; the theme is followed."
    notebook.command('apputils:change-theme', theme=theme)
    dark = theme.endswith('Dark')
    notebook.tab.wait_for_function(f"() => document.body.dataset.jpThemeLight === '{str(not dark).lower()}'")
    ground = notebook.tab.evaluate("() => getComputedStyle(document.querySelector('.vegc-cleaner')).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(','))) < 300) == dark, ground
    for part in ('.given', '.guess b', '.mark', '.counter', '.bar label', '.bar button', '.bar select', '.tile .file'):
        assert contrast(notebook, f'.vegc-cleaner {part}') >= 4.5 - .3 * (part == '.tile .file'), part


def a_killed_kernel_loses_nothing_that_was_confirmed(notebook, ds):
    tab, before = notebook.tab, standing(ds)
    kernel = int(notebook.ask('import os; print(os.getpid())'))
    tab.locator('.vegc-cleaner .tile').nth(40).click()
    os.kill(kernel, signal.SIGKILL)
    tab.keyboard.press('x')  # at once: JupyterLab notices within seconds, and its dialog would be in the way
    tab.locator('.vegc-cleaner .alert').wait_for(state='visible', timeout=15_000)
    assert 'not on the disk yet' in tab.locator('.vegc-cleaner .alert').inner_text()
    assert 'pending' in tab.locator('.vegc-cleaner .tile').nth(40).get_attribute('class')
    assert standing(ds) == before and len(before) == 14, 'what was confirmed is there, what was not is not'
    tab.locator('.jp-Dialog button:has-text("Ok")').click(timeout=20_000)  # JupyterLab starts another kernel by itself
    notebook.wait_for_kernel()


def a_new_kernel_finds_every_decision_and_pages(notebook, ds, df):
    before = standing(ds)
    cell = 'window.jupyterapp.shell.currentWidget.content.widgets[0].model.sharedModel'
    notebook.tab.evaluate(f'code => {cell}.setSource(code)', CELL.format(path=str(ds.path), size=100))
    notebook.run_all()
    tab = notebook.tab
    tab.wait_for_function("() => document.querySelector('.vegc-cleaner .where')?.textContent === 'page 1 of 10'")
    tab.locator('.vegc-cleaner .tile').first.click()
    tab.keyboard.press('n')
    tab.wait_for_function("() => document.querySelector('.vegc-cleaner .where').textContent === 'page 2 of 10'")
    assert tab.locator('.vegc-cleaner .file').first.inner_text() == '00100.jpg'
    tab.locator('.vegc-cleaner .tile').nth(4).click()
    tab.keyboard.press('x')
    settle(notebook, 15)
    want = before | {104: ('exclude', '')}
    assert standing(ds) == want
    given = enumerate(zip(df.path, df.given_label, strict=True))
    labels = {path: label for i, (path, label) in given if want.get(i, ('',))[0] != 'exclude'}
    labels |= {df.path[i]: label for i, (action, label) in want.items() if action == 'relabel'}
    for _ in range(100):  # the list follows when the keys rest
        table = pd.read_csv(ds.path / 'cleaned.csv')
        if df.path[104] not in set(table.name): break
        time.sleep(.1)
    assert dict(zip(table.name, table.label, strict=True)) == labels
    lines = [json.loads(line) for line in (ds.path / 'decisions.jsonl').read_text('utf-8').splitlines()]
    assert {r['who'] for r in lines if 'path' in r} == {'ana', 'file check'}


def nothing_was_saved_or_asked_outside(notebook, folder):
    notebook.command('docmanager:save')
    text = (folder / 'work/n.ipynb').read_text('utf-8')
    assert 'image/jpeg' not in text and len(text) < 20_000, 'no picture is saved with the notebook'
    assert notebook.said == [] and notebook.outside == []
