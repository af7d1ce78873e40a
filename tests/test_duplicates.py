"""Copies are found whatever was done to them, at any size, without chains and without n × n memory."""
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import CHANGES, changed, scene

from vegc.data.images import phash, phash_mirrored
from vegc.splits import duplicates as dup
from vegc.splits.duplicates import (exact_pairs, feature_pairs, group_numbers, hash_pairs, join_pairs,
                                    least_similarity, nearest, pairs_frame, whiten)
from vegc.splits.overlap import GreyThumb, METHOD, overlap


def as_set(pairs): return set(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True))


def vectors(n, d=320, copies=0, seed=0, noise=.4):
    "Vectors in clusters with a common direction; the last `copies` are the first ones with a little noise."
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(30, d))[rng.integers(0, 30, n)] + rng.normal(size=(n, d)) + 3
    x[n - copies:] = x[:copies] + noise * rng.normal(size=(copies, d))
    return x.astype(np.float16)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 90), st.integers(0, 5))
def test_blocks_find_exactly_the_nearest(n, k, seed):
    x = np.random.default_rng(seed).normal(size=(n, 6)).astype(np.float32)
    dots, rows = nearest(x, k)
    full = x @ x.T
    np.fill_diagonal(full, -np.inf)
    want = -np.sort(-full, axis=1)[:, :max(min(k, n - 1), 0)]
    np.testing.assert_allclose(dots, want, atol=1e-5)
    assert all(len(set(r)) == len(r) and i not in r for i, r in enumerate(rows.tolist()))


def test_the_index_gives_the_answer_of_the_blocks():
    x = vectors(6000, copies=600)
    blocks, cells = feature_pairs(x), feature_pairs(x, large=1000)
    assert len(as_set(blocks) ^ as_set(cells)) <= .01 * len(blocks)
    both = blocks.merge(cells, on=['a', 'b'])
    assert (both.similarity_x - both.similarity_y).abs().max() < .05
    planted = {(i, 5400 + i) for i in range(600)}
    assert len(as_set(cells) & planted) >= .99 * 600 and len(as_set(cells) - planted) <= 6


def test_the_index_of_hashes_gives_the_answer_of_the_blocks():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (3000, 32), dtype=np.uint8)
    codes[2700:] = codes[:300] ^ np.packbits(rng.random((300, 256)) < .05, axis=1)
    codes[2600:2700] = codes[300:400] ^ 0x55  # mirrored
    texts = [c.tobytes().hex() for c in codes]
    mirrored = [phash_mirrored(t) for t in texts]
    blocks, cells = hash_pairs(texts, mirrored), hash_pairs(texts, mirrored, large=100)
    blocks, cells = (table.sort_values(['a', 'b'], ignore_index=True) for table in (blocks, cells))
    pd.testing.assert_frame_equal(blocks, cells)
    assert {(300 + i, 2600 + i) for i in range(100)} <= as_set(cells)
    assert not {(300 + i, 2600 + i) for i in range(100)} & as_set(hash_pairs(texts))  # not asked for


def test_without_faiss_the_blocks_go_on_and_say_so(monkeypatch):
    monkeypatch.setattr(dup, 'find_spec', lambda name: None)
    x = vectors(600, 40, copies=60)
    with pytest.warns(match='faiss'): slow = feature_pairs(x, large=300)
    assert as_set(slow) == as_set(feature_pairs(x))


MEMORY = '''
import resource, sys
import numpy as np
from vegc.splits import duplicates as dup
import sklearn.decomposition
if {faiss}: import faiss
else: dup.find_spec = lambda name: None
x = np.random.default_rng(0).normal(size=({n}, 64)).astype(np.float16)
x[{n} - 500:] = x[:500] + np.random.default_rng(1).normal(size=(500, 64)).astype(np.float16)/5
dup.feature_pairs(x[:2000], large=1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = dup.feature_pairs(x, large={large})
assert len(found) >= 450, len(found)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1024)
'''


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('faiss', [True, False], ids=['index', 'blocks'])
def test_memory_never_holds_all_pairs(faiss):
    "16,000 rows: all dot products would be a gigabyte in float32, twice that with their order."
    pytest.importorskip('resource')
    code = MEMORY.format(n=16_000, faiss=faiss, large=1000 if faiss else 10**9)
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 150, f'{done.stdout} MB'


def test_few_pictures_few_claims():
    rng = np.random.default_rng(0)
    for n in (1, 2, 10, 16, 20, 40, 80, 150):
        found = [len(feature_pairs(rng.normal(size=(n, 200)) + 2)) for _ in range(5)]
        assert sum(found) <= 1, (n, found)
    assert len(feature_pairs(vectors(150, copies=40))) >= 38
    assert least_similarity(256) < least_similarity(37) < 1 < least_similarity(4)


def test_constant_and_empty_features_give_nothing():
    assert len(feature_pairs(np.ones((300, 50)))) == 0
    assert len(feature_pairs(np.zeros((0, 50)))) == 0
    x = vectors(300, 50)
    x[:, :20] = 7  # axes without spread
    assert np.isfinite(whiten(x)).all()


def test_a_thousand_identical_rows_do_not_explode():
    x = vectors(1500, 60)
    x[:1000] = x[0]
    assert len(feature_pairs(x)) <= 16 * 1500
    texts = ['ab' * 32] * 1000 + ['cd' * 32]
    assert len(hash_pairs(texts, texts)) == 999


def test_a_series_is_no_set_of_copies():
    "Pictures that resemble each other all alike are no copies; the one copy among them is."
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, 320))
    for s in range(10): x[20 * s:20 * s + 20] = 3 * rng.normal(size=320) + .45 * rng.normal(size=(20, 320))
    x[1] = x[0] + .03 * rng.normal(size=320)
    z = whiten(x)
    assert np.median(z[:20] @ z[:20].T) > least_similarity(256)  # by cosine alone all of them would be
    assert as_set(feature_pairs(x)) == {(0, 1)}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29), st.floats(.5, 1)), max_size=80))
def test_groups_are_between_certain_links_and_closure(links):
    "Certain links always join; nothing is joined that no chain of links joins; order of the table does not matter."
    links = [(a, b, s) for a, b, s in links if a != b]
    pairs = join_pairs(pairs_frame([a for a, _, _ in links], [b for _, b, _ in links], 'near', [s for *_, s in links]))
    got, closure = group_numbers(30, pairs), group_numbers(30, pairs[['a', 'b']])
    certain = group_numbers(30, pairs[pairs.similarity >= .95])
    for fine, coarse in ((certain, got), (got, closure)):
        assert pd.Series(coarse).groupby(fine).nunique().max() == 1
    assert (group_numbers(30, pairs.sample(frac=1, random_state=1)) == got).all()


def test_a_loose_chain_through_a_class_does_not_swallow_it():
    n, rng = 2000, np.random.default_rng(0)
    chain = pairs_frame(np.arange(n - 1), np.arange(1, n), 'near', rng.uniform(.5, .9, n - 1))
    assert np.bincount(group_numbers(n, chain[['a', 'b']])).max() == n  # what closure would do
    assert np.bincount(group_numbers(n, chain)).max() <= 4
    # families of six joined in a chain by one loose link each: the families stay, the chain does not
    i, j = np.triu_indices(6, 1)
    inside = [pairs_frame(6 * f + i, 6 * f + j, 'near', rng.uniform(.6, .9, 15)) for f in range(50)]
    across = pairs_frame(6 * np.arange(49), 6 * np.arange(1, 50), 'near', np.full(49, .55))
    assert np.bincount(group_numbers(300, join_pairs(*inside, across))).tolist() == [6] * 50


def test_exact_links_are_never_doubted():
    hashes = ['x'] * 40 + list('abcdefgh')
    assert np.bincount(group_numbers(48, exact_pairs(hashes))).max() == 40
    loose = pairs_frame([0], [47], 'near', [.6])
    assert len(set(group_numbers(48, join_pairs(exact_pairs(hashes), loose))[[0, 39, 47]])) == 1


@pytest.mark.parametrize('change', [c for c in CHANGES if c != 'cropped'])
def test_hashes_find_all_but_crops(change):
    rng = np.random.default_rng(0)
    pictures = [scene(i) for i in range(40)]
    hashes = [phash(im) for im in pictures] + [phash(changed(im, change, rng)) for im in pictures]
    found = as_set(hash_pairs(hashes, [phash_mirrored(h) for h in hashes]))
    assert len(found & {(i, 40 + i) for i in range(40)}) >= 38
    assert len(found - {(i, 40 + i) for i in range(40)}) == 0


def test_answers_that_are_kept_are_those_of_this_method():
    "If this fails because `overlap` was changed on purpose, METHOD goes up by one: datasets keep what it said by it."
    im, rng = scene(1), np.random.default_rng(0)
    covered = im.copy()
    covered.paste(scene(7).crop((0, 0, 30, 160)), (0, 0))
    others = changed(im, 'cropped', rng), changed(im, 'mirrored', rng), covered, scene(2)
    said = [overlap(GreyThumb.of(im), GreyThumb.of(other)) for other in others]
    assert METHOD == 1 and said == pytest.approx([.974, .999, .392, 0], abs=.003)
