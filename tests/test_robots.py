"""Whoever says no is left alone: robots.txt by RFC 9309, headers, the user's own list, and forgetting on request."""
import asyncio
import gzip
import io
import json
from dataclasses import asdict
from itertools import pairwise
from urllib.parse import quote, unquote

import numpy as np
import pandas as pd
import pytest
from aiohttp import web
from fault_server import FaultServer, closed_port, jpeg, write_lists
from PIL import Image
from safetensors.numpy import load_file, save_file

from vegc.acquire.add import add
from vegc.acquire.fetch import FetchOptions, fetch_many
from vegc.acquire.ingest import ingest
from vegc.core import DatasetError, UsageError, VegcWarning, sha256_hex
from vegc.data.dataset import ImageDataset
from vegc.data.forget import forget
from vegc.data.images import phash
from vegc.training.stages import StageInfo

LOCAL = dict(subject='objects', allow_hosts='127.0.0.1')


def run(folder, urls, **kw):
    "An ingest with one class; its result, and (status, code) by URL."
    options = LOCAL | dict(max_failures=1, deadline=2) | kw
    res = ingest(write_lists(folder/'lists', a=urls), folder/'ds', **options)
    rows = res.dataset.df.fillna({'error_message': ''})
    return res, {u: (s, m.split(':')[0]) for u, s, m in zip(rows.url, rows.status, rows.error_message, strict=True)}


def outcomes(folder, urls, **kw):
    "What all of its URLs came to: a set of (status, code)."
    return set(run(folder, urls, **kw)[1].values())


OUT, OK = ('skipped', 'opted_out'), ('ok', '')
RULES = '''
User-agent: *
Disallow: /

User-agent: otherbot
User-agent: VEGC     # a name is a name in any case
Disallow: /private
Allow: /private/open
Disallow: /*.gif$
Disallow: /bún
Crawl-delay: 0.01

User-agent: vegc
Disallow: /late      # a second group for us counts too
'''


def test_the_group_for_us_the_longer_rule_wildcards_and_a_second_group(tmp_path):
    paths = {'/x': OK, '/private/1': OUT, '/private/open/1': OK, '/a/b.gif': OUT, '/a/b.gif?x': OK,
             '/b%C3%BAn/1': OUT, '/late/1': OUT, '/Private/1': OK}
    with FaultServer(robots=RULES) as server:
        _, got = run(tmp_path, [server.url(p) for p in paths])
        assert got == {server.url(p): want for p, want in paths.items()}
        assert server.robots_asked == 1
        assert set(server.asked) == {p for p, want in paths.items() if want == OK}


HARMLESS = {'empty': '', 'another robot': 'User-agent: otherbot\nDisallow: /', 'rule of nobody': 'Disallow: /\n',
            'BOM': b'\xef\xbb\xbfUser-agent: *\nDisallow: /no', 'a picture': jpeg(1),
            'a page': '<html>Disallow: /</html>'}


@pytest.mark.parametrize('body', HARMLESS.values(), ids=HARMLESS)
def test_what_does_not_close_us_leaves_us_in(tmp_path, body):
    with FaultServer(robots=body) as server:
        assert outcomes(tmp_path, [server.url('/1'), server.url('/2')]) == {OK}


LATER = ('failed', 'rate_limited')


@pytest.mark.parametrize('status, want, asked', [(401, OK, 1), (403, OK, 1), (404, OK, 1), (410, OK, 1),
                                                 (500, OUT, 3), (503, OUT, 3), (429, LATER, 3)])
def test_no_file_is_leave_and_a_sick_server_is_none(tmp_path, status, want, asked):
    with FaultServer(robots=status) as server:
        urls = [server.url('/1'), server.url('/2')]
        assert outcomes(tmp_path, urls, tries=asked) == {want}
        assert (server.robots_asked, bool(server.asked)) == (asked, want == OK)
        server.robots = 404  # it is well again: the same command goes on
        assert outcomes(tmp_path, urls) == {OK}


def test_what_a_refusal_says_is_no_rule(tmp_path):
    with FaultServer(robots=lambda r: web.Response(status=403, text='User-agent: *\nDisallow: /')) as server:
        assert outcomes(tmp_path, [server.url('/1'), server.url('/2')]) == {OK}


def test_a_sick_server_that_recovers_is_read_after_all(tmp_path):
    with FaultServer(robots=lambda r: 503 if server.robots_asked == 1 else 'User-agent: *\nDisallow: /no') as server:
        _, got = run(tmp_path, [server.url('/1'), server.url('/no')])
        assert got == {server.url('/1'): OK, server.url('/no'): OUT}


def test_a_file_that_never_comes_closes_the_host_with_the_networks_reason(tmp_path):
    with FaultServer(robots=lambda r: asyncio.sleep(5)) as silent, FaultServer() as well:
        _, got = run(tmp_path, [silent.url('/1'), silent.url('/2'), well.url('/1')], deadline=.5)
        no_answer = ('failed', 'timeout')
        assert got == {silent.url('/1'): no_answer, silent.url('/2'): no_answer, well.url('/1'): OK}
        assert silent.robots_asked == 1 and not silent.asked


def test_the_file_may_be_redirected_compressed_and_long(tmp_path):
    def hop(request): return web.Response(status=302, headers={'Location': f'/hops-to-rules/{left[0]}'})
    async def on_hops_to_rules(request):
        left[0] -= 1
        if left[0] > 0: return hop(request)
        return web.Response(body=gzip.compress(b'User-agent: *\nDisallow: /no'), headers={'Content-Encoding': 'gzip'})
    for hops, want in ((5, OUT), (6, OK)):  # five are followed; after more there is no file
        left = [hops]
        with FaultServer(robots=hop) as server:
            server.on_hops_to_rules = on_hops_to_rules
            assert run(tmp_path/str(hops), [server.url('/no')])[1] == {server.url('/no'): want}
    with FaultServer(robots='User-agent: *\nDisallow: /no\n' + '# chatter\n'*200_000) as server:
        _, got = run(tmp_path/'long', [server.url('/no'), server.url('/1')])
        assert got == {server.url('/no'): OUT, server.url('/1'): OK}


def test_rules_hold_for_scheme_host_and_port_and_after_redirects(tmp_path):
    with FaultServer(robots='User-agent: *\nDisallow: /') as closed, FaultServer() as well:
        _, got = run(tmp_path, [closed.url('/1'), well.url('/1'), well.url('/to?' + closed.url('/2'))])
        assert got == {closed.url('/1'): OUT, well.url('/1'): OK, well.url('/to?' + closed.url('/2')): OUT}
        assert not closed.asked and (closed.robots_asked, well.robots_asked) == (1, 1)


def test_the_share_is_known_before_the_first_picture():
    closed, asked, got = [], [], []
    def on_survey(hosts):
        closed.extend(host['closed'] for host in hosts)
        asked.append(dict(server.asked))
    async def keep(res): got.append(res.code)
    with FaultServer(robots='User-agent: *\nDisallow: /no') as server:
        urls = [server.url(path) for path in ('/no/1', '/1', '/2')]
        asyncio.run(fetch_many(urls, keep, FetchOptions(allow_hosts=('127.0.0.1',)), on_survey))
        assert (closed, asked, sorted(got)) == ([1], [{}], ['', '', 'opted_out']) and len(server.asked) == 2


def test_the_share_is_said_and_can_be_overruled_by_name(tmp_path, capsys):
    with FaultServer(robots='User-agent: *\nDisallow: /no') as server:
        urls = [server.url('/no/1'), *(server.url(f'/{i}') for i in range(3))]
        res, got = run(tmp_path, urls)
        assert res.to_dict()['robots'] == dict(hosts=1, urls=4, closed=1, share=.25) and got[urls[0]] == OUT
        said = '1 host was asked for robots.txt and tdmrep.json, which close 1 of 4 URLs (25.0%)'
        assert said in capsys.readouterr().out
        assert run(tmp_path, urls)[0].counts['requested'] == 0
        res, got = run(tmp_path, urls, ignore_robots=True)
        assert got[urls[0]] == OK and res.robots == {} and server.robots_asked == 1 and server.asked['/1'] == 1


def test_another_name_follows_other_rules(tmp_path):
    with FaultServer(robots='User-agent: vegc\nDisallow: /\n\nUser-agent: mybot\nDisallow: /no') as server:
        urls = [server.url('/1'), server.url('/no')]
        assert outcomes(tmp_path/'1', urls) == {OUT}
        _, got = run(tmp_path/'2', urls, user_agent='Mozilla/5.0 (compatible; MyBot/2.0)')
        assert got == {urls[0]: OK, urls[1]: OUT}


def test_a_host_that_is_not_there_is_asked_a_few_times_only_for_its_rules(tmp_path):
    port = closed_port()
    _, got = run(tmp_path, [f'http://127.0.0.1:{port}/{i}' for i in range(50)])
    assert set(got.values()) == {('failed', 'refused')}


def test_headers_meant_for_others_do_not_close(tmp_path):
    date = 'unavailable_after: 25 Jun 2030 15:00:00 PST'
    tags = {'noindex': OUT, 'noimageindex': OUT, 'none': OUT, 'otherbot: noai': OK, 'otherbot: nofollow, noai': OK,
            'vegc: noai': OUT, '*: noai': OUT, 'all': OK, date: OK,
            # several robots in one line: a name holds until the next one
            'otherbot: noindex, vegc: noai': OUT, 'vegc: all, otherbot: noindex': OK,
            'otherbot: noindex, VEGC/2.0 : nofollow, NoImageAI': OUT, 'noindex, vegc: all': OUT,
            'otherbot: noai, *: noindex': OUT, 'vegc: nofollow, otherbot: all, noai': OK, 'vegcat: noai, cat: noai': OK,
            # values with colons and commas are no names
            f'googlebot: nofollow, {date}, vegc: noimageai': OUT, f'vegc: all, {date}, otherbot: noai': OK,
            f'{date}, noai': OUT, f'googlebot: {date}, noai': OK,
            'unavailable_after: Wednesday, 25-Jun-30 15:00:00 UTC, noai': OUT,
            'vegc: max-snippet: 20, max-image-preview: large, noai': OUT, 'googlebot: max-video-preview: -1, noai': OK}
    with FaultServer() as server:
        async def on_tag(request):
            return server.picture(request.raw_path, headers={'X-Robots-Tag': request.query['is']})
        server.on_tag = on_tag
        urls = {server.url('/tag?is=' + quote(t)): want for t, want in tags.items()}
        got = run(tmp_path, list(urls))[1]
        assert {unquote(u): got[u] for u in urls} == {unquote(u): want for u, want in urls.items()}


@pytest.mark.parametrize('overruled', [False, True])
def test_a_crawl_delay_is_kept_to_by_that_host_only(tmp_path, overruled, capsys):
    with FaultServer(robots='User-agent: *\nCrawl-delay: 0.3\nDisallow: /no') as slow, FaultServer(delay=.01) as quick:
        urls = [*(slow.url(f'/{i}') for i in range(4)), slow.url('/no'), *(quick.url(f'/{i}') for i in range(20))]
        _, got = run(tmp_path, urls, ignore_robots=overruled)
        assert list(got.values()).count(OK) == len(urls) - (not overruled)
        gaps = [b - a for a, b in pairwise(slow.times)]
        if overruled: assert min(gaps) < .1
        else:
            assert min(gaps) > .28 and quick.times[-1] < slow.times[-1]
            assert 'wants 0.3 s' in capsys.readouterr().out


def test_a_crawl_delay_longer_than_a_run_leaves_the_host_to_a_later_one(tmp_path):
    with FaultServer(robots='User-agent: *\nCrawl-delay: 3600') as server:
        urls = [server.url('/1'), server.url('/2')]
        assert outcomes(tmp_path, urls) == {LATER} and not server.asked
        server.robots = 'User-agent: *\nCrawl-delay: 0'
        assert outcomes(tmp_path, urls) == {OK}


TDMREP = json.dumps([
    {'location': '/art', 'tdm-reservation': 1, 'tdm-policy': 'https://a.example/policy.json'},
    {'location': '/art/free', 'tdm-reservation': 0}, {'location': '/*.gif$', 'tdm-reservation': 1},
    {'location': '/b%C3%BAn', 'tdm-reservation': 1}, {'location': '/a#b', 'tdm-reservation': 1},
    {'no': 'location'}, 7])


def test_tdmrep_reserves_what_its_locations_match_and_the_longer_one_holds(tmp_path):
    paths = {'/1': OK, '/art/1': OUT, '/art/free/1': OK, '/x/2.gif': OUT, '/x/2.gif?a': OK, '/bún/1': OUT, '/a': OK,
             '/to?/art/2': OUT}
    with FaultServer(tdmrep=TDMREP, robots='User-agent: *\nDisallow: /no') as server, FaultServer() as well:
        res, got = run(tmp_path, [*(server.url(p) for p in paths), well.url('/art/1')])
        assert got == {server.url(p): want for p, want in paths.items()} | {well.url('/art/1'): OK}
        assert server.tdmrep_asked == well.tdmrep_asked == 1 and '/art/1' not in server.asked
        assert res.to_dict()['robots']['closed'] == 3  # before it starts; the redirect's target is not known yet
        assert outcomes(tmp_path, [server.url(p) for p in paths], ignore_optout_headers=True) == {OK}
        assert server.tdmrep_asked == 1 and server.asked['/1'] == 1


UNREADABLE = {'none': 404, 'sick': 500, 'a page': '<html>', 'empty': '[]', 'no place': '[{"location": 7}]',
              'deep': '['*100_000, 'no text': b'\xff\xfe', 'silent': lambda r: asyncio.sleep(5)}


@pytest.mark.parametrize('body', UNREADABLE.values(), ids=UNREADABLE)
def test_a_tdmrep_that_cannot_be_read_reserves_nothing(tmp_path, body):
    with FaultServer(tdmrep=body) as server:
        _, got = run(tmp_path, [server.url('/1'), server.url('/tdm')], deadline=.5)
        assert got == {server.url('/1'): OK, server.url('/tdm'): OUT}
        assert server.tdmrep_asked == 1


# --- the user's own list

def test_optout_names_urls_hosts_hashes_and_copies_and_nothing_is_asked_for(tmp_path):
    with FaultServer() as server, FaultServer() as other:
        first = ImageDataset(tmp_path/'ds', subject='objects')
        sha = sha256_hex(server.picture('/by-sha').body)
        noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype='uint8')
        again = Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC)
        again.save(body := io.BytesIO(), 'JPEG')
        server.bodies['/by-phash'] = body.getvalue()
        lines = ['# asked for in May', server.url('/1?a=b'), f'127.0.0.1:{other.port}', sha, f'phash:{phash(again)}']
        (first.path/'optout.txt').write_text('\n'.join(lines) + '\n')
        urls = {server.url('/1?a=b'): OUT, server.url('/1?a=c'): OK, other.url('/1'): OUT, server.url('/by-sha'): OUT,
                server.url('/by-phash'): OUT, server.url('/to?' + other.url('/9')): OUT}
        res, got = run(tmp_path, list(urls))
        assert got == urls and len(list((res.dataset.path/'images').rglob('*.jpg'))) == 1
        assert not server.asked['/1?a=b'] and not other.asked['/1'] and res.dataset.df.sha256.notna().sum() == 1
        src = tmp_path/'src'/'a'
        src.mkdir(parents=True)
        again.resize((160, 120)).save(src/'copy.jpg', quality=50)
        assert add(src.parent, res.dataset, subject='objects').counts['skipped'] == 1


def test_a_line_that_nobody_can_read_is_an_error(tmp_path):
    ds = ImageDataset(tmp_path/'ds', subject='objects')
    (ds.path/'optout.txt').write_text('a.example\nplease remove my picture\n')
    with FaultServer() as server, pytest.raises(DatasetError, match='Line 2'): run(tmp_path, [server.url('/1')])
    assert not server.asked


@pytest.fixture
def full(tmp_path):
    "A dataset with everything that is derived from pictures; the one that goes is under two labels."
    with FaultServer() as server:
        urls = [server.url(f'/{i}') for i in range(6)]
        lists = write_lists(tmp_path/'lists', hat=urls[:4], cap=urls[3:])
        ds = ingest(lists, tmp_path/'ds', **LOCAL, on_conflict='all').dataset
        im = ds.images
        (ds.path/'features').mkdir()
        save_file(dict(x=np.arange(len(im))[:, None].astype('float16')), ds.path/'features/a.safetensors',
                  metadata=dict(images='\n'.join(im.sha256)))
        hashes = list(dict.fromkeys(im.sha256))
        pd.DataFrame(dict(a=hashes[:-1], b=hashes[1:], proof=.5)).to_parquet(ds.path/'features/proofs-1.parquet')
        (ds.path/'predictions').mkdir()
        im[['path']].assign(loss=1.).to_parquet(ds.path/'predictions/raw-valid.parquet')
        for stage, seen in dict(raw=list(im.sha256), other=['f'*64]).items():
            (ds.path/'models'/stage).mkdir(parents=True)
            record = StageInfo(stage, 'resnet50', ['cap', 'hat'], (64, 64), 'current', 42, 'hats', '', {}, seen, [])
            (ds.path/'models'/stage/'stage.json').write_text(json.dumps(asdict(record)))
        (ds.path/'cleaned.csv').write_text('name,label\n' + ''.join(f'{p},x\n' for p in im.path))
        (ds.path/'report.html').write_text('<meta name="generator" content="vegc/0">pictures')
        (ds.path/'mine.html').write_text('my notes')
        ds.update(im.assign(split='train'), ['split'])
        yield server, lists, ds, urls[3]


def test_forgetting_takes_out_the_picture_and_all_that_came_of_it_and_it_stays_out(full):
    server, lists, ds, url = full
    row = ds.df[ds.df.url == url].iloc[0]
    done = forget(ds, url)
    assert (done.rows, done.stages, len(done.files)) == (2, ['raw'], 3)
    files = [p for p in ds.path.rglob('*') if p.is_file()]
    everything = b'\n'.join(p.read_bytes() for p in files if p.parent.name not in ('raw', 'lists'))
    assert not [p for p in files if row.sha256[:16] in p.name]
    assert row.sha256.encode() not in everything and row.phash.encode() not in everything
    assert load_file(ds.path/'features/a.safetensors')['x'].shape == (5, 1)  # of seven rows, the one picture's two
    pairs = pd.read_parquet(ds.path/'features/proofs-1.parquet')
    assert len(pairs) and not {row.sha256} & (set(pairs.a) | set(pairs.b)), 'nor is it half of a pair'
    predicted, cleaned = pd.read_parquet(ds.path/'predictions/raw-valid.parquet'), pd.read_csv(ds.path/'cleaned.csv')
    for paths in (predicted.path, cleaned.name, ds.labels.path): assert len(paths) == 5 and row.path not in set(paths)
    assert not (ds.path/'report.html').exists() and (ds.path/'mine.html').exists()
    after = ds.df
    gone = after[after.url == url]
    assert len(after) == 7 and set(gone.status) == {'skipped'}
    assert gone[['path', 'sha256', 'phash', 'split', 'final_url', 'width']].isna().all(axis=None)
    # neither its URL nor its bytes from elsewhere come back
    twin = server.url('/twin')
    server.bodies['/twin'] = server.picture(url.removeprefix(server.url(''))).body
    write_lists(lists, hat=[url, twin, server.url('/new')])
    res = ingest(lists, ds, allow_hosts='127.0.0.1', retry_failed=True)
    status = res.dataset.df.set_index('url').error_message
    assert server.asked['/3'] == 1 and status[twin] == 'opted_out: forgotten on request'
    assert res.dataset.df.query('url == @twin').sha256.isna().all()
    assert list(ds.df[ds.df.path.notna()].split.dropna()) == ['train']*5


def test_what_optout_names_goes_on_the_next_run(full):
    server, lists, ds, url = full
    (ds.path/'optout.txt').write_text(url + '\n')
    with pytest.warns(VegcWarning, match='2 rows forgotten.*raw'): ingest(lists, ds, allow_hosts='127.0.0.1')
    assert len(ds.images) == 5 and server.asked['/3'] == 1
    assert ingest(lists, ds, allow_hosts='127.0.0.1').counts['requested'] == 0


def test_a_forget_that_was_cut_short_is_finished_by_the_same_call(full, monkeypatch):
    _, _, ds, url = full
    def interrupted(root, gone): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr('vegc.features.features.erase', interrupted)
        with pytest.raises(KeyboardInterrupt): forget(ds, url)
    assert forget(ds, url).rows == 2 and len(ds.images) == 5
    assert load_file(ds.path/'features/a.safetensors')['x'].shape == (5, 1)


def test_what_is_not_there_cannot_be_forgotten(full):
    for what in ('https://nobody.example/x.jpg', 'a sentence'):
        with pytest.raises(UsageError): forget(full[2], what)
    assert forget(full[2]).rows == 0 and len(full[2].images) == 7
