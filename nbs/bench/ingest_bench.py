"""What getting pictures costs: fastai's three calls, img2dataset and vegc on one server on this machine, in paired
rounds.

    python nbs/bench/ingest_bench.py --photos DIR [--img2dataset PATH] [--rounds 3] [--latencies 0 50] \
        [--out ingest.json]

Rounds are added to those that --out holds already; `--show` prints their medians as a table and measures nothing.
DIR holds a folder of JPEGs a class; any photographs will do. The figures in the docs are on the public "clothing
dataset small" (CC0, 400×533). img2dataset needs an environment of its own: python -m venv E && E/bin/pip install
img2dataset==1.47.0. CPU seconds are the operating system's, of the whole process with its children and the
import; memory is the largest sum over its processes. The server is nginx where it is installed, else, and
wherever answers must come late, a small one in Python that hands out what lies in memory."""
import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from PIL import Image

FASTAI = '''
import sys, warnings; warnings.filterwarnings('ignore')
from pathlib import Path
from fastai.vision.utils import download_images, resize_images, verify_images
from fastai.data.transforms import get_image_files
lists, out = map(Path, sys.argv[1:])
for f in sorted(lists.glob('*.csv')):
    (out/f.stem).mkdir(parents=True)
    download_images(out/f.stem, url_file=f, max_pics=10**6)
    verify_images(get_image_files(out/f.stem)).map(Path.unlink)
    resize_images(out/f.stem, max_size=500, dest=out/f.stem)
'''


class _Serve(asyncio.Protocol):
    "Just enough HTTP to hand out what lies in memory, later if asked to."
    files, latency = {}, 0.

    def connection_made(self, transport): self.transport, self.rest = transport, b''

    def data_received(self, data):
        *asks, self.rest = (self.rest + data).split(b'\r\n\r\n')
        for ask in asks:
            body = self.files.get(ask.split(b' ', 2)[1].decode())
            head = (
                b'HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n' % len(body)
                if body
                else b'HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n'
            )
            send = (self.transport.write, head + (body or b''))
            asyncio.get_running_loop().call_later(self.latency, *send) if self.latency else send[0](send[1])


async def _serve(folder, latency):
    _Serve.files = {f'/{p.name}': p.read_bytes() for p in Path(folder).iterdir()}
    _Serve.latency = latency/1000
    server = await asyncio.get_running_loop().create_server(_Serve, '127.0.0.1', 0, backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


NGINX = """daemon off; {user} pid {work}/nginx.pid; error_log {work}/nginx.log; events {{ worker_connections 4096; }}
http {{ access_log off; sendfile on; keepalive_requests 1000000; default_type image/jpeg;
client_body_temp_path {work}; proxy_temp_path {work}; fastcgi_temp_path {work}; uwsgi_temp_path {work};
scgi_temp_path {work}; server {{ listen 127.0.0.1:{port} backlog=1024; root {folder}; }} }}
"""


@contextlib.contextmanager
def server(folder, latency, work):
    "A server for the files of a folder: its name and port."
    nginx = shutil.which('nginx') or shutil.which('/usr/sbin/nginx')
    if nginx and not latency:
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        (work / 'nginx.conf').write_text(
            NGINX.format(user='user root;' if os.geteuid() == 0 else '', work=work, folder=folder, port=port)
        )
        process = subprocess.Popen([nginx, '-c', work/'nginx.conf'])
        time.sleep(.5)
    else:
        process = subprocess.Popen(
            [sys.executable, __file__, '--serve', folder, '--latency', str(latency)], stdout=subprocess.PIPE, text=True
        )
        port = int(process.stdout.readline())
    try: yield 'nginx' if nginx and not latency else 'Python', port
    finally:
        process.terminate()
        process.wait()


def make_sets(photos, work):
    """Two folders of files: photographs as they are, and a thousand that fit 500 pixels already. Gives class names by
    set."""
    files = sorted(p for p in Path(photos).glob('*/*') if p.suffix.lower() in ('.jpg', '.jpeg'))
    for kind in ('shrink', 'fit'): (work/kind).mkdir()
    for i, p in enumerate(files):
        shutil.copy(p, work/'shrink'/f'{i}.jpg')
        if i >= 1000: continue
        im = Image.open(p).convert('RGB')
        im.thumbnail((500, 500))
        im.save(work/'fit'/f'{i}.jpg', quality=90)
    return dict(fit=[p.parent.name for p in files[:1000]], shrink=[p.parent.name for p in files])


def write_lists(folder, labels, port):
    folder.mkdir()
    for name in sorted(set(labels)):
        (folder / f'{name}.csv').write_text(
            ''.join(f'http://127.0.0.1:{port}/{i}.jpg\n' for i, c in enumerate(labels) if c == name)
        )
    (folder/'all.txt').write_text(''.join(f'http://127.0.0.1:{port}/{i}.jpg\n' for i in range(len(labels))))


def commands(lists, out, img2dataset):
    "Each tool's command, and where its pictures are."
    vegc = Path(sys.executable).with_name('vegc')
    res = {
        'fastai': ([sys.executable, '-c', FASTAI, lists, out / 'fastai'], out / 'fastai'),
        'vegc': (
            [
                vegc,
                'ingest',
                lists,
                out / 'vegc',
                '--subject',
                'objects',
                '--allow-hosts',
                '127.0.0.1',
                '--per-host',
                '64',
                '--json',
            ],
            out / 'vegc' / 'images',
        ),
    }
    if img2dataset:
        res['img2dataset'] = (
            [
                img2dataset,
                '--url_list',
                lists / 'all.txt',
                '--output_folder',
                out / 'img2dataset',
                '--processes_count',
                '2',
                '--thread_count',
                '32',
                '--image_size',
                '500',
                '--resize_mode',
                'keep_ratio_largest',
                '--resize_only_if_bigger',
                'True',
            ],
            out / 'img2dataset',
        )
    return res


def measure(command):
    "Wall and CPU seconds of a command with its children, and the largest sum of their memory in MB."
    if hasattr(os, 'sync'): os.sync()  # what the last one left to be written is not this one's business
    t, most = time.monotonic(), 0
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {'NO_ALBUMENTATIONS_UPDATE': '1'},
    )
    me = psutil.Process(process.pid)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid: break
        try: most = max(most, sum(p.memory_info().rss for p in [me, *me.children(recursive=True)]))
        except psutil.Error: continue
        time.sleep(.1)
    process.returncode = os.waitstatus_to_exitcode(status)
    return dict(
        wall=time.monotonic() - t, cpu=usage.ru_utime + usage.ru_stime, memory=most / 2**20, exit=process.returncode
    )


def bench(photos, img2dataset=None, rounds=3, latencies=(0, 50), first=0):
    """A line a run: set, latency, round (from `first`), tool, wall, cpu, memory, saved.

    What the tools wrote stays until the end: for minutes after a deletion ext4 steps around the deleted files' numbers
    one by one, and the tool that runs next would be charged for that.
    """
    work, res = Path(tempfile.mkdtemp()), []
    try:
        sets = make_sets(photos, work)
        for n in range(first, first + rounds):
            for latency in latencies:
                for kind, labels in sets.items():
                    out = work/f'{n}-{latency}-{kind}'
                    out.mkdir()
                    with server(work/kind, latency, work) as (name, port):
                        write_lists(out/'lists', labels, port)
                        for tool, (command, where) in commands(out/'lists', out, img2dataset).items():
                            found = measure(command)
                            res.append(
                                dict(
                                    set=kind,
                                    latency=latency,
                                    round=n,
                                    tool=tool,
                                    server=name,
                                    asked=len(labels),
                                    saved=sum(1 for p in where.rglob('*') if p.suffix in ('.jpg', '.png')),
                                )
                                | found
                            )
                            print(json.dumps(res[-1]), file=sys.stderr, flush=True)
    finally: shutil.rmtree(work)
    return res


def machine():
    "What it was measured on."
    names = (
        [
            line.partition(':')[2].strip()
            for line in Path('/proc/cpuinfo').read_text().splitlines()
            if line.startswith('model name')
        ]
        if Path('/proc/cpuinfo').exists()
        else []
    )
    return dict(
        processors=os.cpu_count(),
        processor=names[0] if names else platform.processor(),
        python=platform.python_version(),
    ) | {p: importlib.metadata.version(p) for p in ('vegc', 'fastai', 'aiohttp', 'Pillow')}


def medians(rows):
    "Medians over rounds, and their ratio to each peer's, by set and latency."
    keys = dict.fromkeys((r['set'], r['latency']) for r in rows)
    res = []
    for kind, latency in keys:
        some = [r for r in rows if (r['set'], r['latency']) == (kind, latency)]
        of = lambda tool, what: statistics.median(r[what] for r in some if r['tool'] == tool)  # noqa: B023
        for tool in dict.fromkeys(r['tool'] for r in some):
            line = dict(
                set=kind,
                latency_ms=latency,
                tool=tool,
                rounds=sum(r['tool'] == tool for r in some),
                saved=int(of(tool, 'saved')),
                cpu_s=round(of(tool, 'cpu'), 1),
                wall_s=round(of(tool, 'wall'), 1),
                memory_mb=round(of(tool, 'memory')),
            )
            for what in ('cpu', 'wall', 'memory'): line[f'vegc/{what}'] = round(of('vegc', what)/of(tool, what), 2)
            res.append(line)
    return res


def as_markdown(lines):
    "Dicts as a table of Markdown."
    cells = [list(lines[0]), *([str(v) for v in line.values()] for line in lines)]
    return '\n'.join('| ' + ' | '.join(c) + ' |' for c in [cells[0], ['---']*len(cells[0]), *cells[1:]])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kw in {
        'photos': {},
        'img2dataset': {},
        'rounds': dict(type=int, default=3),
        'latencies': dict(type=int, nargs='+', default=[0, 50]),
        'out': dict(default='ingest.json'),
        'serve': {},
        'latency': dict(type=float, default=0.0),
    }.items():
        parser.add_argument(f'--{name}', **kw)
    parser.add_argument('--show', action='store_true')
    args = parser.parse_args()
    if args.serve: asyncio.run(_serve(args.serve, args.latency))
    else:
        old = json.loads(Path(args.out).read_text()) if Path(args.out).exists() else dict(machine=machine(), rows=[])
        if not args.show:
            old['rows'] += bench(
                args.photos,
                args.img2dataset,
                args.rounds,
                args.latencies,
                1 + max((r['round'] for r in old['rows']), default=-1),
            )
            Path(args.out).write_text(json.dumps(old, indent=1) + '\n')
        print(as_markdown(medians(old['rows'])))
