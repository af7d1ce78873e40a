"""What is on disk already: arrays as data sets are published, tables of paths or addresses, files by URL."""
import base64
import io
import json
import subprocess

import numpy as np
import pandas as pd
import pytest
from conftest import PROGRAM
from fault_server import FaultServer, jpeg, write_lists
from PIL import Image

from vegc.core import DatasetError, UsageError
from vegc.acquire.add import add
from vegc.acquire.ingest import ask_robots, ingest
from vegc.acquire.lists import plan


@pytest.fixture
def characters(tmp_path):
    "Pictures in one file, labels in another, a class map with code points."
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (30, 28, 28), dtype='uint8'), np.arange(30, dtype='uint8') % 3
    np.savez_compressed(tmp_path/'k-train-imgs.npz', arr_0=x)
    np.savez_compressed(tmp_path/'k-train-labels.npz', arr_0=y)
    np.savez_compressed(tmp_path/'k-test-imgs.npz', arr_0=255 - x[:9])
    np.savez_compressed(tmp_path/'k-test-labels.npz', arr_0=y[:9])
    (tmp_path/'map.csv').write_text('index,codepoint,char\n0,U+3042,あ\n1,U+3044,い\n2,U+309D,ゝ\n', encoding='utf-8')
    return tmp_path, x, y


def test_arrays_in_several_files_keep_every_pixel_their_names_and_their_split(characters):
    folder, x, y = characters
    kw = dict(subject='characters', class_map=folder/'map.csv')
    add(folder/'k-train-imgs.npz', folder/'ds', labels='k-train-labels.npz', split='train', **kw)
    res = add(
        folder / 'k-test-imgs.npz',
        folder / 'ds',
        labels=str(folder / 'k-test-labels.npz') + ':arr_0',
        split='test',
        **kw,
    )
    df = res.dataset.df
    assert df.groupby('source_split').size().to_dict() == {'train': 30, 'test': 9} and set(df.status) == {'ok'}
    for i in (0, 4, 29):
        row = df[df.url == f'k-train-imgs.npz#{i}'].iloc[0]
        pixels = np.asarray(Image.open(res.dataset.path/row.path))
        assert row.given_label == 'あいゝ'[y[i]] and row.path.endswith('.png') and (pixels == x[i][..., None]).all()
    assert (
        add(folder / 'k-train-imgs.npz', folder / 'ds', labels='k-train-labels.npz', split='train', **kw).counts['kept']
        == 30
        and len(res.dataset.df) == 39
    )


def test_one_file_with_everything_from_the_command_line(tmp_path):
    rng = np.random.default_rng(1)
    np.savez(
        tmp_path / 'all.npz',
        imgs=rng.random((6, 32, 32, 3)),
        labels=np.array(list('aabbab')),
        part=np.array(['train', 'val', 'test'] * 2),
        other=np.zeros(4),
    )
    done = subprocess.run(
        [
            PROGRAM,
            'add',
            tmp_path / 'all.npz',
            tmp_path / 'ds',
            '--subject',
            'objects',
            '--images',
            'imgs',
            '--labels',
            'labels',
            '--split',
            'part',
            '--json',
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)['ok'] == 6
    df = add(tmp_path/'all.npz', tmp_path/'ds', labels='labels', split='part').dataset.df
    assert list(df.source_split) == ['train', 'valid', 'test']*2 and list(df.given_label) == list('aabbab')


@pytest.mark.parametrize(
    'arrays, kw, error, match',
    [
        (
            dict(a=np.zeros((3, 20, 20)), b=np.zeros((3, 20, 20)), y=np.zeros(3, int)),
            {},
            UsageError,
            'several arrays.*a, b, y',
        ),
        (dict(x=np.zeros((3, 20, 20)), y=np.zeros(4, int)), dict(labels='y'), UsageError, '3 pictures and 4 labels'),
        (dict(x=np.zeros((3, 20, 20))), {}, UsageError, 'no array that could be the labels'),
        (
            dict(x=np.zeros((3, 20, 20)), y=np.zeros(3, int), s=np.array(['train']*2)),
            dict(split='s'),
            UsageError,
            '3 pictures and 2 splits',
        ),
        (
            dict(x=np.zeros((3, 20, 20)), y=np.array([0, 1, 7])),
            dict(class_map='map'),
            DatasetError,
            'no name for the label 7',
        ),
        (dict(x=np.zeros((3, 20, 20, 5)), y=np.zeros(3, int)), {}, UsageError, 'shape'),
        (
            dict(x=np.zeros((3, 20, 20)), y=np.array([{}, 1, 2], dtype=object)),
            dict(labels='y'),
            DatasetError,
            'without pickle',
        ),
        (dict(x=np.zeros((3, 20, 20)), y=np.zeros(3, int)), dict(labels='nowhere.npz'), UsageError, 'does not exist'),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_arrays_that_cannot_be_meant_are_said_so(tmp_path, arrays, kw, error, match):
    np.savez(tmp_path/'z.npz', **arrays)
    (tmp_path/'map.csv').write_text('0,zero\n1,one\n')
    with pytest.raises(error, match=match):
        add(
            tmp_path / 'z.npz',
            tmp_path / 'ds',
            subject='objects',
            **{k: tmp_path / 'map.csv' if v == 'map' else v for k, v in kw.items()},
        )
    assert not (tmp_path/'ds').exists()


def test_bytes_that_are_no_archive_are_said_so(tmp_path):
    (tmp_path/'z.npz').write_bytes(b'PK no')
    with pytest.raises(DatasetError, match='cannot be read'): add(tmp_path/'z.npz', tmp_path/'ds', subject='objects')


def test_a_table_of_addresses_is_fetched_and_keeps_its_split(tmp_path):
    with FaultServer() as server:
        (tmp_path / 't.csv').write_text(
            'url,label,split\n'
            + ''.join(
                f'{server.url(f"/{i}?a,b")!r},{"ab"[i % 2]},{["train", "val", "test", ""][i % 4]}\n'.replace("'", '"')
                for i in range(8)
            )
        )
        df = add(tmp_path/'t.csv', tmp_path/'ds', subject='objects', allow_hosts='127.0.0.1').dataset.df
        assert (
            set(df.status) == {'ok'}
            and list(df.source_split.fillna('')) == ['train', 'valid', 'test', ''] * 2
            and list(df.given_label) == list('abababab')
        )
        assert server.asked['/0?a,b'] == 1


def test_a_table_of_paths_under_the_name_url_and_a_split_for_all(tmp_path):
    for i in range(4): (tmp_path/f'{i}.jpg').write_bytes(jpeg(i))
    (tmp_path / 't.csv').write_text(
        f'url,label,split\n0.jpg,a,\n{(tmp_path / "1.jpg").as_uri()},a,train\n2.jpg,b,\n3.jpg,b,\n'
    )
    df = add(tmp_path/'t.csv', tmp_path/'ds', subject='objects', split='test').dataset.df
    assert list(df.source_split) == ['test', 'train', 'test', 'test'] and set(df.status) == {'ok'}
    (tmp_path/'mixed.csv').write_text('url,label\n0.jpg,a\nhttps://e.example/1.jpg,a\n')
    with pytest.raises(UsageError, match='web addresses'): add(tmp_path/'mixed.csv', tmp_path/'ds2', subject='objects')


KNOWN = dict(
    query='tree bark',
    rank='7',
    landing_url='https://e.example/1',
    license='CC BY 4.0',
    license_url='https://creativecommons.org/licenses/by/4.0/',
    creator='Tim, S.',
)


def test_a_table_of_paths_takes_the_columns_that_a_table_of_addresses_takes(tmp_path):
    with FaultServer() as server:
        for i in range(3): (tmp_path/f'{i}.jpg').write_bytes(jpeg(i))
        server.bodies |= {f'/{i}': jpeg(i) for i in range(3)}
        found = []
        for address, where in (('path', '{}.jpg'), ('url', '{}.jpg'), ('url', server.url('/{}'))):
            table = pd.DataFrame(
                [
                    dict(Label='a', Title='Old tree')
                    | KNOWN
                    | {address: where.format(0), 'attribution': 'Tree by Tim', 'split': 'val'},
                    dict(Label='a', Title='Old tree') | KNOWN | {address: where.format(1)},
                    dict(Label='b') | {address: where.format(2)},
                ]
            )
            table.to_csv(tmp_path/'t.csv', index=False, encoding='utf-8-sig', lineterminator='\r\n')
            ds = add(tmp_path/'t.csv', tmp_path/f'ds{len(found)}', subject='objects', allow_hosts='127.0.0.1').dataset
            credit = pd.read_csv(ds.path/'ATTRIBUTION.csv')
            found.append(
                (
                    ds.df[['given_label', 'sha256', 'source_split', *KNOWN]].astype(object).fillna('-').values.tolist(),
                    credit[['path', 'creator', 'license', 'attribution']].values.tolist(),
                )
            )
        assert found[0] == found[1] == found[2]
        rows, credit = found[0]
        assert [r[3:] for r in rows] == [['tree bark', 7, *list(KNOWN.values())[2:]]] * 2 + [['-'] * 6] and [
            r[2] for r in rows
        ] == ['valid', '-', '-']
        assert {c[3] for c in credit} == {
            'Tree by Tim',
            '"Old tree" by Tim, S., CC BY 4.0, https://creativecommons.org/licenses/by/4.0/, https://e.example/1',
        }
        add(tmp_path/'ds0'/'images', tmp_path/'ds0')  # what a table said stays when something else is added
        assert pd.read_csv(tmp_path/'ds0'/'ATTRIBUTION.csv').attribution.isin({c[3] for c in credit}).sum() == 2


def test_tables_that_are_written_oddly_are_read_and_impossible_ones_said(tmp_path):
    (tmp_path/'1.jpg').write_bytes(jpeg(1))
    inline = (
        'data:image/jpeg;base64,' + base64.b64encode(jpeg(2)).decode() + '=' * 200_000
    )  # longer than the csv module takes by itself
    (tmp_path/'t.csv').write_bytes('\ufeff\r\n\r\nLABEL ,"path"\r\ncafe\u0301, 1.jpg \r\n\r\n'.encode())
    df = add(tmp_path/'t.csv', tmp_path/'ds', subject='objects').dataset.df
    assert df[['url', 'given_label', 'status']].values.tolist() == [['1.jpg', 'caf\u00e9', 'ok']]
    (tmp_path/'w.csv').write_text(f'url,label\n"{inline}",x\n')
    assert add(tmp_path/'w.csv', tmp_path/'ds2', subject='objects').counts['ok'] == 1
    with pytest.raises(UsageError, match='column split'): add(tmp_path/'w.csv', tmp_path/'ds2', split='test')
    (tmp_path/'n.csv').write_text('path,label\n1.jpg,\n')
    with pytest.raises(DatasetError, match="'' cannot be a class name"):
        add(tmp_path / 'n.csv', tmp_path / 'ds', subject='objects')


def test_file_urls_are_read_by_flag_only_and_never_through_a_redirect(tmp_path):
    for i in range(2): (tmp_path/f'ü {i}.jpg').write_bytes(jpeg(i))
    with FaultServer() as server:
        uris = [(tmp_path/f'ü {i}.jpg').as_uri() for i in range(2)] + [(tmp_path/'none.jpg').as_uri()]
        lists = write_lists(tmp_path/'lists', a=[*uris, server.url('/to?' + uris[0]), server.url('/x')])
        code = lambda ds: [m.split(':')[0] for m in ds.df.error_message.fillna('ok')]
        kw = dict(subject='objects', allow_hosts='127.0.0.1', max_failures=1)
        assert code(ingest(lists, tmp_path/'a', **kw).dataset) == ['bad_scheme']*4 + ['ok']
        assert code(ingest(lists, tmp_path / 'b', allow_files=True, **kw).dataset) == [
            'ok',
            'ok',
            'no_file',
            'bad_scheme',
            'ok',
        ]


def test_the_share_that_robots_closes_can_be_asked_before(tmp_path):
    with FaultServer(robots='User-agent: *\nDisallow: /no') as server, FaultServer() as other:
        lists = write_lists(
            tmp_path / 'lists', a=[server.url('/no/1'), server.url('/2'), other.url('/1')], b=[server.url('/no/1')]
        )
        table = ask_robots(plan(lists), allow_hosts='127.0.0.1')
        assert table[['urls', 'closed', 'why']].values.tolist() == [[2, 1, 'opted_out'], [1, 0, '']]
        done = subprocess.run(
            [PROGRAM, 'plan', lists, '--robots', '--allow-hosts', '127.0.0.1', '--json'], capture_output=True, text=True
        )
        r = json.loads(done.stdout)['robots']
        assert (
            (r['hosts'], r['urls'], r['closed'], r['share']) == (2, 3, 1, round(1 / 3, 6))
            and not server.asked
            and not other.asked
        )


def test_numbers_that_are_no_pixels_are_refused(tmp_path):
    from vegc.acquire.add import array_png
    with pytest.raises(UsageError, match='numbers from 0 to 999'): array_png(np.array([[0, 999]]))
    for a, want in (
        (np.array([[0.0, 1.0]]), [0, 255]),
        (np.array([[False, True]]), [0, 255]),
        (np.array([[7, 9]], 'int64'), [7, 9]),
    ):
        assert list(np.asarray(Image.open(io.BytesIO(array_png(a))))[0]) == want
