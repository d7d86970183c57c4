"""Host memory that threads share."""

import threading


class Budget:
    """So many bytes that may be held at once; who asks for more than there are in all gets all."""

    def __init__(self, limit: int) -> None:
        """Nothing is held."""
        self.limit = limit
        self.most = 0
        """The most that was ever held."""
        self._held = 0
        self._changed = threading.Condition()

    def take(self, amount: int) -> int:
        """Waits until there is room; returns what `give` must get back."""
        amount = min(amount, self.limit)
        with self._changed:
            self._changed.wait_for(lambda: self._held + amount <= self.limit)
            self._held += amount
            self.most = max(self.most, self._held)
        return amount

    def give(self, amount: int) -> None:
        """Gives back."""
        with self._changed:
            self._held -= amount
            self._changed.notify_all()
