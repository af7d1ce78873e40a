"""Lists as people make them: whatever the ends of lines, quotes or letters, every URL stays and each line counts."""
import csv
import io
from itertools import pairwise

import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vegc.acquire.lists import plan, read_list
from vegc.core import DatasetError

# what a URL may hold in a list of one a line: anything but ends of lines, and white space or a BOM at its ends
inside = st.text(st.characters(exclude_characters='\r\n', exclude_categories=('Cs',)), max_size=40)


def without_margins(url): return url.strip().strip('\ufeff').strip()


address = st.one_of(st.builds('https://x.example/images?q=tbn:{}'.format, inside),
                    st.builds('"https://x.example/{},{}"'.format, inside, inside),
                    st.builds('data:image/png;base64,{}'.format, inside),
                    inside).map(without_margins).filter(lambda u: u and u == without_margins(u))
blank = st.sampled_from(['', ' ', '\t', '\u00a0', '  \t '])
line = st.one_of(address, address, blank)
end = st.sampled_from(['\n', '\r\n', '\r'])


def is_header(text):
    first = next((ln for ln in io.StringIO(text.lstrip('\ufeff'), newline=None).read().split('\n') if ln.strip()), '')
    return 'url' in [c.strip().lower() for c in next(csv.reader([first[:9000]]), [])]


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(line, max_size=12), ends=st.lists(end, min_size=12, max_size=12), bom=st.booleans(),
       last=st.booleans(), huge=st.booleans(), pad=st.sampled_from(['', ' ', '\t']))
def test_any_plain_list_keeps_its_urls_and_its_counts(tmp_path_factory, lines, ends, bom, last, huge, pad):
    if huge: lines = [*lines, 'data:image/png;base64,' + 'QUJD'*300_000]  # more than a megabyte on one line
    parts = [pad + ln + (e if i < len(lines) - 1 or last else '')
             for i, (ln, e) in enumerate(zip(lines, ends*2, strict=False))]
    # an end of \r and an empty line that ends in \n are one end of \r\n
    assume(not any(a.endswith('\r') and b.startswith('\n') for a, b in pairwise(parts)))
    text = ''.join(parts)
    if is_header(text): return
    file = tmp_path_factory.getbasetemp()/'any.csv'
    file.write_bytes(b'\xef\xbb\xbf'*bom + text.encode())
    got, urls = read_list(file), [ln for ln in lines if ln.strip()]
    assert [e['url'] for e in got.entries] == urls
    assert got.lines == got.blank + len(urls)
    # a last line without a newline is a line; nothing after the last newline is none
    ended = [pad + ln for ln in lines]
    assert got.lines == len(lines) - bool(lines and not last and not ended[-1])


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(st.tuples(address, st.sampled_from(['hrê', 'a,b', 'say "x"', 'c']),
                               st.one_of(st.none(), st.text('ab,"\' ', max_size=5))), max_size=8),
       ends=end.filter(lambda e: e != '\r'), bom=st.booleans(), lead=st.integers(0, 3), huge=st.booleans(),
       empty=st.integers(0, 3))
def test_any_csv_keeps_its_urls_labels_and_quotes(tmp_path_factory, rows, ends, bom, lead, huge, empty):
    if huge: rows = [*rows, ('data:image/png;base64,' + 'QUJD'*300_000, 'c', None)]
    out = io.StringIO(newline='')
    writer = csv.writer(out, lineterminator=ends)
    writer.writerow(['label', 'URL', 'creator'])
    writer.writerows([('c', '', 'who?')]*empty + [(label, url, creator or '') for url, label, creator in rows])
    file = tmp_path_factory.getbasetemp()/'table.csv'
    file.write_bytes(b'\xef\xbb\xbf'*bom + (ends*lead + out.getvalue()).encode())
    got = read_list(file)
    assert [(e['url'], e['given_label']) for e in got.entries] == [(u, label) for u, label, _ in rows]
    assert [e.get('creator', '') for e in got.entries] == [(c or '').strip() for *_, c in rows]
    assert (got.lines, got.blank) == (len(rows) + empty, empty)


def test_the_real_shape_runs_of_blanks_and_a_cap_that_does_not_count_them(tmp_path):
    for name, n in (('bana', 150), ('hrê', 90)):
        urls = [f'https://encrypted-tbn0.gstatic.com/images?q=tbn:ANd9Gc{name}{i}&usqp=CAU' for i in range(n)]
        (tmp_path/f'{name}.csv').write_text('\r\n'.join([*urls[:80], *['']*20, *urls[80:]]), encoding='utf-8')
    p = plan(tmp_path, max_per_class=100)
    d = p.to_dict()
    assert (d['lines'], d['blank'], d['urls'], d['selected']) == (280, 40, 240, 190)
    assert p.rows.groupby('given_label').size().to_dict() == {'bana': 100, 'hrê': 90}


def test_what_each_policy_keeps_and_who_shares_with_whom(tmp_path):
    for name, urls in dict(a='xyzw', b='xy', c='x', d='x').items():
        (tmp_path/f'{name}.csv').write_text('\n'.join(f'https://e.example/{u}' for u in urls))
    p = plan(tmp_path)
    assert p.conflicts.values.tolist() == [['a', 'b', 2], ['a', 'c', 1], ['a', 'd', 1],
                                           ['b', 'c', 1], ['b', 'd', 1], ['c', 'd', 1]]
    assert p.policies.values.tolist() == [['review', 2, 6, 0, 3], ['drop', 2, 0, 6, 3],
                                          ['first', 4, 0, 4, 3], ['all', 8, 0, 0, 0]]
    d = p.to_dict()
    assert d['accuracy_ceiling'] == .5 and d['pairs'][0] == dict(class_a='a', class_b='b', urls=2)
    assert [r['policy'] for r in d['policies']] == ['review', 'drop', 'first', 'all']
    assert '50.0%' in str(p) and 'review' in str(p)


def test_a_line_that_is_no_address_is_shared_by_nobody(tmp_path):
    for name in 'abc':
        lines = [*['not a url', 'www.x.example/1.jpg', 'https://']*4, *(f'https://x.example/{name}{i}' for i in 'xy')]
        (tmp_path/f'{name}.csv').write_text('\n'.join(lines))
    d = plan(tmp_path).to_dict()
    assert (d['urls'], d['no_address'], d['shared_across'], d['accuracy_ceiling']) == (42, 36, 0, 1)
    assert d['pairs'] == [] and [c['shared'] for c in d['classes']] == [0, 0, 0]
    assert {r['in_use'] for r in d['policies']} == {6}


def test_a_given_split_goes_along_and_a_file_that_is_no_text_is_named(tmp_path):
    rows = ['url,label,split', 'https://e.example/1,a,Val', 'https://e.example/2,b,test', 'https://e.example/3,b,']
    (tmp_path/'t.csv').write_text('\n'.join(rows) + '\n')
    split = plan(tmp_path/'t.csv').rows.source_split
    assert split.tolist()[:2] == ['valid', 'test'] and pd.isna(split[2])
    (tmp_path/'bad.csv').write_bytes(b'https://e.example/1\n\xff\xfe\n')
    with pytest.raises(DatasetError, match='line 2'): plan(tmp_path/'bad.csv')
