"""What a plan says, as typed values."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each device at the worst moment of the step, by what they hold."""

    parameters: float
    """Master weights at rest, and compute copies that outlive one layer."""
    gradients: float
    """Accumulated or whole gradients that outlive one layer."""
    optimizer: float
    """Moments on the device, and a moving average of the weights."""
    activations: float
    """Saved by the forward pass for the backward pass, all micro-batches in flight."""
    logits: float
    """Of the loss: scores, their gradient, and what the loss keeps."""
    temporaries: float
    """Alive only while one layer, the loss or the update is computed, at the worst moment."""
    collectives: float
    """Weights gathered and gradients to be scattered of the layers in flight."""
    reserve: float
    """Fragmentation, the runtime's context and libraries; not in a compiled program's figure."""
    host: float = 0.0
    """Bytes per device in host memory."""

    @property
    def program(self) -> float:
        """What the compiled step holds: all but the reserve."""
        return self.total - self.reserve

    @property
    def total(self) -> float:
        """All on the device."""
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.temporaries
            + self.collectives
            + self.reserve
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Communication:
    """Collectives over one mesh axis in one step."""

    bytes: float
    """Sent by each device."""
    seconds: float
    """If nothing else ran."""
    exposed: float
    """Seconds not hidden behind arithmetic."""

    def __mul__(self, times: float) -> "Communication":
        """Several times."""
        return Communication(
            bytes=self.bytes * times, seconds=self.seconds * times, exposed=self.exposed * times
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of one optimizer step on the critical path of a device; the parts add up to `total`."""

    matmul: float
    attention: float
    memory_bound: float
    """Norms, activations, residuals, embedding, casts: bound by memory bandwidth."""
    communication: dict[str, Communication]
    """By mesh axis; only `exposed` is part of the total."""
    bubble: float
    """Idle at the start and end of the pipeline."""
    optimizer: float
    host: float
    """Kernel launches and input that the device waits for."""

    @property
    def exposed(self) -> float:
        """Exposed communication over all axes."""
        return sum(part.exposed for part in self.communication.values())

    @property
    def parts(self) -> dict[str, float]:
        """What the seconds go to, by name."""
        return {
            "matrix products": self.matmul,
            "attention": self.attention,
            "memory-bound work": self.memory_bound,
            **{f"{axis} communication": part.exposed for axis, part in self.communication.items()},
            "pipeline bubble": self.bubble,
            "optimizer": self.optimizer,
            "kernel launches": self.host,
        }

    @property
    def total(self) -> float:
        """Of the step."""
        return sum(self.parts.values())
