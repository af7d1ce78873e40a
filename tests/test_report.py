"""The report: one file, no network request; it says what evaluate says, shows no person, hurts nobody's file."""
import base64
import hashlib
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import vegc.data.manifest
import vegc.plots.page
import vegc.plots.stage_facts
from vegc.acquire.add import add
from vegc.cleaning.issues import find_issues
from vegc.core import DatasetError, UsageError
from vegc.data.dataset import ImageDataset
from vegc.data.folder import Gone
from vegc.data.manifest import manifest_frame, write_manifest
from vegc.evaluation.compare import compare
from vegc.evaluation.crossval import linear_predictions
from vegc.evaluation.evaluate import evaluate
from vegc.evaluation.health import class_facts, funnel
from vegc.evaluation.metrics import how_often, most_confused
from vegc.evaluation.predictions import predictions, test_looks
from vegc.plots.charts import MatrixView
from vegc.plots.page import Thumbnails, matrix_svg
from vegc.plots.report import erase, report
from vegc.plots.stage_facts import worst_mistakes
from vegc.splits.split import split
from vegc.training.train import train

test_looks.__test__ = False  # a function of the package, not a test
NAMES = {'red': 'Bún chả', 'green': "<script>alert('x')</script>", 'blue': '<b>blue</b> & "co"'}


@pytest.fixture(scope='module')
def untrained(tmp_path_factory):
    "Three classes of drawn pictures: every tenth under a wrong name, one under two, one of one colour, one cut short."
    src, draw = tmp_path_factory.mktemp('report') / 'drawn', np.random.default_rng(0)
    for i in range(120):
        label = list(NAMES)[i % 3]
        pixels = draw.integers(0, 130, (9, 12, 3), dtype=np.uint8)
        pixels[..., i % 3] += 90
        where = src / (list(NAMES)[(i + 1) % 3] if i % 10 == 9 else label)
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((96, 72), Image.Resampling.BICUBIC).save(where / f'{i:03}.png')
    shutil.copy(src / 'red/000.png', src / 'green/shared.png')
    Image.new('RGB', (64, 64), 'white').save(src / 'blue/white.png')
    (src / "blue/<i>short'.png").write_bytes((src / 'blue/002.png').read_bytes()[:200])
    folder = src.with_name('set')
    add(src, folder, subject='other')
    classes = pd.DataFrame(dict(slug=NAMES.keys(), name=NAMES.values(), superclass=['warm', 'cold', 'cold']))
    (folder / 'classes.csv').write_text(classes.to_csv(index=False), 'utf-8')
    return ImageDataset(folder)


def copy_of(dataset, folder): return ImageDataset(shutil.copytree(dataset.path, folder))


@pytest.fixture(scope='module')
def dataset(untrained, tmp_path_factory):
    "The same with splits, a stage of each part, and issues."
    ds = copy_of(untrained, tmp_path_factory.mktemp('trained') / 'set')
    split(ds, valid=.2, test=.2)
    train(ds, arch='efficientnet_lite0', size=32, bs=16, head='mlp', epochs=(1, 4))
    find_issues(ds, stage='raw')
    return ds


@pytest.fixture(scope='module')
def page(dataset): return report(dataset, 'raw').read_text('utf-8')


ADDRESSES = ('src', 'href', 'srcset', 'poster', 'action', 'data', 'xlink:href', 'formaction')


class Asked(HTMLParser):
    "What a page would ask for, and which tags it has."
    def __init__(self, html):
        super().__init__()
        self.tags, self.addresses, self.ids = [], [], set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v or '' for k, v in attrs if k in ADDRESSES]
        self.ids |= {v for k, v in attrs if k == 'id'}


def text_of(html): return re.sub(r'\s+', ' ', re.sub(r'<[^>]+>', ' ', html))


# ---- what it says

def test_the_numbers_are_those_of_evaluate(dataset, page):
    m, text = evaluate(dataset, 'raw', 'test'), text_of(page)
    low, high = m.intervals['accuracy']
    assert f'Accuracy {m.accuracy:.1%} on {m.n} test images' in text
    times = f'{m.accuracy/m.chance["majority"]:.1f} times the largest class'
    assert f'95 % interval {low:.1%} to {high:.1%}; {times}' in text
    for name, value in m.scores.items(): assert re.search(rf'{name.replace("_", " ")} +{value:.3f}', text), name
    for r in m.per_class.itertuples(): assert f'{r.recall:.1%}' in text and f'{r.precision:.1%}' in text
    cells = re.findall(r'<title>.*?: (\d+) of \d+ \(', page)
    assert sum(map(int, cells)) == m.n


def test_the_plain_model_is_judged_on_the_same_pictures(dataset, page):
    table, linear = predictions(dataset, 'raw', 'test'), linear_predictions(dataset, 'raw', 'test')
    assert linear.path.tolist() == table.path.tolist() and linear.label.tolist() == table.label.tolist()
    accuracy = (linear.label == linear.predicted_label).mean()
    assert re.search(rf'Linear model on frozen features +{accuracy:.1%}', text_of(page))


def test_confusions_and_before_and_after_are_those_of_evaluate(dataset, page):
    top, text = most_confused(evaluate(dataset, 'raw', 'test')).iloc[0], text_of(page)
    assert f'{top["count"]} of {top.n}' in text and f'{top.rate:.1%}' in text
    assert compare(dataset, 'raw-1', 'raw', 'test').sentence in text.replace('&lt;', '<')


def test_the_first_screen_has_its_order(page):
    heads = ['Accuracy', 'The twelve worst images', 'Most often confused', 'Files, images fetched, decoded, kept',
             'The weakest classes', 'Before and after', 'Confusion matrix', 'Learning curves', 'Every class',
             'Decisions', 'Run card']
    places = [page.index(h) for h in heads]
    assert places == sorted(places)
    assert 1 <= page.count('<figure') <= 12 and ('likely wrong label' in page or 'model wrong' in page)


def test_one_headline_whole_numbers_and_nothing_against_itself(dataset, page):
    m = evaluate(dataset, 'raw', 'test')
    head, = re.findall(r'<h1>(.*?)</h1>', page)
    assert head.startswith(f'Accuracy {m.cross_validated.accuracy:.1%}, cross-validated on'), 'few images: that one'
    assert page.count('cross-validated on') == 1
    with pytest.raises(UsageError, match='named twice'): compare(dataset, 'raw', 'raw')
    with pytest.raises(UsageError, match='named twice'): report(dataset, 'raw', before='raw')
    from matplotlib import pyplot as plt

    from vegc.plots.charts import plot_classes, plot_history
    rows = [dict(part='frozen', epoch=1, train_loss=1., valid_loss=1., accuracy=.5)]
    few = pd.DataFrame(dict(train=[1, 1], test=[1, 0]), index=['a', 'b'])
    for ax in (*plot_history(rows*2, None), *plot_history(rows, None), plot_classes(few)):
        ax.figure.canvas.draw()
        ticks = [t.get_text() for t in ax.get_xticklabels()]
        assert ticks and all(t.lstrip('−-').replace(',', '').isdigit() for t in ticks), ticks
        assert len(set(ticks)) == len(ticks)
        plt.close(ax.figure)


def test_the_weakest_classes_are_the_weakest_and_thin_ones_are_marked():
    from types import SimpleNamespace

    from vegc.evaluation.metrics import metrics_of
    from vegc.plots.stage_facts import weakest_classes
    right = dict(big=(30, 27), thin_bad=(6, 0), thin_good=(5, 5), one=(1, 0), fine=(20, 20))
    rows = [(c, c if i < k else 'big' if c != 'big' else 'fine') for c, (n, k) in right.items() for i in range(n)]
    table = pd.DataFrame(rows, columns=['label', 'predicted_label'])
    for c in right: table[f'p_{c}'] = np.where(table.predicted_label == c, .9, .025)
    facts = pd.DataFrame(dict(pictures=40, rows=40, failed=0, shared=0, partner='', judged=0, agree=0, suspects=0,
                              name=list(right)), index=list(right))
    of = SimpleNamespace(classes=facts, names={}, name=str)
    weak = weakest_classes(of, metrics_of(table, times=20))
    assert [(c.name, c.thin) for c in weak] == [('thin_bad', True), ('one', True), ('big', False)]


def test_the_worst_come_in_the_order_of_their_loss(dataset):
    table = predictions(dataset, 'raw', 'test')
    worst = worst_mistakes(table, {}, k=3)
    wrong = table[table.label != table.predicted_label].sort_values('loss', ascending=False)
    assert worst.path.tolist() == wrong.path.tolist()[:3] and set(worst.kind) == {'model wrong'}


def test_looking_at_test_is_counted_and_said(dataset):
    before = test_looks(dataset)
    html = report(dataset, 'raw').read_text('utf-8')
    assert test_looks(dataset) > before
    assert f'{how_often(test_looks(dataset))}, this page included' in html
    assert re.search(r'training took</dt><dd>\d+ (seconds|minutes)<', html)
    assert [how_often(n) for n in (1, 2, 1000)] == ['1 time', '2 times', '1,000 times']


def test_valid_is_taken_and_named_where_test_is_small(dataset, tmp_path):
    ds = copy_of(dataset, tmp_path / 'set')
    test = ds.images[ds.images.split == 'test'].assign(split='none').iloc[:-9]
    ds.update(test, ['split'], reassign=True)
    looks, html = test_looks(ds), report(ds, 'raw').read_text('utf-8')
    text = text_of(html)
    assert 'valid images : 95 % interval' in text and '9 test images are too few to say' in text
    assert test_looks(ds) == looks, 'test was not looked at'


def test_corrected_labels_stand_beside_given_ones(dataset, tmp_path):
    from vegc.cleaning.clean import clean
    ds = copy_of(dataset, tmp_path / 'set')
    one = predictions(ds, 'raw', 'test').query('label != predicted_label').iloc[0]
    decided = dict(path=one.path, action='relabel', label=one.predicted_label, who='An', why='<i>looks</i> so')
    pd.DataFrame([decided]).to_csv(tmp_path / 'd.csv', index=False)
    clean(ds, decisions=tmp_path / 'd.csv')
    html = report(ds, 'raw').read_text('utf-8')
    assert 'On labels as given' in html and 'On corrected labels' in html
    assert '1 relabel' in text_of(html) and '&lt;i&gt;looks&lt;/i&gt; so' in html


def test_without_features_the_page_says_so(dataset, tmp_path, monkeypatch):
    ds = copy_of(dataset, tmp_path / 'set')
    (ds.path / 'predictions/issues.parquet').unlink()
    monkeypatch.setattr(vegc.plots.stage_facts, 'linear_predictions', lambda *a: None)
    html = report(ds, 'raw').read_text('utf-8')
    assert 'No frozen features at hand' in html and 'Linear model on frozen' not in html


def test_groups_of_classes_have_a_figure_and_small_ones_none(page):
    groups = re.findall(r'<tr><td>(warm|cold)</td><td class="n">(\d+)</td><td class="n">(.*?)</td>', page)
    assert [g[0] for g in groups] == ['cold', 'warm'] and 'stay inside their superclass' in page
    for _, n, value in groups: assert (value == 'too few to say') == (int(n) < 10)


# ---- before any training

def test_an_untrained_dataset_gets_a_health_report(untrained):
    html = report(untrained).read_text('utf-8')
    steps = funnel(untrained)
    assert f'{steps[-1].count} usable images in 3 classes' in html and 'No stage has been trained' in html
    assert [s.name for s in steps] == ['files', 'distinct', 'fetched', 'decoded', 'kept'] and steps[0].count == 123
    for before, after in zip(steps, steps[1:], strict=False):
        assert before.count - sum(after.lost.values()) == after.count
    assert 'truncated' in html and 'Filed under both' in html
    assert 'under several classes' in html and 'flagged blank' in html
    assert class_facts(untrained).shared.tolist() == [1, 1, 0]


def test_lists_are_counted_as_the_plan_counts_them(tmp_path):
    from vegc.acquire.lists import plan
    ds = ImageDataset(tmp_path / 'set', subject='other')
    (ds.path / 'urls').mkdir()
    lines = ('1', '', '', '2', '2', '3', '4')
    (ds.path / 'urls/a.csv').write_text('\n'.join(f'https://x.example/{k}' if k else '' for k in lines))
    (ds.path / 'urls/b.csv').write_text('https://x.example/1\n')
    rows = plan(ds.path, max_per_class=4).rows
    rows = rows.assign(status='failed', error_message='http_404: gone')
    write_manifest(ds.path / 'manifest.parquet', manifest_frame(rows))
    lines, distinct, *rest = funnel(ds)
    assert (lines.name, lines.count) == ('lines', 8)
    assert distinct.count == 3 and distinct.lost == {'blank': 2, 'left out by the cap': 1, 'repeats': 2}
    assert [s.count for s in rest] == [0, 0, 0] and rest[0].lost == {'http_404': 3}
    html = report(ds).read_text('utf-8')
    assert '0 usable images in 2 classes' in html
    assert 'no model can pass' not in html, 'addresses that never had an image contradict nobody'


def test_rows_without_an_image_are_shared_by_nobody(untrained, tmp_path):
    "A bad line in every list, a dead host and one image under three classes: only the last one is shared."
    ds = copy_of(untrained, tmp_path / 'set')
    before = class_facts(ds), report(ds).read_text('utf-8')
    bad = [dict(key=f'{u}{c}{i}', url=u, given_label=c, status='failed', error_message='bad_url: no address')
           for c in NAMES for u in ('not a url', 'https://dead.example/1.jpg') for i in range(10)]
    write_manifest(ds.path / 'manifest.parquet', manifest_frame(pd.concat([ds.df, manifest_frame(bad)])))
    ds = ImageDataset(ds.path)
    assert class_facts(ds).shared.tolist() == before[0].shared.tolist() == [1, 1, 0]
    ceiling = re.compile(r'no model can pass ([\d.]+%)')
    assert ceiling.findall(report(ds).read_text('utf-8')) == ceiling.findall(before[1]) != []
    one = ds.df[ds.df.sha256.notna() & ds.df.sha256.duplicated()].head(1)
    third = one.assign(key='third', given_label='blue', status='review')
    write_manifest(ds.path / 'manifest.parquet', manifest_frame(pd.concat([ds.df, third])))
    assert class_facts(ImageDataset(ds.path)).shared.tolist() == [1, 1, 1], 'one image of each class'


def test_an_empty_dataset_is_no_accident(tmp_path):
    html = report(ImageDataset(tmp_path / 'set', subject='other')).read_text('utf-8')
    assert '0 usable images in 0 classes' in html and 'There is no image yet' in html


# ---- what it must not do

def test_nothing_is_asked_of_anybody(page):
    asked = Asked(page)
    script = re.search(r'<script>(.*?)</script>', page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert f'content="{policy}"' in page, 'the browser itself forbids it'
    assert asked.tags.count('script') == 1 and 'iframe' not in asked.tags and asked.tags.count('img') > 10
    assert not re.search(r'fetch|XMLHttp|import\(|WebSocket|sendBeacon|eval|innerHTML', script)
    inside = ('data:image/jpeg;base64,', '#')
    assert [a[:60] for a in asked.addresses if not a.startswith(inside) and a != 'data:,'] == []
    assert not re.search(r'url\((?!#)|@import', page)
    assert {a[1:] for a in asked.addresses if a.startswith('#')} <= asked.ids
    assert len(page) < 10_000_000


def test_names_are_text_and_never_markup(page, untrained):
    for html in (page, report(untrained).read_text('utf-8')):
        assert 'Bún chả' in html and '&lt;script&gt;alert(' in html and '&lt;b&gt;blue&lt;/b&gt; &amp; ' in html
        assert html.count('<script') == 1 and '<b>blue' not in html
        assert "<i>short" not in html


def test_people_are_never_shown(dataset, tmp_path):
    ds = copy_of(dataset, tmp_path / 'set')
    toml = ds.path / 'dataset.toml'
    toml.write_text(toml.read_text().replace('"other"', '"people"'))
    html = report(toml.parent, 'raw', pixels=True).read_text('utf-8')
    assert 'img' not in Asked(html).tags and 'data:image' not in html
    assert 'The twelve worst images' in html and 'not a fact about anybody' in html
    assert 'A cell shows its images' not in html, 'nor promised'


def test_licenses_are_listed_and_pictures_of_others_are_pointed_out(untrained, tmp_path):
    ds = copy_of(untrained, tmp_path / 'set')
    assert 'The images were taken from files' in report(ds).read_text('utf-8')
    rows = ds.df.assign(url=[f'https://{"ab"[i % 2]}.example/{i}.png' for i in range(len(ds.df))])
    rows['license'] = ['CC BY 4.0' if i % 3 == 0 else None for i in range(len(rows))]
    rows['creator'] = ['An' if i % 3 == 0 else None for i in range(len(rows))]
    write_manifest(ds.path / 'manifest.parquet', manifest_frame(rows))
    ds = ImageDataset(ds.path)
    n, used = len(ds.labels), ds.df[ds.df.path.isin(ds.labels.path)].drop_duplicates('path')
    known = int(used.license.notna().sum())
    html = report(ds).read_text('utf-8')
    text = text_of(html)
    assert f'came from 2 hosts; for {n - known} no license is known' in text
    assert f'CC BY 4.0 {known} 1' in text and f'not known {n - known} 0' in text
    assert f'This page holds {html.count("<img")} small copies' in text and '--no-pixels makes one without' in text
    bare = report(ds, pixels=False).read_text('utf-8')
    assert 'small copies' not in bare, 'nothing to point out where nothing is shown'
    rows['url'] = rows.url.where(rows.license.notna(), rows.key)
    write_manifest(ds.path / 'manifest.parquet', manifest_frame(rows))
    said = report(ds).read_text('utf-8')
    assert 'small copies' not in said, "one's own files have no license, and what others made has one"


def test_no_pixel_is_read_when_none_is_shown(dataset, tmp_path, monkeypatch):
    def forbidden(*a, **k): raise AssertionError('a picture was opened')
    monkeypatch.setattr(vegc.plots.page, 'thumbnail', forbidden)
    html = report(dataset, 'raw', out=tmp_path / 'bare.html', pixels=False).read_text('utf-8')
    assert 'img' not in Asked(html).tags and 'data:image' not in html and '<figure' in html


def test_the_file_stays_small(untrained):
    thumbs = Thumbnails(untrained.path, budget=20_000)
    shown = [u for p in untrained.images.path for u in [thumbs.uri(p)] if u]
    assert 3 < len(shown) < 60 and sum(map(len, shown)) < 25_000
    names, counts = [f'class {i}' for i in range(54)], np.ones((54, 54), int)
    assert len(matrix_svg(MatrixView(counts, counts.sum(1), names, np.arange(54), []), names)) < 1_000_000


def test_a_missing_picture_is_left_out(dataset, tmp_path):
    ds = copy_of(dataset, tmp_path / 'set')
    report(ds, 'raw')  # with its predictions, which need the images
    for file in (ds.path / 'images').rglob('*.png'): file.unlink()
    html = report(ds, 'raw').read_text('utf-8')
    assert 'The twelve worst images' in html and '<figure' in html and '<img' not in html


def test_somebody_elses_file_is_refused_and_ours_replaced(untrained, tmp_path):
    mine = tmp_path / 'page.html'
    mine.write_text('<html>my thesis</html>')
    with pytest.raises(UsageError, match='not made by vegc'): report(untrained, out=mine)
    assert mine.read_text() == '<html>my thesis</html>'
    with pytest.raises(UsageError, match='is a folder'): report(untrained, out=tmp_path)
    with pytest.raises(UsageError, match='no stage'): report(untrained, 'nothing')
    with pytest.raises(UsageError, match='no stage'): report(untrained, before='raw')
    out = report(untrained, out=tmp_path / 'new/page.html')
    assert report(untrained, out=out) == out
    assert report(untrained) == untrained.path / 'report.html'


def test_the_newest_stage_is_taken(dataset): assert 'Stage raw<' in report(dataset).read_text('utf-8')


def test_one_report_reads_the_manifest_once(dataset, untrained, monkeypatch):
    read, reads = vegc.data.manifest.read_manifest, []
    def counted(path, *a, **kw):
        reads.append(path)
        return read(path, *a, **kw)
    monkeypatch.setattr(vegc.data.manifest, 'read_manifest', counted)
    report(dataset, 'raw')
    assert len(reads) == 1
    report(untrained)
    assert len(reads) == 2


def test_the_same_data_makes_the_same_page(untrained):
    def made(): return re.sub(r'\d{4}-\d\d-\d\d(T[\d:]+Z)?', '', report(untrained).read_text('utf-8'))
    assert made() == made()


def test_pages_of_vegc_go_with_an_image_and_nobody_elses(untrained, tmp_path):
    ds = copy_of(untrained, tmp_path / 'set')
    (ds.path / 'mine.html').write_text('<html>my thesis</html>')
    page = report(ds)
    assert erase(ds.path, Gone(urls=frozenset(['https://x.example/1']))) == [] and page.exists()
    assert erase(ds.path, Gone(paths=frozenset([ds.images.path[0]]))) == [page] and not page.exists()
    assert (ds.path / 'mine.html').exists()


def test_a_report_follows_no_link_out_of_the_dataset(untrained, tmp_path):
    ds = copy_of(untrained, tmp_path / 'set')
    outside = tmp_path / 'outside.html'
    outside.write_text('<meta name="generator" content="vegc/0">')
    (ds.path / 'report.html').unlink(missing_ok=True)
    (ds.path / 'report.html').symlink_to(outside)
    with pytest.raises(DatasetError, match='link'): report(ds)
    with pytest.raises(DatasetError, match='link'): erase(ds.path, Gone(paths=frozenset(['a'])))
    assert outside.read_text() == '<meta name="generator" content="vegc/0">'


# ---- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@pytest.fixture(scope='module')
def browser():
    "A real browser without a network. Where continuous integration lacks one, that is a failure."
    if CHROMIUM is None:
        if os.environ.get('CI'): pytest.fail('no chromium: .ci/run installs it')
        pytest.skip('no chromium is installed')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        options = ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage']
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


def opened(browser, path, **options):
    "Open a file offline: the page, what it asked for besides itself, what the console complained about."
    context = browser.new_context(offline=True, **options)
    tab, asked, said = context.new_page(), [], []
    tab.on('request', lambda r: asked.append(r.url) if not r.url.startswith('data:') else None)
    tab.on('console', lambda m: said.append(m.text) if m.type in ('error', 'warning') else None)
    tab.on('pageerror', lambda e: said.append(str(e)))
    tab.goto(Path(path).resolve().as_uri(), wait_until='load')
    return tab, asked[1:], said


@pytest.mark.parametrize('width', [1280, 390])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_it_opens_from_disk_with_the_network_off(browser, dataset, page, width, scheme):
    view = dict(viewport=dict(width=width, height=900), color_scheme=scheme)
    tab, asked, said = opened(browser, dataset.path / 'report.html', **view)
    assert asked == [] and said == []
    assert tab.evaluate('document.documentElement.scrollWidth') <= width, 'it scrolls sideways'
    assert tab.evaluate('[...document.images].every(i => i.naturalWidth > 0)') and tab.locator('img').count() > 10
    light = tab.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(250, 249, 247)'
    assert light == (scheme == 'light')


def cell_with_mistakes(tab):
    "The first red cell, the pictures that it promises, and the place it leads to."
    link = tab.locator('svg.matrix a:has(rect.no)').first
    count = int(re.search(r': (\d+) of', link.get_attribute('aria-label'))[1])
    return link, count, tab.locator('#' + link.get_attribute('href')[1:])


def test_a_click_on_a_cell_shows_just_those_pictures(browser, dataset, page):
    tab, asked, said = opened(browser, dataset.path / 'report.html')
    link, count, source = cell_with_mistakes(tab)
    panel = tab.locator('#cell')
    assert not panel.is_visible() and not source.is_visible()
    link.click()
    panel.wait_for(state='visible')
    shown = [i.get_attribute('title') for i in panel.locator('img').all()]
    i, j = (int(link.get_attribute(f'data-{k}')) for k in 'ij')
    table = predictions(dataset, 'raw', 'test')
    order = dataset.classes.slug.tolist()
    mine = table[(table.label == order[i]) & (table.predicted_label == order[j])].path
    assert len(shown) == count and set(shown) == set(mine) and link.get_attribute('aria-expanded') == 'true'
    assert asked == [] and said == []


def test_the_matrix_works_from_the_keyboard(browser, dataset, page):
    tab, _, said = opened(browser, dataset.path / 'report.html')
    links = tab.locator('svg.matrix a')
    assert links.evaluate_all('all => all.filter(a => a.tabIndex === 0).length') == 1, 'one stop for the tabulator'
    links.first.focus()
    def at(): return tab.evaluate('[document.activeElement.dataset.i, document.activeElement.dataset.j].map(Number)')
    start = at()
    tab.keyboard.press('ArrowDown')
    down = at()
    assert down[0] > start[0]
    tab.keyboard.press('ArrowUp')
    assert at()[0] < down[0]
    tab.keyboard.press('Enter')
    panel = tab.locator('#cell')
    panel.wait_for(state='visible')
    assert panel.locator('img').count() > 0
    tab.keyboard.press('Escape')
    assert not panel.is_visible() and said == []


def test_without_the_script_a_cell_still_leads_to_its_pictures(browser, dataset, page):
    tab, _, _ = opened(browser, dataset.path / 'report.html', java_script_enabled=False)
    link, count, source = cell_with_mistakes(tab)
    link.click()
    source.wait_for(state='visible')
    assert source.locator('img').count() == count


def test_tables_sort_by_number_and_back(browser, dataset, page):
    tab, _, said = opened(browser, dataset.path / 'report.html')
    button = tab.get_by_role('button', name='recall', exact=True)
    head = tab.locator('th', has=button)
    column = '''() => {
        const heads = [...document.querySelectorAll('th')];
        const h = heads.find(t => t.textContent === 'recall' && t.querySelector('button'));
        return [...h.closest('table').rows].slice(1).map(r => parseFloat(r.cells[h.cellIndex].textContent)); }'''
    def values(): return tab.evaluate(column)
    before = values()
    button.click()
    assert values() == sorted(before) and head.get_attribute('aria-sort') == 'ascending'
    button.click()
    assert values() == sorted(before, reverse=True) and len(set(before)) > 1 and said == []


def test_it_prints_light_and_whole(browser, dataset, page):
    a4 = dict(width=794, height=1123)  # at 96 dpi
    tab, _, _ = opened(browser, dataset.path / 'report.html', color_scheme='dark', viewport=a4)
    tab.emulate_media(media='print')
    assert tab.evaluate('document.documentElement.scrollWidth') <= 794, 'the paper is too narrow for it'
    assert tab.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(255, 255, 255)'
    pdf = tab.pdf(format='A4', print_background=True)
    assert pdf[:5] == b'%PDF-' and 2 <= len(re.findall(rb'/Type\s*/Page[^s]', pdf)) <= 40


def test_the_health_report_opens_too(browser, untrained):
    _, asked, said = opened(browser, report(untrained), viewport=dict(width=390, height=800))
    assert asked == [] and said == []


def test_that_check_sees_a_request_and_an_error(browser, tmp_path):
    (tmp_path / 'bad.html').write_text('<img src="http://example.org/a.png"><script>nothing.here()</script>')
    _, asked, said = opened(browser, tmp_path / 'bad.html')
    assert asked == ['http://example.org/a.png'] and any('nothing is not defined' in s for s in said)
