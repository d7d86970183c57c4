"""The training step of a pipeline: the layers of a model over the mesh axis `stage`."""

from stack.step.pipeline.run import gradients

__all__ = ["gradients"]
