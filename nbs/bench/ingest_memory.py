"""How much memory does a long list of small pictures take, above a short one and above its table?

    python nbs/bench/ingest_memory.py [--n 100000]

A server on this machine draws a different PNG of 28×28 for each number. The peak is the process's own (VmHWM,
Linux)."""
import argparse
import asyncio
import io
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

CLIENT = '''
import sys
from pathlib import Path
from vegc.ingest import ingest
res = ingest(sys.argv[1], sys.argv[2], subject='objects', allow_hosts='127.0.0.1', per_host=32)
peak = int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])/1024
print(peak, res.dataset.df.memory_usage(deep=True).sum()/2**20, res.counts['images'])
'''


async def answer(reader, writer):
    while True:
        try: number = (await reader.readuntil(b'\r\n\r\n')).split(b' ', 2)[1][1:]
        except (asyncio.IncompleteReadError, ConnectionError): return writer.close()
        body = io.BytesIO()
        if number.isdigit():
            Image.fromarray(np.random.default_rng(int(number)).integers(0, 255, (28, 28), dtype='uint8')).save(
                body, 'PNG', compress_level=1
            )
        writer.write(
            b'HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n'
            % (b'200 OK' if number.isdigit() else b'404 Not Found', len(body.getvalue()))
            + body.getvalue()
        )


def serve(ports):
    async def main():
        server = await asyncio.start_server(answer, '127.0.0.1', 0)
        ports.append(server.sockets[0].getsockname()[1])
        await server.serve_forever()
    asyncio.run(main())


def peak(n, port):  # MB, MB of the table, pictures
    with tempfile.TemporaryDirectory() as work:
        (Path(work)/'lists').mkdir()
        (Path(work)/'lists'/'a.csv').write_text(''.join(f'http://127.0.0.1:{port}/{i}\n' for i in range(n)))
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', CLIENT, Path(work) / 'lists', Path(work) / 'ds'],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return [float(v) for v in done.stdout.split()[-3:]]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--n', type=int, default=100_000)
    a, ports = parser.parse_args(), []
    threading.Thread(target=serve, args=(ports,), daemon=True).start()
    while not ports: time.sleep(.01)
    (small, table, _), (large, larger, pictures) = peak(1000, ports[0]), peak(a.n, ports[0])
    above = large - small - (larger - table)
    print(f'1,000 pictures: peak {small:.0f} MB; {pictures:,.0f}: {large:.0f} MB, of which the table {larger:.0f}. '
          f'Above both: {above:.0f} MB.')
