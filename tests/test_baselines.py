"""Cross-validation by groups, tables of methods, and what a curve says about more pictures."""
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.stats import norm
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from vegc.core import DatasetError, UsageError, sha256_hex
from vegc.data.dataset import ImageDataset
from vegc.evaluation import baselines as methods
from vegc.evaluation.baselines import baselines, compare_imbalance, method_table, plain_answers, plain_methods
from vegc.evaluation.crossval import (cross_validate, cross_validated_predictions, grouped_interval,
                                      linear_predictions, small_headline)
from vegc.evaluation.evaluate import evaluate
from vegc.evaluation.growth import (SHARES, Curve, answers_by_n, extrapolated, growth_of, laws_ahead, power_law,
                                    would_more_help)
from vegc.evaluation.metrics import share_interval
from vegc.evaluation.predictions import predictions, test_looks
from vegc.training.train import train

test_looks.__test__ = False  # a function of the package, not a test


def noise(folder, n=60, copies=3, classes=3):
    """Images of noise under labels that are dice; each in several copies, which share a group: there is nothing to
    learn but copies."""
    ds, rng = ImageDataset(folder, subject='objects'), np.random.default_rng(0)
    with ds.run() as run:
        for g in range(n):
            pixels, label = rng.integers(0, 255, (8, 8, 3)), f'class {rng.integers(classes)}'
            for c in range(copies):
                path = ds.path / f'images/{label}/{g:03}-{c}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                copy = np.clip(pixels + rng.integers(-6, 7, pixels.shape), 0, 255).astype(np.uint8)
                Image.fromarray(copy).resize((48, 48), Image.Resampling.BICUBIC).save(path)
                part = ['train', 'train', 'valid', 'train', 'test'][g % 5]
                run.add(dict(key=f'{g}-{c}', url=f'{g}-{c}', given_label=label, status='ok', width=48, height=48,
                             path=str(path.relative_to(ds.path)), sha256=sha256_hex(path.read_bytes()),
                             split=part, duplicate_group=f'g{g}'))
    return ds


@pytest.fixture(scope='module')
def copies(tmp_path_factory):
    ds = noise(tmp_path_factory.mktemp('copies') / 'noise')
    train(ds, arch='efficientnet_lite0', size=48, bs=32, epochs=(6, 0), stage='raw')
    return ds


def test_groups_are_never_cut_and_copies_dealt_apart_would_be_seen(copies):
    table = cross_validated_predictions(copies, 'raw')
    assert table.groupby('group').fold.nunique().max() == 1 and set(table.fold) == set(range(5))
    assert set(table.split) == {'train', 'valid'}, 'test is not among them'
    assert len(table) == (copies.read().items().split != 'test').sum() and table.path.is_unique
    assert cross_validate(copies, 'raw', epochs=30).accuracy < .5, 'dice cannot be learned'
    # the same images, each said to be alone: copies come to stand on both sides
    rows = copies.images
    copies.update(rows.assign(duplicate_group=rows.sha256), ['duplicate_group'])
    try: apart = cross_validate(copies, 'raw', epochs=30)
    finally: copies.update(rows, ['duplicate_group'])
    assert apart.accuracy > .75
    assert cross_validate(copies, 'raw', epochs=30).accuracy < .5


def test_copies_are_not_as_many_witnesses(copies):
    m, table = cross_validate(copies, 'raw'), cross_validated_predictions(copies, 'raw')
    hits, n = int((table.label == table.predicted_label).sum()), len(table)
    low, high = m.intervals['accuracy']
    naive = share_interval(hits, n)
    assert high - low > 1.4 * (naive[1] - naive[0])
    assert low < m.accuracy < high


def test_the_interval_for_groups_covers_at_its_rate():
    rng, inside = np.random.default_rng(1), []
    for _ in range(400):
        easy = rng.beta(4, 1.5, 40)  # of each group
        sizes = rng.integers(1, 6, 40)
        groups = np.repeat(np.arange(40), sizes)
        low, high = grouped_interval(rng.random(len(groups)) < easy[groups], groups)
        inside.append(low <= 4 / 5.5 <= high)
    assert .92 <= np.mean(inside) <= .995, np.mean(inside)
    assert grouped_interval([True] * 12, [1] * 6 + [2] * 6) == share_interval(2, 2), 'two groups are two witnesses'


def test_it_is_the_headline_of_small_sets_only(copies, monkeypatch):
    m = evaluate(copies, 'raw')
    assert m.cross_validated.n == 144 and 'grouped cross-validation' in str(m) and m.cross_validated.headline in str(m)
    told = m.to_dict()['cross_validated']
    assert told['accuracy_low'] == m.cross_validated.intervals['accuracy'][0]
    assert told['sentence'] == m.cross_validated.headline
    monkeypatch.setattr('vegc.evaluation.crossval.SMALL', 180)
    assert small_headline(copies, 'raw') is None
    m = evaluate(copies, 'raw')
    assert 'cross_validated' not in m.to_dict() and 'cross-validation' not in str(m)


def test_one_look_is_one_time(copies, tmp_path):
    before = test_looks(copies)
    baselines(copies, split='valid', size=48)
    assert test_looks(copies) == before
    baselines(copies, split='test', size=48)
    assert test_looks(copies) == before + 1
    text = str(evaluate(copies, 'raw', 'test'))
    n = before + 2
    assert f'looked at {n} times.' in text
    (copies.path / 'predictions/test-looks.jsonl').unlink()
    assert 'looked at 1 time.' in str(evaluate(copies, 'raw', 'test'))


# ---- tables of methods

def test_the_table_says_what_scikit_learn_says():
    rng = np.random.default_rng(3)
    true = rng.choice(4, 300, p=[.6, .25, .1, .05])
    def run(k): return np.where(rng.random(300) < k / 5, true, rng.integers(0, 4, 300))
    told = {f'm{k}': np.stack([run(k) for _ in range(3)]) for k in (1, 3, 4)}
    def macro_f1(a, b): return f1_score(a, b, average='macro')
    scores = dict(accuracy=accuracy_score, balanced_accuracy=balanced_accuracy_score, macro_f1=macro_f1)
    t = method_table(true, told, 4, against='m1').set_index('method')
    for k, runs in told.items():
        for name, score in scores.items():
            assert t.loc[k, name] == pytest.approx(np.mean([score(true, run) for run in runs])), (k, name)
            assert t.loc[k, f'{name}_low'] < t.loc[k, name] < t.loc[k, f'{name}_high']
    assert np.isnan(t.difference['m1']) and t.difference_low['m3'] > 0
    assert t.difference['m4'] == pytest.approx(t.macro_f1['m4'] - t.macro_f1['m1'])


def test_the_bootstrap_is_paired():
    "Two methods that differ on four pictures: the interval of the difference is narrow, theirs are not."
    rng = np.random.default_rng(4)
    true = rng.integers(0, 3, 200)
    first = np.where(rng.random(200) < .7, true, (true + 1) % 3)
    second = first.copy()
    second[np.flatnonzero(first != true)[:4]] = true[np.flatnonzero(first != true)[:4]]
    t = method_table(true, dict(first=first, second=second), 3, against='first', score='accuracy').iloc[1]
    assert t.difference == pytest.approx(.02)
    assert t.difference_high - t.difference_low < .5 * (t.accuracy_high - t.accuracy_low)
    with pytest.raises(UsageError, match='macro_f1'): method_table(true, dict(a=first), 3, score='loss')


def test_plain_methods_stand_in_their_known_order():
    digits = load_digits()
    x, y = digits.data / 16, digits.target
    t = method_table(y[900:], plain_answers(x[:900], y[:900], x[900:], plain_methods()), 10).set_index('method')
    for k in ('largest class', 'class shares'): assert t.accuracy_high[k] < .2
    for k in ('nearest neighbours', 'random forest'): assert t.accuracy_low[k] > .88
    for k in ('logistic regression', 'linear SVM'): assert t.accuracy_low[k] > .8
    assert t.accuracy['largest class'] == pytest.approx((y[900:] == np.bincount(y[:900]).argmax()).mean())


def test_a_fit_that_stops_early_is_a_plain_method_and_says_nothing(recwarn):
    from sklearn.linear_model import LogisticRegression
    x, y = load_digits(return_X_y=True)
    plain_answers(x, y, x[:5], dict(short=LogisticRegression(max_iter=3)))
    assert not [w for w in recwarn if 'onverge' in str(w.message)]


def test_baselines_stand_beside_the_stage_on_its_pictures(copies):
    table = baselines(copies, 'raw', 'valid')
    by = table.set_index(['method', 'features'])
    said = predictions(copies, 'raw', 'valid')
    assert by.accuracy['stage raw', ''] == pytest.approx((said.label == said.predicted_label).mean())
    assert set(table.n) == {len(said)} and set(table.features) == {'', 'pixels 32×32', 'frozen features'}
    assert np.isnan(by.difference['stage raw', ''])
    forest = by.loc['random forest', 'frozen features']
    assert forest.difference == pytest.approx(forest.accuracy - by.accuracy['stage raw', ''])
    with pytest.raises(UsageError, match='valid or test'): baselines(copies, 'raw', 'train')
    assert by.accuracy.max() < .8, 'labels are dice: only what has seen the answers knows them'


def test_only_training_rows_are_repeated(copies, monkeypatch):
    seen = []
    def spy(x, y, held, c, **how):
        seen.append((how['balance'], x, y, held))
        return np.eye(c, dtype=np.float32)[np.zeros(len(held), int)]
    monkeypatch.setattr(methods, 'head_probabilities', spy)
    compare_imbalance(copies, 'raw', methods=('none', 'oversampling'), seeds=(0,))
    part = copies.read().items().split
    for _, x, y, held in seen:
        assert len(x) == len(y) == (part == 'train').sum() and len(held) == (part == 'valid').sum()


def test_oversampling_repeats_what_it_learns_from_and_nothing_else(monkeypatch):
    from vegc.training import fit
    from vegc.training.probes import head_probabilities
    batches, real = [], fit.FeatureLoader
    class Spy(real):
        def __init__(self, x, y, *a, **kw):
            batches.append((x.numpy(), y.numpy()))
            super().__init__(x, y, *a, **kw)
    monkeypatch.setattr(fit, 'FeatureLoader', Spy)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 8)).astype(np.float32), np.array([0] * 50 + [1] * 10)
    held = rng.normal(size=(30, 8)).astype(np.float32)
    head_probabilities(x, y, held, 2, epochs=1, balance='oversampling')
    got, labels = batches[0]
    assert np.bincount(labels).tolist() == [50, 50]
    mine = {r.tobytes() for r in x}
    assert all(r.tobytes() in mine for r in got) and not {r.tobytes() for r in held} & {r.tobytes() for r in got}
    at = [np.flatnonzero((x == row).all(1))[0] for row in got]
    assert labels.tolist() == y[at].tolist(), 'with their own labels'


# ---- more pictures

def drawn(seed, a, b, c, whole=1000, m=400, repeats=3, alike=.8):
    "Answers of a learner whose error is a + b·n^−c: an image that is hard is hard at every n."
    rng, ns = np.random.default_rng(seed), np.array([round(s * whole) for s in SHARES])
    hard, right = rng.normal(size=m), np.zeros((len(ns), repeats, m))
    for i, n in enumerate(ns):
        for r in range(repeats):
            z = np.sqrt(alike) * hard + np.sqrt(1 - alike) * rng.normal(size=m)
            right[i, r] = right[i, 0] if n == whole and r else z > norm.ppf(a + b * n**-c)
    return Curve(ns, right)


@pytest.mark.parametrize('a,b,c', [(.08, 1.2, .45), (0, 2, .3)])
def test_the_interval_at_twice_the_pictures_holds_the_truth_at_about_its_rate(a, b, c):
    truth, inside = 1 - (a + b * 2000**-c), []
    for seed in range(80):
        two = extrapolated(drawn(seed, a, b, c), samples=150, seed=seed).iloc[0]
        inside.append(two.low <= truth <= two.high)
    assert .86 <= np.mean(inside) <= .995, np.mean(inside)


def test_a_law_is_found_again_and_never_bends_upwards():
    ns = np.array([50, 100, 200, 400, 800, 1600])
    for a, b, c in ((.1, 2, .5), (0, 1.5, .3), (.3, 5, .9)):
        want = a + b * np.array([3200., 6400])**-c
        np.testing.assert_allclose(power_law(ns, a + b * ns**-c, [3200, 6400])[0], want, atol=.004)
    rising = power_law(ns, np.linspace(.2, .4, 6), [3200])
    assert rising[0, 0] == pytest.approx(.3), 'where errors rise with n the law is a constant'


def test_where_laws_disagree_the_answer_is_wide():
    """A curve that bends: its large half falls otherwise than its small one, so laws through all points and through the
    last ones part; on a pure law they do not."""
    ns = np.array([round(s * 1000) for s in SHARES])
    pure, bent = .05 + 2 * ns**-.4, np.where(ns < 400, .5 * (ns / 400)**-.15, .5 * (ns / 400)**-.9)
    def spread(errors):
        laws = laws_ahead(ns, errors[None], np.array([2000, 1000]), np.ones(len(ns)))
        return float(np.ptp(laws[:, 0, 0]))
    assert spread(pure) < .004 and spread(bent) > .03
    # so many images that chance has no part in it
    sure = np.stack([np.stack([np.arange(4000) >= round(4000 * e)] * 3) for e in bent]).astype(float)
    two = extrapolated(Curve(ns, sure), samples=60).iloc[0]
    assert two.high - two.low > .02


def test_it_says_so_when_nothing_can_be_said():
    rng, m = np.random.default_rng(0), 200
    flat = np.repeat((rng.random(m) < .6)[None, None], 7, 0).repeat(3, 1).astype(float)
    ns = np.array([round(s * 500) for s in SHARES])
    def say(ns, right): return growth_of(Curve(ns, right), 'valid', samples=100).sentence
    assert 'The curve is flat' in say(ns, flat)
    noisy = (rng.random((7, 3, 25)) < np.linspace(.55, .62, 7)[:, None, None]).astype(float)
    assert 'too flat or too noisy' in say(ns, noisy)
    assert 'too few' in say(ns[-3:], noisy[-3:])
    steep = drawn(0, 0, 4, .4)
    assert 'Twice the images would bring about +' in say(steep.ns, steep.right)
    with pytest.raises(UsageError, match='four times'): extrapolated(steep, times=(8,))


def test_parts_are_nested_and_the_whole_is_learned_once():
    x, y = np.random.default_rng(0).normal(size=(80, 4)), np.arange(80) % 2
    curve = answers_by_n(x, y, x[:10], y[:10], shares=(.01, .5, 1), repeats=3)
    assert curve.ns.tolist() == [2, 40, 80]
    assert (curve.right[2] == curve.right[2, 0]).all() and not (curve.right[1] == curve.right[1, 0]).all()
    assert isinstance(curve.table(), pd.DataFrame)


# ---- tables on disk

@pytest.mark.parametrize('spoil', [lambda t: t.assign(p_x=1.).drop(columns=t.columns[-1]),
                                   lambda t: t.assign(**{t.columns[-1]: 'words'}),
                                   lambda t: t.assign(**{t.columns[-1]: 7.}), lambda t: t[1:]])
def test_a_table_of_predictions_that_holds_something_else_is_refused(spoil, copies):
    predictions(copies, 'raw')
    file = copies.path/'predictions/raw-valid.parquet'
    stored, whole = pq.read_table(file), file.read_bytes()
    table = pa.Table.from_pandas(spoil(stored.to_pandas()), preserve_index=False)
    pq.write_table(table.replace_schema_metadata(stored.schema.metadata), file)
    try:
        with pytest.raises(DatasetError, match='raw-valid.parquet'): predictions(copies, 'raw')
    finally: file.write_bytes(whole)


def test_there_is_no_way_to_judge_without_splits(tmp_path):
    ds = noise(tmp_path/'noise', n=6)
    ds.update(ds.images.assign(split=None), ['split'], reassign=True)
    for ask in (compare_imbalance, baselines):
        with pytest.raises(DatasetError, match='has no splits yet'): ask(ds)
    assert ds.images.split.isna().all()


def test_what_was_trained_on_is_no_place_to_judge(copies):
    for ask in (linear_predictions, would_more_help, baselines):
        with pytest.raises(UsageError, match="split must be valid or test, not 'train'"): ask(copies, 'raw', 'train')
