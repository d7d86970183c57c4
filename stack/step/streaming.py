"""Instances that are runs of their own and meet in a folder: streaming DiLoCo (arXiv 2501.18512).

A fragment of the model is sent at its step, averaged in the background while the next steps are computed,
and taken some steps later. All that is decided is decided by the files of a round alone, so every instance,
and one that goes on from a checkpoint, comes to the same average.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec as P

from stack.config.errors import StackError
from stack.config.fields import flatten
from stack.config.paths import expand
from stack.parallel import mesh as meshes
from stack.parallel import messages
from stack.parallel.meeting import Arrays, Meeting
from stack.parallel.narrow import narrow, widen
from stack.step import state as states
from stack.step.averaging import AveragedSteps, outer_speed, outer_step
from stack.step.instances import counted
from stack.step.program import Program
from stack.step.state import State
from stack.step.step import Batch

_POLL_SECONDS = 0.2

_ALIKE = (
    *(
        "seed",
        "init_from",
        "model",
        "objective",
        "optimizer",
        "data",
        "train.batch_size",
        "average",
        "content",
    ),
    *("train.grad_reduce_dtype", "stability.spike_deviations", "stability.spike_window"),
)
"""What instances must be alike in."""

_OWN = (
    *("average.instance", "average.folder", "average.wait_seconds", "optimizer.schedule", "data.cache_dir"),
    *("data.workers", "data.tokenizer", "data.sources", "model.scan_unroll", "objective.logits_bytes"),
)
"""But in these: what is read of them is compared as content."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Came:
    """What came of a round."""

    params: Arrays
    outer: Arrays
    members: tuple[int, ...]


class StreamedSteps(AveragedSteps):
    """The steps of one instance of several runs; see `Steps`."""

    def __init__(self, program: Program, options: Mapping[str, Any]) -> None:
        """Compiles when it is first asked, with these options of the compiler."""
        super().__init__(program, options)
        self._average_config = average = program.config.average
        assert average.folder is not None
        assert average.instances is not None
        self._gap = average.every // average.fragments
        self._meeting = Meeting(
            expand(average.folder),
            instance=average.instance,
            instances=average.instances,
            wait_seconds=average.wait_seconds,
        )
        self._sent: Future[None] | None = None
        self._coming: tuple[int, Future[_Came]] | None = None
        self._notes: list[str] = []
        self._is_asked: Callable[[], bool] = lambda: False

    def begin(self, state: State, step: int, content: Mapping[str, str]) -> tuple[State, int]:
        """Enters the meeting; the state to go on with, and the steps taken by it.

        Where an average was made without this instance since its checkpoint, it goes on from the newest that
        leaves it a step to take.
        """
        config = self._program.config
        if jax.process_index() == 0:
            fields = dict(flatten(config.model_dump(mode="json"))) | dict(content)
            terms = {name: value for name, value in fields.items() if not _is_own(name)}
            folder = expand(config.output_dir) / config.name
            self._meeting.enter(config.name, terms, folder / "meeting.json")
        taken = int(states.to_host(state["rounds"]))
        newest = messages.from_first(self._missed(taken))  # Files may come between two processes' looks.
        if newest:
            self._notes.append(
                "the others made averages without this instance: it goes on from that of step"
                f" {newest * self._gap:,}, not from its own step {step:,}"
            )
            return self._rejoined(state, newest), newest * self._gap
        number = step // self._gap
        if number > taken:
            self._start(number, self._parts(number, state), is_sent=step > number * self._gap)
            if step >= number * self._gap + self._average_config.delay:
                state = self._take(state, may_leave=False)
        return state, step

    def _missed(self, taken: int) -> int:
        """The newest average to go on from, if one after those taken is without this instance; or 0."""
        meeting, average, steps = self._meeting, self._average_config, self._program.config.train.steps
        last = meeting.last()
        rounds = [number for number in range(taken + 1, last + 1) if number < last or meeting.closed(number)]
        if not any(average.instance not in (meeting.closed(number) or ()) for number in rounds):
            return 0
        newest = meeting.newest(within=average.fragments, most=(steps - 1) // self._gap)
        if newest <= taken and any(meeting.closed(number) is None for number in rounds):
            raise StackError(
                f"average.folder: the others are at step {last * self._gap:,}, and have nothing left that a"
                f" run of train.steps={steps:,} could go on from; set train.steps as theirs"
            )
        return newest if newest > taken else 0

    def hear(self, is_asked: Callable[[], bool]) -> None:
        """Is told what says that the run is to end."""
        self._is_asked = is_asked

    def advance(self, step: int, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """The same after so many steps; what is due is sent, and what has come is taken."""
        state, metrics = self.step(state, batch)
        taken = step + 1
        number, since = divmod(taken, self._gap)
        if number and since == 0:
            self._start(number, self._parts(number, state), is_sent=False)
        if self._coming is not None and since >= self._average_config.delay:
            state = self._take(state, may_leave=taken < self._program.config.train.steps)
        return state, metrics

    def settle(self) -> None:
        """Waits until what was to be sent lies there: a checkpoint relies on it."""
        if self._sent is not None:
            self._sent.result()

    def notes(self) -> list[str]:
        """What a person should know, told once."""
        notes, self._notes = self._notes, []
        return notes

    def _fragment(self, number: int) -> int:
        return (number - 1) % self._average_config.fragments

    def _parts(self, number: int, state: State) -> dict[str, dict[str, jax.Array]]:
        """A round's fragment: the last average, its momentum, and what it is now."""
        apart = jax.tree.map(partial(self._instances.part, index=0), state["instances"]["params"])
        with meshes.use(self._instances.slice_meshes[0]):
            return self._cut(self._fragment(number), state["params"], state.get("outer", {}), apart)

    @cached_property
    def _cut(self) -> Any:
        def cut(fragment: int, params: Any, outer: Any, apart: Any) -> dict[str, dict[str, jax.Array]]:
            own = jax.tree.map(lambda leaf: jnp.squeeze(leaf, 0), apart)
            return {
                name: {
                    ".".join(path): self._for_host(leaf[rows] if rows else jnp.copy(leaf))
                    for path, leaf, rows in self._of(fragment, tree)
                }
                for name, tree in (("params", params), ("outer", outer), ("own", own))
            }

        return jax.jit(cut, static_argnums=0)

    @staticmethod
    def _for_host(leaf: jax.Array) -> jax.Array:
        """As it lies, if this process has all of it; else whole on every device."""
        return leaf if jax.process_count() == 1 else jax.reshard(leaf, P())

    @cached_property
    def _put(self) -> Any:
        """Takes what came of a fragment: into the average, the momentum and the instance's own parameters."""

        def put(
            fragment: int, kept: float, state: tuple[Any, Any, Any], params: Any, outer: Any
        ) -> tuple[Any, Any, Any]:
            def replace(tree: Any, new: Any, kept: float = 0.0) -> Any:
                flat: dict[Any, Any] = flatten_dict(tree)
                for path, leaf, rows in self._of(fragment, tree):
                    flat[path] = self._replaced(leaf, new[".".join(path)], rows, kept)
                return unflatten_dict(flat)

            old, momentum, apart = state
            own = jax.tree.map(lambda leaf: jnp.squeeze(leaf, 0), apart)
            own = jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), replace(own, params, kept))
            return replace(old, params), replace(momentum, outer) if momentum else momentum, own

        return jax.jit(put, static_argnums=(0, 1), donate_argnums=2)

    def _replaced(self, leaf: jax.Array, new: jax.Array, rows: slice | None, kept: float) -> jax.Array:
        """A parameter with what came in the place of its rows, if it is of layers, or of all of it."""
        spec = jax.typeof(leaf).sharding.spec
        if rows is None:
            return kept * leaf + (1 - kept) * jax.reshard(new, spec)
        places = np.arange(leaf.shape[0])
        here = (places % rows.step == rows.start).reshape(-1, *[1] * (leaf.ndim - 1))
        spread = jnp.asarray(new).at[np.minimum(places // rows.step, new.shape[0] - 1)].get(out_sharding=spec)
        return jnp.where(here, kept * leaf + (1 - kept) * spread, leaf)

    def _of(self, fragment: int, tree: Any) -> Iterator[tuple[tuple[str, ...], Any, slice | None]]:
        """The parameters of a fragment, and which layers of those that are stacked.

        Every n-th layer is in it; tables are in the first fragment, what else is in no layer in the last.
        """
        number = self._average_config.fragments
        axes: dict[Any, Any] = flatten_dict(self._program.axes)
        roles: dict[Any, Any] = flatten_dict(self._program.roles)
        for path, leaf in flatten_dict(tree).items():
            if axes[path][0] == "layers":
                yield path, leaf, slice(fragment, None, number)
            elif fragment == (0 if roles[path] == "table" else number - 1):
                yield path, leaf, None

    def _start(self, number: int, parts: dict[str, dict[str, jax.Array]], *, is_sent: bool) -> None:
        told, coming = Future[None](), Future[_Came]()
        self._sent, self._coming = told, (number, coming)

        def meet() -> None:
            try:
                coming.set_result(self._meet(number, parts, told, is_sent=is_sent))
            except BaseException as error:  # It is raised where the average is taken.
                for waited in (told, coming):
                    if not waited.done():
                        waited.set_exception(error)

        threading.Thread(target=meet, name="average", daemon=True).start()

    def _meet(
        self, number: int, parts: dict[str, dict[str, jax.Array]], told: "Future[None]", *, is_sent: bool
    ) -> _Came:
        """In the background: sends this instance's part of a round, waits for the others, and averages."""
        average, meeting = self._average_config, self._meeting
        begun, momentum, own = (jax.device_get(parts[name]) for name in ("params", "outer", "own"))
        if jax.process_index() == 0 and not is_sent:
            sent = {
                f"{kind}.{name}": values
                for name in begun
                for kind, values in narrow(begun[name] - own[name], average.sent_as).items()
            }
            meeting.send(number, sent)
        told.set_result(None)
        members = meeting.close(number)
        kept = meeting.kept(number) or meeting.keep(number, self._averaged(number, members, begun, momentum))
        if jax.process_index() == 0:
            meeting.forget(number - 4 * average.fragments)
        return _Came(params=_part(kept, "params"), outer=_part(kept, "outer"), members=members)

    def _averaged(self, number: int, members: tuple[int, ...], begun: Arrays, momentum: Arrays) -> Arrays:
        """What comes of a round: the new parameters of its fragment, and their momentum."""
        average = self._average_config
        ways = {name: np.zeros_like(values) for name, values in begun.items()}
        for member in members:
            got = self._meeting.sent(number, member)
            for name, way in ways.items():
                kinds = {
                    kind: got[f"{kind}.{name}"] for kind in ("values", "scales") if f"{kind}.{name}" in got
                }
                np.add(way, widen(kinds, average.sent_as, way.shape) / np.float32(len(members)), out=way)
        came: Arrays = {}
        for name, way in ways.items():
            if average.outer == "none":
                came[f"params.{name}"] = begun[name] - way
                continue
            speed = outer_speed(average, momentum[name], way)
            came |= {f"outer.{name}": speed, f"params.{name}": outer_step(average, begun[name], speed, way)}
        return came

    def _take(self, state: State, *, may_leave: bool) -> State:
        """The state with what came of the round; without, if the run is to end while others are waited for.

        It takes it when it goes on. Processes of one instance would have to agree, so they wait to the end.
        """
        assert self._coming is not None, "what is due was sent"
        (number, coming), average = self._coming, self._average_config
        while not wait([coming], timeout=_POLL_SECONDS).done:
            if may_leave and self._is_asked() and jax.process_count() == 1:
                return state
        self._coming, came = None, coming.result()
        absent = [one for one in range(average.instances or 1) if one not in came.members]
        if absent:
            self._notes.append(
                f"the average of step {number * self._gap:,} was made without"
                f" {'this instance' if average.instance in absent else f'instance {absent[0]}'}"
                + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
            )
        kept = average.kept if average.delay else 0.0
        return self._with(state, number, came.params, came.outer, kept)

    def _with(self, state: State, number: int, params: Arrays, outer: Arrays, kept: float = 0.0) -> State:
        apart = jax.tree.map(partial(self._instances.part, index=0), state["instances"]["params"])
        with meshes.use(self._instances.slice_meshes[0]):
            old, momentum, own = self._put(
                self._fragment(number), kept, (state["params"], state.get("outer", {}), apart), params, outer
            )
        joined = jax.tree.map(lambda leaf: self._instances.join({0: leaf}), own)
        after = {"params": old, "instances": state["instances"] | {"params": joined}}
        after |= {"rounds": counted(self._program, number)}
        return state | after | ({"outer": momentum} if momentum else {})

    def _rejoined(self, state: State, newest: int) -> State:
        """The state at the newest average, of each fragment the last one; the instance begins there too."""
        with meshes.use(self._instances.slice_meshes[0]):
            copies = jax.jit(partial(jax.tree.map, lambda leaf: jnp.expand_dims(leaf, 0)))(state["params"])
        begun = jax.tree.map(lambda leaf: self._instances.join({0: leaf}), copies)
        state |= {"instances": state["instances"] | {"params": begun}}
        for number in range(max(1, newest - self._average_config.fragments + 1), newest + 1):
            kept = self._meeting.kept(number)
            if kept is None:
                raise StackError(
                    f"average.folder: the average of round {number} is gone; start the run again"
                )
            state = self._with(state, number, _part(kept, "params"), _part(kept, "outer"))
        taken = np.int32(newest * self._gap)
        instances = self._instances
        of_all = jax.tree.map(partial(instances.part, index=0), state["instances"])

        def at(state: State) -> State:
            return state | {
                "step": jnp.full_like(state["step"], taken),
                "opt_state": jax.tree.map(
                    lambda node: (
                        node._replace(count=jnp.full_like(node.count, taken)) if _is_clock(node) else node
                    ),
                    state["opt_state"],
                    is_leaf=_is_clock,
                ),
            }

        with meshes.use(instances.slice_meshes[0]):
            moved = jax.jit(at, donate_argnums=0)(of_all)
        after = {"instances": jax.tree.map(lambda leaf: instances.join({0: leaf}), moved)}
        return state | after | {"step": counted(self._program, int(taken))}


def _is_clock(node: Any) -> bool:
    """Whether a part of an optimizer's state counts the steps of the schedule."""
    return isinstance(node, optax.ScaleByScheduleState)


def _is_own(name: str) -> bool:
    """Whether instances may differ in a field."""
    alike = any(name == one or name.startswith(f"{one}.") for one in _ALIKE)
    return not alike or any(name == one or name.startswith(f"{one}.") for one in _OWN)


def _part(kept: Arrays, part: str) -> Arrays:
    """Of what came of a round, the parameters or their momentum, by the names of the parameters."""
    return {
        name.removeprefix(f"{part}."): values for name, values in kept.items() if name.startswith(f"{part}.")
    }
