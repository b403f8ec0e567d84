"""A module that runs another one's function on the programs of an engine, one for each kind of inputs."""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxfuse.errors import UsageError
from fxfuse.lowering.candidates import Outcome
from fxfuse.lowering.compilation import compile_verified
from fxfuse.lowering.cuda_graphs import streams, with_cuda_graphs
from fxfuse.lowering.engines import ENGINES
from fxfuse.lowering.kept import Traced
from fxfuse.lowering.leaves import flatten, kind_of, wants_gradients
from fxfuse.lowering.lock import COMPILES
from fxfuse.lowering.records import Lowering
from fxfuse.precision import DEVICES
from fxfuse.reports import attach, report

_LOG = logging.getLogger("fxfuse")
# How many kinds of inputs get a program.
_KINDS = 16
# What answers where there is none.
_FOLDED = Outcome(None)
# Attributes that are not saved.
_MADE_ANEW = ("_outcomes", "_traced", "_weights")


class Lowered(nn.Module):
    """The function of a folded module, on the kernels of an engine.

    What it takes and gives is what the folded module does, without gradients. For each new kind of inputs
    (structure, shapes, layouts, dtypes, devices, values that are no tensors, the number of threads, and with
    CUDA graphs the stream) the first call compiles a program and compares it with the folded module; that of
    the example inputs is there from the beginning. Where the engine cannot do that, for more than 16 kinds,
    with options that can only be given by keyword, under autocast, and where single operators are looked at
    (``torch.jit.trace``, modes of torch's dispatcher), the folded module answers. It does, too, while other
    parameters or buffers are in the places of its own, as in ``torch.func.functional_call``. Weights are
    constants of the programs, and so is what else of its modules forward reads: programs are compiled anew
    after ``to`` and ``load_state_dict`` of this module, and blind to what is written to the folded module
    otherwise.

    Attributes:
        folded: the folded module.
        engine: the name of the engine.
        dtype: in which it computes; None: in that of the weights.
        cuda_graphs: whether programs are recorded as CUDA graphs, one for each stream that calls.
        lowering: what `fxfuse.lower` saw of it.
    """

    def __init__(
        self, folded: nn.Module, engine: str, dtype: torch.dtype | None, cuda_graphs: bool = False
    ) -> None:
        super().__init__()
        self.folded = folded
        self.engine = engine
        self.dtype = dtype
        self.cuda_graphs = cuda_graphs
        self.lowering = Lowering(engine)
        self.training = False
        self._told: set[str] = set()  # options that were warned of
        self._forget()
        self.register_load_state_dict_post_hook(Lowered._forget)  # type: ignore[no-untyped-call]
        with contextlib.suppress(UsageError):  # it need not have been made by fxfuse
            attach(self, report(folded))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the folded module gives."""
        inputs, options = self._by_position(args, kwargs) if kwargs else (args, {})
        leaves, structure = flatten((*inputs, options) if options else inputs)
        if torch.is_grad_enabled() and any(map(wants_gradients, leaves)):
            raise UsageError("a lowered module gives no gradients; call it under torch.no_grad()")
        kind = self._kind(structure, leaves)
        is_folded = options or _are_operators_seen() or self._weights.are_others(self.folded)
        outcome = _FOLDED if is_folded else self._outcomes.get(kind) or self._make_outcome(kind, inputs)
        if outcome.run is None or any(map(torch.is_autocast_enabled, DEVICES)):
            with torch.no_grad():
                return self.folded(*args, **kwargs)
        return outcome.run(leaves)

    def train(self, mode: bool = True) -> Lowered:
        """Stays in eval mode.

        Raises:
            UsageError: it is to train.
        """
        if mode:
            raise UsageError("a lowered module cannot train; train the model that it was made of")
        return self

    def prepare(self, inputs: Sequence[Any]) -> Outcome:
        """What answers for inputs like these."""
        leaves, structure = flatten(tuple(inputs))
        return self._make_outcome(self._kind(structure, leaves), tuple(inputs))

    def _make_outcome(self, kind: Hashable, inputs: tuple[Any, ...]) -> Outcome:
        outcomes, traced = self._outcomes, self._traced  # these, even if the weights change meanwhile
        if len(outcomes) == _KINDS:
            return outcomes.get(kind, _FOLDED)
        with COMPILES:
            if kind not in outcomes and len(outcomes) < _KINDS:
                engine = ENGINES[self.engine]
                engine = with_cuda_graphs(engine) if self.cuda_graphs else engine
                found = outcomes[kind] = compile_verified(traced, inputs, engine, self.dtype)
                name = type(self.folded).__name__
                if found.reason:
                    _LOG.warning(
                        "on engine %s, %s runs as it was folded: %s", self.engine, name, found.reason
                    )
                if len(outcomes) == _KINDS:
                    _LOG.warning("%s runs as it was folded for kinds of inputs after these %d", name, _KINDS)
            return outcomes.get(kind, _FOLDED)

    def _kind(self, structure: pytree.TreeSpec | None, leaves: Sequence[Any]) -> Hashable:
        """What a program depends on, of its inputs and of torch."""
        own = streams([leaf for leaf in leaves if isinstance(leaf, Tensor)]) if self.cuda_graphs else ()
        return (structure, torch.get_num_threads(), own, *map(kind_of, leaves))

    def _by_position(
        self, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs by their positions, and options that have none."""
        signature = inspect.signature(self.folded.forward)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
        given = bound.kwargs.items()
        options = {name: value for name, value in given if value is not defaults.get(name, self)}
        for name in options.keys() - self._told:
            self._told.add(name)
            _LOG.warning(
                "%s runs as it was folded: %s can only be given by keyword", type(self.folded).__name__, name
            )
        return bound.args, options

    def _forget(self, *_: object) -> None:
        self._outcomes: dict[Hashable, Outcome] = {}
        self._weights = _Weights(self.folded)
        self._traced = Traced.of(self.folded)  # not while it is called
        self._outcomes = {}  # without what was compiled of another trace meanwhile

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._forget()
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _MADE_ANEW}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()


class _Weights:
    """The parameters and buffers of a module, which others may take the places of."""

    def __init__(self, folded: nn.Module) -> None:
        self._folded = folded
        modules = [*folded.modules()]
        held: list[dict[str, Any]] = [each._parameters for each in modules]
        held += [each._buffers for each in modules]
        self._places = [each for each in held if each]
        self._tensors = [{**each} for each in self._places]

    def are_others(self, folded: nn.Module) -> bool:
        """Whether other tensors are there now, or another module."""
        try:  # without a loop in Python: what is the same object is equal
            return folded is not self._folded or self._places != self._tensors
        except RuntimeError:  # others were compared, element by element
            return True


def _are_operators_seen() -> bool:
    """Whether torch, or one of its modes, does something with each operator that a program would hide."""
    return bool(torch._C._is_tracing() or torch._C._len_torch_dispatch_stack())


def lowered(
    folded: nn.Module,
    inputs: Sequence[Any],
    engine: str,
    dtype: torch.dtype | None,
    cuda_graphs: bool = False,
) -> Lowered:
    """`folded` on the kernels of an engine, ready for inputs like these."""
    started = time.perf_counter()
    made = Lowered(folded, engine, dtype, cuda_graphs)
    first = made.prepare(inputs)
    seconds = time.perf_counter() - started
    made.lowering = Lowering(engine, first.reason, seconds, first.comparison)
    return made
