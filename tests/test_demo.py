"The demo: what is planted is what is reported, the answer stays outside, and a second run goes on."
import hashlib
import json
import subprocess
import sys
import time

import pandas as pd
import pytest

from vegc.acquire.lists import plan
from vegc.core import DatasetError, UsageError, VegcError
from vegc.demo import NAMES, SHARES, DemoServer, answer_bytes, demo, draw_new, plant, write_lists
from vegc.training.stages import LeakError
from vegc.training.train import load_stage

REASONS = dict(http_404='dead', not_image='page', truncated='cut', opted_out='closed')


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "A small demo, run once for all tests, and its answer."
    folder = tmp_path_factory.mktemp('demo')/'out'
    start = time.process_time()  # the server is in this process; what else the machine does is not the demo's fault
    result = demo(folder, small=True)
    result.took = time.process_time() - start
    return result, pd.read_csv(folder/'answer.csv').fillna({'fault': '', 'true_label': ''})


def faults(planted): return planted.fault.value_counts()


# ---- what is planted

@pytest.mark.parametrize('small', [False, True])
def test_lists_hold_what_was_planted(tmp_path, small):
    planted = plant(small=small)
    told = plan(write_lists(planted, tmp_path, 'http://127.0.0.1:1')).to_dict()
    n = faults(planted)
    assert (told['lists'], told['urls'], told['distinct']) == (10, len(planted), planted.number.nunique())
    assert (told['shared_across'], told['repeats_within']) == (n['shared'], n['repeat'])
    assert told['lines'] - told['urls'] == told['blank'] >= 190
    digits = planted[planted.fault.isin(['', 'wrong_label'])]
    assert len(digits) == (300 if small else 1797) and n['wrong_label'] == (24 if small else 144)
    assert set(n.index) == {'', *SHARES}
    assert set(planted.listed_as) == set(NAMES)


def test_lists_look_scraped(tmp_path):
    write_lists(plant(), tmp_path, 'http://127.0.0.1:1')
    data = {p.stem: p.read_bytes() for p in tmp_path.glob('*.csv')}
    assert {b.startswith(b'\xef\xbb\xbf') for b in data.values()} == {True, False}
    assert {b'\r\n' in b for b in data.values()} == {True, False}
    assert {b.endswith(b'\n') for b in data.values()} == {True, False}
    for b in data.values():
        lines = b.decode('utf-8-sig').splitlines()
        runs = [len(r) for r in ''.join('.' if line else ' ' for line in lines).split('.') if r]
        assert len(runs) == 2 and set(runs) <= {19, 20}, runs
        assert all(line.startswith('http://127.0.0.1:1/images?q=tbn:') for line in lines if line)


def test_an_address_names_one_picture_and_nothing_else():
    planted = plant()
    assert planted.groupby('query').number.nunique().max() == 1 == planted.groupby('number')['query'].nunique().max()
    assert planted['query'].str.fullmatch(r'/images\?q=tbn:ANd9Gc[\w-]{33}&s').all()


def test_same_seed_same_bytes(tmp_path):
    one, two, other = plant(), plant(), plant(seed=7)
    assert one.equals(two) and not one.equals(other)
    for name, planted, seed in (('a', one, 42), ('b', two, 42), ('c', other, 7)):
        write_lists(planted, tmp_path/name, 'http://127.0.0.1:1', seed=seed)
    read = {n: b''.join(p.read_bytes() for p in sorted((tmp_path/n).glob('*'))) for n in 'abc'}
    assert read['a'] == read['b'] != read['c']
    recipes = one.drop_duplicates('number').set_index('number', drop=False).to_dict('index')
    for _, row in one.drop_duplicates('kind').iterrows():
        first, again = (answer_bytes(recipes, row.number, 42) for _ in range(2))
        assert first == again
        if row.kind not in ('dead', 'page'): assert first != answer_bytes(recipes, row.number, 7)


def test_copies_are_copies():
    planted = plant()
    recipes = planted.drop_duplicates('number').set_index('number', drop=False).to_dict('index')

    def sha(n): return hashlib.sha256(answer_bytes(recipes, n, 42)[2]).hexdigest()
    for fault, same in dict(exact_copy=True, clash=True, near_copy=False).items():
        row = planted[planted.fault == fault].iloc[0]
        assert (sha(row.number) == sha(row.of)) is same, fault


# ---- the server

def test_port_in_use_is_one_sentence():
    with DemoServer(small=True) as server:
        says = rf'Port {server.port} of 127.0.0.1 cannot be had .*choose another'
        with pytest.raises(VegcError, match=says): DemoServer(small=True, port=server.port)
    with DemoServer(small=True, port=server.port): pass  # free again


def test_server_ends_with_its_process():
    code = 'from vegc.demo import DemoServer; s = DemoServer(small=True); print(s.port)'
    got = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert got.returncode == 0 and int(got.stdout) > 0, got.stderr


# ---- the whole road, small

def test_small_demo_is_fast(done): assert done[0].took < 60  # CPU seconds


def test_ingest_reports_every_planted_fault(done):
    result, planted = done
    n, reasons = faults(planted), {r['reason']: r['count'] for r in result.ingest['reasons']}
    assert {code: reasons[code] for code in REASONS} == {code: n[fault] for code, fault in REASONS.items()}
    assert reasons['conflict'] == 2*(n['shared'] + n['clash']) == result.ingest['review']
    assert set(reasons) == {*REASONS, 'conflict'}
    assert result.ingest['rows'] == len(planted) == result.plan['urls']
    # equal bytes under one label are one file; the rest of what came is a file each
    assert result.ingest['images'] == result.ingest['ok'] - n['repeat'] - n['exact_copy']


def test_manifest_agrees_row_by_row(done):
    result, planted = done
    faults = planted[['url', 'listed_as', 'fault']].drop_duplicates(['url', 'listed_as'])
    faults = faults.rename(columns=dict(listed_as='given_label'))
    df = result.dataset.df.merge(faults, on=['url', 'given_label'], how='left', validate='m:1')
    assert df.fault.notna().all()
    code = df.error_message.str.split(':').str[0]
    for reason, fault in REASONS.items():
        assert (df.fault == fault).equals((code == reason).fillna(False).astype(bool)), reason
    assert (df.status[df.fault.isin(['shared', 'clash'])] == 'review').all()
    assert (df.status[df.fault.isin(['wrong_label', 'off_topic', 'near_copy', 'exact_copy'])] == 'ok').all()


def test_near_copies_share_a_split(done):
    result, planted = done
    split = result.dataset.df.dropna(subset='split').drop_duplicates('url').set_index('url').split
    url = planted.drop_duplicates('number').set_index('number').url
    copies = planted[planted.fault == 'near_copy']
    together = [split[u] == split[url[o]] for u, o in zip(copies.url, copies.of, strict=True)]
    assert sum(together) >= .8*len(together)


def test_answer_stays_outside_the_dataset(done):
    result, _ = done
    assert (result.folder/'answer.csv').exists()
    for path in result.dataset.path.rglob('*'):
        if not path.is_file() or path.suffix in ('.jpg', '.png'): continue
        assert 'answer' not in path.name
        data = path.read_bytes()
        assert not any(word in data for word in (b'true_label', b'wrong_label', b'listed_as')), path


def test_numbers_have_intervals_and_unfreezing_does_not_hurt(done):
    result, _ = done
    m = result.metrics
    for k in ('frozen', 'unfrozen', 'test'): assert m[k]['accuracy_low'] < m[k]['accuracy'] < m[k]['accuracy_high']
    assert m['frozen']['n'] == m['unfrozen']['n'] == result.split['total']['valid']
    best = json.loads((result.dataset.path/'models'/'raw'/'stage.json').read_text('utf-8'))
    assert best['best']['accuracy'] == max(r['accuracy'] for r in best['history'])


def test_trap_is_refused_and_real_splits_stay(done):
    result, _ = done
    assert result.trap['seen'] > .4*result.trap['n'] and 'was trained on' in result.trap['refusal']
    load_stage(result.dataset, 'raw')  # the real splits were not touched
    assert sorted(p.name for p in result.folder.iterdir()) == [
        'answer.csv', 'dataset', 'decisions.csv', 'demo.json', 'digits.safetensors', 'lists', 'new-pictures',
        'report.html']


def test_review_finds_what_was_planted_and_deletes_nothing(done):
    result, _ = done
    v, images = result.review, list((result.dataset.path/'images').rglob('*.jpg'))
    assert v['found'] + v['missed'] == v['planted'] and v['found'] + v['false_alarms'] <= v['looked']
    assert v['found'] > .5*v['planted']  # a quarter of the pictures holds more than half of the mistakes, even here
    assert len(result.dataset.decisions) == v['decided'] == v['found']
    assert set(result.dataset.decisions.path) <= {p.relative_to(result.dataset.path).as_posix() for p in images}
    assert result.comparison['on_corrected']['n'] <= result.comparison['n'] == result.metrics['test']['n']


def test_result_is_json(done): json.dumps(done[0].to_dict())


def test_bad_file_among_new_pictures_is_reported(done):
    t = done[0].predictions
    assert t.status.value_counts().to_dict() == dict(ok=12, failed=1)
    assert t.error_message[t.status == 'failed'].str.startswith('not_image').all()


def test_second_run_goes_on(done, capsys):
    result, _ = done
    note = result.dataset.path/'models'/'raw'/'stage.json'
    before, splits = note.read_text('utf-8'), result.dataset.images.split.tolist()
    again = demo(result.folder, small=True)
    assert again.ingest['requested'] == 0
    assert note.read_text('utf-8') == before and again.dataset.images.split.tolist() == splits
    assert again.metrics['unfrozen']['accuracy'] == result.metrics['unfrozen']['accuracy']
    out = capsys.readouterr().out
    steps = ('plan ingest split frozen unfrozen evaluate issues clean compare report export predict trap').split()
    for step in steps: assert f'\n{step} ' in out


def test_second_run_needs_its_port(done):
    port = json.loads((done[0].folder/'demo.json').read_text('utf-8'))['port']
    with DemoServer(small=True, port=port), pytest.raises(VegcError, match=f'Port {port}'):
        demo(done[0].folder, small=True)


# ---- folders

def test_folder_of_other_things_is_refused(tmp_path):
    (tmp_path/'thesis.tex').write_text('years of work')
    with pytest.raises(DatasetError, match='is not the folder of a demo'): demo(tmp_path, small=True)
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']
    with pytest.raises(DatasetError, match='is not the folder of a demo'): demo(tmp_path/'thesis.tex', small=True)


def test_other_settings_are_refused(done):
    with pytest.raises(UsageError, match='seed=42'): demo(done[0].folder, small=True, seed=1)
    with pytest.raises(UsageError, match='small=True'): demo(done[0].folder)


def test_leak_error_is_for_people(done):
    assert issubclass(LeakError, VegcError) and done[0].trap['refusal'].endswith('.')


def test_new_pictures_are_none_of_the_lists(tmp_path):
    recipes = plant(small=True).drop_duplicates('number').set_index('number', drop=False).to_dict('index')
    listed = {answer_bytes(recipes, n, 42)[2] for n in list(recipes)[:50]}
    assert not listed & {p.read_bytes() for p in draw_new(tmp_path).glob('*.jpg')}
