"""Runs a function in several processes that form a group, and never waits for long."""

import multiprocessing
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

LIMIT = 60  # seconds that a process waits for another


def run(function, world, folder, *args, limit=240):
    """Call ``function(rank, *args)`` in each process; return what each returned.

    As soon as one fails or all have taken too long, the others are ended.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['mmdet.apis', 'rambo_det'])
    processes = [
        context.Process(target=_work, args=(rank, world, folder, function, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + limit
    while any(p.is_alive() for p in processes) and time.monotonic() < end:
        if any(p.exitcode for p in processes):
            break
        processes[0].join(0.05)
        time.sleep(0.05)
    hanging = [rank for rank, p in enumerate(processes) if p.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    errors = [file.read_text() for file in sorted(folder.glob('*.error'))]
    assert not errors, '\n'.join(errors)
    assert not hanging, f'processes {hanging} hung'
    return [torch.load(folder / f'{rank}.pt') for rank in range(world)]


def _work(rank, world, folder, function, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo',
        init_method=f'file://{folder}/store',
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=LIMIT),
    )
    try:
        torch.manual_seed(rank)
        torch.save(function(rank, *args), folder / f'{rank}.pt')
        dist.barrier()
    except BaseException:
        (folder / f'{rank}.error').write_text(
            f'process {rank}:\n{traceback.format_exc()}'
        )
        raise
    finally:
        dist.destroy_process_group()
