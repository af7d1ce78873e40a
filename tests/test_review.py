"""The review page in a real browser, opened from disk with the network off: decide, save, hand back."""
import os
import re
import warnings

import numpy as np
import pandas as pd
import pytest
from lab import chromium
from PIL import Image

from vegc.cleaning.clean import clean
from vegc.cleaning.session import Session
from vegc.core import UsageError
from vegc.data.dataset import ImageDataset
from vegc.data.manifest import manifest_frame, write_manifest
from vegc.cleaning.review_page import review_page

LABELS = ["hrê d'or", 'a, "b" <img src=x onerror=alert(1)>', 'Ωβ ゐ; =1+1']
NAMES = ['Hrê', 'a, "b" </script><img src=x onerror=alert(1)>']  # a slash is in no label, which names a folder too


def make(folder, subject='objects', n=12):
    ds, rng, rows = ImageDataset(folder, subject=subject), np.random.default_rng(0), []
    for i in range(n):
        path = f'images/{i % 3}/é, {i:02}.png'
        (ds.path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(ds.path / path)
        rows.append(dict(key=str(i), url=f'u{i}', given_label=LABELS[i % 3], status='ok', path=path, sha256=str(i),
                         split='test' if i == 4 else 'train'))
    (ds.path / rows[2]['path']).write_bytes(b'no picture')
    pd.DataFrame(dict(slug=LABELS[:2], name=NAMES)).to_csv(ds.path / 'classes.csv', index=False)
    write_manifest(ds.path / 'manifest.parquet', manifest_frame(rows))
    df = pd.DataFrame(rows)
    return ds, df.assign(predicted_label=LABELS[0], label_score=.1, issue_types='label', confidence=.9, outlier=.1)


@pytest.fixture
def made(tmp_path): return make(tmp_path / 'ds')


@pytest.fixture(scope='module')
def browser():
    with chromium() as b: yield b


def opened(browser, path, **options):
    tab = browser.new_context(offline=True, accept_downloads=True, **options).new_page()
    asked, said = [], []
    tab.on('request', lambda r: asked.append(r.url) if not r.url.startswith(('data:', 'blob:')) else None)
    tab.on('console', lambda m: said.append(m.text))
    tab.on('pageerror', lambda e: said.append(str(e)))
    tab.on('dialog', lambda d: (said.append(d.type), d.accept()))
    tab.goto(path.resolve().as_uri())
    return tab, asked, said


@pytest.mark.parametrize('width', [390, 1280])
def test_decisions_go_there_and_back(browser, made, tmp_path, width):
    ds, order = made
    page = review_page(ds, tmp_path / 'review.html', order=order)
    tab, asked, said = opened(browser, page, viewport=dict(width=width, height=800))
    card = tab.locator('article')
    assert card.count() == 11 and tab.locator('article img').count() == 10
    assert 'cannot be read' in card.nth(2).inner_text()
    assert tab.evaluate('document.documentElement.scrollWidth') == width, 'nothing sticks out'
    assert tab.locator('.save').is_disabled()
    tab.get_by_label('Your name').fill('Ngọc, "N"')
    card.nth(0).get_by_role('button', name='Right').click()
    card.nth(1).get_by_role('button', name='It is Hrê').click()
    card.nth(1).get_by_label('Why').fill('=a "b", c\u00e9')
    card.nth(2).get_by_role('button', name='Leave out').click()
    card.nth(3).focus()
    for key in 'rx': tab.keyboard.press(key)  # a letter is for the box that r opened
    tab.get_by_role('textbox', name='Class').fill('ωβ')
    tab.keyboard.press('Enter')
    card.nth(5).get_by_role('button', name='Leave out').click()
    card.nth(5).get_by_role('button', name='Leave out').click()  # pressed again: taken back
    tab.get_by_label('Show').select_option('done')
    assert tab.locator('article:visible').count() == 4
    tab.reload()  # what was decided is remembered
    assert tab.locator('.count').inner_text() == '4 decided here · 7 left'
    assert tab.get_by_label('Your name').input_value() == 'Ngọc, "N"'
    with tab.expect_download() as got: tab.locator('.save').click()
    got.value.save_as(tmp_path / 'd.csv')
    assert asked[1:] == [page.resolve().as_uri()] and set(said) <= {'beforeunload'}
    done = clean(ds, decisions=tmp_path / 'd.csv')
    assert list(zip(done.path, done.action, done.label, done.who, done.why, strict=True)) == [
        (order.path[0], 'keep', '', 'Ngọc, "N"', ''), (order.path[1], 'relabel', LABELS[0], 'Ngọc, "N"', '=a "b", cé'),
        (order.path[2], 'exclude', '', 'Ngọc, "N"', ''),
        (order.path[3], 'relabel', LABELS[2], 'Ngọc, "N"', '')]
    again = review_page(ds, page, order=order).read_text('utf-8')
    stands = re.findall(r'data-action="(\w+)"', again)
    assert stands == ['keep', 'relabel', 'exclude', 'relabel'], 'a later page knows what stands'


def test_order_search_size_and_the_class_that_was_typed(browser, made, tmp_path):
    ds, order = made
    order = order.assign(confidence=[(7*i % 12)/12 for i in range(12)])
    page = review_page(ds, tmp_path / 'review.html', order=order)
    tab, asked, said = opened(browser, page, viewport=dict(width=1280, height=800))
    assert '1 test image kept out' in tab.locator('header').inner_text()
    every = review_page(ds, tmp_path / 'all.html', order=order, test=True).read_text('utf-8')
    assert 'kept out' not in every
    def paths(): return tab.locator('article:visible').evaluate_all('all => all.map(e => e.dataset.path)')
    shown = order[order.split != 'test']
    tab.get_by_label('Order').select_option('sure')
    guessed = shown[shown.given_label != LABELS[0]].sort_values('confidence', ascending=False)
    assert paths()[:len(guessed)] == guessed.path.tolist()
    tab.get_by_label('Order').select_option('')
    assert paths() == shown.path.tolist(), 'worst first again'
    tab.get_by_label('Search').fill('É, 07')
    assert paths() == [p for p in shown.path if '07' in p]
    tab.get_by_label('Search').fill('')
    wide = tab.locator('article').first.bounding_box()['width']
    assert wide < 320, 'several stand side by side'
    tab.get_by_label('Size').select_option('small')
    assert tab.locator('article').first.bounding_box()['width'] < wide
    card = tab.locator('article').nth(1)  # the suggestion is Hrê
    assert 'chance that this suggestion is right' in card.locator('.take').get_attribute('title')
    card.get_by_role('button', name='Other').click()
    offered = tab.locator('dialog button')
    assert offered.first.inner_text() == 'Hrê', 'nothing typed: the suggestion'
    tab.get_by_role('textbox', name='Class').fill('a')
    assert offered.first.inner_text().startswith('a, "b"'), 'what begins so comes first'
    assert asked[1:] == [] and said == []


def test_people_are_not_shown(browser, tmp_path):
    ds, order = make(tmp_path / 'ds', subject='people')
    page = review_page(ds, tmp_path / 'review.html', order=order)
    assert b'data:image' not in page.read_bytes() and b'\xff\xd8\xff' not in page.read_bytes()
    tab, _, said = opened(browser, page)
    assert tab.locator('img').count() == 0 and 'No pixels are shown' in tab.inner_text('body') and said == []
    assert tab.locator('article').first.get_by_role('button', name='Right').is_visible()


def test_a_page_of_somebody_else_is_not_overwritten_and_ours_is(made, tmp_path):
    ds, order = made
    (tmp_path / 'mine.html').write_text('<p>mine')
    with pytest.raises(UsageError, match='not made by vegc'): review_page(ds, tmp_path / 'mine.html', order=order)
    assert (tmp_path / 'mine.html').read_text() == '<p>mine'
    first = review_page(ds, tmp_path / 'r.html', order=order, limit=3).read_text('utf-8')
    second = review_page(ds, tmp_path / 'r.html', order=order).read_text('utf-8')
    assert (first.count('<article'), second.count('<article')) == (3, 11)
    assert 'http:' not in first and 'https:' not in first


def test_a_page_for_another_dataset_is_refused(made, tmp_path):
    ds, order = made
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        other = ImageDataset(tmp_path / 'other', subject='objects')
        row = dict(key='1', url='u', given_label='x', status='ok', path='images/x/1.jpg', sha256='z')
        write_manifest(other.path / 'manifest.parquet', manifest_frame([row]))
    (tmp_path / 'd.csv').write_text(f'path,action\n"{order.path[0]}",exclude\n', 'utf-8')
    with pytest.raises(Exception, match='nothing was applied'): clean(other, decisions=tmp_path / 'd.csv')
    assert not (other.path / 'decisions.jsonl').exists() and Session(ds, order).progress()['decided'] == 0
    assert os.listdir(other.path / 'images') == [] if (other.path / 'images').exists() else True
