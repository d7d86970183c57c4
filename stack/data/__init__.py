"""Text to batches: sources, tokenizers, a cache on disk, rows packed once, and any step at once."""

from stack.data.dataset import Data, Dataset, open_data

__all__ = ["Data", "Dataset", "open_data"]
