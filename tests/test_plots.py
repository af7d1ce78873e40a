"""Plots: each draws what its table says, in any script, into the Axes it is given; heat lies where it looked."""
import re
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from PIL import Image

import vegc.plots.fonts
from vegc.acquire.add import add
from vegc.core import UsageError, VegcWarning
from vegc.data.dataset import ImageDataset, Snapshot
from vegc.evaluation.metrics import Metrics, metrics_of, most_confused
from vegc.evaluation.predictions import predictions_frame
from vegc.plots.charts import (BLUE, GREEN, GREY, RED, YELLOW, alt_of, as_html, as_svg, confusion_order, finish,
                               matrix_view, plot_accuracy_by_n, plot_classes, plot_confusion, plot_history, plot_lr,
                               plot_methods, plot_most_confused, plot_per_class, plot_precision_recall,
                               plot_reliability, spread_out, table_of)
from vegc.plots.fonts import Font, clusters, font_families, font_letters, lettering, letters, short_signs
from vegc.plots.interpret import ClassifierInterpretation, grad_cam
from vegc.plots.pictures import (flat_map, plot_confused, plot_embedding, plot_mistakes, plot_samples,
                                 plot_top_losses, sparse_places)

matplotlib.use('Agg')
NAMES = dict(vi='Ê Đê · Bún chả', ja='ひらがな ゐゑゝ', ar='الفول المدمس', hi='हिन्दी', emoji='🍜 😀', usd='$5 & $6',
             xss='<b>b</b>')


@pytest.fixture(autouse=True)
def closed():
    plt.close('all')  # what tests of other files left open
    yield
    plt.close('all')


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    "Seven classes of twenty flat pictures; one file is gone afterwards."
    src = tmp_path_factory.mktemp('plots')
    for i in range(140):
        where = src / 'in' / list(NAMES)[i % 7]
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (30, 40, 3), np.uint8)).save(where / f'{i}.png')
    add(src / 'in', src / 'set', subject='other')
    return ImageDataset(src / 'set')


@pytest.fixture(scope='module')
def table(dataset):
    "Answers that are right three times in four."
    rng, rows, classes = np.random.default_rng(0), dataset.labels.assign(given_label=lambda t: t.label), list(NAMES)
    said = np.where(rng.random(len(rows)) < .75, rows.label, rng.choice(classes, len(rows)))
    p = rng.dirichlet(np.ones(7), len(rows))*.3
    p[np.arange(len(rows)), [classes.index(c) for c in said]] += .7
    return predictions_frame(rows, p, classes)


@pytest.fixture(scope='module')
def m(table): return metrics_of(table, stage='raw', split='test', times=50)


HISTORY = [dict(part='frozen', epoch=i + 1, train_loss=1/(i + 1), valid_loss=1.1/(i + 1), accuracy=.5 + .1*i)
           for i in range(3)]
HISTORY += [dict(part='unfrozen', epoch=1, train_loss=.2, valid_loss=.5, accuracy=.75)]
CURVE = pd.DataFrame(dict(n=[10, 100], accuracy=[.5, .8], low=[.4, .7], high=[.6, .9]))
METHODS = pd.DataFrame(dict(method=['line', 'forêt 森', 'stage raw'], features=['pixels', 'pixels', ''], n=50,
                            accuracy=[.5, .6, .7], accuracy_low=[.4, .5, .6], accuracy_high=[.6, .7, .8],
                            difference=[-.2, -.1, np.nan], difference_low=[-.3, -.2, np.nan],
                            difference_high=[-.1, .02, np.nan]))
SPLITS = pd.DataFrame(dict(train=[3, 1], valid=[1, 1], test=[1, 0]), index=['vi', 'ja'])
RATES = pd.DataFrame(dict(lr=[1e-4, 1e-3, 1e-2], loss=[2., 1., 3.]))


def plots(dataset, table, m):
    "Every plot of one Axes, by name: a call that takes the Axes."
    x = np.random.default_rng(0).normal(size=(len(table), 8))
    root = dataset.path
    return dict(
        classes=lambda ax: plot_classes(SPLITS, ax, names=NAMES),
        lr=lambda ax: plot_lr(RATES, 1e-3, ax),
        confusion=lambda ax: plot_confusion(m, NAMES, ax=ax),
        most_confused=lambda ax: plot_most_confused(m, 5, NAMES, ax),
        per_class=lambda ax: plot_per_class(m, NAMES, ax),
        precision_recall=lambda ax: plot_precision_recall(m, NAMES, ax=ax),
        reliability=lambda ax: plot_reliability(m, ax),
        by_n=lambda ax: plot_accuracy_by_n(CURVE, ax, ahead=CURVE.assign(n=[200, 400])),
        methods=lambda ax: plot_methods(METHODS, ax=ax),
        samples=lambda ax: plot_samples(dataset, 3, ax=ax),
        top_losses=lambda ax: plot_top_losses(table, root, 7, names=NAMES, ax=ax),
        confused=lambda ax: plot_confused(table, root, 3, 2, names=NAMES, ax=ax),
        mistakes=lambda ax: plot_mistakes(table, root, 'vi', names=NAMES, ax=ax),
        embedding=lambda ax: plot_embedding(table, x, root, xy=x[:, :2], names=NAMES, ax=ax))


KINDS = list(plots(type('D', (), dict(path=None))(), range(1), None))


@pytest.mark.parametrize('kind', KINDS)
def test_each_draws_where_it_is_told_and_keeps_its_table_and_text(kind, dataset, table, m):
    fig, (ax, other) = plt.subplots(1, 2, figsize=(12, 6))
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        # missing letters are said once; a glyph warning of matplotlib would fail here
        warnings.filterwarnings('ignore', category=VegcWarning)
        got = plots(dataset, table, m)[kind](ax)
        fig.canvas.draw()
    assert got is ax and isinstance(got, Axes) and not other.has_data() and plt.get_fignums() == [fig.number]
    assert isinstance(table_of(ax), pd.DataFrame) and len(table_of(ax)) and len(alt_of(ax)) > 20
    html = as_html(ax, dpi=30)
    assert html.startswith('<img alt="') and 'data:image/png;base64,' in html and '<b>' not in html
    assert dict(matplotlib.rcParams) == before, "nobody's settings change"


@pytest.mark.parametrize('kind', KINDS)
def test_each_makes_its_own_figure_and_shows_nothing(kind, dataset, table, m, monkeypatch):
    monkeypatch.setattr(plt, 'show', lambda *a, **k: pytest.fail('a plot called show'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', VegcWarning)
        ax = plots(dataset, table, m)[kind](None)
    assert len(plt.get_fignums()) == 1 and ax.get_figure().get_size_inches().min() > .5


def test_charts_draw_their_table(m):
    ax = plot_confusion(m, shares=True, order='given')
    rate = m.counts/m.counts.sum(1, keepdims=True)
    assert np.allclose(table_of(ax).to_numpy(), rate)
    assert {t.get_text() for t in ax.texts} == {f'{v:.0%}' for v in rate[m.counts > 0]}
    ax, top = plot_most_confused(m, 4), most_confused(m).head(4)
    assert [b.get_width() for b in ax.patches][::-1] == table_of(ax).rate.tolist() == sorted(top.rate, reverse=True)
    ax = plot_per_class(m)
    assert [b.get_width() for b in ax.patches][::-1] == table_of(ax).f1.tolist()
    ax = plot_reliability(m)
    assert np.allclose(ax.collections[-1].get_offsets(), table_of(ax)[['confidence', 'accuracy']])
    ax = plot_precision_recall(m, glyphs={c: c for c in m.classes})
    assert table_of(ax)[['recall', 'precision']].equals(m.per_class[['recall', 'precision']])
    assert {t.get_text() for t in ax.texts} >= set(m.classes)
    ax = plot_accuracy_by_n(CURVE)
    assert ax.lines[0].get_ydata().tolist() == CURVE.accuracy.tolist() == table_of(ax).accuracy.tolist()
    assert np.array_equal(plot_lr(RATES).lines[0].get_xydata(), RATES) and table_of(plt.gca()).equals(RATES)
    ax = plot_classes(pd.DataFrame(dict(train=[3, 9], test=[1, 0]), index=['a', 'b']))
    assert [b.get_width() for b in ax.patches] == [3, 9, 1, 0] and table_of(ax).index.tolist() == ['b', 'a']
    axes = plot_history(HISTORY, HISTORY[2])
    assert axes[0].lines[0].get_ydata().tolist() == [r['train_loss'] for r in HISTORY]
    assert len(table_of(axes[1])) == 4 and 'best 0.700' in alt_of(axes[0])
    with pytest.raises(UsageError, match='not drawn by vegc'): table_of(plt.subplots()[1])


def test_plots_of_images_draw_their_table(dataset, table, m):
    ax = plot_top_losses(table, dataset.path, 5)
    assert table_of(ax).loss.tolist() == sorted(table.loss, reverse=True)[:5]
    losses = [t.get_text().split('\n')[3] for t in ax.texts if 'loss' in t.get_text()]
    assert losses == [f'loss {v:.2f}' for v in table_of(ax).loss]
    ax = plot_samples(dataset, 3)
    assert len(ax.images) == len(table_of(ax)) == 3*table_of(ax).label.nunique()
    with pytest.raises(UsageError, match="no column 'colour' to go by"): plot_samples(dataset, by='colour')
    assert dataset.labels.set_index('path').label[table_of(ax).path].tolist() == table_of(ax).label.tolist()
    (a, b), (c, d) = most_confused(m)[['label', 'predicted_label']].head(2).to_numpy().tolist()
    ax = plot_confused(table, dataset.path, [(a, b), (c, d)], 50)
    pair = table.label + '→' + table.predicted_label
    t = table[pair.isin([f'{a}→{b}', f'{c}→{d}'])]
    assert sorted(table_of(ax).path) == sorted(t.path) and len(ax.images) == len(t) > 0
    all_wrong = table.assign(predicted_label=table.predicted_label.mask(table.label == 'ja', 'vi'))
    ax = plot_mistakes(all_wrong, dataset.path, 'ja', columns=6)
    assert sorted(table_of(ax).path) == sorted(table[table.label == 'ja'].path) and len(ax.images) == 20, 'all of them'
    x = np.random.default_rng(0).normal(size=(len(table), 2))
    ax = plot_embedding(table, x, dataset.path, xy=x)
    assert np.allclose(table_of(ax)[['x', 'y']], x) and np.allclose(ax.collections[0].get_offsets(), x)
    assert f'{int((table.label != table.predicted_label).sum())} mistakes' in alt_of(ax)


LONG = {k: f'{v}, with a long name behind it' for k, v in dict(NAMES, hi='Hindi', emoji='Emoji').items()}


@pytest.mark.parametrize('kind', [k for k in KINDS if k not in ('lr', 'reliability', 'by_n')])
def test_no_name_is_cut_off_at_the_edge_of_the_figure(kind, dataset, table, m, monkeypatch):
    monkeypatch.setitem(globals(), 'NAMES', LONG)
    if kind == 'samples': monkeypatch.setattr(Snapshot, 'names', property(lambda self: LONG))
    fig = plots(dataset, table, m)[kind](None).get_figure(root=True)
    fig.canvas.draw()
    texts = [t for t in fig.findobj(matplotlib.text.Text) if t.get_visible()]
    boxes = {t.get_text(): t.get_window_extent() for t in texts if any(ch.isalpha() for ch in t.get_text())}
    assert len(boxes) > 1
    low, high = fig.bbox.min - 1, fig.bbox.max + 1
    assert [t for t, b in boxes.items() if (b.min < low).any() or (b.max > high).any()] == []


def test_two_classes_of_one_name_stay_two_bars():
    ax = plot_classes(pd.DataFrame(dict(train=[3, 9]), index=['a', 'b']), names=dict(a='same', b='same'))
    assert sorted(b.get_y() for b in ax.patches) == [-.4, .6] and [b.get_width() for b in ax.patches] == [3, 9]


def test_the_rate_finder_shows_the_valley_and_not_the_explosion():
    lr = np.logspace(-6, 0, 50)
    loss = 2 - np.exp(-(np.log10(lr) + 2)**2) + 1e4*np.maximum(lr - .1, 0)
    ax = plot_lr(pd.DataFrame(dict(lr=lr, loss=loss)), 1e-3)
    low, high = ax.get_ylim()
    assert low < 1.1 and 2 < high < 3
    assert 'stopped before' in alt_of(plot_lr(pd.DataFrame(dict(lr=[], loss=[]), dtype=float), 2e-3))


def test_text_of_a_plot_is_text_and_no_markup():
    html = as_html(finish(plt.subplots()[1], pd.DataFrame(), '<b>bold</b> & "quoted"'), dpi=20)
    assert html.startswith('<img alt="&lt;b&gt;bold&lt;/b&gt; &amp; &quot;quoted&quot;" src="data:')


def test_svg_of_a_plot_follows_the_page_and_asks_for_nothing():
    def drawn(): return as_svg(plot_history(HISTORY, HISTORY[2])[0], {BLUE: 'var(--blue)'})
    svg = drawn()
    assert svg == drawn(), 'the same plot is the same text'
    assert svg.startswith('<svg class="chart" role="img" aria-label="4 epochs') and svg.endswith('</svg>')
    assert 'var(--blue)' in svg and BLUE not in svg and 'font-family' not in svg and '<style' not in svg
    ids = set(re.findall(r' id="([^"]+)"', svg))
    asked = re.findall(r'href="([^"]*)"|url\(([^)]*)\)', svg)
    assert {(a or b).lstrip('#') for a, b in asked} == ids, 'only what is in it'
    assert len(svg) < 12_000
    risky = finish(plt.subplots()[1], pd.DataFrame(), '<b>"x"</b>')
    risky.set_title('<script>')
    assert 'aria-label="&lt;b&gt;&quot;x&quot;&lt;/b&gt;"' in as_svg(risky) and '<script' not in as_svg(risky)


def test_two_svgs_on_a_page_share_no_id():
    loss, accuracy = (set(re.findall(r' id="([^"]+)"', as_svg(ax))) for ax in plot_history(HISTORY))
    assert loss and accuracy and not loss & accuracy


def test_the_heat_lies_over_its_picture(dataset, table):
    path = table.sort_values('loss').path.iloc[-1]
    ax = plot_top_losses(table, dataset.path, 2, heat={path: np.eye(4)})
    assert len(ax.images) == 3 and ax.images[0].get_extent() == ax.images[1].get_extent()
    assert np.array_equal(ax.images[1].get_array(), np.eye(4))


def test_a_file_that_is_gone_is_a_tile_and_no_error(dataset, table, tmp_path):
    ax = plot_top_losses(table.assign(path='gone.png'), tmp_path, 3)
    assert not ax.images and [t.get_text() for t in ax.texts].count('not\nreadable') == 3


# ---- order and place

def test_orders_keep_every_class_and_put_the_confused_together():
    rng = np.random.default_rng(0)
    counts = rng.poisson(.2, (40, 40)) + np.eye(40, dtype=int)*30
    counts[7, 31] = counts[31, 7] = 25
    groups = [str(i % 3) for i in range(40)]
    for order in ('given', 'superclass', 'similarity', 'confused', 'auto'):
        assert sorted(confusion_order(counts, order, groups)) == list(range(40)), order
    assert set(confusion_order(counts, 'confused')[:2]) == {7, 31}
    assert set(confusion_order(counts)[:2]) == {7, 31}, 'auto: many classes'
    place = confusion_order(counts, 'similarity').tolist()
    assert abs(place.index(7) - place.index(31)) == 1
    assert [groups[i] for i in confusion_order(counts, 'auto', groups)] == sorted(groups)
    with pytest.raises(UsageError, match='no superclasses'): confusion_order(counts, 'superclass')


@pytest.mark.parametrize('c', [2, 3, 26, 100, 150])
def test_the_matrix_is_readable_from_two_classes_to_a_hundred(c):
    counts = np.random.default_rng(0).poisson(1, (c, c)) + np.eye(c, dtype=int)*20
    names = [f'class {i}' for i in range(c)]
    big = Metrics('raw', 'test', int(counts.sum()), {}, {}, {}, pd.DataFrame(), counts, names)
    ax = plot_confusion(big)
    shown = min(c, 100)
    assert table_of(ax).shape == (shown, shown) and len(ax.get_xticklabels()) == shown
    assert (len(ax.texts) > 0) == (c <= 25)
    ax.figure.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.get_yticklabels()]
    over = [a.y0 < b.y1 - 1 and b.y0 < a.y1 - 1 for a, b in zip(boxes, boxes[1:], strict=False)]
    assert not any(over), 'names lie on one another'


def test_lines_part_superclasses_only_where_classes_stand_by_them():
    counts, names = np.eye(120, dtype=int)*5, [f'c{i}' for i in range(120)]
    m = Metrics('raw', 'test', 600, {}, {}, {}, pd.DataFrame(), counts, names)
    groups = {c: 'ab'[i % 2] for i, c in enumerate(names)}
    assert matrix_view(m, groups=groups, most=120).borders == [60]
    few = matrix_view(m, groups=groups)
    assert few.borders == [] and len(few.classes) == 100, 'of too many the most confused: groups lie anywhere'
    assert sorted(few.places) == list(range(120)), 'no class is lost'
    assert matrix_view(m, groups={c: c for c in names}, most=120).borders == [], 'each class its own'
    assert matrix_view(m, 'given', given=names[::-1], most=120).classes == names[::-1]


def test_signs_do_not_cover_one_another(m):
    crowd = m.per_class.assign(precision=.8, recall=.8)
    crowded = Metrics('raw', 'test', m.n, m.scores, m.intervals, m.chance, crowd, m.counts, m.classes)
    ax = plot_precision_recall(crowded, {c: c[:3] for c in m.classes})
    ax.figure.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.texts if t.get_text() in {c[:3] for c in m.classes}]
    assert len(boxes) == 7 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_names_on_the_map_do_not_cover_one_another(dataset, table):
    x = np.random.default_rng(0).normal(size=(len(table), 4))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', VegcWarning)
        ax = plot_embedding(table, x, dataset.path, xy=x[:, :2]*.01, names=LONG)
    ax.figure.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.texts if t.get_text()]
    assert len(boxes) == 7 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_boxes_stay_inside_and_apart():
    rng = np.random.default_rng(0)
    xy, size = rng.normal(50, 3, (60, 2)), rng.uniform(4, 9, (60, 2))
    at = spread_out(xy, size, (0, 0, 100, 100))
    assert (at - size/2 >= -1e-9).all() and (at + size/2 <= 100 + 1e-9).all()
    gap = np.abs(at[:, None] - at[None]) - (size[:, None] + size[None])/2
    assert ((gap >= -1e-9).any(-1) | np.eye(60, dtype=bool)).all()


def test_thumbnails_of_the_map_do_not_cover_one_another():
    xy = np.random.default_rng(0).normal(size=(500, 2))
    at = xy[sparse_places(xy, 10)]
    far = (np.abs(at[:, None] - at[None]) >= np.ptp(xy, axis=0)/10).any(-1)
    assert 20 < len(at) and (far | np.eye(len(at), dtype=bool)).all()
    assert flat_map(np.random.default_rng(0).normal(size=(30, 5))).shape == (30, 2)
    assert flat_map(np.eye(2, 5)).shape == (2, 2)


def test_colours_differ_for_every_kind_of_eyes():
    "Machado et al. (2009), severity 1, in linear light: any two colours stay apart, by hue or by lightness."
    kinds = dict(
        normal=np.eye(3),
        protan=[[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
        deutan=[[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],
        tritan=[[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]])
    oklab = (np.array([[.4122, .2119, .0883], [.5363, .6807, .2817], [.0514, .1074, .6300]]),
             np.array([[.2105, 1.978, .0259], [.7936, -2.4286, .7828], [-.0041, .4506, -.8087]]))
    rgb = np.array([[int(c[i:i + 2], 16)/255 for i in (1, 3, 5)] for c in (BLUE, RED, GREEN, YELLOW, GREY)])
    linear = np.where(rgb <= .04045, rgb/12.92, ((rgb + .055)/1.055)**2.4)
    for name, matrix in kinds.items():
        seen = np.clip(linear @ np.array(matrix).T, 0, 1)
        lab = np.cbrt(seen @ oklab[0]) @ oklab[1]
        apart = np.sqrt(((lab[:, None] - lab[None])**2).sum(-1)) + np.eye(5)
        assert apart.min() > .08, (name, apart.min())


# ---- any script

def test_a_font_is_found_where_the_first_one_lacks_letters():
    families, missing = font_families(letters(['Đắk Lắk', 'Ελλάδα']), ['cmr10'])
    assert missing == set() and len(families) >= 2
    files = [font_manager.findfont(font_manager.FontProperties(family=[f])) for f in families]
    assert all(any(ord(ch) in font_letters(f) for f in files) for ch in 'ĐắΕλ')


def test_all_fonts_that_were_installed_meanwhile_are_looked_through(monkeypatch):
    "Each of two new fonts has one of two letters."
    have, known = {'new one': {'\u0378'}, 'new two': {'\u0379'}}, []
    def add_new():
        if known: return False
        known.extend(Font(name, name) for name in have)
        return True
    monkeypatch.setattr(vegc.plots.fonts, 'known_fonts', lambda: known)
    monkeypatch.setattr(vegc.plots.fonts, 'add_new_fonts', add_new)
    monkeypatch.setattr(vegc.plots.fonts, 'font_letters', lambda path: {ord(ch) for ch in have.get(path, ())})
    families, missing = font_families({'\u0378', '\u0379'}, ['cmr10'])
    assert missing == set() and set(families) == {'cmr10', *have}


def test_one_warning_names_letters_and_remedy_and_the_legend_keeps_the_name(monkeypatch):
    _without(monkeypatch, others=True)
    odd = 'a\u0378b\u0379'  # numbers that no letter has, though a font may draw a box with the number
    with pytest.warns(VegcWarning) as said: write = lettering(['fine', 'odd'], dict(fine='ok', odd=odd))
    text = str(said[0].message)
    assert len(said) == 1 and '\u0378' in text and 'install a font' in text and 'fonts-noto' in text
    assert write('fine') == 'ok' and write('odd') == '#2 odd' and write.legend == {'#2 odd': odd}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert lettering(['vi', 'usd'], NAMES).legend == {}


def test_short_signs_tell_classes_apart():
    numbered = [f'class number {i}' for i in range(60)]
    names = ['t-shirt', 'trousers', 'shirt', 'shorts', *numbered, 'हिन्दी', 'हिब्रू', 'ひらがな']
    signs = short_signs(names)
    assert len(set(signs)) == len(names) and max(len(clusters(s)) for s in signs) <= 8
    assert signs[:4] == ['t-sh', 'trou', 'shir', 'shor'] and signs[4] == 'cla…0' and signs[63] == 'cla…59'
    for s, name in zip(signs[-3:], names[-3:], strict=True):
        assert name.startswith(s) and clusters(name)[:len(clusters(s))] == clusters(s), 'no half letters'


def _without(monkeypatch, *words, others=False):
    "As on a machine that lacks these fonts; with `others`, all that matplotlib does not bring along."
    ours = matplotlib.get_data_path()
    kept = [f for f in font_manager.fontManager.ttflist if not any(w in f.name for w in words)
            and (not others or f.fname.startswith(ours))]
    monkeypatch.setattr(font_manager.fontManager, 'ttflist', kept)
    monkeypatch.setattr(vegc.plots.fonts, 'add_new_fonts', lambda: False)
    return kept


@pytest.mark.parametrize('without, others', [((), False), (('CJK',), False), ((), True)])
def test_every_script_is_drawn_or_replaced_and_never_a_box(without, others, m, monkeypatch):
    _without(monkeypatch, *without, others=others)
    have = set().union(*(font_letters(f.file) for f in vegc.plots.fonts.known_fonts()))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        ax = plot_per_class(m, NAMES)
        ax.figure.canvas.draw()
    assert all(isinstance(w.message, VegcWarning) for w in said), 'a glyph warning of matplotlib: an empty box'
    drawable = {k for k, v in NAMES.items() if all(ord(ch) in have for ch in letters([v]))}
    shown = ' '.join(t.get_text() for t in ax.get_yticklabels())
    for i, (k, v) in enumerate(NAMES.items(), 1):
        assert (v in shown) if k in drawable else (f'#{i} {k}' in shown and v not in shown), k
    assert len(said) == (len(drawable) < len(NAMES)), 'one warning, and only where something is missing'
    for k in set(NAMES) - drawable:
        assert f'{k} is {NAMES[k]}' in str(said[0].message) and f'{k} is {NAMES[k]}' in alt_of(ax)
    if others: assert 'ja' not in drawable and {'vi', 'ar', 'usd'} <= drawable


def test_readers_of_japanese_get_japanese_forms():
    "Where a family has one font for each region. Without such fonts there is nothing to choose."
    if not any(' JP' in f.name for f in font_manager.fontManager.ttflist): pytest.skip('no font for Japanese readers')
    for text, region in (('直ゐ', ' JP'), ('직直', ' KR'), ('直', ' SC')):
        assert region in font_families(letters([text]), ['DejaVu Sans'])[0][1]


def test_scripts_that_join_are_not_drawn_in_pieces(monkeypatch):
    monkeypatch.setattr(vegc.plots.fonts, 'can_shape', lambda: False)
    with pytest.warns(VegcWarning, match='3.11'): write = lettering(['ar'], NAMES)
    assert write('ar') == '#1 ar'


def test_dollars_are_dollars_and_arrows_keep_their_direction(m):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', VegcWarning)
        ax = plot_most_confused(m, 40, NAMES)
    drawn = [t.get_text() for t in ax.get_yticklabels()]
    assert any('$5 & $6' in t for t in drawn) and not any(t.get_parse_math() for t in ax.get_yticklabels())
    assert all(t.startswith('\u200e') and '→ \u200e' in t for t in drawn), 'marks that keep the line left to right'


# ---- what the network looked at

def test_heat_follows_the_class_that_is_asked_about():
    "Two maps, each lit on its own side; a head that gives each class its own map."
    class Sides(torch.nn.Module):
        def forward(self, x):
            left = torch.arange(8) < 4
            return torch.stack([x[:, 0]*left, x[:, 0]*~left], 1).requires_grad_()
    class Head(torch.nn.Module):
        def forward(self, maps): return maps.mean((2, 3))
    x = torch.ones(2, 3, 8, 8)
    model = torch.nn.Sequential(Sides(), Head())
    left, right = grad_cam(model, x, [0, 1])
    assert left.shape == (8, 8) and left.max() == right.max() == 1 and not model[0]._forward_hooks
    assert left[:, :4].sum() == left.sum() > 0 and right[:, 4:].sum() == right.sum() > 0


def test_an_interpretation_of_a_table_alone(dataset, table, m):
    interp = ClassifierInterpretation(table, dataset.path, names=NAMES, dataset=dataset)
    assert interp.classes == list(NAMES) and interp.metrics.accuracy == m.accuracy
    assert (interp.confusion_matrix() == m.counts).all()
    losses, at, paths = interp.top_losses(4, items=True)
    assert losses.tolist() == sorted(table.loss, reverse=True)[:4] and table.path[at].tolist() == paths
    assert interp.top_losses(3, largest=False)[0].tolist() == sorted(table.loss)[:3]
    assert len(interp.top_losses()[0]) == len(table)
    pairs = interp.most_confused(2)
    assert pairs['count'].min() >= 2 and 'shared' in pairs
    assert pairs.columns.tolist()[:3] == ['label', 'predicted_label', 'count']
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', VegcWarning)
        drawn = (interp.plot_confusion_matrix(), interp.plot_top_losses(4), interp.plot_confused(2),
                 interp.plot_mistakes('vi'), interp.plot_most_confused(3), interp.plot_per_class(),
                 interp.plot_precision_recall(), interp.plot_reliability())
    assert all(len(table_of(ax)) for ax in drawn)
    with pytest.raises(UsageError, match='no network'): interp.plot_top_losses(2, heat=True)
    assert interp.explain(permutations=50).columns.tolist()[0] == 'factor'


def test_a_plain_fastai_learner_can_be_interpreted(dataset):
    from fastai.vision.all import (CategoryBlock, DataBlock, ImageBlock, Learner, RandomSplitter, Resize, accuracy, nn,
                                   parent_label)
    files = sorted((dataset.path / 'images').glob('*/*.png'))
    block = DataBlock((ImageBlock, CategoryBlock), get_y=parent_label, splitter=RandomSplitter(seed=0),
                      item_tfms=Resize(16))
    dls = block.dataloaders(files, bs=8, num_workers=0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3, 4, 3), head), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): interp = ClassifierInterpretation.from_learner(learn)
    with learn.no_bar(), learn.no_logging(): loss, share = learn.validate()
    assert interp.metrics.accuracy == pytest.approx(share)
    assert interp.metrics.scores['log_loss'] == pytest.approx(loss, rel=1e-4)
    assert interp.table.path.tolist() == [str(f) for f in dls.valid_ds.items] and set(interp.classes) == set(NAMES)
