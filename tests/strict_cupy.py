"""A stand-in for CuPy on machines without a GPU: NumPy underneath, CuPy's manners on top.

It keeps the GPU path honest where no GPU is: `ndarray` refuses every silent step between host and
device that CuPy refuses, and CUDA C kernels run on the CPU, one thread after the other, compiled
by g++ (no shared memory, no barriers). What it does not imitate: streams, timing, rounding.

    python tests/strict_cupy.py air_multimnist.py --device gpu ...     run a script on it
"""

import contextlib
import ctypes
import hashlib
import operator
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np

SCALARS = (bool, int, float, complex, np.generic)


# ---------------------------------------------------------------- arrays

def inner(x):
    """The NumPy array inside a strict one, also within lists; a bare NumPy array is refused."""
    if isinstance(x, ndarray):
        return x._host
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {np.ndarray}")
    if isinstance(x, (list, tuple)):
        items = [inner(item) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    if isinstance(x, slice):
        return slice(inner(x.start), inner(x.stop), inner(x.step))
    return x


def strict(x):
    """NumPy's result as the device's: arrays and NumPy numbers become strict arrays."""
    if isinstance(x, (np.ndarray, np.generic)):
        if x.dtype.kind not in "biufc":
            raise TypeError(f"Unsupported dtype {x.dtype}")
        return ndarray(np.asarray(x))
    if isinstance(x, (list, tuple)):
        items = [strict(item) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return x


def call(function, *args, **kwargs):
    """A NumPy function on strict arrays; `out` is given back as the very object that came in."""
    out = kwargs.get("out")
    result = function(*inner(args), **{k: inner(v) for k, v in kwargs.items()})
    return strict(result) if out is None else out[0] if isinstance(out, tuple) else out


class ndarray:
    __slots__ = ("_host",)
    __hash__ = None
    __array_priority__ = 100

    def __init__(self, host):
        self._host = host

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. "
                        "Please use `.get()` to construct a NumPy array explicitly.")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        return call(ufunc, *inputs, **kwargs) if method == "__call__" else NotImplemented

    def __array_function__(self, function, types, args, kwargs):
        if function.__name__ in MISSING or any(kind is not ndarray for kind in types):
            return NotImplemented
        return call(function, *args, **kwargs)

    def __getattr__(self, name):
        if name.startswith("_") or name not in ATTRIBUTES:
            raise AttributeError(f"the strict ndarray has no attribute {name!r}")
        value = getattr(self._host, name)
        if not callable(value):
            return strict(value)
        return lambda *args, **kwargs: call(value, *args, **kwargs)

    def __getitem__(self, index):
        return strict(self._host[inner(index)])

    def __setitem__(self, index, value):
        if not isinstance(value, (ndarray, *SCALARS)):
            raise TypeError(f"Unsupported type {type(value)}")
        self._host[inner(index)] = inner(value)

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        if self.ndim == 0:
            raise TypeError("iteration over a 0-d array")
        return (self[k] for k in range(len(self)))

    def __repr__(self):
        return repr(self._host)

    def __str__(self):
        return str(self._host)

    def __format__(self, spec):
        return format(self._host, spec)

    def __reduce__(self):
        return ndarray, (self._host,)

    def get(self):
        return self._host.copy()

    def set(self, host):
        if not isinstance(host, np.ndarray) or host.dtype != self.dtype:
            raise TypeError(f"cannot set {self.dtype} from {getattr(host, 'dtype', type(host))}")
        if host.shape != self.shape:
            raise ValueError(f"cannot set {self.shape} from {host.shape}")
        self._host[...] = host

    def item(self, *args):
        return self._host.item(*args)

    def tolist(self):
        return self._host.tolist()


ATTRIBUTES = set("""
    T all any argmax argmin argpartition argsort astype choose clip conj copy cumprod cumsum
    diagonal dot dtype fill flags flatten imag itemsize max mean min nbytes ndim nonzero partition
    prod ravel real repeat reshape round searchsorted shape size sort squeeze std strides sum
    swapaxes take tobytes trace transpose var view
    """.split())


def add_operators():
    """Give `ndarray` its operators, reflected and in place."""
    def binary(function, reflected=False):
        def method(self, other):
            if not isinstance(other, (ndarray, np.ndarray, *SCALARS)):
                return NotImplemented
            return call(function, *((other, self) if reflected else (self, other)))
        return method

    def in_place(function):
        def method(self, other):
            if not isinstance(other, (ndarray, *SCALARS)):
                raise TypeError(f"Unsupported type {type(other)}")
            call(function, self, other)
            return self
        return method

    for name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split():
        function = getattr(operator, f"__{name}__")
        setattr(ndarray, f"__{name}__", binary(function))
        setattr(ndarray, f"__r{name}__", binary(function, reflected=True))
        setattr(ndarray, f"__i{name}__", in_place(getattr(operator, f"__i{name}__")))
    for name in "lt le eq ne gt ge".split():
        setattr(ndarray, f"__{name}__", binary(getattr(operator, f"__{name}__")))
    for name in "neg pos abs invert".split():
        function = getattr(operator, f"__{name}__")
        setattr(ndarray, f"__{name}__", lambda self, f=function: call(f, self))
    for name, kind in {"float": float, "int": int, "complex": complex, "bool": bool,
                       "index": operator.index}.items():
        setattr(ndarray, f"__{name}__", lambda self, kind=kind: kind(self._host))


add_operators()


# ---------------------------------------------------------------- the module `cupy`

class Function:
    """One of NumPy's functions, on strict arrays."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args, **kwargs):
        return call(self.function, *args, **kwargs)

    def __getattr__(self, name):
        if name not in ("at", "reduce", "accumulate", "outer", "reduceat"):
            raise AttributeError(name)
        return Function(getattr(self.function, name))


def forward(module):
    """A module-level __getattr__: what NumPy has, on strict arrays."""
    def lookup(name):
        if name.startswith("__") or name in MISSING:
            raise AttributeError(f"module 'cupy' has no attribute {name!r}")
        value = getattr(module, name)
        if isinstance(value, types.ModuleType):
            part = types.ModuleType(f"cupy.{name}")
            part.__getattr__ = forward(value)
            return part
        is_data = isinstance(value, type) or not callable(value)
        return value if is_data else Function(value)
    return lookup


MISSING = {"random", "ma", "char", "rec", "testing", "matrix", "recarray", "block", "fromiter",
           "nditer", "ndenumerate", "memmap", "load", "save", "savez", "savez_compressed",
           "insert", "einsum_path"}


def asarray(a, dtype=None, order="K"):
    """What is on the host is copied over to the device: this transfer is an explicit one."""
    if isinstance(a, ndarray):
        host = np.asarray(a._host, dtype, order=order)
        return a if host is a._host else strict(host)
    return strict(np.array(a if isinstance(a, np.ndarray) else inner(a), dtype, order=order))


def array(a, dtype=None, copy=True, order="K"):
    a = asarray(a, dtype, order)
    return a.copy() if copy else a


def ascontiguousarray(a, dtype=None):
    return asarray(a, dtype, order="C")


def asnumpy(a):
    return a.get() if isinstance(a, ndarray) else np.asarray(a)


def get_array_module(*args):
    return sys.modules["cupy"] if any(isinstance(a, ndarray) for a in args) else np


class Pool:
    def used_bytes(self):
        return 0

    def total_bytes(self):
        return 0

    def free_all_blocks(self):
        pass


class Stream(contextlib.nullcontext):
    def __init__(self, *args, **kwargs):
        super().__init__(self)

    def synchronize(self):
        pass


class Device(contextlib.nullcontext):
    def __init__(self, device=0):
        super().__init__(self)
        self.id = device

    def use(self):
        pass

    def synchronize(self):
        pass


def install():
    """From now on, `import cupy` in this process finds the stand-in."""
    cupy = types.ModuleType("cupy")
    cuda = types.ModuleType("cupy.cuda")
    Stream.null = Stream()
    cuda.Stream, cuda.Device, cuda.MemoryPool = Stream, Device, Pool
    cuda.get_current_stream = lambda: Stream.null
    cuda.runtime = types.SimpleNamespace(
        getDeviceCount=lambda: 1, CUDARuntimeError=type("CUDARuntimeError", (RuntimeError,), {}),
        getDeviceProperties=lambda device: {"name": b"strict stand-in on the CPU"})
    vars(cupy).update(
        __getattr__=forward(np), __path__=[], __version__="0.0+strict", cuda=cuda,
        ndarray=ndarray, array=array, asarray=asarray, asanyarray=asarray, asnumpy=asnumpy,
        ascontiguousarray=ascontiguousarray, get_array_module=get_array_module,
        get_default_memory_pool=Pool, RawModule=RawModule, RawKernel=RawKernel)
    sys.modules.update({"cupy": cupy, "cupy.cuda": cuda})
    return cupy


# ---------------------------------------------------------------- CUDA C, one thread at a time

SHIM = r"""
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string>
#include <type_traits>
#include <utility>
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };
static thread_local uint3 blockIdx, threadIdx;
static thread_local dim3 blockDim, gridDim;
template <class A, class B> std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
template <class A, class B> std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> A atomicAdd(A* p, B x) { A old = *p; *p = old + (A)x; return old; }
template <class A, class B> A atomicMax(A* p, B x) { A old = *p; *p = max(old, (A)x); return old; }
template <class A, class B> A atomicMin(A* p, B x) { A old = *p; *p = min(old, (A)x); return old; }
template <class A> A __ldg(const A* p) { return *p; }
static inline float rsqrtf(float x) { return 1 / sqrtf(x); }
static inline double rsqrt(double x) { return 1 / sqrt(x); }
static inline float rsqrt(float x) { return 1 / sqrtf(x); }
#define __expf expf
#define __logf logf
#define __powf powf
#define __sinf sinf
#define __cosf cosf
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __saturatef(float x) { return x < 0 ? 0 : x > 1 ? 1 : x; }

template <class P> struct strict_type {
    static std::string name() {
        const char* kind = std::is_same<P, bool>::value ? "b" : std::is_floating_point<P>::value
            ? "f" : std::is_unsigned<P>::value ? "u" : "i";
        return kind + std::to_string(sizeof(P));
    }
};
template <class P> struct strict_type<P*> {
    static std::string name() { return "*" + strict_type<std::remove_cv_t<P>>::name(); }
};
template <class... P> std::string strict_signature(void (*)(P...)) {
    std::string all;
    int each[] = {0, (all += strict_type<P>::name() + " ", 0)...};
    return all;
}
template <class... P, size_t... I>
void strict_call(void (*kernel)(P...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<P*>(args[I])...);
}
template <class... P>
void strict_launch(void (*kernel)(P...), const unsigned* size, void** args) {
    gridDim = {size[0], size[1], size[2]};
    blockDim = {size[3], size[4], size[5]};
    for (unsigned z = 0; z < gridDim.z; z++)
    for (unsigned y = 0; y < gridDim.y; y++)
    for (unsigned x = 0; x < gridDim.x; x++)
    for (unsigned c = 0; c < blockDim.z; c++)
    for (unsigned b = 0; b < blockDim.y; b++)
    for (unsigned a = 0; a < blockDim.x; a++) {
        blockIdx = {x, y, z};
        threadIdx = {a, b, c};
        strict_call(kernel, args, std::index_sequence_for<P...>());
    }
}
"""

ENTRY = """
extern "C" const char* strict_signature_{name}() {{
    static std::string s = strict_signature({name});
    return s.c_str();
}}
extern "C" void strict_launch_{name}(const unsigned* size, void** args) {{
    strict_launch({name}, size, args);
}}
"""


def build(code, options):
    """Compile CUDA C for the CPU, once per text, and load it."""
    for word in ("__syncthreads", "__shared__", "__shfl", "<<<"):
        if word in code:
            raise NotImplementedError(f"the stand-in runs threads one by one: no {word}")
    names = re.findall(r"__global__\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?void\s+(\w+)", code)
    code = SHIM + "\n#line 1 \"kernel.cu\"\n" + code + "".join(ENTRY.format(name=n) for n in names)
    options = [o for o in options if o.startswith("-D")]
    key = hashlib.sha256("\0".join([code, *options]).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"strict-cupy-{getattr(os, 'getuid', int)()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{key}.so"
    if not library.exists():
        made = folder / f"{key}.{os.getpid()}.so"
        command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *options,
                   "-x", "c++", "-", "-o", str(made)]
        done = subprocess.run(command, input=code, text=True, capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(f"g++ refuses the kernel:\n{done.stderr}")
        made.replace(library)
    return ctypes.CDLL(str(library))


class RawModule:
    def __init__(self, code, options=(), backend="nvrtc"):
        self.compiled = build(code, options)

    def get_function(self, name):
        return Kernel(self.compiled, name)


class Kernel:
    """Called as CuPy's: kernel(grid, block, args)."""

    def __init__(self, library, name):
        self.name = name
        self.launch = getattr(library, f"strict_launch_{name}")
        signature = getattr(library, f"strict_signature_{name}")
        signature.restype = ctypes.c_char_p
        self.signature = signature().decode().split()

    def __call__(self, grid, block, args, shared_mem=0):
        size = [*grid, *[1] * (3 - len(grid)), *block, *[1] * (3 - len(block))]
        if min(size) < 1 or np.prod(size[3:]) > 1024:
            raise RuntimeError(f"CUDA_ERROR_INVALID_VALUE: grid {grid}, block {block}")
        if len(args) != len(self.signature):
            raise TypeError(f"{self.name} takes {len(self.signature)} arguments, not {len(args)}")
        kept = [self.argument(*pair) for pair in zip(args, self.signature, strict=True)]
        pointers = (ctypes.c_void_p * len(kept))(*[a.ctypes.data for a in kept])
        self.launch((ctypes.c_uint * 6)(*map(int, size)), pointers)

    def argument(self, x, want):
        """One argument in memory, as the kernel reads it: a pointer or a number."""
        host = inner(x)
        if not isinstance(x, (ndarray, *SCALARS)):
            raise TypeError(f"Unsupported type {type(x)}")
        if isinstance(x, ndarray) and not host.flags.c_contiguous:
            raise ValueError(f"{self.name}: an array of shape {host.shape} is not C-contiguous")
        a = np.asarray(host)
        have = ("*" if isinstance(x, ndarray) else "") + f"{a.dtype.kind}{a.dtype.itemsize}"
        if have != want:
            raise TypeError(f"{self.name} takes {want} (* is a pointer) where {have} is given")
        return np.array(host.ctypes.data, np.uintp) if isinstance(x, ndarray) else a


def RawKernel(code, name, options=(), backend="nvrtc"):
    return RawModule(code, options).get_function(name)


def compile_cuda(source, arch="sm_90"):
    """PTX of CUDA C source, by nvcc; its complaints are raised as a RuntimeError."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cu")
        file.write_text(source, encoding="utf-8")
        command = [shutil.which("nvcc"), f"-arch={arch}", "--ptx", "-o", "kernel.ptx", file.name]
        done = subprocess.run(command, cwd=folder, text=True, capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc refuses the kernel:\n{done.stdout}{done.stderr}")
        return Path(folder, "kernel.ptx").read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.path[0] = str(Path(sys.argv[1]).resolve().parent)
    sys.argv = sys.argv[1:]
    install()
    runpy.run_path(sys.argv[0], run_name="__main__")
