"""Stop it anywhere: what was done is kept, and nothing good is fetched twice."""
import contextlib
import errno
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
import zlib

import pandas as pd
import pytest
from conftest import hears_ctrl_c
from fault_server import FaultServer, jpeg, write_lists

import vegc.acquire.ingest
from vegc.core import DatasetError, DiskFullError, LockedError, UsageError
from vegc.data.dataset import ImageDataset
from vegc.data.folder import Journal, read_jsonl
from vegc.data.manifest import manifest_frame, read_manifest, write_manifest
from vegc.data.images import load_rgb
from vegc.acquire.add import add
from vegc.acquire.ingest import ingest

PROGRAM = '''
import sys
from vegc.acquire.ingest import ingest
ingest(sys.argv[1], sys.argv[2], subject='objects', allow_hosts='127.0.0.1', concurrency=4)
'''


@contextlib.contextmanager
def stopped(lists, ds, server, after, how):
    "An ingest in a process of its own, stopped after so many requests."
    process = subprocess.Popen(
        [sys.executable, '-c', PROGRAM, lists, ds],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=hears_ctrl_c,
    )
    try:
        while sum(server.asked.values()) < after:
            assert process.poll() is None, 'it ended by itself'
            time.sleep(.005)
        process.send_signal(how)
        process.wait(20)
        yield process
    finally:
        if process.poll() is None: process.kill()


def whole(ds):
    "Every picture of the manifest decodes, and no other file lies there."
    files = {p.relative_to(ds.path).as_posix() for p in (ds.path/'images').rglob('*') if p.is_file()}
    assert files == set(ds.df.path.dropna())
    for f in files: load_rgb(ds.path/f)


@pytest.mark.parametrize('after', [10, 60, 110])
def test_after_a_kill_the_same_command_goes_on_and_asks_for_no_good_picture_again(tmp_path, after):
    with FaultServer(delay=.005) as server:
        urls = [server.url(f'/{i}') for i in range(120)]
        lists = write_lists(tmp_path/'lists', hat=urls[:70], cap=urls[60:])
        with stopped(lists, tmp_path/'ds', server, after, signal.SIGKILL): "It is dead."
        known = {r['url'] for r in read_jsonl(tmp_path/'ds'/'journal.jsonl')}
        res = ingest(lists, tmp_path/'ds', allow_hosts='127.0.0.1')
        assert len(known) >= after - 8  # the requests in flight, and those just being decoded
        assert {server.asked['/' + u.rsplit('/', 1)[1]] for u in known} == {1}
        assert set(server.asked.values()) <= {1, 2} and sum(server.asked.values()) <= 120 + 4
        assert (res.counts['rows'], res.counts['ok'], res.counts['review']) == (130, 110, 20)
        whole(res.dataset)


def test_six_kills_at_random_moments_of_one_ingest(tmp_path):
    rng = random.Random(7)
    with FaultServer(delay=.004) as server:
        urls = [server.url(f'/{i}') for i in range(360)]
        lists = write_lists(tmp_path/'lists', hat=urls[:200], cap=urls[200:])
        for n in range(6):
            with stopped(
                lists, tmp_path / 'ds', server, sum(server.asked.values()) + rng.randrange(2, 50), signal.SIGKILL
            ):
                "It is dead."
            assert sum(server.asked.values()) - len(server.asked) <= 4*(n + 1)
        res = ingest(lists, tmp_path/'ds', allow_hosts='127.0.0.1')
        assert set(server.asked) == {f'/{i}' for i in range(360)} and sum(server.asked.values()) - 360 <= 4*6
        assert (res.counts['rows'], res.counts['ok'], res.counts['images']) == (360, 360, 360)
        whole(res.dataset)


def test_control_c_keeps_what_was_done(tmp_path):
    with FaultServer(delay=.005) as server:
        lists = write_lists(tmp_path/'lists', a=[server.url(f'/{i}') for i in range(150)])
        with stopped(lists, tmp_path/'ds', server, 60, signal.SIGINT) as process: assert process.returncode != 0
        assert not (tmp_path/'ds'/'journal.jsonl').exists()
        ds = ImageDataset(tmp_path/'ds')
        assert 50 <= len(ds.df) < 150 and set(ds.df.status) == {'ok'}
        whole(ds)
        done = len(ds.df)
        assert ingest(lists, ds, allow_hosts='127.0.0.1').counts['kept'] == done
        assert sum(server.asked.values()) <= 150 + 4 and len(ds.df) == 150


def test_an_interrupted_cell_leaves_nothing_running_behind(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with FaultServer(delay=.02) as server:
            lists = write_lists(tmp_path/'lists', a=[server.url(f'/{i}') for i in range(400)])
            def press():
                while sum(server.asked.values()) < 40: time.sleep(.005)
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            threading.Thread(target=press, daemon=True).start()
            with pytest.raises(KeyboardInterrupt):
                ingest(lists, tmp_path / 'ds', subject='objects', allow_hosts='127.0.0.1', concurrency=4)
            asked = sum(server.asked.values())
            time.sleep(.3)
            assert sum(server.asked.values()) == asked < 200
            assert not [t for t in threading.enumerate() if t.name.startswith('vegc')]
            assert len(ImageDataset(tmp_path/'ds').df) >= asked - 4
            assert (
                ingest(lists, tmp_path / 'ds', allow_hosts='127.0.0.1').counts['ok'] == 400
                and sum(server.asked.values()) <= 404
            )
    finally: signal.signal(signal.SIGINT, before)


def test_a_second_run_says_so_and_stops(tmp_path):
    with FaultServer() as server:
        lists = write_lists(tmp_path/'lists', a=[server.url('/1'), server.url('/2')])
        ds = ImageDataset(tmp_path/'ds', subject='objects')
        with ds.run(), pytest.raises(LockedError, match='Another run'): ingest(lists, ds, allow_hosts='127.0.0.1')
        assert not server.asked
        assert ingest(lists, ds, allow_hosts='127.0.0.1').counts['ok'] == 2


def test_a_full_disk_stops_with_a_sentence_and_keeps_what_was_done(tmp_path, monkeypatch):
    written, real = [], os.replace
    def full(src, path):
        written.append(path)
        if 'images' in pathlib.Path(path).parts and len(written) > 20:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return real(src, path)
    with FaultServer() as server:
        lists = write_lists(tmp_path/'lists', a=[server.url(f'/{i}') for i in range(40)])
        ImageDataset(tmp_path/'ds', subject='objects')
        monkeypatch.setattr(os, 'replace', full)
        with pytest.raises(DiskFullError, match='disk is full'):
            ingest(lists, tmp_path / 'ds', allow_hosts='127.0.0.1', concurrency=4)
        monkeypatch.undo()
        kept = ImageDataset(tmp_path/'ds').df
        assert 10 <= len(kept) <= 20 and set(kept.status) == {'ok'}
        res = ingest(lists, tmp_path/'ds', allow_hosts='127.0.0.1')
        assert res.counts['ok'] == 40 and res.counts['kept'] == len(kept)
        assert {server.asked['/' + u.rsplit('/', 1)[1]] for u in kept.url} == {1}


def test_after_a_power_cut_pictures_are_read_again_and_half_ones_fetched_anew(tmp_path):
    with FaultServer() as server:
        lists = write_lists(tmp_path/'lists', a=[server.url(f'/{i}') for i in range(6)])
        ds = ingest(lists, tmp_path/'ds', subject='objects', allow_hosts='127.0.0.1').dataset
        rows = ds.df.to_dict('records')
        (ds.path/'manifest.parquet').unlink()  # the power went off: rows in the journal, some bytes not on the disk
        journal = Journal(ds.path/'journal.jsonl')
        for r in rows[:5]: journal.add({k: v for k, v in r.items() if not pd.isna(v)})
        (ds.path/rows[0]['path']).write_bytes(bytes(rows[0]['bytes']))
        (ds.path/rows[1]['path']).write_bytes(b'')
        (ds.path/rows[2]['path']).unlink()
        assert ingest(lists, ds, allow_hosts='127.0.0.1').counts['ok'] == 6
        assert [server.asked[f'/{i}'] for i in range(6)] == [2, 2, 2, 1, 1, 2]
        whole(ds)


def test_of_two_lines_about_a_row_the_later_counts_and_a_torn_one_does_not(tmp_path):
    ds = ImageDataset(tmp_path/'ds', subject='objects')
    journal = Journal(ds.path/'journal.jsonl')
    for key, status in (('a', 'failed'), ('b', 'ok'), ('a', 'ok'), ('c', 'failed')):
        journal.add(dict(key=key, url=f'u{key}', given_label='x', status=status, rank='7'))
    journal.close()
    with open((ds.path/'journal.jsonl'), 'ab') as f: f.write(b'{"key": "b", "url": "ub", "sta')
    assert ds.df[['key', 'status', 'rank']].values.tolist() == [['b', 'ok', 7], ['a', 'ok', 7], ['c', 'failed', 7]]
    (ds.path/'journal.jsonl').write_bytes((ds.path/'journal.jsonl').read_bytes() + b'\n')
    with pytest.raises(DatasetError, match='Line 5'): _ = ds.df


def test_a_picture_that_vanished_from_the_disk_is_fetched_again(tmp_path):
    with FaultServer() as server:
        lists = write_lists(tmp_path/'lists', a=[server.url('/1'), server.url('/2')])
        ds = ingest(lists, tmp_path/'ds', subject='objects', allow_hosts='127.0.0.1').dataset
        ds.update(ds.df.assign(split=['train', 'test'], duplicate_group=['g', 'h']), ['split', 'duplicate_group'])
        (ds.path/ds.df.path[0]).unlink()
        assert ingest(lists, ds, allow_hosts='127.0.0.1').counts['requested'] == 1
        assert list(ds.df.split) == ['train', 'test'] and list(ds.df.duplicate_group) == ['g', 'h']
        assert (server.asked['/1'], server.asked['/2']) == (2, 1)
        whole(ds)


def test_only_what_failed_is_asked_again_and_splits_stay(tmp_path):
    with FaultServer() as server:
        lists = write_lists(tmp_path/'lists', a=[server.url(p) for p in ('/1', '/2', '/status/404', '/html')])
        ds = ingest(lists, tmp_path/'ds', subject='objects', allow_hosts='127.0.0.1').dataset
        ds.update(ds.df.dropna(subset='path').assign(split='train'), ['split'], reassign=True)
        assert ingest(lists, ds, allow_hosts='127.0.0.1', retry_failed=True).counts['requested'] == 2
        assert [server.asked[p] for p in ('/1', '/2', '/status/404', '/html')] == [1, 1, 2, 2]
        assert list(ds.df.split.fillna('')) == ['train', 'train', '', '']


def test_the_memory_holds_no_more_pictures_than_are_in_flight(tmp_path, monkeypatch):
    inside, most = [], []
    real = vegc.acquire.ingest.store
    def counted(*args):
        inside.append(1)
        most.append(len(inside))
        time.sleep(.01)
        try: return real(*args)
        finally: inside.pop()
    monkeypatch.setattr(vegc.acquire.ingest, 'store', counted)
    with FaultServer() as server:
        lists = write_lists(tmp_path/'lists', a=[server.url(f'/{i}') for i in range(60)])
        ahead, answer = [], server.picture
        server.picture = lambda raw, **kw: (ahead.append(sum(server.asked.values()) - len(most)), answer(raw, **kw))[1]
        assert (
            ingest(lists, tmp_path / 'ds', subject='objects', allow_hosts='127.0.0.1', concurrency=6).counts['ok'] == 60
        )
    assert max(ahead) <= 6


MEMORY = '''
import sys
from pathlib import Path
from vegc.acquire.ingest import ingest
res = ingest(sys.argv[1], sys.argv[2], subject='objects', max_failures=1)
peak = int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])  # ru_maxrss: the parent's too
print(peak*1024, res.dataset.df.memory_usage(deep=True).sum())
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='the peak is read from /proc')
def test_memory_grows_by_the_table_and_by_little_more(tmp_path):
    found = []
    for n in (1000, 41_000):
        lists = write_lists(
            tmp_path / f'lists{n}', a=[f'ftp://pictures.example/{i:0100}' for i in range(n)]
        )  # a row each, and no request
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', MEMORY, lists, tmp_path / f'ds{n}'],
            capture_output=True,
            text=True,
            check=True,
        )
        found.append([int(v) for v in done.stdout.split()])
    (small, table), (large, larger) = found
    assert 0 < large - small - (larger - table) < 40_000*1_500, found  # bytes; 150 MB for a hundred thousand rows


def test_a_changed_byte_of_the_manifest_is_said_and_never_read_as_another_value(tmp_path):
    rng, path = random.Random(0), tmp_path/'manifest.parquet'
    df = manifest_frame(
        [
            dict(
                key=rng.randbytes(8).hex(),
                url=f'https://example.org/{rng.randbytes(12).hex()}',
                given_label='ab'[i % 2],
                width=rng.randrange(9999),
                status='ok',
            )
            for i in range(300)
        ]
    )
    write_manifest(path, df)
    whole, said, unsaid = path.read_bytes(), 0, []
    pages = len(whole) - 8 - int.from_bytes(whole[-8:-4], 'little')  # what follows is the footer and its length
    for at in range(4, pages, 29):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:])
        try:
            if not read_manifest(path).equals(df): unsaid.append(at)
        except DatasetError: said += 1
    assert unsaid == [] and said > 100


# --- pictures already on disk

def folder_of(root, **classes):
    for name, files in classes.items():
        for file, data in files.items():
            (root/name/file).parent.mkdir(parents=True, exist_ok=True)
            (root/name/file).write_bytes(data)
    return root


def test_a_folder_gives_the_same_set_as_its_urls(tmp_path):
    with FaultServer() as server:
        urls = [server.url(f'/{i}') for i in range(20)]
        got = ingest(
            write_lists(tmp_path / 'lists', hat=urls[:12], cap=urls[8:]),
            tmp_path / 'a',
            subject='objects',
            allow_hosts='127.0.0.1',
        ).dataset
        files = {u: jpeg(zlib.crc32(u.removeprefix(server.url('')).encode())) for u in urls}
    src = folder_of(
        tmp_path / 'src',
        hat={f'{i}.jpg': files[u] for i, u in enumerate(urls[:12])},
        cap={f'{i}.jpg': files[u] for i, u in enumerate(urls[8:])},
    )
    before = {p: p.read_bytes() for p in src.rglob('*.jpg')}
    added = add(src, tmp_path/'b', subject='objects').dataset
    key = lambda ds: sorted(zip(ds.df.given_label, ds.df.sha256, ds.df.status, strict=True))
    assert key(got) == key(added) and list(added.df.url[:2]) == ['cap/0.jpg', 'cap/1.jpg']
    assert {p: p.read_bytes() for p in src.rglob('*.jpg')} == before
    assert add(src, tmp_path/'b').counts['kept'] == 24 and len(added.df) == 24


def test_files_that_are_no_pictures_get_a_row_and_other_folders_go_on(tmp_path):
    src = folder_of(
        tmp_path / 'one',
        hat={'1.jpg': jpeg(1), 'deep/2.jpg': jpeg(2), 'notes.txt': b'hello', '.hidden': b'x'},
        cap={'1.jpg': jpeg(3)},
    )
    (src/'LICENSE').write_text('x')
    assert add(src, tmp_path / 'ds', subject='objects').reasons == [
        dict(reason='not_image', count=1, example='hat/notes.txt')
    ]
    more = folder_of(tmp_path/'two', hat={'1.jpg': jpeg(4)})  # another picture of the same name
    ds = add(more, tmp_path/'ds').dataset
    assert len(ds.df) == 5 and len(ds.images) == 4 and ds.df.key.is_unique


def test_given_splits_are_kept_from_folders_and_from_a_csv(tmp_path):
    src = folder_of(
        tmp_path / 'src',
        **{
            f'{s}/{c}': {f'{i}.jpg': jpeg(n * 10 + i) for i in range(2)}
            for n, (s, c) in enumerate((s, c) for s in ('train', 'val') for c in 'ab')
        },
    )
    df = add(src, tmp_path/'ds', subject='objects').dataset.df
    assert sorted(zip(df.given_label, df.source_split, strict=True)) == sorted(
        [(c, s) for s in ('train', 'valid') for c in 'ab'] * 2
    )
    (src/'labels.csv').write_text('path,label,split\ntrain/a/0.jpg,x,train\nval/b/1.jpg,y,test\nnowhere.jpg,y,\n')
    df = add(src/'labels.csv', tmp_path/'ds2', subject='objects').dataset.df
    assert list(zip(df.url, df.given_label, df.status, df.source_split.fillna(''), strict=True)) == [
        ('train/a/0.jpg', 'x', 'ok', 'train'), ('val/b/1.jpg', 'y', 'ok', 'test'), ('nowhere.jpg', 'y', 'failed', '')]


def test_what_cannot_be_added_is_said_in_a_sentence(tmp_path):
    for error, match, make in (
        (UsageError, 'does not exist', lambda p: p / 'nothing'),
        (DatasetError, 'no class folders', lambda p: folder_of(p / 'e', x={}) or p / 'e'),
    ):
        (tmp_path/'e').mkdir(exist_ok=True)
        with pytest.raises(error, match=match): add(make(tmp_path), tmp_path/'ds', subject='objects')
    (tmp_path/'web.csv').write_text('path,label\nhttps://example.org/a.jpg,x\n')
    with pytest.raises(UsageError, match='ingest'): add(tmp_path/'web.csv', tmp_path/'ds', subject='objects')
    (tmp_path/'bad.csv').write_text('file,class\na,b\n')
    with pytest.raises(DatasetError, match='path and label'): add(tmp_path/'bad.csv', tmp_path/'ds', subject='objects')
    (tmp_path/'odd.csv').write_bytes(b'path,label\n\xff\xfe,x\n')
    with pytest.raises(DatasetError, match='UTF-8'): add(tmp_path/'odd.csv', tmp_path/'ds', subject='objects')
    assert not (tmp_path/'ds').exists()


# --- folders that come from somebody else, and wishes of people

def test_half_files_are_found_though_somebody_opted_out_meanwhile(tmp_path):
    "Forgetting folds the journal into the manifest; what it says of the files is read before."
    with FaultServer() as server:
        lists = write_lists(tmp_path / 'lists', a=[server.url(f'/{i}') for i in range(4)])
        ds = ingest(lists, tmp_path / 'ds', subject='objects', allow_hosts='127.0.0.1').dataset
        rows = ds.df.to_dict('records')
        (ds.path / 'manifest.parquet').unlink()
        journal = Journal(ds.path / 'journal.jsonl')
        for r in rows: journal.add({k: v for k, v in r.items() if not pd.isna(v)})
        (ds.path / rows[0]['path']).write_bytes(b'half')
        (ds.path / 'optout.txt').write_text(rows[3]['url'])
        res = ingest(lists, ds, allow_hosts='127.0.0.1')
        assert (res.counts['ok'], res.counts['skipped'], server.asked['/0'], server.asked['/1']) == (3, 1, 2, 1)
        whole(ds)


@pytest.mark.parametrize('path', ['../thesis.txt', 'images/../../thesis.txt', 'classes.csv', 'images/link/thesis.txt'])
def test_a_journal_of_a_stranger_deletes_nothing(tmp_path, path):
    (tmp_path / 'thesis.txt').write_text('mine')
    src = folder_of(tmp_path / 'src', a={'1.jpg': jpeg(1), '2.jpg': jpeg(2)})
    ds = add(src, tmp_path / 'ds', subject='objects').dataset
    (ds.path / 'classes.csv').write_text('slug,name\na,A\n')
    (ds.path / 'images/link').symlink_to(tmp_path)
    Journal(ds.path / 'journal.jsonl').add(dict(key='0', url='x', given_label='a', status='ok', path=path))
    with pytest.raises(DatasetError): add(src, ds)
    assert (tmp_path / 'thesis.txt').read_text() == 'mine' and (ds.path / 'classes.csv').exists()


def test_a_link_in_place_of_a_class_is_followed_neither_to_write_nor_to_delete(tmp_path):
    outside = tmp_path / 'outside'
    outside.mkdir()
    (outside / '.tmp-mine').write_text('mine')
    src = folder_of(tmp_path / 'src', a={'1.jpg': jpeg(1)}, b={'2.jpg': jpeg(2)})
    ds = add(folder_of(tmp_path / 'one', a={'1.jpg': jpeg(1)}), tmp_path / 'ds', subject='objects').dataset
    (ds.path / 'images/b').symlink_to(outside)
    for attempt in (lambda: add(src, ds), lambda: ds.forget('a/1.jpg')):
        with pytest.raises(DatasetError, match='leads out of the dataset'): attempt()
    assert [p.name for p in outside.iterdir()] == ['.tmp-mine']


def test_a_link_in_place_of_an_image_is_replaced(tmp_path):
    src = folder_of(tmp_path / 'src', a={'1.jpg': jpeg(1), '2.jpg': jpeg(2)})
    ds = add(src, tmp_path / 'ds', subject='objects').dataset
    stored = ds.path / ds.df.path[0]
    outside = tmp_path / 'outside.jpg'
    outside.write_bytes(b'm' * stored.stat().st_size)
    (ds.path / 'manifest.parquet').unlink()
    stored.unlink()
    stored.symlink_to(outside)
    add(src, ds)
    assert not stored.is_symlink() and set(outside.read_bytes()) == set(b'm')
    whole(ds)


def test_who_asked_to_be_forgotten_is_not_named_when_the_list_is_added_again(tmp_path):
    folder_of(tmp_path, x={'1.jpg': jpeg(1), '2.jpg': jpeg(2)})
    table = tmp_path / 't.csv'
    table.write_text('path,label,creator,landing_url\nx/1.jpg,a,Jane Doe,https://jane.example\nx/2.jpg,a,Tim,\n')
    ds = add(table, tmp_path / 'ds', subject='people').dataset
    ds.forget('x/1.jpg')
    add(table, ds)
    assert ds.df.creator.fillna('-').tolist() == ['-', 'Tim'] and ds.df.landing_url.isna().all()
    assert not [p for p in ds.path.rglob('*') if p.is_file() and b'Jane' in p.read_bytes()]
