"""Who sees whom."""

from typing import NamedTuple

import jax


class Mask(NamedTuple):
    """Who sees whom: a query sees the keys of its own document at its own position or before."""

    query_positions: jax.Array
    """[batch, queries] int32, position within the document."""
    key_positions: jax.Array
    """[batch, keys] int32."""
    query_segments: jax.Array | None = None
    """[batch, queries] int32, number of the document within the row; None: one document per row."""
    key_segments: jax.Array | None = None
    """[batch, keys] int32; -1 where a cache holds nothing yet."""

    def allowed(self, window: int | None) -> jax.Array:
        """[batch, queries, keys] bool."""
        distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]
        allowed = distance >= 0
        if window is not None:
            allowed &= distance < window
        if self.query_segments is not None and self.key_segments is not None:
            allowed &= self.query_segments[:, :, None] == self.key_segments[:, None, :]
        return allowed
