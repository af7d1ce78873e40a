"""Open-license sources in the shape their documentation gives, and pages that a person saved.

Openverse: https://api.openverse.org/v1/ (Search images).
Commons: https://www.mediawiki.org/wiki/API:Imageinfo, API:Search and API:Continue.
iNaturalist: https://api.inaturalist.org/v1/docs/ (GET /observations)."""
import base64
import json
import subprocess
from functools import partial
from urllib.parse import parse_qs, urlsplit

import pandas as pd
import pytest
from aiohttp import web
from conftest import PROGRAM, ROOT
from fault_server import FaultServer, jpeg
from lab import chromium

from vegc.acquire.ingest import ingest
from vegc.acquire.lists import read_list
from vegc.acquire.sources import SourceError, read_page, search, write_list
from vegc.core import UsageError


def refusal(status, detail, **headers):
    "An answer of a source that does not want to."
    return web.json_response(status=status, data=dict(detail=detail), headers=headers)


class Api(FaultServer):
    "A FaultServer that is one source too: `answers` gives the JSON for a query; `faults` come first, one a request."
    def __init__(self, answers, faults=()):
        super().__init__()
        self.answers, self.faults, self.queries, self.headers = answers, list(faults), [], []

    async def _answer(self, request):
        if not request.path.startswith(('/v1/', '/w/')): return await super()._answer(request)
        if self.faults: return self.faults.pop(0)()
        self.headers.append(dict(request.headers))
        self.queries.append({k: v[0] for k, v in parse_qs(urlsplit(request.raw_path).query).items()})
        return web.json_response(self.answers(self, self.queries[-1]))


def openverse(server, q):
    """GET /v1/images/: https://api.openverse.org/v1/#tag/images/operation/images_search
    (its sample answer; page_count and result_count beside results)."""
    page = int(q['page'])
    results = [dict(id=f'{page}-{i}', title=f'Tree "{page}", {i}', url=server.url(f'/{page}-{i}.jpg'),
                    foreign_landing_url=f'https://e.example/{page}/{i}', creator='Tim <b>S.</b>',
                    license=['cc0', 'by-nc', 'pdm'][i % 3], license_version=['1.0', '2.0', '1.0'][i % 3],
                    license_url='https://creativecommons.org/x/', attribution=f'"Tree" {page}.{i}', tags=[],
                    mature=False)
               for i in range(int(q['page_size']))]
    return dict(result_count=240, page_count=12, page_size=int(q['page_size']), page=page,
                results=results if page < 13 else [])


def commons_info(server, i):
    "imageinfo and extmetadata: https://www.mediawiki.org/wiki/API:Imageinfo."
    known = dict(License=dict(value='cc-by-sa-4.0', source='commons-templates', hidden=''),
                 LicenseShortName=dict(value='CC BY-SA 4.0'),
                 LicenseUrl=dict(value='https://creativecommons.org/licenses/by-sa/4.0'),
                 Artist=dict(value='<a href="//c.example/User:A" title="User:A">A &amp; B</a>'),
                 Credit=dict(value='<span>Own work</span>'))
    return dict(thumburl=server.url(f'/thumb/{i}.jpg'), thumbwidth=960, url=server.url(f'/full/{i}.jpg'),
                descriptionurl=f'https://c.example/File:{i}.jpg', mime='image/jpeg', sha1='0'*40, extmetadata=known)


def commons(server, q):
    """action=query with generator=search: https://www.mediawiki.org/wiki/API:Search,
    continue: https://www.mediawiki.org/wiki/API:Continue."""
    first = int(q.get('gsroffset', 0))
    pages = [dict(pageid=i, ns=6, title=f'File:Phở {i}.jpg', index=i + 1, imagerepository='local',
                  imageinfo=[commons_info(server, i)]) for i in range(first, first + 50)]
    if first == 0:
        del pages[1]['imageinfo']                                   # a file that is gone
        del pages[2]['imageinfo'][0]['extmetadata']['Artist']        # no author: the credit stands in
        pages[3]['imageinfo'][0]['extmetadata'] = {}
        del pages[4]['imageinfo'][0]['thumburl']
    res = dict(batchcomplete=True, query=dict(pages=pages[::-1]))   # pages come in no order; `index` is the rank
    return res | ({'continue': dict(gsroffset=first + 50, **{'continue': 'gsroffset||'})} if first == 0 else {})


def photo(server, i, code):
    "A photograph with its license_code and attribution."
    return dict(id=i, license_code=code, url=server.url(f'/photos/{i}/square.jpg'), flags=[],
                attribution=f'(c) Someone, some rights reserved ({code})',
                original_dimensions=dict(width=2048, height=1361))


def observation(server, i):
    photos = [photo(server, i*10 + n, code) for n, code in enumerate(['cc-by-nc', None, 'cc0'])]
    return dict(id=i, uri=f'https://i.example/observations/{i}', species_guess='Monarch', license_code=None,
                user=dict(login=f'user{i}', name=None if i % 2 else f'Name {i}'),
                taxon=dict(name='Danaus plexippus', preferred_common_name='Monarch'), photos=photos)


def inaturalist(server, q):
    """GET /observations: https://api.inaturalist.org/v1/docs/#!/Observations/get_observations
    (ObservationsResponse: total_results, page, per_page, results)."""
    page = int(q['page'])
    results = [observation(server, i) for i in range(page*100, page*100 + 100)]
    if page == 1:
        results[0] = dict(id=1, uri=None, photos=[photo(server, 7, 'cc-by')], user=None, taxon=None, species_guess=None)
    return dict(total_results=150, page=page, per_page=100, results=results[:100 if page == 1 else 50])


def test_openverse_pages_licenses_and_a_token():
    with Api(openverse) as server:
        got = search('tree bark', label='tree', max_results=50, base=server.url(''), pause=0, contact='me@example.org',
                     licenses='cc0,by')
        assert [q['page'] for q in server.queries] == ['1', '2', '3']
        assert server.queries[0] == dict(q='tree bark', page='1', page_size='20', license='cc0,by')
        assert server.headers[0]['User-Agent'].endswith('(+me@example.org)')
        assert 'Authorization' not in server.headers[0]
        assert len(got) == 50 and list(got['rank']) == list(range(1, 51))
        assert list(got.license[:3]) == ['CC0 1.0', 'CC BY-NC 2.0', 'Public Domain Mark 1.0']
        assert got.creator[0] == 'Tim S.' and got.landing_url[21] == 'https://e.example/2/1'
        assert len(search('x', max_results=1000, base=server.url(''), pause=0)) == 240  # where the source ends
        search('x', max_results=1, base=server.url(''), token='secret')
        assert server.headers[-1]['Authorization'] == 'Bearer secret' and server.queries[-1]['page_size'] == '100'


def test_commons_continues_ranks_and_strips_html():
    with Api(commons) as server:
        find = partial(search, 'phở', 'commons', base=server.url(''), pause=0)
        got = find(max_results=200)
        assert [q.get('gsroffset') for q in server.queries] == [None, '50']
        assert server.queries[1]['continue'] == 'gsroffset||'
        assert server.queries[0]['gsrsearch'] == 'filetype:bitmap phở'
        assert len(got) == 99 and got.url[0] == server.url('/thumb/0.jpg') and got.url[3] == server.url('/full/4.jpg')
        assert list(got.creator[:3]) == ['A & B', 'Own work', ''] and got.title[0] == 'Phở 0.jpg'
        assert list(got.license[:3]) == ['CC BY-SA 4.0', 'CC BY-SA 4.0', '']
        assert len(find(licenses='cc-by-sa-4.0')) == 98
        assert len(find(licenses='cc0')) == 0


def test_inaturalist_takes_licensed_photographs_of_every_observation():
    with Api(inaturalist) as server:
        got = search('Danaus plexippus', 'inaturalist', max_results=1000, base=server.url(''), pause=0)
        assert len(server.queries) == 2 and len(got) == 1 + 149*2
        assert not got.url.str.contains('square').any() and got.url.str.contains('/medium.jpg').all()
        assert list(got.license[:3]) == ['CC BY', 'CC BY-NC', 'CC0']
        assert got.license_url[2] == 'https://creativecommons.org/publicdomain/zero/1.0/'
        assert list(got.creator[[0, 1, 3]]) == ['', 'user101', 'Name 102']
        assert got.attribution[1].startswith('(c) Someone')


def test_limits_are_waited_for():
    busy = partial(refusal, 429, 'Request was throttled.', **{'Retry-After': '0'})
    with Api(openverse, [busy, partial(refusal, 503, 'later')]) as server:
        assert len(search('x', max_results=5, base=server.url(''), pause=0)) == 5 and not server.faults


# 429 with `detail`, 400, 401: the answers listed under images_search of https://api.openverse.org/v1/; an `error` that
# comes with 200: https://www.mediawiki.org/wiki/API:Errors_and_warnings
LAGGING = dict(error=dict(code='maxlag', info='Waiting for a server'))
REFUSALS = {"refuses with 400.*'x' does not exist": partial(refusal, 400, "License 'x' does not exist."),
            '401': partial(refusal, 401, 'page_size must be 20'),
            'no more requests for 86400 s': partial(refusal, 429, 'no', **{'Retry-After': '86400'}),
            'JSON object': partial(web.Response, text='<html>'),
            'Waiting for a server': partial(web.json_response, LAGGING)}


@pytest.mark.parametrize('match', REFUSALS)
def test_refusals_are_sentences(match):
    with Api(openverse, [REFUSALS[match]]) as server, pytest.raises(SourceError, match=match):
        search('x', base=server.url(''), pause=0)


def test_a_source_that_cannot_answer_is_given_up_and_wrong_use_is_said():
    with Api(openverse, [partial(refusal, 500, 'sick')]*9) as server, pytest.raises(SourceError, match='500'):
        search('x', base=server.url(''), pause=0)
    with pytest.raises(SourceError, match='cannot be reached'): search('x', base='http://127.0.0.1:9', pause=0)
    for kw in (dict(source='bing'), dict(max_results=0), dict(query=' ')):
        with pytest.raises(UsageError): search(**(dict(query='x') | kw))


def test_from_a_search_to_pictures_with_attribution(tmp_path):
    with Api(openverse) as server:
        options = ['--label', 'tree', '--max-results', '6', '--base', server.url(''), '--pause', '0', '--json']
        command = [PROGRAM, 'search', 'tree bark', tmp_path/'lists', *options]
        done = subprocess.run(command, capture_output=True, text=True)
        licenses = json.loads(done.stdout)['licenses']
        assert licenses == {'CC0 1.0': 2, 'CC BY-NC 2.0': 2, 'Public Domain Mark 1.0': 2}, done.stderr
        (tmp_path/'lists'/'other.csv').write_text(server.url('/other.jpg') + '\n' + server.url('/more.jpg'))
        ds = ingest(tmp_path/'lists', tmp_path/'ds', subject='objects', allow_hosts='127.0.0.1').dataset
        row = ds.df[ds.df.given_label == 'tree'].iloc[0]
        assert (row['query'], row['rank'], row.license, row.creator) == ('tree bark', 1, 'CC0 1.0', 'Tim S.')
        assert row.landing_url == 'https://e.example/1/0'
        credit = pd.read_csv(ds.path/'ATTRIBUTION.csv')
        assert len(credit) == 6 and credit.attribution.str.startswith('"Tree" 1.').all()
        assert set(credit.path) <= set(ds.images.path)


def test_a_second_search_adds_what_is_new_to_the_list(tmp_path):
    with Api(openverse) as server:
        for n in (6, 8): write_list(search('tree', max_results=n, base=server.url(''), pause=0), tmp_path)
        entries = read_list(tmp_path/'tree.csv').entries
        urls = [e['url'] for e in entries]
        assert len(urls) == len(set(urls)) == 8 and entries[0]['attribution'] == '"Tree" 1.0'
        assert {e['source'] for e in entries} == {'openverse'}


# --- pages

def results_page(server):
    "What a page of results looks like once it is loaded: some pictures inline, some to be loaded, icons between."
    inline = ['data:image/jpeg;base64,' + base64.b64encode(jpeg(i)).decode() for i in range(3)]
    icon = 'data:image/gif;base64,R0lGODlhAQABAIAAAP///////yH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=='
    return inline, f'''<!doctype html><meta charset="utf-8"><title>phở, "bò" - Search</title>
<img src="{icon}" alt="icon">
<a href="/imgres?u=1"><div><img src="{inline[0]}" alt="a, &quot;bowl&quot;"></div></a>
<a href="https://shop.example/2"><img src="{inline[1]}"></a>
<a href="https://shop.example/3"><img src="data:image/gif;base64,R0lGODlhAQABAAAAACw="
                                      data-src="{server.url('/images?q=tbn:3&amp;s')}"></a>
<img data-iurl="{server.url('/images?q=tbn:4')}" src="{inline[2]}">
<img srcset="/s.jpg 100w, /l.jpg 800w" src="/s.jpg"><img src="/images?q=tbn:5">
<img src="{inline[0]}"><img src="data:image/svg+xml;utf8,<svg xmlns='http://www.w3.org/2000/svg'></svg>">
<img alt="nothing">'''


def wanted(server, inline):
    paths = ('/images?q=tbn:3&s', '/images?q=tbn:4', '/l.jpg', '/images?q=tbn:5')
    return [inline[0], inline[1], *map(server.url, paths)]


def test_a_saved_page_gives_all_pictures_inline_ones_too_and_they_can_be_ingested(tmp_path):
    with FaultServer() as server:
        inline, text = results_page(server)
        (tmp_path/'phở.html').write_text(text, encoding='utf-8')
        page = read_page(tmp_path/'phở.html', base=server.url('/search?q=x'))
        assert list(page.url) == wanted(server, inline) and list(page['rank']) == [1, 2, 3, 4, 5, 6]
        links = [server.url('/imgres?u=1'), 'https://shop.example/2', 'https://shop.example/3']
        assert list(page.landing_url[:3]) == links and page.title[0] == 'a, "bowl"'
        done = subprocess.run([PROGRAM, 'harvest', tmp_path/'phở.html', tmp_path/'lists', '--base', server.url('/')],
                              capture_output=True, text=True)
        assert done.stdout.startswith('6 images; license: 6 unknown.'), done.stderr
        res = ingest(tmp_path/'lists', tmp_path/'ds', subject='objects', allow_hosts='127.0.0.1')
        assert res.counts['ok'] == 6 and set(res.dataset.df['query']) == {'phở, "bò" - Search'}


def test_pictures_saved_beside_a_page_and_pages_without_an_address(tmp_path):
    local = tmp_path/'p_files'/'a b.jpg'
    local.parent.mkdir()
    local.write_bytes(jpeg(1))
    (tmp_path/'p.html').write_text('<!-- saved from url=(0022)https://e.example/x/y --><img src="./p_files/a%20b.jpg">'
                                   '<img src="z.jpg"><a href="q"><img src="//cdn.example/1.jpg"></a>')
    elsewhere = ['https://e.example/x/z.jpg', 'https://cdn.example/1.jpg']
    assert list(read_page(tmp_path/'p.html').url) == [local.resolve().as_uri(), *elsewhere]
    (tmp_path/'q.html').write_text('<base href="https://b.example/d/"><img src="z.jpg"><img src=')
    assert list(read_page(tmp_path/'q.html').url) == ['https://b.example/d/z.jpg']
    (tmp_path/'r.html').write_bytes(b'\xff\xfe<img src="z.jpg">')
    assert len(read_page(tmp_path/'r.html')) == 0
    with pytest.raises(UsageError): read_page(tmp_path/'none.html')


def test_the_console_snippet_writes_the_same_list_in_a_real_browser(tmp_path):
    with FaultServer() as server, chromium() as browser:
        inline, text = results_page(server)
        server.bodies['/page'] = text.encode()
        async def on_page(request): return web.Response(text=text, content_type='text/html')
        server.on_page = on_page
        page = browser.new_page(accept_downloads=True)
        page.goto(server.url('/page'), wait_until='domcontentloaded')
        with page.expect_download() as download: said = page.evaluate((ROOT/'docs/harvest.js').read_text('utf-8'))
        download.value.save_as(tmp_path/'phở.csv')
        assert said.startswith('6 pictures')
        entries = read_list(tmp_path/'phở.csv').entries
        assert [e['url'] for e in entries] == wanted(server, inline)
        assert {e['query'] for e in entries} == {'phở, "bò" - Search'}
        first = entries[0]
        assert (first['landing_url'], first['title']) == (server.url('/imgres?u=1'), 'a, "bowl"')
        assert first['given_label'] == 'phở'
