"""Promises that hold whatever is called in whatever order: a split stays, an image has one, no row is lost."""
import hashlib
import importlib.metadata
import re
import shutil
import warnings

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from vegc.acquire.add import add
from vegc.acquire.ingest import ingest
from vegc.cleaning.clean import apply_rules, clean
from vegc.cleaning.issues import find_issues
from vegc.cleaning.review_page import review_page
from vegc.cleaning.session import Session, review_items
from vegc.core import DatasetError, VegcWarning, sha256_hex
from vegc.data.dataset import ImageDataset
from vegc.data.folder import Journal
from vegc.data.forget import forget
from vegc.data.manifest import SPLITS
from vegc.evaluation.predictions import embeddings, predictions
from vegc.features.features import FeatureFile, offline_features
from vegc.splits.split import split, split_log
from vegc.training.stages import LeakError

CLASSES, N = ('cat', 'dog'), 12


@pytest.fixture(scope='module')
def pool(tmp_path_factory):
    "Twelve pictures a class, of noise, so that none is a copy of another; and a mirror site of them."
    root, rng = tmp_path_factory.mktemp('pool'), np.random.default_rng(3)
    for site in ('site', 'mirror'):
        for c in CLASSES: (root/site/c).mkdir(parents=True)
    for c in CLASSES:
        for i in range(N):
            im = Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)
            im.save(root/'site'/c/f'{i:02}.png')
            shutil.copy(root/'site'/c/f'{i:02}.png', root/'mirror'/c/f'{i:02}.png')
    add(root/'site', root/'all', subject='objects')
    offline_features(ImageDataset(root/'all'))
    return root


class Somebody:
    "Who works with a dataset, and the lists that grow while they do."
    def __init__(self, pool, root):
        self.pool, self.root, self.site = pool, root, root/'site'
        shutil.copytree(pool/'site', self.site)
        self.ds = ImageDataset(root/'ds', subject='objects')
        shutil.copytree(pool/'all/features', self.ds.path/'features')
        self.listed = {c: [] for c in CLASSES}
        self.forgotten = set()

    def fetch(self, **how):
        (self.root/'lists').mkdir(exist_ok=True)
        for c, urls in self.listed.items(): (self.root/'lists'/f'{c}.csv').write_text('\n'.join(urls) + '\n')
        ingest(self.root/'lists', self.ds, allow_files=True, max_failures=1., **how)

    def list(self, c, i, where='site', at_top=False, under=None):
        base = self.site if where == 'site' else self.pool/'mirror'
        url, urls = (base/CLASSES[c]/f'{i:02}.png').resolve().as_uri(), self.listed[under or CLASSES[c]]
        if url not in urls: urls.insert(0 if at_top else len(urls), url)

    def picture(self, i):
        rows = self.ds.stored(excluded=True)
        return rows.path.iloc[i % len(rows)] if len(rows) else None


def _list(who, i):
    for c in (0, 1): who.list(c, i)
    who.fetch()


def _top(who, i):
    "A mirror's addresses come in above all others."
    for c in (0, 1):
        for k in range(i + 1): who.list(c, k, 'mirror', at_top=True)
    who.fetch()


def _other_label(who, i):
    "A picture is listed under the other class, too: both are held for review."
    who.list(i % 2, i, 'mirror', at_top=True, under=CLASSES[1 - i % 2])
    who.fetch()


def _lose(who, i):
    "A file is lost, and its address shows another picture by now."
    if (path := who.picture(i)) is None: return
    (who.ds.path/path).unlink()
    for c in CLASSES:
        shutil.copy(who.pool/'site'/CLASSES[i % 2]/f'{(i + 1) % N:02}.png', who.site/c/f'{i:02}.png')
    who.fetch(retry_failed=True)


def _gone(who, i):
    "A file is lost and cannot be had now; later it can."
    if (path := who.picture(i)) is None: return
    (who.ds.path/path).unlink()
    away = who.site.rename(who.root/'away')
    who.fetch()
    away.rename(who.site)
    who.fetch(retry_failed=True)


def _decide(who, i):
    if (path := who.picture(i)) is None: return
    action = ('exclude', 'relabel', 'keep')[i % 3]
    table = f'path,action,label,who,why\n{path},{action},{"dog" if action == "relabel" else ""},me,looked\n'
    (who.root/'d.csv').write_text(table)
    clean(who.ds, decisions=who.root/'d.csv')


def _undo(who, i):
    if len(who.ds.decisions): clean(who.ds, undo=True)


def _forget(who, i):
    if (path := who.picture(i)) is None: return
    rows = who.ds.df
    same = rows.sha256.isin(rows.sha256[rows.path == path])
    who.forgotten |= set(rows.path[same].dropna())
    forget(who.ds, path)


def _killed(who, i):
    "A run that was killed leaves rows of known pictures in its journal, without a split."
    rows = who.ds.df.dropna(subset='path')
    if rows.empty: return
    row = rows.iloc[i % len(rows)].drop(['split', 'duplicate_group']).dropna().to_dict()
    journal = Journal(who.ds.path/'journal.jsonl')
    journal.add(row | dict(key=f'killed{i}', url=f'https://x.example/{i}'))
    journal.close()


DO = dict(list=_list, top=_top, other_label=_other_label, lose=_lose, gone=_gone, decide=_decide, undo=_undo,
          forget=_forget, killed=_killed, add=lambda who, i: add(who.pool/'mirror', who.ds),
          split=lambda who, i: split(who.ds, seed=i, valid=.25, test=.25),
          policy=lambda who, i: who.fetch(on_conflict=('review', 'drop', 'first', 'all')[i % 4]))
STEPS = st.lists(st.tuples(st.sampled_from([*DO, 'split', 'top']), st.integers(0, N - 1)), min_size=3, max_size=8)
GROWN = [('list', i) for i in range(8)]


def splits_of(ds):
    "Stored pictures with their splits, and that all rows of one say the same."
    rows = ds.df.dropna(subset='path')
    assert (rows.groupby('path').split.nunique(dropna=False) == 1).all(), 'rows of one picture differ'
    dealt = rows.dropna(subset='split').drop_duplicates('path')
    return dict(zip(dealt.path, dealt.split, strict=True)), rows


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture],
          phases=[Phase.explicit, Phase.reuse, Phase.generate])
@example([('split', 5), ('top', 7), ('split', 6)])
@example([('split', 5), ('other_label', 3), ('lose', 2), ('split', 1), ('policy', 1), ('policy', 3), ('split', 2)])
@example([('split', 5), ('killed', 3), ('top', 3), ('gone', 1), ('split', 4)])
@given(STEPS)
def test_a_stored_split_never_changes(pool, tmp_path_factory, steps):
    "Lists grow at the top with other addresses, files are lost, runs killed, pictures forgotten, policies change."
    who = Somebody(pool, tmp_path_factory.mktemp('any'))
    for c in (0, 1):
        for i in range(8): who.list(c, i)
    stored = {}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', VegcWarning)
        who.fetch()
        for what, i in steps:
            rows_before = len(who.ds.df)
            DO[what](who, i)
            now, rows = splits_of(who.ds)
            assert len(who.ds.df) >= rows_before, 'a row is lost'
            for path, part in stored.items():
                if path not in who.forgotten and (rows.path == path).any(): assert now[path] == part, (what, path)
            same = rows[rows.split.isin(SPLITS)].groupby('sha256').split.nunique()
            assert same.max() <= 1 if len(same) else True, (what, 'bytes in two splits')
            stored |= now


def test_the_writer_refuses_to_change_a_split(pool, tmp_path):
    "Two processes deal at once: the second one is told, and the first deal stays."
    ds = ImageDataset(tmp_path/'ds', subject='objects')
    add(pool/'site', ds)
    stale = ds.images
    split(ds)
    before = (ds.path/'manifest.parquet').read_bytes()
    other = stale.assign(split='test', duplicate_group='g')
    with pytest.raises(DatasetError, match='stays as it was.*reassign'): ds.update(other, ['split', 'duplicate_group'])
    with pytest.raises(DatasetError, match='stays as it was'): ds.update(stale, ['split'])  # to none
    assert (ds.path/'manifest.parquet').read_bytes() == before
    split(ds, seed=9, reassign=True)
    assert (ds.path/'manifest.parquet').read_bytes() != before


def test_what_is_held_keeps_its_split_for_its_copies(pool, tmp_path):
    "A copy that comes while a picture is held for review goes where the picture is, so that both can be used later."
    ds = ImageDataset(tmp_path/'ds', subject='objects')
    add(pool/'site', ds)
    split(ds, valid=.25, test=.25)
    was = ds.images.set_index('path').split
    for name in ('extra', 'copies'): (tmp_path/name).mkdir()
    for k in range(N):  # every cat is filed as a dog, too: held; then a smaller copy of each comes
        for folder, c in (('extra', 'dog'), ('copies', 'cat')): (tmp_path/folder/c).mkdir(exist_ok=True)
        shutil.copy(pool/'site/cat'/f'{k:02}.png', tmp_path/'extra/dog'/f'x{k:02}.png')
        Image.open(pool/'site/cat'/f'{k:02}.png').resize((80, 80)).save(tmp_path/'copies/cat'/f'{k:02}-c.png')
    add(tmp_path/'extra', ds)
    add(tmp_path/'copies', ds)
    split(ds, seed=11)
    rows = ds.df.dropna(subset='path').assign(n=lambda t: t.url.str.extract(r'cat/(\d+)', expand=False))
    cats = rows[rows.given_label == 'cat'].dropna(subset='n')
    assert (cats[cats.status == 'review'].path.map(was) == cats[cats.status == 'review'].split).all()
    assert (cats.groupby('n').split.nunique() == 1).all(), 'a copy lies in another split than what is held'


# --- who decides on what --------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def suspicious(tmp_path_factory):
    "A tiny dataset with wrong labels and its issues, then another deal."
    root = tmp_path_factory.mktemp('suspicious')
    src = tiny.draw(root/'pictures')
    for i in range(0, 18, 3): (src/'zero'/f'{i:03}.png').rename(src/'one'/f'z{i:03}.png')
    ds = ImageDataset(root/'ds', subject='characters')
    add(src, ds)
    split(ds, valid=.3, test=.3)
    return ds


def test_rules_and_pages_leave_the_test_part_of_today_alone(suspicious, tmp_path):
    "Issues were found under the splits of then; whatever order is handed in, the splits of now decide."
    ds = tiny.copy(suspicious, tmp_path)
    then = find_issues(ds)
    split(ds, seed=7, valid=.3, test=.3, reassign=True)
    now = ds.images.set_index('path').split
    moved = then[(then.split != 'test') & (then.path.map(now) == 'test')]
    assert len(moved) and moved.issue_types.str.contains('label').any()
    for order in (None, then):
        shown = review_items(ds.read(), order, False)
        assert len(shown) and not (shown.path.map(now) == 'test').any()
    session = Session(ds, then, test=True)
    assert (session.items.split == session.items.path.map(now)).all()
    apply_rules(session, then, .05)
    session.close()
    decided = ds.decisions.path.map(now)
    assert len(decided) and not (decided == 'test').any()
    html = review_page(ds, ds.path/'r.html').read_text('utf-8')
    shown = re.findall('data-path="([^"]*)"', html)
    assert shown and not any(now[path] == 'test' for path in shown)


# --- answers are of what lies there ----------------------------------------------------------------------------

@pytest.fixture(scope='module')
def staged(tmp_path_factory): return tiny.make(tmp_path_factory.mktemp('staged'), decisions=False)


def test_other_bytes_under_a_stored_name_are_noticed(staged, tmp_path):
    "Pictures of one class are overwritten with those of another: no figure of before is given again."
    ds = tiny.copy(staged, tmp_path)
    features = offline_features(ds)
    before, looked = predictions(ds, 'raw'), embeddings(ds, 'raw')
    valid = ds.images[ds.images.split == 'valid']
    zero, one = (valid[valid.given_label == c].path.tolist() for c in ('zero', 'one'))
    for p, q in zip(zero, one, strict=False): shutil.copy(ds.path/q, ds.path/p)
    changed = min(len(zero), len(one))
    with pytest.warns(VegcWarning, match=f'{changed - 1} more was changed since it was stored' if changed > 1 else ''):
        after = predictions(ds, 'raw')
    p = [c for c in after if c.startswith('p_')]
    of = before.set_index('path')[p]
    for old, new in zip(zero, one, strict=False):
        got = after.set_index('path').loc[old, p].astype(float)
        np.testing.assert_allclose(got, of.loc[new].astype(float), atol=1e-5)
    with pytest.warns(VegcWarning, match='was changed'): assert not np.array_equal(embeddings(ds, 'raw'), looked)
    with pytest.warns(VegcWarning, match='was changed'): assert not np.array_equal(offline_features(ds), features)
    train_image = ds.images.path[ds.images.split == 'train'].iloc[0]
    shutil.copy(ds.path/train_image, ds.path/zero[0])
    with pytest.raises(LeakError), pytest.warns(VegcWarning, match='was changed'): predictions(ds, 'raw')


def test_other_weights_under_a_stage_are_noticed(staged, tmp_path):
    ds = tiny.copy(staged, tmp_path)
    before = predictions(ds, 'raw')
    assert predictions(ds, 'raw').equals(before)
    file = ds.path/'models/raw/weights.safetensors'
    save_file({k: v/2 if k.endswith('.weight') else v for k, v in load_file(file).items()}, file)
    assert not predictions(ds, 'raw').equals(before)


def test_kept_answers_cost_no_second_reading(staged, tmp_path, monkeypatch):
    "Files are read for their hash once a process, not at every question."
    ds = tiny.copy(staged, tmp_path)
    predictions(ds, 'raw')
    monkeypatch.setattr(hashlib, 'file_digest', lambda *a: pytest.fail('a file was read again'))
    predictions(ds, 'raw')


def test_what_was_made_of_other_bytes_is_forgotten_too(staged, tmp_path):
    "A picture was replaced by hand, and its features computed; then it is forgotten."
    ds = tiny.copy(staged, tmp_path)
    path = ds.images.path.iloc[0]
    Image.new('RGB', (40, 40), 'teal').save(ds.path/path)
    with pytest.warns(VegcWarning, match='was changed'): offline_features(ds)
    mark = sha256_hex((ds.path/path).read_bytes())
    def kept(): return any(mark in FeatureFile.read(f).hashes for f in ds.path.glob('features/*.safetensors'))
    assert kept()
    forget(ds, path)
    assert not kept()


def test_a_checkout_that_is_not_installed_works(monkeypatch, staged, tmp_path):
    "No metadata of vegc: the version is noted as not installed, and no work is lost for it."
    real = importlib.metadata.version
    def version(name):
        if name == 'vegc': raise importlib.metadata.PackageNotFoundError(name)
        return real(name)
    monkeypatch.setattr(importlib.metadata, 'version', version)
    ds = tiny.copy(staged, tmp_path)
    split(ds, seed=3, reassign=True)
    assert split_log(ds).tool.iloc[-1] == 'vegc 0+not.installed'
    find_issues(ds)
    review_page(ds, ds.path/'r.html', test=True)
