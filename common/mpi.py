"""Data-parallel training over processes: `mpiexec -n 4 python script.py`.

Each process takes its share of every batch, and one all-reduce averages the flat gradient. Without
mpiexec nothing here imports anything, and every function is the identity.
"""

import functools
import os

import numpy as np

from common.backend import to_device, to_host
from common.errors import Fail


@functools.cache
def world():
    """The communicator, or None when this process is alone."""
    sizes = (os.environ.get(k, "1") for k in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"))
    if all(size == "1" for size in sizes):
        return None
    try:
        from mpi4py import MPI
    except ImportError:
        raise Fail("started by mpiexec, but mpi4py is not installed "
                   "(pip install -r requirements-mpi.txt)") from None
    return MPI.COMM_WORLD


def is_root():
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
        total = np.empty_like(to_host(flat))
        world().Allreduce(np.ascontiguousarray(to_host(flat)), total)
        flat[...] = to_device(total / world().size)


def any_process(flag):
    """True everywhere if it is true anywhere."""
    return bool(flag) if world() is None else any(world().allgather(bool(flag)))
