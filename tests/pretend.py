"""A pretend accelerator, to find the tensor that was left on the CPU where no GPU is.

`with pretend_device():` makes torch's empty device `meta` one: a tensor moved there keeps its
values in a CPU tensor, computes there, and refuses to meet tensors of the CPU, as a GPU's do.
`run_notebook` runs a notebook's cells on it.

Not covered: streams, autocast, generators of the device, and the numerics of its kernels.
"""
import json
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

aten = torch.ops.aten
TRANSFERS = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
            aten._index_put_impl_.default}

class Away(Tensor):
    "A tensor on the pretend device: torch sees a shape on `meta`, `here` has the values"
    @staticmethod
    def __new__(cls, here):
        place = dict(dtype=here.dtype, device='meta')
        if here.layout == torch.strided: # a sparse tensor has neither
            place |= dict(strides=here.stride(), storage_offset=here.storage_offset())
        self = Tensor._make_wrapper_subclass(cls, here.shape, **place)
        self.here = here
        return self
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})
    # what torch does for a `meta` tensor in C++, without asking the dispatcher
    def __repr__(self): return f'Away({self.here!r})'
    def __format__(self, spec): return format(self.here, spec)
    def tolist(self): return self.here.tolist()
    def new_tensor(self, *args, **kwargs): return Away(self.here.new_tensor(*args, **kwargs))

def tensors(args):
    "The tensors among the arguments of an operation, lists of them included"
    for a in args:
        if isinstance(a, Tensor): yield a
        elif isinstance(a, (list, tuple)): yield from tensors(a)

def brought_here(a):
    "An argument with its tensors' values"
    if isinstance(a, Away): return a.here
    return type(a)(map(brought_here, a)) if isinstance(a, (list, tuple)) else a

def sent_away(out):
    "A result with its tensors on the device"
    if isinstance(out, Tensor): return out if isinstance(out, Away) else Away(out)
    return type(out)(map(sent_away, out)) if isinstance(out, (list, tuple)) else out

def meeting(func, args):
    "The tensors that must be on one device: all but the CPU's scalars, and the CPU's indices"
    free = [id(index) for index in tensors(args[1])] if func in INDEXING else []
    return [t for t in tensors(args) if isinstance(t, Away) or (t.dim() and id(t) not in free)]

def compute(func, args, kwargs):
    "One operation of torch: checked, done on the CPU, and its results put where they belong"
    device, everything = kwargs.get('device'), [*args, *kwargs.values()]
    if func not in TRANSFERS:
        met = meeting(func, everything)
        if len({isinstance(t, Away) for t in met}) > 1:
            places = ', '.join(f'{tuple(t.shape)} on {t.device}' for t in met)
            raise RuntimeError(f'{func} wants its tensors on one device, got {places}')
    here = {name: brought_here(a) for name, a in kwargs.items()}
    if device is not None: here['device'] = 'cpu'
    out = func(*map(brought_here, args), **here)
    if device is None: away = any(isinstance(t, Away) for t in tensors(everything))
    else: away = torch.device(device).type == 'meta'
    if not away: return out
    # the result of an operation in place is its argument, and a view shares its storage
    return return_and_correct_aliasing(func, args, kwargs, sent_away(out))

class Operations(TorchDispatchMode):
    "Sees the operations that no `Away` takes part in yet: factories, and moves from the CPU"
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if Away in types or kwargs.get('device') is not None: return compute(func, args, kwargs)
        return func(*args, **kwargs)
    @classmethod
    def _should_skip_dynamo(cls): return False # skipping means importing the compiler: seconds

def moved(make):
    "`make`, such as `torch.tensor`, which writes values from Python past the dispatcher"
    def made(*args, device=None, **kwargs):
        t = make(*args, **kwargs)
        return t if device is None else t.to(device)
    return made

@contextmanager
def pretend_device():
    "Inside, `meta` is an accelerator"
    names = 'tensor', 'as_tensor', 'asarray'
    literals = {name: moved(getattr(torch, name)) for name in names}
    with patch.multiple(torch, **literals), Operations(): yield

SKIPPED = '#| eval: false', '#| default_exp', '#| slow', '#| gpu'

def run_notebook(path, /, **parameters):
    "Run the cells of a notebook on the pretend device, as papermill would; its names"
    names = dict(__name__='__main__', display=lambda *shown, **options: None)
    with pretend_device():
        for i, cell in enumerate(json.loads(path.read_text())['cells']):
            source = ''.join(cell['source'])
            if cell['cell_type'] != 'code' or source.startswith(SKIPPED): continue
            exec(compile(source, f'{path.name}, cell {i}', 'exec'), names)
            if 'parameters' in cell['metadata'].get('tags', []): names.update(parameters)
    return names
