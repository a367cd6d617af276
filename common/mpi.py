"""Data parallel training over processes: `mpiexec -n 4 python script.py`.

Each process takes its share of every batch, and one all-reduce averages the flat gradient. Without
mpiexec nothing here imports anything, and every function is the identity.
"""

import functools
import os
import sys
import time

from common.backend import to_device, to_host
from common.errors import Fail

LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")    # each sets one of these


@functools.cache
def world():
    """The communicator, or None when this process is alone."""
    started = max(int(os.environ.get(name, "1")) for name in LAUNCHERS)
    if started == 1:
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as e:    # RuntimeError: mpi4py finds no MPI library
        raise Fail(f"{started} processes were started, but mpi4py cannot be used ({e}): "
                   "pip install -r requirements-mpi.txt") from None
    if MPI.COMM_WORLD.size != started:
        raise Fail(f"{started} processes were started, but mpi4py sees {MPI.COMM_WORLD.size}: "
                   "it uses another MPI than mpiexec does")
    return MPI.COMM_WORLD


def is_root():
    """Whether this is the process that writes files and speaks."""
    return world() is None or world().rank == 0


def share(batch):
    """(start, count): the part of each batch that is this process's."""
    if world() is None:
        return 0, batch
    if batch % world().size:
        raise Fail(f"a batch of {batch} cannot be shared equally by {world().size} processes")
    count = batch // world().size
    return world().rank * count, count


def mean_over_processes(flat):
    """In place: the mean of `flat` over all processes."""
    if world() is not None:
        from mpi4py import MPI

        host = to_host(flat)
        world().Allreduce(MPI.IN_PLACE, host)
        host /= world().size
        if host is not flat:
            flat[...] = to_device(host)


def from_root(flat):
    """In place: what the first process has."""
    if world() is not None:
        host = to_host(flat)
        world().Bcast(host)
        if host is not flat:
            flat[...] = to_device(host)


def greatest(number):
    """The largest over all processes."""
    return number if world() is None else max(world().allgather(number))


def leave(status):
    """Exit, and end the processes that would wait for this one for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi and mpi.COMM_WORLD.size > 1:
        time.sleep(0.5)                                 # or mpiexec may drop the last words
        mpi.COMM_WORLD.Abort(status)
    raise SystemExit(status)
