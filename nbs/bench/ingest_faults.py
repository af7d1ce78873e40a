"""What three tools make of the same faults: fastai's download_images + verify_images, img2dataset and vegc, on one
server that really behaves so.

    python nbs/bench/ingest_faults.py [--img2dataset PATH] [--out faults.json]

The server is the one of the tests. A tool has a minute for each fault, its start included; "saved" is a file that
was left as a picture."""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]/'tests'))
from fault_server import FaultServer, write_lists

SECONDS = 60  # of which starting takes some
FAULTS = {
    'query-only address': '/images?q=tbn:ANd9',
    '404': '/status/404',
    '500 once': '/once-500/a',
    '503 for ever': '/status/503',
    '429, Retry-After: 2': '/limited?wait=2',
    'never answers': '/never',
    'a byte now and then': '/drip',
    'reset in the body': '/reset',
    'shorter than announced': '/short',
    'five redirects': '/hops/5',
    'a loop of redirects': '/loop?a',
    'redirect to this machine': '/to?http://localhost:PORT/secret',
    'redirect to file:': '/to?file:///etc/passwd',
    'a body without end': '/endless',
    'gzip': '/gzip',
    'gzip bomb, 100 MB': '/bomb',
    'wrong content type': '/text-type',
    'a page of HTML': '/html',
    'empty': '/empty',
    'X-Robots-Tag: noimageai': '/robots-tag?noimageai',
    'tdm-reservation: 1': '/tdm',
    'cut short, no length': '/no-length',
    'a Unicode name': '/bún chả.php',
}
FASTAI = '''
import sys, signal, warnings; warnings.filterwarnings('ignore')
from pathlib import Path
from fastai.vision.utils import download_images, verify_images
out = Path(sys.argv[1])
out.mkdir()
download_images(out, urls=[sys.argv[2]], n_workers=0)
for bad in verify_images(list(out.iterdir())): bad.unlink()
'''


def by_fastai(url, work):
    return _run([sys.executable, '-c', FASTAI, work / 'f', url]) or (
        'saved' if any((work / 'f').glob('*')) else 'nothing, no reason'
    )


def by_img2dataset(url, work, program):
    (work/'u.txt').write_text(url + '\n', 'utf-8')
    said = _run(
        [
            program,
            '--url_list',
            work / 'u.txt',
            '--output_folder',
            work / 'i',
            '--processes_count',
            '1',
            '--thread_count',
            '1',
            '--image_size',
            '500',
            '--resize_mode',
            'keep_ratio_largest',
            '--resize_only_if_bigger',
            'True',
        ]
    )
    if said: return said
    if any((work/'i').rglob('*.jpg')): return 'saved'
    stats = list((work/'i').glob('*_stats.json'))
    reasons = json.loads(stats[0].read_text())['status_dict'] if stats else {}
    return next((k for k in reasons), 'nothing, no reason')[:60]


def by_vegc(urls, work):
    lists = write_lists(work/'lists', a=urls)
    vegc = Path(sys.executable).with_name('vegc')
    subprocess.run(
        [
            vegc,
            'ingest',
            lists,
            work / 'ds',
            '--subject',
            'objects',
            '--allow-hosts',
            '127.0.0.1',
            '--max-failures',
            '1',
            '--deadline',
            '5',
        ],
        capture_output=True,
        check=True,
    )
    from vegc.data.dataset import ImageDataset

    return [
        m.split(':')[0] if isinstance(m, str) else 'saved'
        for m in ImageDataset(work / 'ds').df.error_message.astype(object)
    ]


def _run(command):
    "None, or 'still running' when it had to be stopped with all its children."
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {'NO_ALBUMENTATIONS_UPDATE': '1'},
    )
    try: process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return f'still at it after {SECONDS} s'


def compare(img2dataset=None):
    "A line a fault: what each tool made of it."
    work, res = Path(tempfile.mkdtemp()), []
    try:
        with FaultServer() as server:
            urls = [server.url(p.replace('PORT', str(server.port))) for p in FAULTS.values()]
            ours = by_vegc(urls, work)
        for (fault, path), own in zip(FAULTS.items(), ours, strict=True):
            line = dict(fault=fault)
            for tool, ask in (('fastai', by_fastai), ('img2dataset', lambda u, w: by_img2dataset(u, w, img2dataset))):
                if tool == 'img2dataset' and not img2dataset: continue
                folder = Path(tempfile.mkdtemp(dir=work))
                with FaultServer() as server:
                    line[tool] = ask(server.url(path.replace('PORT', str(server.port))), folder)
            res.append(line | dict(vegc=own))
            print(json.dumps(res[-1]), flush=True)
    finally: shutil.rmtree(work)
    return res


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kw in {'img2dataset': {}, 'out': dict(default='faults.json')}.items():
        parser.add_argument(f'--{name}', **kw)
    args = parser.parse_args()
    Path(args.out).write_text(json.dumps(compare(args.img2dataset), indent=1))
