"""A real HTTP server on loopback that misbehaves: every path is one fault, every request is counted."""
import asyncio
import contextlib
import gzip
import io
import socket
import struct
import threading
import time
import zlib
from collections import Counter

import numpy as np
from aiohttp import web
from PIL import Image


def jpeg(seed=0, size=(160, 120), **kw):
    "A photograph-like JPEG: soft random colours, different for every seed."
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype='uint8')
    out = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(out, 'JPEG', **({'quality': 90} | kw))
    return out.getvalue()


def bomb(megabytes):
    "A gzip stream of zeros."
    pack = zlib.compressobj(9, wbits=31)
    return b''.join([pack.compress(bytes(1 << 20)) for _ in range(megabytes)]) + pack.flush()


class FaultServer:
    "Use as a context manager; `url(path)` names a picture, `asked` counts requests by path and query."
    def __init__(self, delay=0., robots=None, tdmrep=None):
        self.robots, self.robots_asked = robots, 0  # a text, a status, or a function of the request
        self.tdmrep, self.tdmrep_asked, self.times = tdmrep, 0, []  # the same; when a picture was asked for
        self.asked, self.sent, self.agents = Counter(), Counter(), set()
        self.open_now, self.most_open, self.delay = 0, 0, delay
        self.ready, self.bodies = threading.Event(), {}

    def url(self, path): return f'http://127.0.0.1:{self.port}{path}'

    def __enter__(self):
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.thread.start()
        assert self.ready.wait(10)
        return self

    def __exit__(self, *exc):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(10)

    async def _serve(self):
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_route('*', '/{tail:.*}', self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=.1)
        await runner.setup()
        await web.TCPSite(runner, '127.0.0.1', 0).start()
        self.port = runner.addresses[0][1]
        self.ready.set()
        await self.stop.wait()
        await runner.cleanup()

    async def _answer(self, request):
        raw = request.raw_path
        if raw == '/robots.txt':
            self.robots_asked += 1
            return await self._rules(self.robots, request)
        if raw == '/.well-known/tdmrep.json':
            self.tdmrep_asked += 1
            return await self._rules(self.tdmrep, request)
        self.asked[raw] += 1
        self.times.append(time.monotonic())
        self.agents.add(request.headers.get('User-Agent'))
        self.open_now += 1
        self.most_open = max(self.most_open, self.open_now)
        try:
            if self.delay: await asyncio.sleep(self.delay)
            name = request.path.strip('/').replace('-', '_').partition('/')[0]
            fault = getattr(self, 'on_' + name, None)
            return await fault(request) if fault else self.picture(raw)
        finally: self.open_now -= 1

    async def _rules(self, rules, request):
        rules = rules(request) if callable(rules) else rules
        if hasattr(rules, '__await__'): rules = await rules
        if isinstance(rules, (bytes, str)): return web.Response(body=rules, content_type='text/plain')
        return rules if isinstance(rules, web.StreamResponse) else web.Response(status=rules or 404)

    def picture(self, raw, **kw):
        "A good answer; the picture depends on path and query."
        body = self.bodies.setdefault(raw, None) or jpeg(zlib.crc32(raw.encode()))
        return web.Response(**({'body': body, 'content_type': 'image/jpeg'} | kw))

    def first(self, request, n=1): return self.asked[request.raw_path] <= n

    # one method a fault: /once-503/… is answered by on_once_503

    async def on_status(self, request): return web.Response(status=int(request.path.split('/')[2]))

    def good_after(self, request, fault):
        "A fault for the first request, a picture for the others."
        return fault if self.first(request) else self.picture(request.raw_path)

    async def on_once_503(self, request): return self.good_after(request, web.Response(status=503))
    async def on_once_500(self, request): return self.good_after(request, web.Response(status=500))
    async def on_limited(self, request):
        wait = request.query.get('wait', '2')
        busy = web.Response(status=429, headers={'Retry-After': wait})
        return busy if int(wait) > 99 else self.good_after(request, busy)

    async def on_sick(self, request):
        return web.Response(status=503, headers={'Retry-After': request.query['wait']})

    async def on_never(self, request): await asyncio.sleep(30)

    async def _stream(self, request, chunk, pause=0., **headers):
        answer = web.StreamResponse(headers={'Content-Type': 'image/jpeg'} | headers)
        await answer.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await answer.write(chunk)
                self.sent[request.raw_path] += len(chunk)
                await asyncio.sleep(pause)
        return answer

    async def on_drip(self, request): return await self._stream(request, b'\xff', .2)
    async def on_endless(self, request): return await self._stream(request, bytes(1 << 16))
    async def on_huge(self, request):
        return await self._stream(request, bytes(1 << 16), **{'Content-Length': '52428800'})

    async def _cut(self, request, reset):
        body = jpeg(1)
        answer = web.StreamResponse(headers={'Content-Length': str(len(body))})
        await answer.prepare(request)
        await answer.write(body[:len(body)//2])
        await asyncio.sleep(.02)
        if reset:
            no_linger = struct.pack('ii', 1, 0)
            request.transport.get_extra_info('socket').setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
            request.transport.abort()
        else: request.transport.close()
        return answer

    async def on_reset(self, request): return await self._cut(request, True)
    async def on_short(self, request): return await self._cut(request, False)

    async def on_once_reset(self, request):
        return await self._cut(request, True) if self.first(request) else self.picture(request.raw_path)

    async def on_once_short(self, request):
        return await self._cut(request, False) if self.first(request) else self.picture(request.raw_path)

    async def _raw(self, request, head, body):
        "An answer written by hand; the end of the connection is its end."
        request.transport.write(head.replace('\n', '\r\n').encode() + b'\r\n\r\n' + body)
        request.transport.close()
        await asyncio.sleep(.01)
        return web.Response()

    async def on_no_length(self, request):  # HTTP/1.0 manner: the body ends with the connection, here half-way
        body = jpeg(2, progressive=request.query_string == 'progressive')[:1500]
        return await self._raw(request, 'HTTP/1.0 200 OK\nContent-Type: image/jpeg', body)

    def _moved(self, target, status=302): return web.Response(status=status, headers={'Location': target})

    async def on_hops(self, request):
        left = int(request.path.split('/')[2])
        return self._moved(f'/hops/{left - 1}') if left else self.picture(request.raw_path)

    async def on_slow_hops(self, request):
        await asyncio.sleep(.5)
        return self._moved(f'/slow-hops/{int(request.path.split("/")[2]) - 1}')

    async def on_loop(self, request): return self._moved('/loop?b' if request.query_string == 'a' else '/loop?a', 301)
    async def on_to(self, request): return self._moved(request.raw_path.partition('?')[2], 307)

    def _packed(self, request, encoding, body):
        return self.picture(request.raw_path, body=body, headers={'Content-Encoding': encoding})

    async def on_gzip(self, request): return self._packed(request, 'gzip', gzip.compress(jpeg(3)))
    async def on_deflate(self, request): return self._packed(request, 'deflate', zlib.compress(jpeg(4)))
    async def on_not_gzip(self, request): return self._packed(request, 'gzip', jpeg(5))
    async def on_bomb(self, request): return self._packed(request, 'gzip', bomb(100))
    async def on_text_type(self, request): return self.picture(request.raw_path, content_type='text/html')

    async def on_no_type(self, request):
        body = jpeg(8)
        return await self._raw(request, f'HTTP/1.1 200 OK\nConnection: close\nContent-Length: {len(body)}', body)

    async def on_html(self, request): return self.picture(request.raw_path, body=b'<!DOCTYPE html><title>no</title>')
    async def on_svg(self, request):
        body = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
        return self.picture(request.raw_path, body=body, content_type='image/svg+xml')

    async def on_text(self, request): return self.picture(request.raw_path, body=b'not found')
    async def on_empty(self, request): return self.picture(request.raw_path, body=b'')

    async def on_robots_tag(self, request):
        tag = request.query_string.replace('+', ' ')
        return await self._stream(request, bytes(1 << 16), .01, **{'X-Robots-Tag': tag})

    async def on_reserved(self, request):  # and never a body
        return await self._stream(request, b'', 30, **{'X-Robots-Tag': 'noai', 'Content-Length': '9999'})

    async def on_tdm(self, request): return self.picture(request.raw_path, headers={'tdm-reservation': '1'})
    async def on_agent(self, request):
        known = 'Browser' in request.headers['User-Agent']
        return self.picture(request.raw_path) if known else web.Response(status=403)

    async def on_gone_picture(self, request): return self.picture(request.raw_path, body=jpeg(6))

    async def on_usage(self, request):
        return self.picture(request.raw_path, headers={'Content-Usage': 'train-ai=n; exp, search=y'})

    async def on_blank(self, request):
        out = io.BytesIO()
        Image.new('RGB', (99, 99), 'white').save(out, 'JPEG')
        return self.picture(request.raw_path, body=out.getvalue())


def closed_port():
    "A port of this machine on which nobody listens."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def write_lists(folder, **lists):
    "<class>.csv files."
    folder.mkdir(parents=True, exist_ok=True)
    for name, urls in lists.items(): (folder/f'{name}.csv').write_text('\n'.join(urls), encoding='utf-8')
    return folder
