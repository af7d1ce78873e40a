"""How sure a suggestion is, on labels planted wrong; scores and probabilities from elsewhere."""
import numpy as np
import pandas as pd
import pytest
from cleanlab.rank import get_label_quality_scores
from PIL import Image

from vegc.cleaning.clean import clean
from vegc.cleaning.reasons import reason
from vegc.cleaning.wrong_labels import class_posterior, fit_label_noise, judge_labels
from vegc.core import DatasetError, UsageError
from vegc.data.dataset import ImageDataset
from vegc.data.folder import Gone
from vegc.data.manifest import manifest_frame, write_manifest
from vegc.cleaning.issues import erase, find_issues, merge_queues, saved_issues
from vegc.training.probes import out_of_fold

K = 6


def clouds(seed, n=3000, noise=.08, similar=False, apart=3.2):
    "Features of overlapping classes of unequal size, true labels, given labels: a wrong one is any other, or the next."
    rng = np.random.default_rng(seed)
    true = rng.choice(K, n, p=np.array([5, 4, 3, 3, 2, 1])/18)
    x = (rng.normal(size=(n, 16)) + apart*np.eye(K, 16)[true]).astype(np.float32)
    slip = 1 if similar else rng.integers(1, K, n)
    return x, true, np.where(rng.random(n) < noise, (true + slip) % K, true)


def suggestions(x, true, given, c=.05):
    "For each label that the folds dispute: the chance that the suggestion is right, whether it is, the probability."
    p = out_of_fold(x, given, np.arange(len(x)), folds=5, c=c)
    best, rows = p.argmax(1), np.arange(len(x))
    asked = best != given
    chance = class_posterior(p, given, *fit_label_noise(p, given))[rows, best]
    return chance[asked], (best == true)[asked], p[rows, best][asked]


def pooled(**planting):
    "The same over four plantings."
    return map(np.concatenate, zip(*(suggestions(*clouds(seed, **planting)) for seed in range(4)), strict=True))


def miss(said, right):
    "Expected calibration error, ten bins."
    part = np.minimum((said*10).astype(int), 9)
    return sum(abs(said[part == b].sum() - right[part == b].sum()) for b in range(10))/len(said)


@pytest.mark.parametrize('noise', [.04, .08, .15])
def test_nine_in_ten_of_what_is_ninety_per_cent_sure_is_right(noise):
    "Pooled over plantings, at the top and all along; the plain probability is not fit for that."
    chance, right, plain = pooled(noise=noise)
    sure = chance >= .9
    assert sure.sum() >= 100 and right[sure].mean() >= .9 and abs(right[sure].mean() - chance[sure].mean()) < .05
    for low, high in ((0, .2), (.2, .5), (.5, .9)):
        some = (chance >= low) & (chance < high)
        said, true = chance[some].mean(), right[some].mean()
        assert some.sum() >= 40 and abs(true - said) < .1, (low, some.sum(), said, true)
    assert miss(plain, right) > .1 > .05 > miss(chance, right)


def test_slips_between_two_classes_make_it_careful_not_bold():
    chance, right, _ = pooled(similar=True)
    assert right[chance >= .9].mean() >= .9 and right[chance >= .5].mean() >= chance[chance >= .5].mean() - .03


@pytest.mark.parametrize('c, n, noise', [(4, 800, .1), (10, 1000, .04), (10, 3000, .1)])
def test_slips_between_like_classes_are_not_called_unlikely(c, n, noise):
    "Classes in pairs that resemble each other, wrong labels inside a pair: the first suggestions said 0 to 12 %."
    rng = np.random.default_rng(2)
    centres = rng.normal(size=(c, 32))
    centres[1::2] = centres[::2] + .5*rng.normal(size=(c//2, 32))
    true = rng.integers(0, c, n)
    x = rng.normal(size=(n, 32)) + 1.6*centres[true]
    given = np.where(rng.random(n) < noise, true ^ 1, true)
    found = judge_labels(out_of_fold(x, given, np.arange(n)), given)
    first = np.argsort(found.score)[:int(n*noise)]
    said, right = found.confidence[first].mean(), (found.predicted == true)[first].mean()
    assert right > .7 and abs(said - right) < .15, (said, right)
    assert abs(found.wrong - (given != true).sum()) < .3*(given != true).sum()


def test_without_wrong_labels_nothing_is_sure():
    x, true, _ = clouds(9)
    chance, _, _ = suggestions(x, true, true)
    assert (chance >= .9).sum() == 0


def test_a_few_sure_mistakes_do_not_make_the_probabilities_look_unsure():
    "Fitted without a share of wrong labels, the temperature would rise with every planted mistake."
    x, true, given = clouds(3, noise=.15)
    p = out_of_fold(x, true, np.arange(len(x)), folds=5, c=.05)
    honest, planted = fit_label_noise(p, true), fit_label_noise(p, given)
    assert abs(planted[0] - honest[0]) < .1 and honest[1] < .02 and abs(planted[1] - (true != given).mean()) < .02


@pytest.fixture
def ds(tmp_path):
    "Two hundred and forty drawn images, every eleventh under the next class."
    ds, rng, rows = ImageDataset(tmp_path / 'ds', subject='objects'), np.random.default_rng(0), []
    for i in range(240):
        label, path = (i % 3 + (i % 11 == 0)) % 3, f'images/x/{i:03}.png'
        (ds.path / 'images/x').mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(ds.path / path)
        rows.append(dict(key=str(i), url=f'u{i}', given_label='abc'[label], path=path, sha256=f'{i:016x}',
                         status='review' if i == 200 else 'ok', width=64, height=64,
                         split=['train', 'valid', 'test'][i % 5 % 3]))
    write_manifest(ds.path / 'manifest.parquet', manifest_frame(rows))
    return ds


def numbers(issues): return issues.path.str[-7:-4].astype(int).to_numpy()


def test_scores_and_probabilities_from_elsewhere(ds):
    "The label score is cleanlab's self-confidence on the same probabilities; its other scores rank when handed in."
    rng, n = np.random.default_rng(1), 240
    x = rng.normal(size=(n, 8)) + 4*np.eye(3, 8)[np.arange(n) % 3]
    p = rng.dirichlet([1, 1, 1], n)*.3 + .7*np.eye(3)[np.arange(n) % 3]
    y = ds.stored().label.map('abc'.index).to_numpy()
    mine = find_issues(ds, pred_probs=p, features=x)
    known = numbers(mine) != 200
    theirs = get_label_quality_scores(y, p, method='self_confidence')[numbers(mine)]
    assert np.allclose(mine.label_score.to_numpy()[known], theirs[known])
    assert (mine.predicted_label.to_numpy() == np.array(list('abc'))[p.argmax(1)][numbers(mine)]).all()
    margin = get_label_quality_scores(y, p, method='normalized_margin')
    own = find_issues(ds, pred_probs=p, features=x, label_scores=margin)
    assert np.allclose(own.label_score, margin[numbers(own)])
    label_queue = [i for i in np.argsort(margin, kind='stable') if i != 200]
    assert set(label_queue[:20]) <= set(numbers(own)[:36]), 'the worst by the scores handed in come first'
    assert set(numbers(mine)[:30]) >= set(range(0, 240, 11)) - {200}


def test_what_is_handed_in_is_checked(ds):
    x, p = np.random.default_rng(0).normal(size=(240, 8)), np.full((240, 3), 1/3)
    nan = p.copy()
    nan[3, 1] = np.nan
    for more, said in [(dict(pred_probs=p[:9]), r'pred_probs has shape \(9, 3\)'), (dict(pred_probs=p*2), 'sum to 1'),
                       (dict(pred_probs=nan), 'sum to 1'), (dict(features=x[:7]), 'features has 7 rows'),
                       (dict(label_scores=np.zeros(5)), 'label_scores must be 240'),
                       (dict(label_scores=[*[0.]*239, np.inf]), 'label_scores must be 240')]:
        with pytest.raises(UsageError, match=said): find_issues(ds, **(dict(features=x) | more))
    assert not (ds.path / 'predictions/issues.parquet').exists()


def test_rules_act_on_the_chance_and_say_it(ds):
    "`auto` at .9 relabels what is right with that chance or more, in train and valid; of planted mistakes nearly all."
    n = 240
    rng = np.random.default_rng(2)
    x = rng.normal(size=(n, 8)).astype(np.float32) + 6*np.eye(3, 8)[np.arange(n) % 3]
    issues = find_issues(ds, features=x)
    done = clean(ds, auto=.9)
    moved = done[done.action == 'relabel']
    number = moved.path.str[-7:-4].astype(int)
    assert len(moved) >= 8 and (moved.label == ['abc'[i % 3] for i in number]).mean() >= .9
    surest = issues.set_index('path').confidence[moved.path]
    assert (surest >= .9).all() and not set(moved.path) & set(ds.images.path[ds.images.split == 'test'])
    assert moved.why.str.match(r'right with a chance of (0\.9|1\.0)').all()
    assert done.attrs['left_alone']['test pictures'] > 0


def test_a_reason_promises_no_more_than_the_chance():
    row = pd.Series(dict(given_label='a', predicted_label='b', label_score=.02, issue_types='label', confidence=.93,
                         outlier=.5))
    assert reason(row) == 'looks like b (93%), not a'
    assert reason(row.replace(.93, .18)) == 'may be b (18%) rather than a'


@pytest.mark.parametrize('alone', [1, 3])
def test_a_class_that_its_judges_have_not_seen_is_named(ds, recwarn, alone):
    "Once and in our words; scikit-learn's about \"the least populated class in y\" does not reach anybody."
    rows = ds.df
    rows.loc[:alone - 1, 'given_label'] = 'rare'
    write_manifest(ds.path / 'manifest.parquet', rows)
    find_issues(ds, features=np.random.default_rng(0).normal(size=(len(rows), 16)).astype(np.float32))
    said = [str(w.message) for w in recwarn]
    assert not [t for t in said if 'populated' in t], said
    mine = [t for t in said if 'with a single image' in t]
    named = "1 class with a single image, duplicates not counted: 'rare'."
    assert len(mine) == (alone == 1) and all(named in t for t in mine), said


def test_the_table_is_checked_when_it_is_read_and_forgets(ds):
    "A table of another make is named and refused; rows of images that the dataset does not have are left out."
    issues = find_issues(ds, features=np.random.default_rng(0).normal(size=(240, 8)))
    file = ds.path / 'predictions/issues.parquet'
    issues.assign(path=['../../etc/passwd', *issues.path[1:]]).to_parquet(file)
    assert saved_issues(ds).path.tolist() == issues.path[1:].tolist()
    assert erase(ds.path, Gone(paths=frozenset(issues.path[3:5]))) == [file]
    assert set(issues.path[3:5]).isdisjoint(saved_issues(ds).path)
    assert erase(ds.path, Gone(paths=frozenset(['images/none.png']))) == []
    for bad in (issues.drop(columns='outlier'), issues.assign(label_score='high'), issues.assign(given_label=1)):
        bad.to_parquet(file)
        with pytest.raises(DatasetError, match='issues.parquet'): saved_issues(ds)
    file.write_bytes(b'no table')
    with pytest.raises(DatasetError, match='issues.parquet'): saved_issues(ds)


def test_one_call_reads_the_manifest_once(ds, monkeypatch):
    from vegc.data import dataset
    reads, real = [], dataset.read_rows
    monkeypatch.setattr(dataset, 'read_rows', lambda *a, **kw: reads.append(a) or real(*a, **kw))
    find_issues(ds, features=np.random.default_rng(0).normal(size=(240, 8)))
    assert len(reads) == 1


class Asked(list):
    "A queue that counts how often it is gone through."
    times = 0

    def __iter__(self):
        self.times += 1
        return super().__iter__()


def test_queues_are_merged_in_one_go_however_long_they_are():
    queue = Asked(range(1000))
    assert merge_queues([queue, Asked([5, 1000])], [3, 1]) == [0, 1, 2, 5, 3, 4, 6, 1000, *range(7, 1000)]
    assert queue.times <= 2, 'not once a round: of 100,000 images a round takes a fiftieth of a second'
