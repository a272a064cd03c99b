"""What it costs that ranks agree in every update whether to stop: one asynchronous reduction.

python benchmarks/agreement.py --ranks 2 4 8

Every rank takes the same small updates (forward, backward with the sum of the gradients over the
ranks, AdamW), in blocks with the agreement and without it by turns, on the CPU with gloo.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection

from measure import ROOT, heading

BLOCKS, UPDATES = 40, 50
WIDTH, BATCH = 256, 64


def rank(number: int, size: int, port: int, answer: Connection) -> None:
    """Take updates as rank `number`; rank 0 sends back seconds an update, without and with."""
    os.environ.update(RANK=str(number), WORLD_SIZE=str(size), LOCAL_RANK=str(number))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    sys.path.insert(0, str(ROOT))
    import torch

    from atlas.training.ranks.agreement import Agreement, Requests
    from atlas.training.ranks.world import join_ranks, leave_ranks

    torch.set_num_threads(1)
    world = join_ranks("cpu")
    model = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Sequential(
            torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, 1)
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    agreement = Agreement(world)
    batch = torch.randn(BATCH, WIDTH)

    def update(agree: bool) -> None:
        model(batch).square().mean().backward()
        if agree:
            agreement.start(Requests())
        optimizer.step()
        optimizer.zero_grad()
        if agree:
            agreement.read()

    took: dict[bool, list[float]] = {False: [], True: []}
    for block in range(2 * BLOCKS):
        agree = bool(block % 2)
        world.barrier()
        began = time.perf_counter()
        for _ in range(UPDATES):
            update(agree)
        took[agree].append((time.perf_counter() - began) / UPDATES)
    if world.is_main:
        answer.send((took[False][2:], took[True][2:]))
    world.barrier()
    leave_ranks()


def measure(size: int) -> tuple[list[float], list[float]]:
    """Seconds an update in each block of `size` ranks, without the agreement and with it."""
    from launchers.local.ranks import free_port

    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    port = free_port()
    ranks = [context.Process(target=rank, args=(n, size, port, theirs)) for n in range(size)]
    for process in ranks:
        process.start()
    without, with_it = mine.recv()
    for process in ranks:
        process.join()
    return without, with_it


def main() -> None:
    """A line for every number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    print(f"{heading('Agreement to stop')}\n")
    print(
        "| ranks | without, ms | with, ms | ratio | more, us |\n|---|---|---|---|---|", flush=True
    )
    for size in args.ranks:
        without, with_it = measure(size)
        ratio = statistics.median(b / a for a, b in zip(without, with_it, strict=True))
        a, b = statistics.median(without), statistics.median(with_it)
        print(
            f"| {size} | {1e3 * a:.2f} | {1e3 * b:.2f} | {ratio:.3f} | {1e6 * (b - a):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
