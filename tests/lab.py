"""A real JupyterLab for tests: its own folders, options through a config file, gone when the test process is gone."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
# A killed test would leave its server behind: the server ends when its standard input does.
SERVER = ('import os, sys, threading\n'
          'threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()\n'
          'from jupyterlab.labapp import main\nmain()')
# JupyterLab: outputs off screen stay in the page, nothing is asked of the network, nothing is saved behind our back
SETTINGS = {
    'notebook-extension/tracker': {'windowingMode': 'none'},
    'apputils-extension/notification': {'checkForUpdates': False, 'fetchNews': 'false', 'doNotDisturbMode': True},
    'docmanager-extension/plugin': {'autosave': False},
}


def need_browser():
    "Where continuous integration lacks a browser, that is a failure; elsewhere the test is skipped."
    if CHROMIUM is None:
        if os.environ.get('CI'): pytest.fail('no chromium: .ci/run installs it')
        pytest.skip('no chromium is installed')


@contextmanager
def chromium():
    "Debian's browser, driven by path."
    need_browser()
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage']
        )
        yield browser
        browser.close()


@contextmanager
def jupyterlab(folder: Path):
    "A server on loopback with `folder/work` as its root: its address."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    dirs = {
        v: folder / v.lower()
        for v in (
            'JUPYTER_CONFIG_DIR',
            'JUPYTER_DATA_DIR',
            'JUPYTER_RUNTIME_DIR',
            'IPYTHONDIR',
            'JUPYTERLAB_SETTINGS_DIR',
            'JUPYTERLAB_WORKSPACES_DIR',
        )
    }
    for d in [*dirs.values(), folder/'work']: d.mkdir(parents=True, exist_ok=True)
    config = dict(
        ServerApp=dict(
            ip='127.0.0.1',
            port=port,
            port_retries=0,
            open_browser=False,
            root_dir=str(folder / 'work'),
            allow_root=True,
        ),
        IdentityProvider=dict(token=''),
        LabApp=dict(expose_app_in_browser=True, extension_manager='readonly', news_url=None),
    )
    (dirs['JUPYTER_CONFIG_DIR']/'jupyter_lab_config.json').write_text(json.dumps(config))
    for name, value in SETTINGS.items():
        file = dirs['JUPYTERLAB_SETTINGS_DIR']/f'@jupyterlab/{name}.jupyterlab-settings'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    env = os.environ | {k: str(v) for k, v in dirs.items()} | {'OMP_NUM_THREADS': '1'}
    with open(folder/'server.log', 'wb') as log:
        server = subprocess.Popen(
            [sys.executable, '-c', SERVER], env=env, stdin=subprocess.PIPE, stdout=log, stderr=log
        )
        try:
            for _ in range(600):
                try: urllib.request.urlopen(f'http://127.0.0.1:{port}/api/status', timeout=5).read()
                except OSError: time.sleep(.1)
                else: break
                if server.poll() is not None: break
            else: raise TimeoutError((folder/'server.log').read_text())
            assert server.poll() is None, (folder/'server.log').read_text()
            yield f'http://127.0.0.1:{port}'
        finally:
            server.terminate()
            server.wait(20)


class Notebook:
    "A notebook open in a browser tab."
    def __init__(self, browser, url: str, root: Path, cells: list[str], name: str='n.ipynb', **options):
        nbformat.write(
            nbformat.v4.new_notebook(
                cells=[nbformat.v4.new_code_cell(c) for c in cells],
                metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')),
            ),
            root / 'work' / name,
        )
        self.tab = browser.new_context(**options).new_page()
        self.said, self.outside = [], []
        self.tab.on('pageerror', lambda e: self.said.append(str(e)))
        self.tab.route(
            '**/*',
            lambda r: (
                r.continue_()
                if r.request.url.startswith((url, 'data:', 'blob:'))
                else (self.outside.append(r.request.url), r.abort())
            ),
        )
        self.tab.goto(f'{url}/lab/tree/{name}?reset', wait_until='load')
        self.tab.wait_for_function("""() => { const p = window.jupyterapp?.shell.currentWidget?.context?.sessionContext;
            return p?.isReady && p.session?.kernel?.status === 'idle'; }""", timeout=60_000)
        self.run_all()

    def command(self, name: str, **args):
        "Await a command of JupyterLab; its promise is the end of it."
        return self.tab.evaluate(
            '([name, args]) => window.jupyterapp.commands.execute(name, args).then(() => null)', [name, args]
        )

    def run_all(self): self.command('notebook:run-all-cells')

    def ask(self, code: str) -> str:
        "What the kernel prints for some code."
        return self.tab.evaluate("""async code => {
            const k = window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel;
            const f = k.requestExecute({code, store_history: false}); let out = '';
            f.onIOPub = m => { const c = m.content; out += c.text ?? (c.evalue ? c.ename + ': ' + c.evalue : ''); };
            await f.done; return out; }""", code).strip()

    def wait_for_kernel(self):
        "Until the kernel, or the one that was started in its place, is idle."
        self.tab.wait_for_function(
            """() => { const s = window.jupyterapp.shell.currentWidget.context.sessionContext.session;
            return s?.kernel?.status === 'idle' && s.kernel.connectionStatus === 'connected'; }""",
            timeout=60_000,
        )
