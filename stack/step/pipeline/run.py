"""Runs a schedule's table: a loop over ticks in which each stage does what the table says of it.

Stages do different things at the same time, so a stage's work is a loop of one round or none: a conditional
would copy all that it hands through, what is kept for the backward passes included (XLA:GPU, jaxlib 0.11.2).
Gradients are made layer by layer, straight into their sums.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from stack.parallel.pipeline.pipeline import Pipeline
from stack.parallel.pipeline.places import KINDS, Rows
from stack.parallel.pipeline.schedules import Kind
from stack.parallel.rules import BATCH_AXES, ELEMENTWISE, Layout
from stack.parallel.zero import is_variable, split_rows
from stack.step.pipeline.cut import Cut, Ends, Place
from stack.step.pipeline.layers import Layers, is_float, kept_of
from stack.step.pipeline.slots import (
    put,
    put_layer,
    put_one,
    replaced,
    take,
    take_layer,
    zeros,
)
from stack.step.pipeline.split import Split
from stack.step.pipeline.weights import MANUAL, Deal, by_hand, gather, manual_spec, scatter

Loss = Callable[..., tuple[jax.Array, Any]]


def gradients[M](
    loss: Loss,
    model: M,
    batch: Any,
    shared: Any,
    layout: Layout,
    *,
    micro_batches: int,
    plan_of: Callable[[Sequence[int]], Pipeline],
) -> tuple[M, Any]:
    """The gradient of a loss summed over micro-batches, split as the parameters are.

    Args:
      loss: (shared, parameters, micro-batch, layout=, instead=) -> (scalar, any sums); already divided by
        what the whole batch is divided by. The keywords go into `Execution`.
      model: the parameters, float32, split.
      batch: arrays [batch, ...].
      shared: what every micro-batch needs besides, whole everywhere.
      layout: how things lie on the mesh.
      micro_batches: their number; divides the batch on every device.
      plan_of: stacks of so many layers -> who does what and when.

    Returns:
      The gradient in float32, and the sums of all micro-batches.
    """
    leaves, tree = jax.tree.flatten(model, is_leaf=is_variable)
    specs = [manual_spec(layout.parameter_spec(leaf.axes, leaf.shape, leaf.role)) for leaf in leaves]
    rows = P(BATCH_AXES)

    def body(shards: list[jax.Array], batch: Any, shared: Any) -> tuple[list[jax.Array], Any]:
        inside = dataclasses.replace(layout, manual=frozenset(MANUAL), zero=0)
        cut = Cut(partial(loss, shared), tuple(leaves), tree, inside)
        return _run(cut, shards, specs, batch, layout, micro_batches, plan_of)

    whole = jax.tree.map(lambda _: P(), shared)
    batch = jax.tree.map(lambda values: jax.reshard(values, P(BATCH_AXES)), batch)
    found, sums = jax.shard_map(
        body,
        in_specs=(specs, jax.tree.map(lambda _: rows, batch), whole),
        out_specs=(specs, P()),
        axis_names=set(MANUAL),
        check_vma=False,
    )([leaf[...] for leaf in leaves], batch, shared)
    new = [leaf.replace(gradient) for leaf, gradient in zip(leaves, found, strict=True)]
    return jax.tree.unflatten(tree, new), sums


def _run(
    cut: Cut,
    shards: list[jax.Array],
    specs: list[P],
    batch: Any,
    layout: Layout,
    micro_batches: int,
    plan_of: Callable[[Sequence[int]], Pipeline],
) -> tuple[list[jax.Array], Any]:
    def of_use(number: int) -> Any:
        leaf = cut.variables[number]
        return leaf.dtype if leaf.role in ELEMENTWISE else layout.dtype or leaf.dtype

    ends: Ends = {
        number: gather(shards[number], specs[number], of_use(number), None)
        for number, leaf in enumerate(cut.variables)
        if leaf.axes[0] != "layers"
    }
    places: list[Place] = []
    members: list[list[int]] = []

    def look(batch: Any) -> None:
        places.extend(cut.stacks(ends, batch))
        members.extend(map(cut.members, places))

    micros = jax.tree.map(partial(split_rows, number=micro_batches), batch)
    # Traced once for what enters each stack and what it is made of.
    jax.eval_shape(look, jax.tree.map(lambda x: x[0], micros))
    plan = plan_of([cut.variables[own[0]].shape[0] for own in members])
    deals = {number: Deal.of(*plan.chunks_of(stack)) for stack, own in enumerate(members) for number in own}
    layers = {
        number: gather(shards[number], specs[number], of_use(number), deal) for number, deal in deals.items()
    }
    stage = _Stage(
        cut=cut,
        plan=plan,
        places=places,
        members=members,
        ends=ends,
        layers=layers,
        micros=micros,
        reduce_dtype=jnp.dtype(layout.reduce_dtype),
    )
    totals, sums = stage.run()
    found = [
        scatter(totals[number], specs[number], deals.get(number)) for number in range(len(cut.variables))
    ]
    return found, jax.tree.map(lambda value: jax.lax.psum(value, MANUAL), sums)


class _State(NamedTuple):
    """What a stage carries from tick to tick; a list has an entry for each stack of layers."""

    inputs: list[jax.Array]
    """[slots, ...]: what has come from the stage before, and waits."""
    gradients: list[jax.Array]
    """[slots, ...]: what has come from the stage after; what the last part has made."""
    onward: list[jax.Array]
    """What goes to the stage after at the end of the tick; then what has come from the one before."""
    back: list[jax.Array]
    """What goes to the stage before; then what has come from the one after."""
    flow: list[jax.Array]
    """How far the gradient has come in a backward pass of several ticks."""
    kept: list[Any]
    """[slots, layers of a chunk, ...]: what the backward passes need."""
    late: list[Any]
    """[slots, layers of a chunk, ...]: what the gradients of weights need that are put off."""
    given: list[jax.Array]
    """[slots, ...]: what each stack but the last has given, where it is needed again."""
    around: list[list[jax.Array]]
    """The gradients of what a stack's layers read besides their input, so far."""
    totals: dict[int, jax.Array]
    """The gradients of all parameters, by their places."""
    sums: Any


@dataclass(frozen=True, kw_only=True)
class _Stage(Layers):
    """One device's part in the pipeline."""

    reduce_dtype: Any

    def run(self) -> tuple[dict[int, jax.Array], Any]:
        """The totals of all parameters, and the sums."""
        state = jax.lax.fori_loop(0, self.plan.table.ticks, self._tick, self._begin())
        return state.totals, state.sums

    def _begin(self) -> _State:
        slots, stacks = self.plan.slots, range(len(self.places))
        x = [jax.typeof(place.x) for place in self.places]
        shapes = (jax.eval_shape(partial(self.keeps, stack)) for stack in stacks)
        kept, late, around = map(list, zip(*shapes, strict=True))

        def waiting(of: list[Any], number: int) -> list[Any]:
            fronts = [(number + 1, most) for most in self.plan.most]
            return [
                jax.tree.map(partial(zeros, front=front), one) for front, one in zip(fronts, of, strict=True)
            ]

        nothing = [zeros(one) for one in x]
        sums = jax.eval_shape(lambda: self.cut.finish(self.ends, self.micro(0), nothing)[1])

        def total(number: int, weight: jax.Array) -> jax.Array:
            elementwise = self.cut.variables[number].role in ELEMENTWISE
            return jnp.zeros_like(weight, dtype=jnp.float32 if elementwise else self.reduce_dtype)

        return _State(
            inputs=[zeros(one, front=(slots.input + 1,)) for one in x],
            gradients=[zeros(one, front=(slots.gradient + 1,)) for one in x],
            onward=nothing,
            back=nothing,
            flow=nothing,
            kept=waiting(kept, slots.live),
            late=waiting(late, slots.late),
            given=[zeros(one, front=(slots.live + 1,)) for one in x[:-1]],
            around=[[zeros(one) for one in some] for some in around],
            totals={number: total(number, weight) for number, weight in (self.ends | self.layers).items()},
            sums=jax.tree.map(zeros, sums),
        )

    def _tick(self, tick: jax.Array, state: _State) -> _State:
        plan, stage = self.plan, jax.lax.axis_index("stage")
        row = Rows(*(jnp.asarray(field)[tick, stage] for field in plan.rows))
        state = state._replace(
            inputs=put(state.inputs, row.arrived_input, state.onward),
            gradients=put(state.gradients, row.arrived_gradient, state.back),
        )
        came, wanted = take(state.inputs, row.input), take(state.gradients, row.gradient)
        is_forward = row.kind == KINDS.index("forward")
        for stack in range(len(self.places)):
            mine = jnp.asarray(plan.stack_of)[row.chunk] == stack
            onward, kept, given = _when(
                mine & is_forward,
                partial(self._forward, stack, row, came),
                (state.onward, state.kept[stack], state.given),
                share=(plan.turns(stack, "forward")[0], plan.table.ticks),
            )
            state = state._replace(onward=onward, kept=replaced(state.kept, stack, kept), given=given)
            # The one or the other, as the schedule has it.
            for kind in ("backward", "input_gradient"):
                if turns := plan.turns(stack, kind)[0]:
                    flow, around, late, totals, sums = _when(
                        mine & (row.kind == KINDS.index(kind)),
                        partial(self._backward, kind, stack, row, wanted, kept, given),
                        (state.flow, state.around[stack], state.late[stack], state.totals, state.sums),
                        share=(turns, plan.table.ticks),
                    )
                    state = state._replace(
                        flow=flow,
                        around=replaced(state.around, stack, around),
                        late=replaced(state.late, stack, late),
                        totals=totals,
                        sums=sums,
                    )
            if turns := plan.turns(stack, "weight_gradient")[0]:
                totals = _when(
                    mine & (row.kind == KINDS.index("weight_gradient")),
                    partial(self._weigh, stack, row, kept, state.late[stack], given),
                    state.totals,
                    share=(turns, plan.table.ticks),
                )
                state = state._replace(totals=totals)
        # The model's last part keeps what it has made where a gradient would come from the stage after.
        place = jnp.where(self._is_last(row) & is_forward, row.gradient, plan.slots.gradient)
        made = put(state.gradients[-1:], place, state.onward[-1:])
        after = [(one, (one + 1) % plan.stages) for one in range(plan.stages)]
        before = [(there, here) for here, there in after]
        # Both are sent when all is done: else a stage that works backwards waits, where what goes onward is
        # sent, for its neighbour's forward pass, and that one then for it.
        onward, flow = jax.lax.optimization_barrier((state.onward, state.flow))
        return state._replace(
            gradients=[*state.gradients[:-1], *made], onward=_sent(onward, after), back=_sent(flow, before)
        )

    def _each[S](
        self, stack: int, kind: Kind, row: Rows[jax.Array], body: Callable[[jax.Array, S], S], state: S
    ) -> S:
        """The body for each layer of the tick; of a length that is known where all ticks have as many."""
        counts, (turns, layers) = self.plan.counts(stack, kind), self.plan.turns(stack, kind)
        if len(counts) == 1:
            return jax.lax.fori_loop(0, max(counts), body, state)
        share = layers, turns * max(counts)

        def some(index: jax.Array, state: S) -> S:
            return _when(index < row.high - row.low, partial(body, index), state, share=share)

        return jax.lax.fori_loop(0, max(counts), some, state)

    def _forward(self, stack: int, row: Rows[jax.Array], came: list[jax.Array], own: Any) -> Any:
        """The layers of a chunk: what comes out of them goes on, and what is kept of each into its slot."""
        _, kept, given = own
        micro, before = self.micro(row.micro_batch), came[:stack]
        begins = self.is_first(stack, row)
        x = jax.lax.cond(begins, lambda: self.cut.place(self.ends, micro, before).x, lambda: came[stack])

        def layer(index: jax.Array, state: Any) -> Any:
            x, kept = state
            step, around, args = self.layer(stack, row, micro, before, index, x)
            x, pull = jax.vjp(step, around, *args)
            self.pulls[stack] = pull
            return x, put_layer(kept, row.live, index, kept_of(pull))

        x, kept = self._each(stack, "forward", row, layer, (x, kept))
        given = [put_one(slots, row.live, y) for slots, y in zip(given[:stack], before, strict=True)] + given[
            stack:
        ]
        return replaced(came, stack, x), kept, given

    def _backward(
        self,
        kind: Kind,
        stack: int,
        row: Rows[jax.Array],
        wanted: list[jax.Array],
        kept: Any,
        given: list[jax.Array],
        own: Any,
    ) -> Any:
        """Some layers of a chunk, backwards: the loss before a model's last, what enters after the first."""
        flow, around, late, totals, sums = own
        micro, before = self.micro(row.micro_batch), take(given[:stack], row.live)
        micros, (turns, _) = self.plan.table.shape.micro_batches, self.plan.turns(stack, kind)
        begun = row.begins == 1
        flow, around = (
            jax.tree.map(lambda new, old: jnp.where(begun, new, old), new, old)
            for new, old in ((wanted, flow), ([jnp.zeros_like(one) for one in around], around))
        )
        if stack == len(self.places) - 1:
            judge = partial(self._judge, micro, before)
            flow, totals, sums = _when(
                self._is_last(row) & begun, judge, (flow, totals, sums), share=(micros, turns)
            )

        def layer(index: jax.Array, state: Any) -> Any:
            dx, around, late, totals = state
            index = row.high - 1 - index
            again = self.again(stack, row, kept, micro, before, index)
            if kind == "backward":
                (floats, dx, vectors), weights = self.pulled(stack, again, dx)
                totals = self.with_layer(totals, stack, row, index, vectors | weights)
            else:
                self.splits[stack] = Split.of(partial(self.pulled, stack), again, dx)
                (floats, dx, vectors), held = self.splits[stack].begin(again, dx)
                totals = self.with_layer(totals, stack, row, index, vectors)
                late = put_layer(late, row.late, index, held)
            around = [old + new for old, new in zip(around, floats, strict=True)]
            return dx, around, late, totals

        x, around, late, totals = self._each(stack, kind, row, layer, (flow[stack], around, late, totals))
        flow = replaced(flow, stack, x)
        ends = (row.ends == 1) & (self.is_first(stack, row) | bool(around))
        enter = partial(self._enter, stack, row, micro, before, around)
        often = self.plan.chunks if around else 1
        flow, totals = _when(ends, enter, (flow, totals), share=(micros * often, turns))
        return flow, around, late, totals, sums

    def _weigh(
        self, stack: int, row: Rows[jax.Array], kept: Any, late: Any, given: list[jax.Array], totals: Any
    ) -> Any:
        """The gradients of weights that were put off."""
        micro, before = self.micro(row.micro_batch), take(given[:stack], row.live)

        def layer(index: jax.Array, totals: Any) -> Any:
            index = row.low + index
            again = self.again(stack, row, kept, micro, before, index)
            weights = self.splits[stack].finish(again, take_layer(late, row.late, index))
            return self.with_layer(totals, stack, row, index, weights)

        return self._each(stack, "weight_gradient", row, layer, totals)

    def _judge(self, micro: Any, before: list[jax.Array], own: Any) -> Any:
        """The loss of what the last part has made: its gradient in the place of that."""
        flow, totals, sums = own

        def loss(ends: Ends, given: list[jax.Array]) -> tuple[jax.Array, Any]:
            return self.cut.finish(ends, micro, given)

        value, pull, found = jax.vjp(loss, self.ends, [*before, flow[-1]], has_aux=True)
        ends, flow = pull(jnp.ones_like(value))
        return flow, _added(totals, ends), jax.tree.map(jnp.add, sums, found)

    def _enter(
        self,
        stack: int,
        row: Rows[jax.Array],
        micro: Any,
        before: list[jax.Array],
        around: list[jax.Array],
        own: Any,
    ) -> Any:
        """Backwards through what enters a stack and what its layers read besides."""
        flow, totals = own

        def enter(ends: Ends, given: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
            place = self.cut.place(ends, micro, given)
            _, read = self.lifted(stack, place, row, jnp.int32(0), place.x)[:2]
            return place.x, [one for one in read if is_float(one)]

        first = self.is_first(stack, row)
        _, pull = jax.vjp(enter, self.ends, before)
        ends, given = pull((jnp.where(first, flow[stack], 0), around))
        flow = [old + new for old, new in zip(flow[:stack], given, strict=True)] + flow[stack:]
        return replaced(flow, stack, jnp.where(first, 0, flow[stack])), _added(totals, ends)

    def _is_last(self, row: Rows[jax.Array]) -> jax.Array:
        """Whether a chunk is the last part of the model."""
        return (row.chunk == self.plan.last_chunk) & (jax.lax.axis_index("stage") == self.plan.stages - 1)


def _sent(values: list[jax.Array], to: list[tuple[int, int]]) -> list[jax.Array]:
    """What comes from another stage, where each sends its own."""
    return [by_hand(partial(jax.lax.ppermute, axis_name="stage", perm=to), x) for x in values]


def _when[S](flag: jax.Array, work: Callable[[S], S], state: S, *, share: tuple[int, int]) -> S:
    """The work's result, or the state as it is: a loop of one round or none.

    `share` says how often of how many times it is one, for whoever reads the compiled program.
    """

    def once(state: tuple[jax.Array, S]) -> tuple[jax.Array, S]:
        return jnp.zeros_like(state[0]), work(state[1])

    with jax.named_scope(f"about_{share[0]}_of_{share[1]}_times"):
        return jax.lax.while_loop(lambda state: state[0], once, (flag, state))[1]


def _added(totals: dict[int, jax.Array], gradients: dict[int, jax.Array]) -> dict[int, jax.Array]:
    return totals | {
        number: totals[number] + gradient.astype(totals[number].dtype)
        for number, gradient in gradients.items()
    }
