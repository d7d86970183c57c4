"""A device that computes more slowly than the others is named, and no other."""

import jax
import numpy as np
from tiny_runs import config, saved_state

from stack import Trainer
from stack.config import MeshConfig
from stack.parallel import mesh as meshes
from stack.train import stragglers
from stack.train.stragglers import Stragglers, device_seconds, multiply
from stack.train.watch.listeners import Listener


class Heard(Listener):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_warning(self, text) -> None:
        self.texts.append(text)


def test_a_slow_device_is_named_once_when_it_was_slow_twice() -> None:
    looks = Stragglers(jax.devices())
    healthy = np.array([[1.0, 1.05, 0.97, 1.1], [1.0, 1.02, 1.0, 1.15]])
    slow = healthy.copy()
    slow[1, 2] = 1.6
    assert looks.compare(healthy) == []
    assert looks.compare(slow) == []
    (note,) = looks.compare(slow)
    assert note.startswith("device 2 of process 1 computes 1.55 times as long as the median device")
    assert looks.compare(slow) == []


def test_one_that_was_slow_by_chance_is_not_named() -> None:
    looks = Stragglers(jax.devices())
    for times in ([[1.0, 2.0, 1.0]], [[1.0, 1.0, 1.0]], [[1.0, 2.0, 1.0]], [[2.0, 1.0, 1.0]]):
        assert looks.compare(np.array(times)) == []


def test_a_device_does_its_work_alone() -> None:
    device = jax.devices()[3]
    with meshes.use(meshes.build(MeshConfig(fsdp=8))):  # As a run is in one.
        assert device_seconds(device, 8) > 0
    result = multiply(jax.device_put(np.full((8, 8), 0.5, np.float32), device))
    assert result.devices() == {device}
    np.testing.assert_allclose(result, np.full((8, 8), 0.5 * 0.5**8))


def test_a_run_looks_before_each_save_and_its_numbers_are_the_same(tmp_path, monkeypatch) -> None:
    options = ("mesh.fsdp=8", "train.steps=6", "checkpoint.every=2")
    Trainer(config(tmp_path, "plain", *options)).fit(progress=False)
    monkeypatch.setattr(stragglers, "_LEFT_OUT", ())
    monkeypatch.setattr(stragglers, "_SIZE", 16)
    monkeypatch.setattr(stragglers, "_SLOWER", 0.0)  # All are slow, but the first time none is named.
    heard = Heard()
    Trainer(config(tmp_path, "looked", *options), listeners=[heard]).fit(progress=False)
    assert [text.split(" computes")[0].split(" on ")[0] for text in heard.texts] == [
        f"device {number} of process 0" for number in range(8)
    ]
    assert saved_state(tmp_path, "looked") == saved_state(tmp_path, "plain")


def test_on_cpus_nothing_is_measured() -> None:
    assert Stragglers(jax.devices()).look() == []
