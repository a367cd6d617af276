"""Data parallel training: each process takes its share of every batch, gradients are averaged.

On one machine a run forks itself, one process a core, for as long as its loop lasts (`--threads`
says how many): half a batch on each of two cores is faster than two threads on every product. Over
machines, `mpiexec -n 4 python script.py` (mpi4py) does the same. Alone, all this is the identity.
"""

import contextlib
import ctypes
import functools
import gc
import mmap
import os
import signal
import sys
import time
import warnings

import numpy as np

from common.backend import DEVICE, THREADS, to_device, to_host, xp
from common.errors import Fail
from common.kernels import average

LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")    # each sets one of these
BOARD = 256             # numbers that a process can tell the others at a meeting

team = None             # the forked processes, while there are any
wanted = 1              # how many the coming loop would like to have


@functools.cache
def world():
    """The communicator, or None when no mpiexec started this process."""
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
    group = team or world()
    return group is None or group.rank == 0


def share(batch):
    """(start, count): the part of each batch that is this process's."""
    group = team or world()
    if group is None:
        return 0, batch
    if batch % group.size:
        raise Fail(f"a batch of {batch} cannot be shared equally by {group.size} processes")
    count = batch // group.size
    return group.rank * count, count


def mean_over_processes(flat, rows=None):
    """In place: the mean of `flat` over all processes; `rows` is where forked ones keep theirs."""
    if team:
        team.average(flat, rows)
    elif world() is not None:
        from mpi4py import MPI

        host = to_host(flat)
        world().Allreduce(MPI.IN_PLACE, host)
        host /= world().size
        if host is not flat:
            flat[...] = to_device(host)


def from_root(flat):
    """In place: what the first process has. (Forked ones begin with it.)"""
    if world() is not None:
        host = to_host(flat)
        world().Bcast(host)
        if host is not flat:
            flat[...] = to_device(host)


def greatest(number):
    """The largest over all processes."""
    if team:
        return int(team.tell(np.array([number], float)).max())
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


# ================================================================ forked processes

def want(count):
    """Say, before anything is allocated, that the coming loop may fork into so many."""
    global wanted
    can = DEVICE == "cpu" and sys.platform == "linux" and world() is None and blas_threads()
    wanted = count if can else 1


def shared():
    """Whether what is allocated now will be common to the processes of a loop that is to come."""
    return wanted > 1 and team is None


def zeros(size, dtype):
    """Zeros; where a loop is going to fork, all its processes write into the same ones."""
    if not shared() or not size:
        return xp.zeros(size, dtype)
    return np.frombuffer(mmap.mmap(-1, size * np.dtype(dtype).itemsize), dtype)


def rows(size, dtype):
    """Zeros, a row for each process to come; `row` says which one is this process's."""
    count = team.size if team else wanted
    return zeros(count * size, dtype).reshape(count, size)


def row():
    return team.rank if team else 0


def part(span):
    """What this process updates of a slice of all weights, when all write into the same ones."""
    if not team:
        return span
    edges = [span.start + (span.stop - span.start) * (team.rank + k) // team.size for k in (0, 1)]
    return slice(*edges)


def meet():
    """Wait for the other forked processes, if there are any."""
    if team:
        team.meet()


def threads():
    """How many threads a kernel may use: forked processes have one each."""
    return 1 if team else THREADS


def fork(batch):
    """As many processes as are wanted and can share this batch equally, from here on."""
    global team
    gc.freeze()                 # what is there stays: the collector need not look through it again
    size = max(n for n in range(1, wanted + 1) if batch % n == 0)
    if size > 1:
        blas_threads(1)
        team = Team(size)


def disband(status=0):
    """End all forked processes; the first one goes on alone, with all threads."""
    global team, wanted
    if team and team.rank:
        sys.stderr.flush()
        os._exit(status)
    if team:
        team.end()
        blas_threads(THREADS)
    team, wanted = None, 1
    gc.unfreeze()


class Team:
    """Processes forked from this one, the first. They meet in memory that all of them share."""

    def __init__(self, size):
        self.size, self.rank, self.first, self.others = size, 0, os.getpid(), []
        self.arrived = memoryview(mmap.mmap(-1, 8 * size)).cast("q")
        self.board = np.frombuffer(mmap.mmap(-1, 16 * size * BOARD)).reshape(2, size, BOARD)
        self.meetings, self.talks = 0, 0
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(1, size):
            with warnings.catch_warnings():             # of threads: those of BLAS survive a fork
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                self.rank, self.others = rank, []
                return
            self.others.append(child)

    def meet(self):
        """Return when all have come here. Short waits stay awake, long ones sleep."""
        self.meetings += 1
        self.arrived[self.rank] = self.meetings
        tries = 0
        while min(self.arrived) < self.meetings:
            tries += 1
            if tries > 5000:
                self.look_around()
                time.sleep(1e-4)
            elif tries > 200:
                os.sched_yield()

    def look_around(self):
        """Nobody waits for the dead."""
        if self.rank and os.getppid() != self.first:
            os._exit(1)
        for child in self.others:
            if os.waitpid(child, os.WNOHANG)[0]:
                self.others.remove(child)
                raise Fail("a process of this run was ended from outside; continue with --resume")

    def tell(self, numbers):
        """What each process has to say: a row of numbers each."""
        board = self.board[self.talks % 2, :, :len(numbers)]    # the other half may still be read
        self.talks += 1
        board[self.rank] = numbers
        self.meet()
        return board

    def average(self, flat, rows):
        """In place, the mean over processes: of few numbers, or of the rows that each has."""
        if rows is None:
            flat[...] = self.tell(flat).mean(0)
            return
        self.meet()
        own = part(slice(0, flat.size))
        average(rows[:self.size], own.start, own.stop)
        self.meet()

    def end(self):
        for child in self.others:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


SETTERS = ("scipy_openblas_set_num_threads64_", "scipy_openblas_set_num_threads",
           "openblas_set_num_threads64_", "openblas_set_num_threads", "MKL_Set_Num_Threads")


@functools.cache
def blas_setter():
    """The function of NumPy's BLAS that sets its threads, or None where it goes by another name."""
    try:
        library = ctypes.CDLL(np.linalg._umath_linalg.__file__)
    except (AttributeError, OSError):
        return None
    return next((getattr(library, name) for name in SETTERS if hasattr(library, name)), None)


def blas_threads(count=None):
    """Give BLAS so many threads from now on; whether that can be done here."""
    if count and blas_setter():
        blas_setter()(ctypes.c_int(count))
    return blas_setter() is not None
