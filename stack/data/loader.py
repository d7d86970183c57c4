"""Batches as global arrays: each process reads only the rows its devices hold."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from stack.data.dataset import Dataset
from stack.data.mixture import training_order

Batch = dict[str, jax.Array]

_AHEAD = 3  # batches made before they are asked for
