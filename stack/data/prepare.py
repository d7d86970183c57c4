"""Filling the cache before a run, on this machine or on a cluster."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

from stack.config import Config
from stack.data.atomic import cache_folder
from stack.data.dataset import open_data
from stack.data.examples import Examples
from stack.data.ray_tasks import RayTasks
from stack.data.tokenizer import Tokenizer
from stack.parallel import cluster


def prepare(
    config: Config, ray: str | None, examples: Callable[[Tokenizer], Examples] | None = None
) -> Iterator[str]:
    """Tokenizes and packs what a config names, as a run would, and tells what came of it, line by line.

    Args:
        config: of the run.
        ray: the address of a Ray cluster whose workers tokenize; None: threads of this process.
        examples: of the objective; see `open_data`.

    Raises:
        StackError: what `open_data` and the cluster raise.
    """
    start = time.monotonic()
    with nullcontext() if ray is None else cluster.connected(ray):
        data = open_data(config, examples=examples, workers=None if ray is None else RayTasks())
    seconds = time.monotonic() - start
    root = cache_folder(config.data.cache_dir)
    for source, part in zip(config.data.read_sources, data.train.parts, strict=True):
        corpus = part.corpus
        size = int(corpus.num_bytes[:].sum()) / 1e6
        yield (
            f"source    {source.path or source.kind}: {len(corpus.num_bytes):,} documents,"
            f" {len(corpus.tokens):,} tokens, {size:,.1f} MB of text; {root / f'tokens-{corpus.key}'}"
        )
    rows = f"{data.train.num_rows:,} to train on and {data.heldout.num_rows:,} held out"
    yield f"rows      {rows}, of {config.data.sequence_length:,} tokens"
    yield from (f"note      {note}" for note in data.notes)
    yield f"ready     in {seconds:.1f} s"
