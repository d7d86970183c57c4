"""Everything static about a run's computation: what the trainer turns and the planner compiles."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from stack.config import Config, ConfigError
from stack.config.instances import instance_config, num_here
from stack.config.layout import check_divides
from stack.data.fields import abstract_batch
from stack.kernels.attention import Choice
from stack.kernels.matmul import Choice as MatmulChoice
from stack.layers.adapter import Adapter
from stack.layers.linear import linears, sizes, use_adapters
from stack.models import model_class
from stack.models.stack import Execution, Remat
from stack.objectives import build as build_objective
from stack.objectives.protocol import Objective
from stack.parallel import mesh as meshes
from stack.parallel.instances import Instances
from stack.parallel.pipeline.pipeline import Pipeline
from stack.parallel.pipeline.table import Costs
from stack.parallel.rules import ELEMENTWISE, Layout, Role
from stack.parallel.zero import is_variable
from stack.step import adapter as adapters
from stack.step import groups
from stack.step import optimizer as optimizers
from stack.step.kernels import choose_attention, choose_matmul, platform_of

Path = tuple[str, ...]
"""The way to a parameter in their tree."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A config on a mesh: the model's definition, how it lies, its kernels and its optimizer."""

    config: Config
    mesh: Mesh | AbstractMesh
    layout: Layout
    attention: Choice
    matmul: MatmulChoice

    @cached_property
    def objective(self) -> Objective:
        """What the model is trained for."""
        return build_objective(self.config)

    @cached_property
    def model(self) -> Any:
        """Abstract: shapes, dtypes, axes and roles, no arrays."""
        return nnx.eval_shape(self.make_model)

    def make_model(self) -> Any:
        """Builds the model with its initial parameters, from the seed."""
        model = self._make_base()
        if self.adapters:
            use_adapters(model, self.adapters, seed=self.config.seed)
        return model

    def _make_base(self) -> Any:
        rngs = nnx.Rngs(self.config.seed)
        model = model_class(self.config.model)(self.config.model, rngs=rngs)
        self.objective.equip(model, rngs)
        return model

    @cached_property
    def adapters(self) -> dict[str, Adapter]:
        """The adapter of each `Linear` that has one, by its path, as `layers.mlp.up`.

        Raises:
          ConfigError: see `stack.step.adapter.choose`.
        """
        if self.config.adapter is None:
            return {}
        base: Any = nnx.eval_shape(self._make_base)
        own = {name: sizes(one) for name, one in linears(base) if not adapters.is_of_task(name)}
        return adapters.choose(self.config.adapter, own)

    @cached_property
    def axes(self) -> dict[str, Any]:
        """A tree like the parameters with the logical axes of each."""
        return self._metadata(lambda variable: variable.axes)

    @cached_property
    def roles(self) -> dict[str, Any]:
        """A tree like the parameters with the role of each."""
        return self._metadata(lambda variable: variable.role)

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """A tree like the parameters with the shape, dtype and sharding of each."""

        def abstract(names: tuple, role: Role, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            spec = self.layout.parameter_spec(names, leaf.shape, role)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(self.mesh, spec))

        shapes = nnx.to_pure_dict(nnx.state(self.model))
        leaves = jax.tree.map(abstract, self.axes, self.roles, shapes, is_leaf=optimizers.is_names)
        return self._narrowed(leaves)

    def _narrowed(self, leaves: dict[str, Any]) -> dict[str, Any]:
        """The same with what an adapter leaves as it is in the dtype it is kept in."""
        adapter = self.config.adapter
        if adapter is None or adapter.base_dtype == "float32":
            return leaves
        roles: dict[Path, Any] = flatten_dict(self.roles)
        flat: dict[Path, Any] = flatten_dict(leaves)
        for path in self.frozen:
            if roles[path] not in ELEMENTWISE:
                leaf = flat[path]
                flat[path] = jax.ShapeDtypeStruct(leaf.shape, adapter.base_dtype, sharding=leaf.sharding)
        return unflatten_dict(flat)

    @cached_property
    def frozen(self) -> frozenset[Path]:
        """The parameters that are not trained.

        Raises:
          ConfigError: a pattern that fits no parameter, or patterns that leave none to train.
        """
        paths = {".".join(path): path for path in flatten_dict(self.axes)}
        frozen: set[Path] = set()
        if self.config.adapter is not None:
            frozen |= {paths[name] for name in adapters.frozen(self.config.adapter, paths)}
        for pattern in self.config.optimizer.frozen:
            frozen |= {paths[name] for name in groups.matching(pattern, paths, field="optimizer.frozen")}
        if len(frozen) == len(paths):
            raise ConfigError("optimizer.frozen leaves nothing to train; remove a pattern")
        return frozenset(frozen)

    @cached_property
    def float8(self) -> dict[str, int]:
        """The `Linear` modules whose products a training step computes in 8 bits, as `layers.mlp.up`.

        With the layers of the stack that each is in.

        Raises:
          ConfigError: a pattern that fits no weight, or patterns and layers that leave none.
        """
        if self.matmul.fp8 is None:
            return {}
        options, leaves = self.config.kernels.fp8, jax.tree_util.tree_flatten_with_path(self.parameters)[0]
        axes = jax.tree.leaves(self.axes, is_leaf=optimizers.is_names)
        layers = {
            jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape[0]
            for (path, leaf), names, role in zip(leaves, axes, jax.tree.leaves(self.roles), strict=True)
            if role == "matrix" and names[0] == "layers"
        }
        plain: set[str] = set()
        for pattern in options.exclude:
            plain |= set(groups.matching(pattern, layers, field="kernels.fp8.exclude"))
        chosen = {name: number for name, number in layers.items() if name not in plain}
        if options.first_layers + options.last_layers >= max(chosen.values(), default=0):
            raise ConfigError("kernels.fp8 leaves no product in 8 bits; set kernels.matmul=xla instead")
        return {name.removesuffix(".kernel"): number for name, number in chosen.items()}

    def split(self, tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a tree like the parameters has for those that are trained, and for those that are not."""
        flat = flatten_dict(tree)
        trained = {path: leaf for path, leaf in flat.items() if path not in self.frozen}
        frozen = {path: leaf for path, leaf in flat.items() if path in self.frozen}
        return unflatten_dict(trained), unflatten_dict(frozen)

    def _metadata(self, read: Callable[[nnx.Variable], Any]) -> dict[str, Any]:
        values = jax.tree.map(lambda v: v.replace(read(v)), self.model, is_leaf=is_variable)
        return nnx.to_pure_dict(nnx.state(values))

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Clipping, rule, decay and schedule."""
        (axes, _), (roles, _) = self.split(self.axes), self.split(self.roles)
        steps, dtype = self.config.train.steps, self.config.model.dtype
        return optimizers.build(
            self.config.optimizer, steps=steps, axes=axes, roles=roles, depths=self.depths, dtype=dtype
        )

    @cached_property
    def depths(self) -> dict[str, Any]:
        """Of the parameters that are trained, how many layers are above each; see `groups.depths`."""
        return self.split(groups.depths(self.axes, self.parameters))[0]

    @cached_property
    def graph(self) -> nnx.GraphDef:
        """The model without its parameters."""
        return nnx.graphdef(self.model)

    def merge(self, params: dict[str, Any]) -> Any:
        """The model with these parameters."""
        return nnx.merge(self.graph, params)

    @property
    def num_parameters(self) -> int:
        """Parameters, the padding of the vocabulary left out."""
        model = self.config.model
        axes = jax.tree.leaves(self.axes, is_leaf=optimizers.is_names)
        sizes = zip(axes, jax.tree.leaves(self.parameters), strict=True)
        padded, used = model.padded_vocab_size, model.vocab_size
        return sum(leaf.size // padded * used if "vocab" in names else leaf.size for names, leaf in sizes)

    @property
    def num_base_parameters(self) -> int:
        """The same without those of adapters."""
        leaves: dict[Path, Any] = flatten_dict(self.parameters)
        adapted = sum(leaf.size for path, leaf in leaves.items() if adapters.is_of_adapter(path))
        return self.num_parameters - adapted

    @property
    def num_trained(self) -> int:
        """Parameters that are trained, padding and all."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.split(self.parameters)[0]))

    def execution(self, *, keys: jax.Array | None = None) -> Execution:
        """How the step runs the model.

        Args:
          keys: [batch] dropout keys in training, else None.
        """
        train = self.config.train
        assert train.remat != "auto", "no program has it"
        return Execution(
            layout=self.layout,
            kernels={"attention": self.attention.implementation},
            keys=keys,
            packed=self.config.data.packed,
            remat=train.remat,
            offload=train.offload_activations,
            plain_layers=(self.config.kernels.fp8.first_layers, self.config.kernels.fp8.last_layers),
        )

    def pipeline(self, stacks: Sequence[int]) -> Pipeline:
        """The layers of a model's stacks on the stages of the mesh, and who does what and when."""
        return pipeline_of(self.config, stacks, self.layout.size("stage"))

    @property
    def stacks(self) -> tuple[int, ...]:
        """Layers of each stack of the model."""
        names = jax.tree.leaves(self.axes, is_leaf=optimizers.is_names)
        leaves = zip(jax.tree_util.tree_leaves_with_path(self.parameters), names, strict=True)
        numbers = {path[0]: leaf.shape[0] for (path, leaf), axes in leaves if axes[0] == "layers"}
        return tuple(numbers.values())

    @cached_property
    def instances(self) -> Instances | None:
        """Where the instances lie that train apart; None where there are none."""
        if not self.config.average.apart:
            return None
        return Instances(num_here(self.config, self.layout.size("data")), self.mesh)

    @cached_property
    def instance(self) -> "Program":
        """What one instance runs: a plain program on the mesh of a slice, of devices that are not named.

        Where none train apart, it is this one.
        """
        if self.instances is None:
            return self
        config, sizes = instance_config(self.config, self.layout.size("data")), dict(self.mesh.shape)
        shape = tuple((sizes | {"data": config.mesh.data}).values())
        mesh = AbstractMesh(shape, self.mesh.axis_names, axis_types=self.mesh.axis_types)
        return on_mesh_like(self, mesh, config)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a batch, for compiling."""
        sizes = {"batch": self.config.train.batch_size, **self.objective.sizes}
        return abstract_batch(self.objective.fields, sizes=sizes, layout=self.layout)


_TICKS = {"none": 2, "dots": 2, "save_qkv_proj": 3, "full": 3}
"""Of a backward pass by the name of the remat policy, where a forward pass takes one."""


def pipeline_of(config: Config, stacks: Sequence[int], stages: int) -> Pipeline:
    """The pipeline of a config on so many stages, of stacks of so many layers."""
    mesh, train = config.mesh, config.train
    assert train.remat != "auto", "no program has it"
    return Pipeline.of(
        mesh.schedule,
        stacks,
        stages=stages,
        micro_batches=train.accumulation,
        chunks=mesh.virtual_stages,
        costs=costs_of(train.remat),
    )


def costs_of(remat: Remat) -> Costs:
    """How many ticks a pipeline's actions take, by what is computed again."""
    return Costs(backward=_TICKS[remat], input_gradient=_TICKS[remat] - 1)


def build(config: Config, devices: Sequence[jax.Device] | None = None) -> Program:
    """The program of a config on these devices, by default all of them; nothing is allocated.

    Raises:
      ConfigError: the config does not fit the devices, or a kernel that was asked for cannot run.
    """
    mesh = meshes.build(config.mesh, devices)
    return on_mesh(config, mesh, *platform_of(mesh.devices.flat[0]))


def on_mesh(
    config: Config, mesh: Mesh | AbstractMesh, platform: str, compute_capability: float | None = None
) -> Program:
    """The same on a mesh, which may be abstract: shapes and shardings of devices that are not here."""
    _check_resolved(config)
    check_offload(config, _memory_kinds(mesh))
    check_divides(config, dict(mesh.shape))
    program = Program(
        config=config,
        mesh=mesh,
        layout=_layout(config, mesh),
        attention=choose_attention(config, platform=platform, compute_capability=compute_capability),
        matmul=choose_matmul(config, platform=platform, compute_capability=compute_capability),
    )
    _check_rows(program)
    if config.optimizer.frozen or config.optimizer.groups or config.adapter:
        _ = program.optimizer  # Refused now, not when the text is tokenized.
    _ = program.float8
    return program


def on_mesh_like(program: Program, mesh: Mesh | AbstractMesh, config: Config | None = None) -> Program:
    """The same program on another mesh of the same kind of devices; of the same shape, or with a config."""
    config = config or program.config
    layout = _layout(config, mesh)
    return Program(
        config=config, mesh=mesh, layout=layout, attention=program.attention, matmul=program.matmul
    )


def _layout(config: Config, mesh: Mesh | AbstractMesh) -> Layout:
    """How things lie on a mesh; rows over its stages too, where there are enough of them."""
    train, sizes = config.train, mesh.shape
    ways = sizes["data"] * sizes["fsdp"] * sizes["stage"]
    rows = (train.batch_size, config.eval.batch_size or train.batch_size)
    return Layout.of(
        mesh,
        config.mesh,
        dtype=config.model.dtype,
        reduce_dtype=train.grad_reduce_dtype,
        rows_over_stages=sizes["stage"] > 1 and not any(number % ways for number in rows),
    )


def _check_resolved(config: Config) -> None:
    for name, auto in (("mesh", config.mesh.auto), ("train.remat", config.train.remat == "auto")):
        if auto:
            raise ConfigError(f"{name}: auto names no layout yet; name one, or let the trainer choose")


def _check_rows(program: Program) -> None:
    """`check_divides` of a row that only the objective knows the length of."""
    length, tensor = program.objective.sizes.get("target_length", 0), program.layout.size("tensor")
    if program.layout.sequence_parallel and length % tensor:
        raise ConfigError(
            f"mesh.sequence_parallel splits the {length} tokens of a row that is written over tensor={tensor}"
            f" ways, which do not divide it; set objective.target_length={-(-length // tensor) * tensor}, or"
            " sequence_parallel=false"
        )


def _memory_kinds(mesh: Mesh | AbstractMesh) -> set[str]:
    """Of its devices; none if they are not here."""
    if isinstance(mesh, AbstractMesh):
        return set()
    return {memory.kind for memory in mesh.devices.flat[0].addressable_memories()}


_KEEPS = {
    "adafactor": "adafactor's state is a thousandth of the parameters, there is nothing to gain",
    "muon": "muon takes all layers of a matrix at once, to deal them out to the devices",
}
"""Optimizers whose state stays on the device, and why."""


def check_offload(config: Config, memory_kinds: set[str]) -> None:
    """Refuses to keep in host memory what cannot be kept there.

    Raises:
      ConfigError: the devices have no pinned host memory, or the optimizer no moments worth moving.
    """
    wishes = [name for name in ("offload_optimizer", "offload_activations") if getattr(config.train, name)]
    if wishes and memory_kinds and "pinned_host" not in memory_kinds:
        raise ConfigError(
            f"train.{wishes[0]}: these devices reach no pinned host memory, only "
            f"{', '.join(sorted(memory_kinds))}; set it to false"
        )
    if config.train.offload_optimizer and config.optimizer.kind in _KEEPS:
        raise ConfigError(
            f"train.offload_optimizer: {_KEEPS[config.optimizer.kind]}; set it to false, or take another "
            "optimizer.kind"
        )
