"""How long a batch takes alone and beside two busy processes, by how OpenMP's threads wait for one another.

    python nbs/bench/busy_bench.py [--batches 30] [--rounds 3]

PyTorch's threads wait busily by default: they hold a core while they wait, which costs nothing where cores are free and
a multiple where they are not. EfficientNet-Lite0 (random weights), 16 images of 160 px, forward; medians of rounds in
turn, ms a batch. `as vegc sets it` is what `import vegc` does to a process that has not loaded torch yet."""
import argparse
import json
import os
import statistics
import subprocess
import sys

WAYS = {
    'as PyTorch comes': {},
    'as vegc sets it': None,
    'OMP_WAIT_POLICY=PASSIVE': dict(OMP_WAIT_POLICY='PASSIVE'),
    'GOMP_SPINCOUNT=1000': dict(GOMP_SPINCOUNT='1000'),
    'GOMP_SPINCOUNT=10000': dict(GOMP_SPINCOUNT='10000'),
    'GOMP_SPINCOUNT=30000': dict(GOMP_SPINCOUNT='30000'),
    'GOMP_SPINCOUNT=100000': dict(GOMP_SPINCOUNT='100000'),
}
WORK = '''
import sys, time, statistics
if sys.argv[2] == 'vegc': import vegc
import torch, timm
net = timm.create_model('tf_efficientnet_lite0', pretrained=False).eval().to(memory_format=torch.channels_last)
x = torch.rand(16, 3, 160, 160).to(memory_format=torch.channels_last)
times = []
with torch.inference_mode():
    for i in range(int(sys.argv[1]) + 5):
        start = time.perf_counter()
        net(x)
        times.append(time.perf_counter() - start)
print(1000*statistics.median(times[5:]))
'''


def batch_ms(way, batches):
    env = {k: v for k, v in os.environ.items() if not k.startswith(('OMP_', 'GOMP_', 'MKL_'))} | (way or {})
    args = [sys.executable, '-W', 'ignore', '-c', WORK, str(batches), 'vegc' if way is None else 'plain']
    return float(subprocess.run(args, env=env, capture_output=True, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batches', type=int, default=30)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--only', help='ways whose name holds this, beside the first')
    args = parser.parse_args()
    ways = {k: v for k, v in WAYS.items() if not args.only or args.only in k or not v and v is not None}
    for n in (0, 2):
        others = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(n)]
        try:
            found = {name: [] for name in ways}
            for _ in range(args.rounds):
                for name, way in ways.items(): found[name].append(batch_ms(way, args.batches))
        finally:
            for other in others: other.kill()
        first = statistics.median(found['as PyTorch comes'])
        for name, ms in found.items():
            mid = statistics.median(ms)
            print(json.dumps(dict(beside=n, way=name, ms=round(mid, 1), times=round(mid/first, 2))), flush=True)


if __name__ == '__main__': main()
