"""Kill an ingest of photographs again and again: is anything lost, is anything asked for twice?

    python nbs/bench/ingest_kills.py --photos DIR [--n 1500] [--kills 20] [--seed 0]

A server on this machine counts requests by picture. The ingest runs at concurrency 4 and is killed (SIGKILL) at a
random moment, then the same command goes on. Whoever was being asked for when the process died is asked for
again: four for each kill at most."""
import argparse
import asyncio
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path


class Server(threading.Thread):
    "Hands out files by number after a short pause and counts."
    def __init__(self, bodies):
        super().__init__(daemon=True)
        self.bodies, self.asked, self.port = bodies, Counter(), None
        self.start()
        while self.port is None: time.sleep(.01)

    def run(self): asyncio.run(self.serve())

    async def serve(self):
        server = await asyncio.start_server(self.answer, '127.0.0.1', 0)
        self.port = server.sockets[0].getsockname()[1]
        await server.serve_forever()

    async def answer(self, reader, writer):
        while True:
            try: head = await reader.readuntil(b'\r\n\r\n')
            except (asyncio.IncompleteReadError, ConnectionError): return writer.close()  # whoever asked is dead
            path = head.split(b' ', 2)[1].decode()
            body = self.bodies.get(path)
            if body: self.asked[path] += 1
            await asyncio.sleep(.005)
            writer.write(
                b'HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n'
                % (b'200 OK' if body else b'404 Not Found', len(body or b''))
                + (body or b'')
            )


def kills(photos, n=1500, kills=20, seed=0):
    "A dict of what came of it."
    from vegc.data.dataset import ImageDataset
    from vegc.data.images import load_rgb

    files, rng = (
        sorted(p for p in Path(photos).glob('*/*') if p.suffix.lower() in ('.jpg', '.jpeg')),
        random.Random(seed),
    )
    files = rng.sample(files, min(n, len(files)))
    server, work, again = Server({f'/{i}': p.read_bytes() for i, p in enumerate(files)}), Path(tempfile.mkdtemp()), []
    (work/'lists').mkdir()
    for c in sorted({p.parent.name for p in files}):
        (work / 'lists' / f'{c}.csv').write_text(
            ''.join(f'http://127.0.0.1:{server.port}/{i}\n' for i, p in enumerate(files) if p.parent.name == c)
        )
    command = [
        Path(sys.executable).with_name('vegc'),
        'ingest',
        work / 'lists',
        work / 'ds',
        '--subject',
        'objects',
        '--allow-hosts',
        '127.0.0.1',
        '--concurrency',
        '4',
        '--on-conflict',
        'all',
    ]
    for k in range(kills):
        before, until = (
            sum(server.asked.values()),
            sum(server.asked.values()) + rng.randrange(1, 2 * (len(files) - len(server.asked)) // (kills - k + 1) + 2),
        )
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while sum(server.asked.values()) < until and process.poll() is None: time.sleep(.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        again.append(sum(v - 1 for v in server.asked.values()))
        print(
            f'kill {k + 1}: {sum(server.asked.values()) - before} asked for in this run, {again[-1]} twice so far',
            flush=True,
        )
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    ds = ImageDataset(work/'ds')
    for p in ds.images.path: load_rgb(ds.path/p)
    twice = [b - a for a, b in zip([0, *again], [*again, sum(v - 1 for v in server.asked.values())], strict=True)]
    return dict(
        pictures=len(files),
        asked=len(server.asked),
        ok=int((ds.df.status == 'ok').sum()),
        kills=kills,
        asked_twice=sum(twice),
        most_after_one_kill=max(twice),
    )


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--photos', required=True)
    for name, default in dict(n=1500, kills=20, seed=0).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    print(kills(**vars(parser.parse_args())))
