"""Every fault of the network has one outcome, with a code, and nothing else suffers from it."""
import base64
import gc
import json
import socket
import tracemalloc
from itertools import pairwise

import pytest
from fault_server import FaultServer, bomb, closed_port, jpeg, write_lists

from vegc.acquire.fetch import Body, FetchProblem, is_public
from vegc.acquire.ingest import TooManyFailures, ingest
from vegc.core import DatasetError, UsageError, VegcWarning, sha256_hex
from vegc.data.dataset import ImageDataset
from vegc.data.images import load_rgb

LOCAL = dict(subject='objects', allow_hosts='127.0.0.1')
INLINE = 'data:image/jpeg;base64,' + base64.b64encode(jpeg(77)).decode()

# path -> (outcome, how often the server is asked); outcome: ok, or the code of the failure
FAULTS = {
    '/images?q=tbn:ANd9%2FGc+Q==&usqp=CAU': ('ok', 1),
    '/status/404': ('http_404', 1), '/status/403': ('http_403', 1), '/status/410': ('http_410', 1),
    '/status/204': ('http_204', 1),
    '/once-503/a': ('ok', 2), '/once-500/a': ('ok', 2), '/status/503': ('http_503', 3),
    '/limited?wait=2': ('ok', 2), '/limited?wait=3600': ('rate_limited', 1), '/sick?wait=3600': ('http_503', 1),
    '/sick?wait=0': ('http_503', 3),
    '/never': ('timeout', 1), '/drip': ('deadline', 1),
    '/reset': ('connection_reset', 3), '/short': ('incomplete', 3), '/once-reset': ('ok', 2),
    '/once-short': ('ok', 2), '/no-length': ('truncated', 1), '/no-length?progressive': ('truncated', 1),
    '/no-type': ('ok', 1), '/usage': ('ok', 1),
    '/hops/5': ('ok', 1), '/hops/30': ('too_many_redirects', 1), '/slow-hops/30': ('deadline', 1),
    '/loop?a': ('redirect_loop', 1),
    '/to?http://10.0.0.8/a.jpg': ('blocked_address', 1),
    '/to?http://169.254.169.254/latest/meta-data': ('blocked_address', 1),
    '/to?http://localhost:PORT/secret-name': ('blocked_address', 1),
    '/to?http://127.0.0.2:PORT/secret-2': ('blocked_address', 1),
    '/to?http://[::1]:PORT/secret-6': ('blocked_address', 1),
    '/to?http://[::ffff:127.0.0.1]:PORT/secret-4in6': ('blocked_address', 1),
    '/to?http://127.1:PORT/secret-short': ('blocked_address', 1),
    '/to?http://2130706433:PORT/secret-number': ('blocked_address', 1),
    '/to?file:///etc/passwd': ('bad_scheme', 1), '/to?ftp://example.org/a': ('bad_scheme', 1),
    '/to?http://:80/a.jpg': ('bad_url', 1),
    '/huge': ('too_large', 1), '/endless': ('too_large', 1), '/bomb': ('too_large', 1),
    '/gzip': ('ok', 1), '/deflate': ('ok', 1), '/not-gzip': ('ok', 1), '/text-type': ('ok', 1),
    '/html': ('not_image', 1), '/svg': ('not_image', 1), '/text': ('not_image', 1), '/empty': ('empty', 1),
    '/robots-tag?noai': ('opted_out', 1), '/robots-tag?nofollow,+noimageai': ('opted_out', 1),
    '/robots-tag?noindex': ('opted_out', 1), '/robots-tag?otherbot:+noindex,+vegc:+noai': ('opted_out', 1),
    '/tdm': ('opted_out', 1), '/reserved': ('opted_out', 1),
    '/agent': ('http_403', 1),
    '/../../etc/passwd.jpg': ('ok', 1), '/' + 'n'*400 + '.jpg': ('ok', 1), '/bún%20chả.php': ('ok', None),
    '/bún chả.php': ('ok', None), '/plain': ('ok', 1),
}
ELSEWHERE = {
    'http://10.0.0.8/a.jpg': 'blocked_address', 'http://[fe80::1]/a.jpg': 'blocked_address',
    'file:///etc/passwd': 'bad_scheme',
    'ftp://example.org/a.jpg': 'bad_scheme', 'javascript:alert(1)': 'bad_scheme', 'not a url': 'bad_url',
    'http:///a.jpg': 'bad_url',
    'http://nobody.invalid/a.jpg': 'dns', 'http://127.0.0.1:CLOSED/a.jpg': 'refused',
    INLINE: 'ok', 'data:image/jpeg;base64,%%%': 'bad_data_uri', 'data:image/jpeg;base64,AAA*AAAA': 'bad_data_uri',
    'data:image/jpeg;base64,AAAA*AAAA': 'bad_data_uri', 'data:text/plain,hello': 'not_image',
    'data:nonsense': 'bad_data_uri',
}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "One ingest of all faults at once: server, dataset, rows by URL as listed above."
    folder = tmp_path_factory.mktemp('faults')
    with FaultServer() as server:
        def fill(url): return url.replace('PORT', str(server.port)).replace('CLOSED', str(closed_port()))
        listed = {u: server.url(fill(u)) for u in FAULTS} | {u: fill(u) for u in ELSEWHERE}
        lists = write_lists(folder/'lists', thing=['', *listed.values(), '', ''])
        result = ingest(lists, folder/'ds', subject='objects', allow_hosts=('127.0.0.1',), deadline=3,
                        max_failures=1, max_bytes=2_000_000)
        rows = {r['url']: r for r in result.dataset.df.to_dict('records')}
        yield server, result, {k: rows[u] for k, u in listed.items()}


def outcome(row): return 'ok' if row['status'] == 'ok' else row['error_message'].split(':')[0]


@pytest.mark.parametrize('fault', FAULTS, ids=lambda f: f[:50])
def test_a_fault_of_the_server_has_its_outcome(run, fault):
    server, _, rows = run
    want, asked = FAULTS[fault]
    assert outcome(rows[fault]) == want, rows[fault]['error_message']
    if asked: assert server.asked[fault.replace('PORT', str(server.port))] == asked


@pytest.mark.parametrize('url', ELSEWHERE, ids=lambda u: u[:40])
def test_a_url_that_leads_nowhere_has_its_outcome(run, url):
    row = run[2][url]
    assert outcome(row) == ELSEWHERE[url], row['error_message']


def test_every_row_has_one_status_and_a_code_where_there_is_no_picture(run):
    _, result, rows = run
    assert result.counts['rows'] == len(FAULTS) + len(ELSEWHERE)
    for row in rows.values():
        assert row['status'] in {'ok', 'failed', 'skipped'}
        assert (row['status'] == 'skipped') == (outcome(row) == 'opted_out')
        if row['status'] == 'ok': load_rgb(result.dataset.path/row['path'])
    assert result.dataset.failures()['count'].sum() == result.counts['failed'] + result.counts['skipped']


def test_what_came_is_recorded(run):
    server, _, rows = run
    assert rows['/hops/5']['final_url'] == server.url('/hops/0')
    assert (rows['/status/404']['http_status'], rows['/gzip']['http_status']) == (404, 200)
    assert rows['/text-type']['content_type'] == 'text/html'
    assert rows['/plain']['fetched_at'].endswith('Z') and rows['/plain']['tool'].startswith('vegc')
    assert len(rows['/plain']['phash']) == len(rows['/plain']['sha256']) == 64


def test_a_draft_of_a_signal_is_noted_and_decides_nothing(run):
    assert run[2]['/usage']['flags'] == 'content-usage train-ai=n, exp, search=y'


def test_no_private_address_was_connected_to(run): assert not [p for p in run[0].asked if p.startswith('/secret')]


def test_private_addresses_stay_closed_where_the_rules_of_hosts_are_ignored(tmp_path):
    with FaultServer() as server:
        hidden = [f'http://{host}:{server.port}/secret' for host in ('127.0.0.2', '[::1]', '127.2', 'localhost')]
        urls = [*hidden, *(server.url('/to?' + u) for u in hidden), server.url('/1')]
        lists = write_lists(tmp_path/'lists', a=urls)
        res = ingest(lists, tmp_path/'ds', **LOCAL, max_failures=1, ignore_robots=True, ignore_optout_headers=True)
        assert [outcome(r) for r in res.dataset.df.to_dict('records')] == ['blocked_address']*8 + ['ok']
        assert '/secret' not in server.asked


PUBLIC = ['8.8.8.8', '2001:4860:4860::8888', '64:ff9b::808:808', '2002:808:808::']
PRIVATE = ['10.1.2.3', '100.64.0.1', '169.254.169.254', '224.0.0.1', '0.0.0.0', 'fe80::1%eth0', 'fd00::1',
           '::ffff:10.0.0.1', '64:ff9b::7f00:1', '2002:a00:1::']


@pytest.mark.parametrize('address', PUBLIC + PRIVATE)
def test_an_address_is_judged_by_what_it_leads_to(address): assert is_public(address) == (address in PUBLIC)


def test_reading_stops_at_the_cap(run):
    # what the system buffers on both sides is sent, but no more: far from the 50 MB announced or the stream without end
    for path in ('/huge', '/endless', '/robots-tag?noai'): assert run[0].sent[path] < 12_000_000


def test_a_bomb_is_not_unpacked_beyond_the_cap():
    data, body = bomb(200), Body('gzip', 2_000_000)
    assert len(data) < 250_000
    tracemalloc.start()
    try:
        with pytest.raises(FetchProblem) as e: body.add(data)
        assert e.value.code == 'too_large' and tracemalloc.get_traced_memory()[1] < 6_000_000
    finally: tracemalloc.stop()


def test_files_are_named_by_their_content_and_stay_in_their_class(run):
    ds = run[1].dataset
    files = sorted(p.relative_to(ds.path).as_posix() for p in (ds.path/'images').rglob('*') if p.is_file())
    assert files == sorted(set(ds.df.path.dropna()))
    assert files == sorted({f'images/thing/{sha256_hex((ds.path/f).read_bytes())[:16]}.jpg' for f in files})


def test_the_agent_is_named_and_can_be_set(run, tmp_path):
    assert len(run[0].agents) == 1 and run[0].agents.pop().startswith('vegc/')
    with FaultServer() as server:
        lists = write_lists(tmp_path/'lists', a=[server.url('/agent')])
        ds = ImageDataset(tmp_path/'ds', subject='objects', contact='me@example.org')
        with pytest.raises(TooManyFailures): ingest(lists, ds, allow_hosts='127.0.0.1')
        assert server.agents.pop().endswith('(+me@example.org)')
        with pytest.warns(VegcWarning, match='single'):
            assert ingest(lists, ds, allow_hosts='127.0.0.1', retry_failed=True, user_agent='Browser').counts['ok'] == 1


def test_opt_out_headers_can_be_overruled_by_name(tmp_path):
    with FaultServer() as server:
        lists = write_lists(tmp_path/'lists', a=[server.url('/tdm'), server.url('/x')])
        assert ingest(lists, tmp_path/'ds', **LOCAL).counts['skipped'] == 1
        assert ingest(lists, tmp_path/'ds', allow_hosts='127.0.0.1', ignore_optout_headers=True).counts['ok'] == 2
        assert server.asked['/x'] == 1


def test_a_rate_limit_is_asked_again_on_the_next_run_only(tmp_path):
    with FaultServer() as server:
        urls = [server.url(p) for p in ('/limited?wait=3600', '/status/404', '/x', '/y')]
        lists = write_lists(tmp_path/'lists', a=urls)
        for _ in range(2): ingest(lists, tmp_path/'ds', **LOCAL)
        assert [server.asked[p] for p in ('/limited?wait=3600', '/status/404', '/x')] == [2, 1, 1]


@pytest.mark.parametrize('rules', [True, False], ids=['rules asked for', 'rules ignored'])
def test_a_dead_host_is_given_up_after_a_few_tries(tmp_path, monkeypatch, rules):
    tried = []
    import asyncio
    real = asyncio.selector_events.BaseSelectorEventLoop.sock_connect
    async def counted(self, sock, address):
        tried.append(address)
        return await real(self, sock, address)
    monkeypatch.setattr(asyncio.selector_events.BaseSelectorEventLoop, 'sock_connect', counted)
    port = closed_port()
    lists = write_lists(tmp_path/'lists', a=[f'http://127.0.0.1:{port}/{i}' for i in range(200)])
    with pytest.raises(TooManyFailures) as e, pytest.warns(VegcWarning, match='no picture at all'):
        ingest(lists, tmp_path/'ds', **LOCAL, ignore_robots=not rules, ignore_optout_headers=not rules)
    assert e.value.result.reasons == [dict(reason='refused', count=200, example=f'http://127.0.0.1:{port}/0')]
    assert 1 <= len(tried) <= 6, len(tried)


def test_a_name_is_resolved_once_checked_and_connected_to_as_checked(tmp_path, monkeypatch):
    real, looked = socket.getaddrinfo, []
    def fake(host, *args, **kw):
        if host not in ('pictures.test', 'stranger.test'): return real(host, *args, **kw)
        looked.append(host)
        return real('127.0.0.1', *args, **kw)
    monkeypatch.setattr(socket, 'getaddrinfo', fake)
    with FaultServer() as server:
        urls = [f'http://{name}.test:{server.port}/{name}{i}' for name in ('pictures', 'stranger') for i in range(2)]
        lists = write_lists(tmp_path/'lists', a=urls)
        res = ingest(lists, tmp_path/'ds', subject='objects', allow_hosts='pictures.test', concurrency=1)
    assert res.reasons == [dict(reason='blocked_address', count=2, example=urls[2])] and res.counts['ok'] == 2
    assert looked.count('pictures.test') == 1 and not [p for p in server.asked if 'stranger' in p]


def test_a_body_that_was_refused_is_let_go_without_the_garbage_collector(tmp_path):
    with FaultServer() as server:
        lists = write_lists(tmp_path/'lists', a=[server.url(f'/endless?{i}') for i in range(8)])
        gc.collect()
        gc.disable()
        try:
            res = ingest(lists, tmp_path/'ds', **LOCAL, max_bytes=200_000, max_failures=1)
            assert res.counts['failed'] == 8 and not [o for o in gc.get_objects() if isinstance(o, Body)]
        finally: gc.enable()


def test_a_host_is_asked_by_no_more_than_its_share_at_a_time(tmp_path):
    with FaultServer(delay=.02) as server:
        lists = write_lists(tmp_path/'lists', a=[server.url(f'/{i}') for i in range(60)])
        assert ingest(lists, tmp_path/'ds', **LOCAL, per_host=4).counts['ok'] == 60
        assert 2 <= server.most_open <= 4


def test_a_host_that_answered_its_robots_txt_has_its_whole_share_from_the_first_picture_on(tmp_path):
    with FaultServer(delay=.3) as server:
        lists = write_lists(tmp_path/'lists', a=[server.url(f'/{i}') for i in range(6)])
        assert ingest(lists, tmp_path/'ds', **LOCAL, per_host=6).counts['ok'] == 6
        # all in one wave: three of them, then three, if only a picture counted as an answer
        assert server.most_open == 6


def test_redirects_into_a_host_count_for_its_share(tmp_path):
    with FaultServer(delay=.02) as target, FaultServer() as door, FaultServer() as gate:
        urls = [s.url('/to?' + target.url(f'/{i}{n}')) for i in range(20) for n, s in enumerate((door, gate))]
        lists = write_lists(tmp_path/'lists', a=urls)
        assert ingest(lists, tmp_path/'ds', **LOCAL, per_host=3).counts['ok'] == 40
        assert 2 <= target.most_open <= 3


def test_while_one_host_waits_the_others_go_on(tmp_path):
    with FaultServer() as slow, FaultServer(delay=.02) as quick:
        seen, answer = [], quick.picture
        quick.picture = lambda raw, **kw: (seen.append(sum(slow.asked.values())), answer(raw, **kw))[1]
        urls = [slow.url('/limited?wait=2'), *(host.url(f'/{i}') for host in (slow, quick) for i in range(40))]
        lists = write_lists(tmp_path/'lists', a=urls)
        res = ingest(lists, tmp_path/'ds', **LOCAL, per_host=2, concurrency=2)  # a worker that slept would be missed
        assert res.counts['ok'] == 81 and slow.asked['/limited?wait=2'] == 2
        # the slow host had a few requests in the air when it asked for patience, and none more until the other was done
        assert seen[-1] <= 10, seen
        assert 1.9 < max(b - a for a, b in pairwise(slow.times)) < 4  # and then as long as it asked for


def test_the_same_url_is_fetched_once_also_across_classes_and_runs(tmp_path):
    with FaultServer() as server:
        one, two, three = (server.url(f'/{i}') for i in range(3))
        lists = write_lists(tmp_path/'lists', hat=[one, two, one], cap=[one])
        res = ingest(lists, tmp_path/'ds', **LOCAL)
        assert (res.counts['rows'], res.counts['review'], res.counts['ok']) == (4, 3, 1)
        write_lists(lists, cap=[one, three, two])
        res = ingest(lists, tmp_path/'ds', allow_hosts='127.0.0.1', on_conflict='first')
        assert set(server.asked.values()) == {1} and res.counts['reused'] == 1
        status = res.dataset.df.set_index(['given_label', 'url']).status
        assert list(status['cap']) == ['ok']*3 and set(status['hat']) == {'skipped'}
        assert len(list((tmp_path/'ds'/'urls'/'replaced').iterdir())) == 1


def test_the_same_bytes_under_two_labels_are_one_picture(tmp_path):
    with FaultServer() as server:
        lists = write_lists(tmp_path/'lists', hat=[server.url('/gone-picture?1'), server.url('/h')],
                            cap=[server.url('/gone-picture?2'), server.url('/c')])
        for policy, counts in dict(review=(2, 0, 2), drop=(2, 2, 0), first=(3, 1, 0), all=(4, 0, 0)).items():
            res = ingest(lists, tmp_path/'ds', **LOCAL, on_conflict=policy)
            assert (res.counts['ok'], res.counts['skipped'], res.counts['review']) == counts
        assert res.dataset.config.on_conflict == 'all'


def test_a_placeholder_and_a_blank_picture_are_flagged_and_kept(tmp_path):
    with FaultServer() as server:
        same = [server.url(f'/gone-picture?{i}') for i in range(4)]
        lists = write_lists(tmp_path/'lists', a=[*same, server.url('/blank'), server.url('/x')])
        df = ingest(lists, tmp_path/'ds', **LOCAL).dataset.df
        assert list(df['flags'].fillna('')) == ['placeholder']*4 + ['blank', ''] and set(df.status) == {'ok'}


def test_too_many_failures_end_the_run_with_everything_kept(tmp_path):
    with FaultServer() as server:
        gone, there = [server.url(f'/status/404?{i}') for i in range(7)], [server.url(f'/{i}') for i in range(3)]
        lists = write_lists(tmp_path/'lists', a=gone + there)
        with pytest.raises(TooManyFailures, match='http_404') as e: ingest(lists, tmp_path/'ds', **LOCAL)
        assert e.value.exit_code == 1 and e.value.result.counts['ok'] == 3
        assert json.loads(json.dumps(e.value.result.to_dict()))['reasons'][0]['count'] == 7
        assert len(ImageDataset(tmp_path/'ds').images) == 3
        assert ingest(lists, tmp_path/'ds', max_failures=.7).counts['requested'] == 0


def test_classes_without_pictures_are_named(tmp_path):
    with FaultServer() as server:
        lists = write_lists(tmp_path/'lists', good=[server.url(f'/{i}') for i in range(9)],
                            bad=[server.url('/status/404')], lone=[server.url('/l')])
        with pytest.warns(VegcWarning) as w: ingest(lists, tmp_path/'ds', **LOCAL)
        assert [str(x.message).split(': ')[-1] for x in w if x.category is VegcWarning] == ['bad.', 'lone.']


def test_another_dataset_is_not_mixed_in_and_a_subject_is_needed(tmp_path):
    with FaultServer() as server:
        one = write_lists(tmp_path/'one', a=[server.url('/1'), server.url('/2')])
        with pytest.raises(UsageError, match='subject'): ingest(one, tmp_path/'ds', allow_hosts='127.0.0.1')
        ingest(one, tmp_path/'ds', **LOCAL)
        two, three = write_lists(tmp_path/'two', b=[server.url('/3')]), write_lists(tmp_path/'three', a=['x'], A=['y'])
        for match, kw in {'another dataset': dict(lists=two), 'case': dict(lists=three),
                          'subject is objects': dict(lists=one, subject='people')}.items():
            with pytest.raises(DatasetError, match=match): ingest(dataset=tmp_path/'ds', **kw)
        assert len(ImageDataset(tmp_path/'ds').df) == 2
        assert sorted(p.name for p in (tmp_path/'ds'/'urls').iterdir()) == ['a.csv']


def test_an_ingest_works_where_a_loop_is_running_already(tmp_path):
    import asyncio
    with FaultServer() as server:
        lists = write_lists(tmp_path/'lists', a=[server.url('/1'), server.url('/2')])
        async def cell(): return ingest(lists, tmp_path/'ds', **LOCAL)
        assert asyncio.run(cell()).counts['ok'] == 2


def test_the_rows_stand_in_list_order(tmp_path):
    with FaultServer() as server:
        urls = [server.url(f'/{i}' if i % 3 else f'/once-500/{i}') for i in range(12)]
        df = ingest(write_lists(tmp_path/'lists', a=urls), tmp_path/'ds', **LOCAL).dataset.df
        assert list(df.url) == urls
