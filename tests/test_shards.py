"""Past one machine: the same manifest from a cluster of two nodes.

Host limits are kept without a word between shards, a killed worker loses nothing."""
import os
import signal
import threading
import time

import psutil
import pytest
from fault_server import FaultServer, write_lists

from vegc.core import UsageError
from vegc.data.dataset import ImageDataset
from vegc.data.images import load_rgb
from vegc.acquire.ingest import ingest
from vegc.acquire.shards import ingest_on_ray

KW = dict(subject='objects', allow_hosts='127.0.0.1', per_host=3, concurrency=4, deadline=5)


@pytest.fixture(scope='module')
def cluster():
    "Two nodes of one processor each, on this machine."
    ray = pytest.importorskip('ray') if not os.environ.get('CI') else __import__('ray')
    from ray.cluster_utils import Cluster

    nodes = Cluster(
        initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False, object_store_memory=10**8)
    )
    nodes.add_node(num_cpus=1, object_store_memory=10**8)
    ray.init(address=nodes.address, log_to_driver=False, logging_level='error')
    try: yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


def kill_one_worker_when(server, after, killed):
    "Wait until the server was asked so often, then kill a process that fills a shard, by its id."
    while not killed:
        time.sleep(.01)
        if sum(server.asked.values()) < after: continue
        for p in psutil.Process().children(recursive=True):
            try: busy = any('fill_shard' in c for c in p.cmdline())
            except psutil.Error: continue
            if busy and not killed:
                p.send_signal(signal.SIGKILL)
                killed.append(p.pid)


def comparable(ds): return ds.df[[c for c in ds.df if c != 'fetched_at']]


def test_two_nodes_give_the_manifest_of_one_though_a_worker_is_killed(cluster, tmp_path):
    servers = [FaultServer(delay=.03, robots='User-agent: *\nDisallow: /no') for _ in range(4)]
    for s in servers: s.__enter__()
    try:
        urls = {name: [s.url(f'/{name}{i}') for i in range(30) for s in servers] for name in ('hat', 'cap')}
        urls['hat'] += [
            s.url(p) for s in servers for p in ('/status/404', '/no/1', '/gone-picture', '/cap0', '/once-503/a')
        ] + ['data:,x']
        lists, killed = write_lists(tmp_path/'lists', **urls), []
        watch = threading.Thread(target=kill_one_worker_when, args=(servers[0], 12, killed), daemon=True)
        watch.start()
        res = ingest_on_ray(lists, tmp_path/'ray', shards=5, **KW)
        watch.join(10)
        assert killed and 2 <= max(s.most_open for s in servers) <= 3
        asked = [s.asked.copy() for s in servers]
        # a kill costs what was in the air, no more; everything else was asked for once
        again = sum(n - 1 for a in asked for p, n in a.items() if not p.startswith('/once'))
        assert again <= 4, again
        local = ingest(lists, tmp_path/'local', **KW)
        assert res.counts == local.counts and res.counts['ok'] == 244 and res.counts['skipped'] == 4
        assert comparable(res.dataset).equals(comparable(local.dataset))
        files = lambda ds: sorted(p.relative_to(ds.path) for p in (ds.path/'images').rglob('*.*'))
        assert files(res.dataset) == files(local.dataset) and not list((tmp_path/'ray'/'shards').iterdir())
        for p in res.dataset.df.path.dropna().unique()[:20]: load_rgb(tmp_path/'ray'/p)
        # again: nothing is left to do, no shard is made
        assert ingest_on_ray(lists, tmp_path/'ray', shards=3, **KW).counts['requested'] == 0
    finally:
        for s in servers: s.__exit__()


def test_what_a_stopped_run_left_in_its_shards_is_taken_over(cluster, tmp_path):
    with FaultServer() as server:
        lists = write_lists(
            tmp_path / 'lists', a=[server.url(f'/{i}') for i in range(12)], b=[server.url(f'/b{i}') for i in range(6)]
        )
        ds = ImageDataset(tmp_path/'ds', subject='objects')
        write_lists(tmp_path/'some', a=[server.url(f'/{i}') for i in range(7)])
        ingest(tmp_path/'some', ds.path/'shards'/'00099', on_conflict='all', **KW)
        res = ingest_on_ray(lists, ds, shards=2, **KW)
        assert res.counts['ok'] == 18 and set(server.asked.values()) == {1} and not list((ds.path/'shards').iterdir())
        for p in ds.df.path: load_rgb(ds.path/p)


def test_wrong_use_is_a_sentence(tmp_path):
    for kw, match in ((dict(colour=1), 'no keyword colour'), (dict(shards=0), 'at least 1')):
        with pytest.raises(UsageError, match=match): ingest_on_ray(tmp_path, tmp_path/'ds', **kw)
