"""A backward pass in two: what the stage before waits for, and the gradients of weights, which nobody does.

A program of arrays is cut where it can be: what the first results are made of is computed first, and of that,
what the others need besides is held until they are made (arXiv 2401.10241, section 2.1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

_CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "checkpoint",
    "remat2",
    "custom_jvp_call",
    "custom_vjp_call",
)
"""Primitives that stand for a program within the program, which is cut as well."""


@dataclass(frozen=True)
class Split:
    """A function (again, once) -> (first, second), in two."""

    jaxpr: Jaxpr
    consts: tuple[Any, ...]
    early: tuple[JaxprEqn, ...]
    """What the first results are made of."""
    late: tuple[JaxprEqn, ...]
    """What the second are made of besides."""
    again: int
    """Arguments that are given both times."""
    held: tuple[Var, ...]
    """What is handed over."""
    first: Any
    second: Any
    """How the results are put together."""

    @staticmethod
    def of(function: Callable[[Any, Any], tuple[Any, Any]], again: Any, once: Any) -> "Split":
        """The function traced with such arguments; it must read no other arrays."""
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(again, once)
        flat = jax.make_jaxpr(lambda *args: _run(closed.jaxpr, closed.consts, args))(
            *jax.tree.leaves((again, once))
        )
        first, second = shapes
        cut = len(jax.tree.leaves(first))
        early = _needed(flat.jaxpr.eqns, flat.jaxpr.outvars[:cut])
        made = {id(eqn) for eqn in early}
        late = tuple(eqn for eqn in _needed(flat.jaxpr.eqns, flat.jaxpr.outvars[cut:]) if id(eqn) not in made)
        number = len(jax.tree.leaves(again))
        there = {*flat.jaxpr.invars[number:], *(var for eqn in early for var in eqn.outvars)}
        read = dict.fromkeys(
            var
            for var in (*(var for eqn in late for var in eqn.invars), *flat.jaxpr.outvars[cut:])
            if isinstance(var, Var) and var in there
        )
        return Split(
            flat.jaxpr,
            tuple(flat.consts),
            early,
            late,
            number,
            tuple(read),
            jax.tree.structure(first),
            jax.tree.structure(second),
        )

    def begin(self, again: Any, once: Any) -> tuple[Any, list[jax.Array]]:
        """The first results, and what is held."""
        known = self._known(again) | dict(
            zip(self.jaxpr.invars[self.again :], jax.tree.leaves(once), strict=True)
        )
        known = _evaluate(self.early, known)
        number = self.first.num_leaves
        results = [_read(known, var) for var in self.jaxpr.outvars[:number]]
        return jax.tree.unflatten(self.first, results), [known[var] for var in self.held]

    def finish(self, again: Any, held: Sequence[jax.Array]) -> Any:
        """The second results."""
        known = self._known(again) | dict(zip(self.held, held, strict=True))
        known = _evaluate(self.late, known)
        results = [_read(known, var) for var in self.jaxpr.outvars[self.first.num_leaves :]]
        return jax.tree.unflatten(self.second, results)

    def _known(self, again: Any) -> dict[Var, Any]:
        own = dict(zip(self.jaxpr.constvars, self.consts, strict=True))
        return own | dict(zip(self.jaxpr.invars[: self.again], jax.tree.leaves(again), strict=True))


def _needed(eqns: Sequence[JaxprEqn], results: Sequence[Any]) -> tuple[JaxprEqn, ...]:
    """The equations that some results are made of, in order."""
    wanted = {var for var in results if isinstance(var, Var)}
    found = []
    for eqn in reversed(eqns):
        if wanted & set(eqn.outvars):
            found.append(eqn)
            wanted |= {var for var in eqn.invars if isinstance(var, Var)}
    return tuple(reversed(found))


def _run(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """A program whose calls are written out."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    known = _evaluate(jaxpr.eqns, known)
    return [_read(known, var) for var in jaxpr.outvars]


def _evaluate(eqns: Sequence[JaxprEqn], known: dict[Var, Any]) -> dict[Var, Any]:
    known = dict(known)
    for eqn in eqns:
        values = [_read(known, var) for var in eqn.invars]
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if eqn.primitive.name in _CALLS and isinstance(inner, ClosedJaxpr):
            results = _run(inner.jaxpr, inner.consts, values)
        elif eqn.primitive.name in _CALLS and isinstance(inner, Jaxpr):
            results = _run(inner, (), values)
        else:
            with eqn.ctx.manager:
                results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
            results = results if eqn.primitive.multiple_results else [results]
        known |= dict(zip(eqn.outvars, results, strict=True))
    return known


def _read(known: dict[Var, Any], var: Any) -> Any:
    return var.val if isinstance(var, Literal) else known[var]
