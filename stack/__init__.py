"""Plan, train and trust large models in JAX.

    import stack

    print(stack.plan(stack.load("configs/llama3_8b.yaml"), hardware="h100", devices=8).time)
    config = stack.load("configs/quickstart.yaml", ["train.steps=100"])
    trainer = stack.Trainer(config)
    trainer.fit()
    print(trainer.generate(["def "]))

The public names are loaded when they are used, so `import stack` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stack.config import Config as Config
    from stack.config import ConfigError as ConfigError
    from stack.config import StackError as StackError
    from stack.config import dump as dump
    from stack.config import load as load
    from stack.planner.plan import Plan as Plan
    from stack.planner.plan import plan as plan
    from stack.search.index import Index as Index
    from stack.train.trainer import Trainer as Trainer

__all__ = ["Config", "ConfigError", "Index", "Plan", "StackError", "Trainer", "dump", "load", "plan"]

_HOME = {
    "Config": "stack.config",
    "ConfigError": "stack.config",
    "Index": "stack.search.index",
    "Plan": "stack.planner.plan",
    "StackError": "stack.config",
    "Trainer": "stack.train.trainer",
    "dump": "stack.config",
    "load": "stack.config",
    "plan": "stack.planner.plan",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'stack' has no attribute {name!r}")
    from stack import environment

    environment.prepare()
    if name in ("Index", "Plan", "Trainer", "plan"):
        from stack.hardware import defaults

        defaults.import_jax()
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
