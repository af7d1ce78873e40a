"""Splits: leak-free on pictures with planted copies, and put, whatever happens to the dataset afterwards."""
import itertools
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
from aiohttp import web
from fault_server import FaultServer, write_lists
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from pictures import CHANGES, changed, jpeg, scene
from scipy.stats import binomtest

from vegc.acquire.add import add
from vegc.acquire.ingest import ingest
from vegc.cleaning.clean import clean
from vegc.core import DatasetError, UsageError, VegcWarning
from vegc.data.dataset import ImageDataset
from vegc.data.folder import Gone
from vegc.data.handover import export_folder, to_hf
from vegc.data.manifest import SPLITS, write_manifest
from vegc.features import features
from vegc.features.backbones import WeightsError
from vegc.features.features import FeatureFile, cached_features
from vegc.splits import copies
from vegc.splits.copies import duplicate_pairs, duplicates, find_groups
from vegc.splits.deal import DealProgram, assign_splits, deal
from vegc.splits.folds import folds, group_folds
from vegc.splits.overlap import GreyThumb
from vegc.splits.split import split, split_counts, split_log

SHARES = np.array([.7, .2, .1])


def put(folder, label, name, im):
    "A picture as a file in a folder a class."
    (folder / label).mkdir(parents=True, exist_ok=True)
    (folder / label / f'{name}.jpg').write_bytes(jpeg(im))


def rate(k, n):
    "A share with its 95 % interval, for the log."
    low, high = binomtest(k, n).proportion_ci(method='wilson')
    return f'{k} of {n}: {k / n:.3f} ({low:.3f} to {high:.3f})'


# --- 150 pictures with planted copies -------------------------------------------------------------------------

@pytest.fixture(scope='module')
def planted(tmp_path_factory):
    "150 pictures of five classes, and a copy of each, every fifth changed in another way."
    root, rng = tmp_path_factory.mktemp('planted'), np.random.default_rng(0)
    for i in range(150):
        im, label = scene(i), f'class {i % 5}'
        put(root / 'src', label, f'{i:03}', im)
        put(root / 'src', label, f'{i:03}-{CHANGES[i % 7 % 5]}', changed(im, CHANGES[i % 7 % 5], rng))
    add(root / 'src', root / 'ds', subject='objects')
    ds = ImageDataset(root / 'ds')
    with warnings.catch_warnings():
        warnings.simplefilter('error', VegcWarning)  # no group is too large, no class too small
        split(ds)
    return ds


def test_copies_of_150_pictures_are_grouped(planted):
    "At least 95 % of the pairs in one group, at most 3 % in two splits, no group of more than five that are no copies."
    im = planted.images.assign(number=lambda t: t.url.str.extract(r'/(\d+)')[0])
    of = im.groupby('number')
    pairs = of.agg(groups=('duplicate_group', 'nunique'), splits=('split', 'nunique'), n=('path', 'size'))
    assert (pairs.n == 2).all() and len(pairs) == 150
    together, apart = int((pairs.groups == 1).sum()), int((pairs.splits > 1).sum())
    strangers = im.groupby('duplicate_group').number.nunique()
    print(f'grouped {rate(together, 150)}; in two splits {rate(apart, 150)}; '
          f'largest group of strangers {strangers.max()}; groups of strangers {(strangers > 1).sum()}')
    assert together >= .95 * 150 and apart <= .03 * 150 and strangers.max() <= 5


def test_shares_of_that_split_are_kept(planted):
    counts = split_counts(planted).counts[list(SPLITS)]
    # sixty pictures a class, in pairs: nothing can be nearer than one pair
    assert (counts.sub(counts.sum(axis=1), axis=0).abs().to_numpy() >= 0).all()
    assert (counts - counts.sum(axis=1).to_numpy()[:, None] * SHARES).abs().to_numpy().max() <= 2


def test_without_a_body_hashes_alone_do_and_say_so(planted, tmp_path, monkeypatch):
    bare = ImageDataset(tmp_path / 'ds', subject='objects')
    shutil.copytree(planted.path / 'images', bare.path / 'images')
    shutil.copy(planted.path / 'manifest.parquet', bare.path)

    def no_body(*_, **__): raise WeightsError('no weights')
    monkeypatch.setattr('vegc.splits.copies.offline_features', no_body)
    with pytest.warns(VegcWarning, match=r'hash only, which misses crops.*vegc\[offline\]'):
        pairs = duplicate_pairs(bare, bare.images)
    numbers = bare.images.assign(number=lambda t: t.url.str.extract(r'/(\d+)')[0])
    found = numbers.number.to_numpy()[pairs.a] == numbers.number.to_numpy()[pairs.b]
    crops = sum(i % 7 % 5 == 2 for i in range(150))
    assert found.sum() >= .95 * (150 - crops)


def test_pixels_are_asked_once(planted, tmp_path, monkeypatch):
    "What `split` has proved, `duplicates` and a look for issues need not prove again; nor need the images be there."
    ds, read, seen = ImageDataset(shutil.copytree(planted.path, tmp_path / 'ds')), GreyThumb.read, []
    monkeypatch.setattr(GreyThumb, 'read', lambda path: (seen.append(path), read(path))[1])
    kept = duplicate_pairs(ds, ds.images)
    assert len(duplicates(ds)) == len(kept) >= 145 and not seen, 'the file beside the features answers'
    file, = (ds.path / 'features').glob('proofs-*.parquet')
    stored = pd.read_parquet(file)
    assert set(stored.a) | set(stored.b) <= set(ds.images.sha256) and not stored.duplicated(['a', 'b']).any()
    # a third of the answers is lost: these pairs are asked again, by the pictures they are of, and no others
    stored[::3].to_parquet(file, index=False)
    again = ds.images.sample(frac=1, random_state=0).sort_values('path')
    pd.testing.assert_frame_equal(duplicate_pairs(ds, again), kept)
    lost = stored.drop(stored.index[::3])
    sha = ds.images.set_index(ds.images.path.map(lambda p: ds.path / p)).sha256
    assert {sha[p] for p in seen} == set(lost.a) | set(lost.b) and len(pd.read_parquet(file)) == len(stored)
    monkeypatch.setattr('vegc.splits.copies.METHOD', 99)
    seen.clear()
    pd.testing.assert_frame_equal(duplicate_pairs(ds, ds.images), kept)
    assert len(seen) > 145, 'another method, other answers'
    file.write_bytes(b'PAR1')
    monkeypatch.undo()
    with pytest.raises(DatasetError, match='damaged .*made again'): duplicate_pairs(ds, ds.images)
    pd.DataFrame(dict(a=[1], b=['x'], proof=[.9])).to_parquet(file)
    with pytest.raises(DatasetError, match='damaged .*other types'): duplicate_pairs(ds, ds.images)


def test_what_is_asked_does_not_depend_on_what_other_features_lie_there(planted, tmp_path):
    "Features of other bodies, newer ones, of another number format, damaged ones: none of them is taken."
    ds = ImageDataset(shutil.copytree(planted.path, tmp_path / 'ds'))
    kept, mine = duplicate_pairs(ds, ds.images), next((ds.path / 'features').glob('*.safetensors'))
    file = FeatureFile.read(mine)
    other = {'fp32': 'bf16', 'bf16': 'fp32'}[mine.stem[-4:]]
    for name in ('resnet18-0123456789ab-160x160-fp32', f'{mine.stem[:-4]}{other}'):
        nothing = np.zeros((len(file.hashes), 8), np.float16)
        FeatureFile(mine.with_name(f'{name}.safetensors'), file.hashes, nothing).write()
    mine.with_name('x.safetensors').write_bytes(b'damaged')
    for proofs in (ds.path / 'features').glob('proofs-*'): proofs.unlink()
    pd.testing.assert_frame_equal(duplicate_pairs(ds, ds.images), kept)
    assert cached_features(ds, 'efficientnet_lite0', 160).shape == file.x.shape


def test_duplicates_are_looked_for_with_the_features_that_are_named(planted, tmp_path):
    ds, asked = ImageDataset(shutil.copytree(planted.path, tmp_path / 'ds')), []
    for file in (ds.path / 'features').iterdir(): file.unlink()

    def features_of(paths):
        asked.extend(paths)
        return np.random.default_rng(0).normal(size=(len(paths), 64))
    pairs = duplicate_pairs(ds, ds.images, features_of=features_of)
    assert sorted(asked) == ds.images.path.tolist() and len(pairs) > 100
    assert not list((ds.path / 'features').glob('*.safetensors'))
    split(ds, reassign=True, features_of=features_of)
    assert len(asked) == 2 * len(ds.images)


def test_a_file_that_is_gone_takes_part_by_what_is_known_of_it(planted, tmp_path):
    ds = ImageDataset(shutil.copytree(planted.path, tmp_path / 'ds'))
    kept = duplicate_pairs(ds, ds.images)
    (ds.path / ds.images.path[0]).unlink()
    pd.testing.assert_frame_equal(duplicate_pairs(ds, ds.images), kept)
    for file in (ds.path / 'features').glob('*.safetensors'): file.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter('error', VegcWarning)  # the others still have features
        assert len(duplicate_pairs(ds, ds.images)) >= len(kept) - 1


def test_what_is_forgotten_leaves_features_and_proofs(planted, tmp_path):
    ds = ImageDataset(shutil.copytree(planted.path, tmp_path / 'ds'))
    gone = Gone(hashes=frozenset(ds.images.sha256[:3]))
    rewritten = features.erase(ds.path, gone) + copies.erase(ds.path, gone)
    assert [p.suffix for p in rewritten] == ['.safetensors', '.parquet']
    assert features.erase(ds.path, gone) == copies.erase(ds.path, gone) == []
    left = FeatureFile.read(next((ds.path / 'features').glob('*.safetensors')))
    assert len(left.x) == len(ds.images) - 3 and not gone.hashes & set(left.hashes)
    proofs = pd.read_parquet(next((ds.path / 'features').glob('proofs-*')))
    assert len(proofs) and not gone.hashes & (set(proofs.a) | set(proofs.b))
    (ds.path / 'features/x.safetensors').write_bytes(b'damaged')
    (ds.path / 'features/proofs-x.parquet').write_bytes(b'damaged')
    features.erase(ds.path, gone), copies.erase(ds.path, gone)
    assert not list((ds.path / 'features').glob('*x.*')), 'what cannot be read may hold them'


@pytest.mark.parametrize('name', ['features', 'features/proofs', 'splits.jsonl'])
def test_nothing_is_written_through_a_link(tmp_path, hashed, name):
    ds, outside = table(tmp_path, [(i, 'ab'[i % 2], '') for i in range(20)]), tmp_path / 'outside'
    if name == 'features': ds.path.joinpath(name).symlink_to(outside, target_is_directory=True)
    elif name == 'splits.jsonl': (ds.path / name).symlink_to(outside)
    else:
        (ds.path / 'features').mkdir()
        copies.proof_file(ds.path, ds.config.mirror).symlink_to(outside)
    with pytest.raises(DatasetError, match='leads out'): split(ds)
    assert not outside.exists()


def test_a_large_group_is_named_with_what_to_do(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(100): put(tmp_path / 'src', 'ab'[i % 2], i, scene(i))
    for i in range(12):
        again = changed(scene(5), ('resized', 'recompressed')[i % 2], rng)
        put(tmp_path / 'src', 'ab'[i % 2], f'again-{i}', again)
    add(tmp_path / 'src', tmp_path / 'ds', subject='objects')
    with pytest.warns(VegcWarning, match=r'holds 1\d of 112 pictures .*vegc duplicates .*vegc clean.*--reassign'):
        split(ImageDataset(tmp_path / 'ds'))


# --- nothing moves --------------------------------------------------------------------------------------------

# the first twelve: a scene and two copies of it; the last four: its left part, its right part, the whole, which
# bridges them, and a copy of the left part
FAMILIES = 16


def family(f, rng):
    "Pictures of one scene; its two parts share too little to be copies of each other."
    im = scene(f, (320, 240))
    if f < 12: return [im, changed(im, 'resized', rng), changed(im, 'mirrored', rng)]
    return [left := im.crop((0, 0, 208, 240)), im.crop((112, 0, 320, 240)), im, changed(left, 'resized', rng)]


@pytest.fixture(scope='module')
def pool(tmp_path_factory):
    "Pictures on disk, and a dataset that knows their features."
    root, rng = tmp_path_factory.mktemp('pool'), np.random.default_rng(0)
    for f in range(FAMILIES):
        for k, im in enumerate(family(f, rng)): put(root / 'src', 'ab'[f % 2], f'{f:02}-{k}', im)
    add(root / 'src', root / 'all', subject='objects')
    cached_features(ImageDataset(root / 'all'), 'efficientnet_lite0', 160)
    return root


class PoolServer(FaultServer):
    "The pool on loopback; what is in `down` is not there for the time being."
    def __init__(self, pool):
        super().__init__()
        self.pool, self.down = pool, set()

    async def on_pool(self, request):
        name = request.path.rpartition('/')[2]
        if name in self.down: return web.Response(status=404)
        return self.picture(request.raw_path, body=next((self.pool / 'src').glob(f'*/{name}')).read_bytes())


@pytest.fixture(scope='module')
def served(pool):
    with PoolServer(pool) as server: yield server


def best_reachable(sizes, have, shares=SHARES):
    "The least that the furthest split of a class can be off, in images, by trying every sum; none is left empty."
    sums = {(0, 0)}
    for s in map(int, sizes): sums |= {(v + s, t) for v, t in sums} | {(v, t + s) for v, t in sums}
    have, total = np.asarray(have, float), int(sum(sizes))
    counts = [have + [total - v - t, v, t] for v, t in sums]
    if len(sizes) >= (have == 0).sum(): counts = [c for c in counts if (c > 0).all()]
    return min(np.abs(c - shares * c.sum()).max() for c in counts)


def linked(name, other):
    "Whether two pictures of the pool are copies; the two parts of a scene are not."
    (f, k), (g, m) = name, other
    return f == g and (f < 12 or 2 in (k, m) or {k, m} == {0, 3})


def found_links(ds, names):
    "Pairs of names that the search takes for copies; how many is measured elsewhere, but it must not invent any."
    pairs = {(names[int(p)], names[int(q)]) for p, q in duplicate_pairs(ds, ds.images)[['a', 'b']].to_numpy()}
    assert all(linked(*p) for p in pairs), 'pictures that are no copies were taken for some'
    return pairs | {p[::-1] for p in pairs}


def expected(fresh, known, links):
    "What must become of new images: a split, none, or the set of new ones that must share any. Bridges carry no links."
    res, left = {}, set(fresh)
    while left:
        group, todo = set(), {min(left)}
        while todo: group, todo = group | todo, {o for n in todo for o in left - group - todo if (n, o) in links}
        left -= group
        near = {s for o, s in known.items() for n in group if (n, o) in links}
        near = near & set(SPLITS) or near
        res |= dict.fromkeys(group, near.pop() if len(near) == 1 else 'none' if near else frozenset(group))
    return res


USUAL = st.tuples(st.integers(0, 11), st.integers(0, 2))
BRIDGED = st.tuples(st.integers(12, FAMILIES - 1), st.integers(0, 3))
NAMES = st.lists(st.one_of(USUAL, BRIDGED), min_size=1, max_size=12)
ROW = st.integers(0, 47)
STEPS = st.lists(st.one_of(
    st.tuples(st.just('add'), NAMES), st.tuples(st.just('fetch'), st.tuples(NAMES, st.integers(1, 4))),
    st.tuples(st.sampled_from(['exclude', 'relabel', 'keep', 'lose', 'lose for a while']), ROW),
    st.tuples(st.sampled_from(['retry', 'undo']), st.just(0)),
    st.tuples(st.just('merge'), st.sampled_from(['', 'slug,merge_into\na,b\n', 'slug,drop\na,yes\n']))),
    min_size=2, max_size=7)
FIRST = ('add', [(0, 0), (0, 1), (2, 0), (3, 0), (5, 2), (8, 0), (9, 1),
                 (12, 0), (12, 1), (13, 0), (13, 1), (14, 0), (14, 1), (15, 0), (15, 1)])
BRIDGES = [('add', [(12, 2), (13, 2), (14, 2), (15, 2)]), ('exclude', 3),
           ('add', [(0, 2), (3, 1), (9, 0), (12, 3), (13, 3), (14, 3), (15, 3)]), ('lose', 0), ('relabel', 1)]
FETCHED = [('fetch', ([(0, 2), (1, 0), (1, 1), (4, 0), (12, 2), (13, 3)], 2)), ('exclude', 5), ('retry', 0),
           ('lose for a while', 0), ('fetch', ([(4, 1), (6, 0), (0, 0)], 4)), ('retry', 0)]
# where the search misses a bridge's second side
MISSED = [('relabel', 22), ('add', [(15, 0), (10, 2), (9, 1)]), ('merge', 'slug,merge_into\na,b\n'),
          ('fetch', ([(7, 1), (3, 1), (6, 0), (10, 1), (1, 0), (2, 0), (14, 2), (11, 0)], 1)),
          ('add', [(4, 1), (14, 2), (15, 1), (14, 3), (9, 0)])]


# no shrinking: an example takes a second, and the steps of a failing one are few
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture],
          phases=[Phase.explicit, Phase.reuse, Phase.generate])
@example(BRIDGES, 0)
@example(FETCHED, 1)
@example(MISSED, 3)
@given(STEPS, st.integers(0, 3))
def test_no_split_changes_in_any_order(pool, served, tmp_path_factory, steps, seed):
    """Add, fetch, fetch what failed, fetch again what was lost, exclude, relabel, undo, merge and drop classes, in any
    order: every image's split is as the links say, and stays."""
    root = tmp_path_factory.mktemp('any')
    ds = ImageDataset(root / 'ds', subject='objects', seed=seed)
    shutil.copytree(pool / 'all/features', ds.path / 'features')
    known = {}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', VegcWarning)
        for what, which in [FIRST, *steps]:
            change(ds, pool, served, root, what, which)
            split(ds)
            im = ds.images
            im['name'] = [(int(f), int(k)) for f, k in im.url.str.extract(r'(\d+)-(\d)').to_numpy()]
            now = dict(zip(im.name, im.split, strict=True))
            assert known == {n: now.get(n) for n in known}, 'a stored split changed'
            links = found_links(ds, im.name.tolist())
            for n, want in expected(set(now) - set(known), known, links).items():
                if isinstance(want, str): assert now[n] == want, n
                else: assert len({now[o] for o in want}) == 1 and now[n] in SPLITS, (n, want, now[n])
            assert im[im.split.isin(SPLITS)].groupby('duplicate_group').split.nunique().max() <= 1, 'a group straddles'
            _shares_hold(im, known)
            known = now


def change(ds, pool, served, root, what, which):
    "One step of somebody who works with a dataset."
    lists = root / 'lists'

    def fetch(**how):
        if lists.exists(): ingest(lists, ds, allow_hosts='127.0.0.1', tries=1, max_failures=1., **how)

    def file(name): return f'{name[0]:02}-{name[1]}.jpg'

    served.down = set()
    if what == 'add':
        for n in which:
            (root / 'src' / 'ab'[n[0] % 2]).mkdir(parents=True, exist_ok=True)
            shutil.copy(pool / 'src' / 'ab'[n[0] % 2] / file(n), root / 'src' / 'ab'[n[0] % 2])
        add(root / 'src', ds)
    elif what == 'fetch':  # new addresses, every so many of which cannot be had yet
        names, every = which
        urls = {c: (lists / f'{c}.csv').read_text().split() if lists.exists() else [] for c in 'ab'}
        for n in names: urls['ab'[n[0] % 2]].append(served.url(f'/pool/{file(n)}'))
        write_lists(lists, **{c: list(dict.fromkeys(some)) for c, some in urls.items()})
        served.down = {file(n) for n in names[::every]}
        fetch()
    elif what == 'retry': fetch(retry_failed=True)
    elif what in ('lose', 'lose for a while'):  # a lost file is fetched again, at once or when it can be had
        path = ds.images.path[which % len(ds.images)]
        lost = (ds.path / path).read_bytes()
        (ds.path / path).unlink()
        if what != 'lose':
            served.down = {p.name for p in (pool / 'src').glob('*/*')}
            fetch()
            served.down = set()
        add(root / 'src', ds)
        fetch(retry_failed=True)
        assert (ds.path / path).read_bytes() == lost
    elif what == 'undo' and len(ds.decisions): clean(ds, undo=True)
    elif what == 'merge': (ds.path / 'classes.csv').write_text(which or 'slug\na\nb\n')
    elif what in ('exclude', 'relabel', 'keep'):
        path = ds.stored().path[which % len(ds.stored())]
        label = 'b' if what == 'relabel' else ''
        (root / 'd.csv').write_text(f'path,action,label,who,why\n{path},{what},{label},ana,looked\n')
        clean(ds, decisions=root / 'd.csv')


def _shares_hold(im, known):
    "A class is off by half a point at most, or by what cannot be helped with the groups that were dealt now."
    old = im.duplicate_group.isin(im.duplicate_group[im.name.isin(known.keys()) & im.split.isin(SPLITS)])
    for _, part in im[im.split.isin(SPLITS)].groupby('given_label'):
        def count(rows): return rows.split.value_counts().reindex(SPLITS, fill_value=0).to_numpy()
        off = np.abs(count(part) - SHARES * len(part)).max()
        sizes = part[~old[part.index]].groupby('duplicate_group').size()
        least = best_reachable(sizes, count(part[old[part.index]]))
        assert off <= max(.005 * len(part), least) + 1e-9, (count(part), sizes.tolist())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=14), st.lists(st.integers(0, 25), min_size=3, max_size=3),
       st.booleans(), st.integers(0, 9))
def test_a_class_is_dealt_as_well_as_its_groups_allow(sizes, have, anew, seed):
    "Half a point off at most, or the least that any deal can reach; a class with three groups is in every split."
    have = np.zeros(3) if anew else np.array(have, float)
    got = have + np.bincount(deal(np.array(sizes), SHARES, have, np.random.default_rng(seed)), sizes, 3)
    assert np.abs(got - SHARES * got.sum()).max() <= max(.005 * got.sum(), best_reachable(sizes, have)) + 1e-6
    if len(sizes) >= 3: assert (got > 0).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=2, max_size=3), max_size=25),
       st.integers(60, 200), st.integers(0, 9))
def test_half_a_point_though_copies_lie_in_several_classes(mixed, singles, seed):
    "Groups of several classes among four classes of single images: the single ones even it out to an image."
    rows = [(g, c) for g, parts in enumerate(mixed) for c, n in parts for _ in range(n)]
    rows += [(len(mixed) + 4 * i + c, c) for i in range(singles) for c in range(4)]
    im, numbers = _frame([c for _, c in rows]), np.array([g for g, _ in rows])
    im['split'] = assign_splits(im, numbers, SHARES, seed).split
    assert im.split.isin(SPLITS).all() and im.groupby(numbers).split.nunique().max() == 1
    off = pd.crosstab(im.given_label, im.split)[list(SPLITS)]
    assert np.abs(off.to_numpy() - off.sum(axis=1).to_numpy()[:, None] * SHARES).max() <= 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=60), st.integers(0, 9))
def test_every_class_with_three_groups_is_in_every_split(groups, seed):
    "Groups of any mixture of classes; classes of more than six groups, so that there is a way."
    im = _frame([c for classes in groups for c in classes])
    numbers = np.array([g for g, classes in enumerate(groups) for _ in classes])
    im['split'] = assign_splits(im, numbers, SHARES, seed).split
    assert im.split.isin(SPLITS).all() and im.groupby(numbers).split.nunique().max() == 1
    of = pd.Series(numbers).groupby(im.given_label)
    pure = im.groupby(numbers).given_label.nunique().max() == 1
    for label, n in of.nunique().items():
        if n > 6 or pure and n >= 3: assert im.split[im.given_label == label].nunique() == 3, (label, n)


def _frame(classes):
    labels, i = [f'c{c}' for c in classes], range(len(classes))
    return pd.DataFrame(dict(path=[f'{i}' for i in i], given_label=labels, split=None, duplicate_group=None,
                             sha256=[f'{i:064}' for i in i]))


def test_hosts_with_many_classes_even_out():
    """Sixty hosts of very different sizes, each with images of several of eight classes and none for itself: moving
    hosts leaves the furthest class 4.4 points off."""
    rng = np.random.default_rng(0)
    host = np.sort(rng.choice(60, 3000, p=rng.dirichlet(np.full(60, .8))))
    im = _frame((rng.integers(0, 8, 60)[host] + rng.integers(0, 3, 3000)) % 8)
    off = pd.crosstab(im.given_label, assign_splits(im, host, SHARES, 0).split)[list(SPLITS)]
    assert (off.div(off.sum(axis=1), axis=0) - SHARES).abs().to_numpy().max() <= .02


def cost(counts, own, fixed, dealt):
    """What the solver makes small, of one deal [n]: each class's furthest split beyond half a point, its own images
    going where they help; and the furthest as often."""
    total = counts.sum(1) + own + fixed.sum(1)
    have = fixed + np.stack([counts[:, dealt == s].sum(1) for s in range(3)], 1)
    lacks = SHARES * total[:, None] - have
    low, high = np.zeros(len(total)), total.astype(float)
    for _ in range(50):  # the least distance that `own` pictures can bring every split within
        mid = (low + high) / 2
        most, least = lacks + mid[:, None], np.maximum(lacks - mid[:, None], 0)
        fits = (most >= 0).all(1) & (least.sum(1) <= own + 1e-9) & (most.sum(1) >= own - 1e-9)
        low, high = np.where(fits, low, mid), np.where(fits, mid, high)
    off = np.maximum(high / total, .005)
    return off.sum() + len(off) * off.max()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), min_size=2, max_size=7),
       st.lists(st.integers(0, 6), min_size=3, max_size=3), st.integers(0, 9))
def test_the_solver_finds_what_trying_everything_finds(groups, own, seed):
    "Up to seven groups of up to three classes: all 3ⁿ deals that bring no class short of a split it can be in."
    counts, own = np.array(groups).T, np.array(own)
    fixed = np.random.default_rng(seed).integers(0, 8, (3, 3))
    keep = counts.sum(1) > 0
    counts, own, fixed = counts[keep], own[keep], fixed[keep]
    needs = (fixed == 0) & (own[:, None] == 0) & ((counts > 0).sum(1) + (fixed > 0).sum(1) >= 3)[:, None]
    got = DealProgram(counts, own, SHARES, fixed, counts.sum(1) + own + fixed.sum(1), needs).solve()
    fine = [d for d in map(np.array, itertools.product(range(3), repeat=len(groups)))
            if (np.stack([(counts[:, d == s] > 0).any(1) for s in range(3)], 1) >= needs).all()]
    if got is None: assert not fine
    else:
        assert any((got == d).all() for d in fine)
        assert cost(counts, own, fixed, got) <= min(cost(counts, own, fixed, d) for d in fine) + 1e-4


def test_half_a_point_where_group_sizes_allow():
    rng = np.random.default_rng(0)
    for n in (200, 500, 3000):
        sizes = np.r_[rng.integers(2, 7, n // 30), np.ones(n - n // 10)]
        off = np.bincount(deal(sizes, SHARES, np.zeros(3), rng), sizes, 3) / sizes.sum() - SHARES
        assert np.abs(off).max() <= .005


def test_a_class_of_three_mixed_groups_is_in_every_split():
    "Each of its groups holds more images of another class, which has nothing in train yet and would send all there."
    label = ['usual'] * 20 + (['rare'] + ['usual'] * 5) * 3
    numbers = np.r_[np.arange(20), 20 + np.repeat(np.arange(3), 6)]
    stored = ['valid'] * 10 + ['test'] * 10 + [None] * 18
    im = _frame(range(38)).assign(given_label=label, split=stored)
    for seed in range(5):
        done = assign_splits(im, numbers, SHARES, seed)
        assert done.split[:20].tolist() == stored[:20] and set(done.split[im.given_label == 'rare']) == set(SPLITS)


# --- given splits, groups by origin, the record -----------------------------------------------------------------

def table(tmp_path, rows, **config):
    "A dataset of drawn pictures: (scene, label, given split) each; a negative number is the scene with other bytes."
    for i, (number, label, part) in enumerate(rows):
        im = scene(number) if number >= 0 else changed(scene(-number), 'recompressed', np.random.default_rng(0))
        put(tmp_path / 'src' / part if part else tmp_path / 'src', label, f'{i:02}', im)
    add(tmp_path / 'src', tmp_path / 'ds', subject='objects', **config)
    return ImageDataset(tmp_path / 'ds')


@pytest.fixture
def hashed(monkeypatch):
    "Hashes are enough for these."
    monkeypatch.setattr('vegc.splits.copies.features_if_any', lambda *_: None)


def test_given_splits_are_kept_or_merged(tmp_path, hashed):
    ds = table(tmp_path, [(i, 'ab'[i % 2], ['train', 'test', 'valid'][i % 3]) for i in range(30)])
    split(ds)
    assert (ds.images.split == ds.images.source_split).all() and split_log(ds).as_given.tolist() == [30]
    split(ds, given='merge', valid=.2, test=0, reassign=True)
    assert ds.images.split.value_counts().to_dict() == {'train': 24, 'valid': 6}
    log = split_log(ds)
    assert log.given.tolist() == ['keep', 'merge'] and log.reassign.tolist() == [False, True] and log.changed[1] > 0
    assert log.shares[1] == [.8, .2, 0] and log.seed.tolist() == [42, 42] and log.tool[0].startswith('vegc ')


def test_a_source_without_a_validation_part_gets_one_out_of_train(tmp_path, hashed):
    ds = table(tmp_path, [(i, 'ab'[i % 2], ['train', 'test'][i % 3 == 0]) for i in range(36)])
    with pytest.warns(VegcWarning, match='no validation part'): split(ds)
    im = ds.images
    assert (im.split[im.source_split == 'test'] == 'test').all()
    assert im.split.value_counts().to_dict() == {'train': 20, 'test': 12, 'valid': 4}


def test_a_source_that_leaks_keeps_its_test_part(tmp_path, hashed):
    "Scenes 1 and 2 are in train and, with other bytes, in test; 3 and 4 are in train and, as the same file, in valid."
    train, test = [(i, 'a', 'train') for i in range(1, 10)], [(-1, 'a', 'test'), (-2, 'a', 'test')]
    ds = table(tmp_path, train + test + [(3, 'a', 'valid'), (4, 'a', 'valid'), (11, 'a', 'valid')])
    with pytest.warns(VegcWarning, match='2 pictures .* `none`'): split(ds)
    im = ds.images
    assert im.split.value_counts().to_dict() == {'train': 5, 'valid': 3, 'none': 2, 'test': 2}
    assert im[im.split != 'none'].groupby('duplicate_group').split.nunique().max() == 1


def test_groups_by_origin_and_copies_together(tmp_path, hashed):
    ds = table(tmp_path, [(i, 'ab'[i % 2], '') for i in range(24)])
    df = ds.df
    df['creator'] = [f'photographer {i % 6}' if i < 18 else pd.NA for i in range(24)]
    df['phash'] = df.phash.where(df.index != 23, df.phash[0])  # one without a creator is a copy of the first
    write_manifest(ds.path/'manifest.parquet', df)
    split(ds, group_by='creator')
    im = ds.images
    assert im.groupby('creator').split.nunique().max() == 1 and im.creator.notna().sum() == 18
    twins = im[im.phash == df.phash[0]]
    assert len(twins) == 2 and twins.split.nunique() == 1 and split_log(ds).group_by[0] == 'creator'
    with pytest.warns(VegcWarning, match='has a split already.*reassign'): split(ds, group_by='query')
    with pytest.raises(UsageError, match='No picture .* has a query'): split(ds, group_by='query', reassign=True)
    with pytest.raises(UsageError, match='must be host'): split(ds, group_by='moon', reassign=True)


def test_a_bridge_is_used_nowhere(tmp_path, hashed):
    ds = table(tmp_path, [(i, 'a', '') for i in range(20)])
    split(ds)
    im = ds.images
    one, other = im[im.split == 'train'].iloc[0], im[im.split == 'test'].iloc[0]
    bridge = im.iloc[:1].assign(path='images/a/bridge.jpg', sha256='f' * 64, split=pd.NA, duplicate_group=pd.NA)
    every = pd.concat([im, bridge], ignore_index=True)
    links = np.arange(21)
    links[[every.index[every.path == one.path][0], every.index[every.path == other.path][0]]] = 20
    assert assign_splits(every, links, SHARES).split.tolist() == [*im.split, 'none']


def test_two_pictures_used_nowhere_in_one_group():
    """Bridges of the same two splits, copies of each other; a third copy is used nowhere either, and images that come
    beside it are dealt."""
    im = _frame([0] * 12)
    im['split'] = ['train'] * 4 + ['valid'] * 4 + ['none', 'none', None, None]
    done = assign_splits(im, np.r_[np.arange(8), 8, 8, 8, 9], SHARES)
    assert done.split[:10].tolist() == im.split[:10].tolist() and done.split[10] == 'none' and done.split[11] in SPLITS


def test_what_was_together_stays_together(planted, tmp_path):
    "Stored groups are links: when later pictures change what is similar, no stored group falls apart."
    ds = ImageDataset(shutil.copytree(planted.path, tmp_path / 'ds'))
    im = ds.images
    ds.update(im.iloc[:2].assign(duplicate_group='together'), ['duplicate_group'])
    numbers = find_groups(ds, ds.images)
    assert numbers[0] == numbers[1]
    assert pd.Series(numbers).groupby(ds.images.duplicate_group).nunique().max() == 1


def test_counts_follow_merged_classes(planted, tmp_path):
    ds = ImageDataset(shutil.copytree(planted.path, tmp_path / 'ds'))
    rows = ['slug,name,merge_into,drop', 'class 0,,one and two,', 'class 1,,one and two,', 'class 2,,,yes']
    (ds.path / 'classes.csv').write_text('\n'.join(rows) + '\n')
    counts = split_counts(ds).counts
    assert counts.index.tolist() == ['class 3', 'class 4', 'one and two'] and counts.loc['one and two'].sum() == 120
    assert ds.vocab == ['class 3', 'class 4', 'one and two']
    assert set(ds.images.given_label) == {f'class {i}' for i in range(5)}


# --- folds ------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), min_size=12, max_size=200), st.integers(2, 6),
       st.integers(0, 5))
def test_folds_never_cut_a_group(rows, k, seed):
    labels, groups = np.array([f'c{c}' for c, _ in rows]), np.array([g for _, g in rows])
    if len(set(groups)) < k:
        with pytest.raises(UsageError, match='cannot be dealt'): group_folds(labels, groups, k, seed)
        return
    fold = group_folds(labels, groups, k, seed)
    assert pd.Series(fold).groupby(groups).nunique().max() == 1 and set(fold) == set(range(k))
    assert (fold == group_folds(labels, groups, k, seed)).all()


def test_folds_of_a_dataset_without_splits_say_so_and_deal_none(tmp_path):
    ds = table(tmp_path, [(i, 'ab'[i % 2], '') for i in range(20)])
    before = ds.path.joinpath('manifest.parquet').read_bytes()
    with pytest.raises(DatasetError, match='has no splits yet; `vegc split'): folds(ds)
    assert ds.path.joinpath('manifest.parquet').read_bytes() == before and not (ds.path / 'splits.jsonl').exists()


def test_folds_keep_the_classes(planted):
    fold, im = folds(planted, 5), planted.images
    assert pd.Series(fold).groupby(im.duplicate_group).nunique().max() == 1
    assert pd.crosstab(im.given_label, fold).to_numpy().min() >= 10
    assert (folds(planted, 5, parts=('train', 'valid')) == -1).sum() == (im.split == 'test').sum()


# --- handing on -------------------------------------------------------------------------------------------------

def test_export_and_hugging_face_say_the_same(planted, tmp_path, monkeypatch):
    ds = ImageDataset(shutil.copytree(planted.path, tmp_path / 'ds'))
    out = export_folder(ds, tmp_path / 'out')
    labels = ds.labels
    files = sorted(p.relative_to(out).as_posix() for p in out.rglob('*.jpg'))
    assert files == sorted(f'{r.split}/{r.label}/{r.path.rpartition("/")[2]}' for r in labels.itertuples())
    assert len(files) == 300
    assert all((ds.path / p).exists() for p in labels.path), 'copied, not moved'
    assert pd.read_csv(out / 'labels.csv').path.map(lambda p: (out / p).exists()).all()
    (out / files[0]).unlink()  # as if it had been stopped
    export_folder(ds, out)
    assert (out / files[0]).exists()
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    hf = to_hf(ds)
    sizes = labels.split.value_counts()
    by_split = dict(train=sizes.train, validation=sizes.valid, test=sizes.test)
    assert {name: len(part) for name, part in hf.items()} == by_split
    row = hf['test'][0]
    assert row['image'].size == (200, 160) or row['image'].size[0] < 200
    assert hf['test'].features['label'].int2str(row['label']) == labels.set_index('path').label[row['path']]


def test_without_the_library_to_hf_says_what_to_install(planted, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'datasets', None)
    with pytest.raises(UsageError, match=r'vegc\[hf\]'): to_hf(planted)


def test_export_never_overwrites(planted, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/notes.txt').write_text('mine')
    with pytest.raises(DatasetError, match='notes.txt'): export_folder(planted, tmp_path / 'out')
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['notes.txt']


def test_warnings_point_at_the_line_of_whoever_called(tmp_path):
    rng = np.random.default_rng(0)
    for place, n in {'train/a': 6, 'train/b': 6, 'test/a': 3, 'test/b': 1}.items():
        for i in range(n): put(tmp_path / 'src' / place[:-2], place[-1], str(i), scene(int(rng.integers(1000))))
    add(tmp_path / 'src', tmp_path / 'ds', subject='objects')
    ds = ImageDataset(tmp_path / 'ds')
    with pytest.warns(VegcWarning) as said: split(ds, features_of=lambda paths: rng.random((len(paths), 8)))
    assert any('no validation part' in str(w.message) for w in said)
    with pytest.warns(VegcWarning) as more: split_counts(ds, parts=20)
    assert {w.filename for w in [*said, *more]} == {__file__}


def test_there_is_nothing_to_deal_over_folds_where_no_image_takes_part():
    with pytest.raises(UsageError, match='0 groups cannot be dealt'): group_folds(np.array([]), np.array([]), 5)
