"""Does a test fail when the code is broken? Breaks one line at a time, in a copy, and runs tests on it.

    uv run python tests/mutations.py [PART OF A NAME ...]

Each mutation below was, or might be, somebody's mistake. The everyday tests beside it must fail; one that
passes says what no test sees. `tests/test_mutations.py` sees to it that every line is still in its file.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("stack", "tests", "configs", "benchmarks", "docs", "pyproject.toml")


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One line that is broken, and the tests that must see it."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = (
    Mutation(
        "an infinite number is rounded to the largest",
        "stack/kernels/matmul/float8.py",
        "jnp.where(jnp.isfinite(values), jnp.clip(values, -limit, limit), jnp.nan)",
        "jnp.clip(values, -limit, limit)",
        "tests/kernels/matmul/test_float8.py",
    ),
    Mutation(
        "a prefix is seen by what follows alone",
        "stack/models/decoder.py",
        'kind="prefix" if "prefix" in batch else "causal"',
        'kind="causal"',
        "tests/models/test_reach.py",
    ),
    Mutation(
        "rows of other options are read",
        "stack/objectives/pairs.py",
        "json.dumps(options, sort_keys=True)",
        '""',
        "tests/objectives/test_room.py",
    ),
    Mutation(
        "a special word is hidden",
        "stack/objectives/masked_words.py",
        "~self.special[np.minimum(tokens, len(self.special) - 1)]",
        "(tokens >= 0)",
        "tests/objectives/test_examples.py",
    ),
    Mutation(
        "optimizer.epsilon ignored",
        "stack/step/optimizer.py",
        "config.beta1, config.beta2, config.epsilon)",
        "config.beta1, config.beta2)",
        "tests/step/test_optimizer.py",
    ),
    Mutation(
        "clipping after the rule",
        "stack/step/optimizer.py",
        "return optax.chain(*clip, *rule)",
        "return optax.chain(*rule, *clip)",
        "tests/step/test_optimizer.py",
    ),
    Mutation(
        "vectors decay",
        "stack/step/groups.py",
        'else {"matrix"}',
        'else {"matrix", "vector"}',
        "tests/step/test_optimizer.py",
    ),
    Mutation(
        "a group's rate is its decay's",
        "stack/step/groups.py",
        "rates[paths[name]] = group.learning_rate_factor",
        "rates[paths[name]] = group.learning_rate_factor if group.weight_decay is None else 1.0",
        "tests/step/test_optimizer.py",
    ),
    Mutation(
        "Muon scaled by the shorter side",
        "stack/step/muon.py",
        "math.sqrt(max(matrices.shape[1:]))",
        "math.sqrt(min(matrices.shape[1:]))",
        "tests/step/test_muon.py",
    ),
    Mutation(
        "a bad step moves the average",
        "stack/step/ema.py",
        "return guard.choose(is_good, new, mean)",
        "return new",
        "tests/step/test_ema.py",
    ),
    Mutation(
        "the average is not evaluated",
        "stack/step/state.py",
        'state.get("ema", state["params"])',
        'state["params"]',
        "tests/step/test_ema.py",
    ),
    Mutation(
        "YaRN's factor of queries and keys ignored",
        "stack/layers/attention.py",
        "config.head_width), amplitude(config.rope)",
        "config.head_width), 1.0",
        "tests/interop/test_hugging_face_numerics.py",
    ),
    Mutation(
        "the first step wasted",
        "stack/step/optimizer.py",
        "joined(step + 1)",
        "joined(step)",
        "tests/step/test_optimizer.py",
    ),
    Mutation(
        "one shuffle seed for all sources",
        "stack/data/mixture.py",
        "SeedSequence([seed, number])",
        "SeedSequence([seed, 0])",
        "tests/data/test_loader.py",
    ),
    Mutation(
        "labels not shifted",
        "stack/data/packing.py",
        "self.corpus.tokens[source + 1]",
        "self.corpus.tokens[source]",
        "tests/data/test_packing.py",
    ),
    Mutation(
        "what is nearly held out trained on",
        "stack/data/duplicates.py",
        'np.argsort(~np.concatenate(heldout), kind="stable")',
        "np.arange(len(np.concatenate(heldout)))",
        "tests/data/test_duplicates.py",
    ),
    Mutation(
        "shares that jump where they should change",
        "stack/data/mixture.py",
        " + change * steps**2",
        "",
        "tests/data/test_mixture.py",
    ),
    Mutation(
        "documents of an index run together",
        "stack/data/token_files.py",
        "np.union1d(closed, edges[here])",
        "closed",
        "tests/data/test_megatron.py",
    ),
    Mutation(
        "held-out text trained on",
        "stack/data/packing.py",
        '{"train": ~heldout,',
        '{"train": heldout | ~heldout,',
        "tests/data",
    ),
    Mutation(
        "MFU not divided by devices",
        "stack/train/watch/speed.py",
        "self._mfu(places / seconds / self._devices)",
        "self._mfu(places / seconds)",
        "tests/train/watch/test_speed.py",
    ),
    Mutation(
        "MFU with rows for tokens",
        "stack/train/watch/speed.py",
        "self._config.train.batch_size * self._config.data.sequence_length",
        "self._config.train.batch_size",
        "tests/train/watch/test_speed.py",
    ),
    Mutation(
        "a save counted as a step",
        "stack/train/watch/speed.py",
        '"""Forgets the last arrival: what came between was more than a step."""\n        self._last = None',
        '"""Forgets the last arrival: what came between was more than a step."""',
        "tests/train/watch/test_speed.py",
    ),
    Mutation(
        "z-loss without a gradient",
        "stack/objectives/cross_entropy.py",
        "(1.0 + 2.0 * head.z_loss * normaliser) / total",
        "1.0 / total",
        "tests/objectives",
    ),
    Mutation(
        "soft cap without a slope",
        "stack/objectives/cross_entropy.py",
        "slope = 1.0 - jnp.square(scores / head.softcap)",
        "slope = 1.0 + 0.0 * scores",
        "tests/objectives",
    ),
    Mutation(
        "the loss's scale rounded",
        "stack/objectives/cross_entropy.py",
        "(gradient.astype(jnp.float32) * scale).astype(gradient.dtype)",
        "gradient * scale.astype(jnp.bfloat16).astype(gradient.dtype)",
        "tests/objectives",
    ),
    Mutation(
        "every micro-batch divided by its own labels",
        "stack/step/step.py",
        "program.execution(keys=keys), divisor)\n        return value",
        "program.execution(keys=keys), objective.divisor(micro))\n        return value",
        "tests/numerics/test_contract.py",
    ),
    Mutation(
        "padded words scored",
        "stack/layers/head.py",
        "< vocab_size, scores",
        "< table.shape[0], scores",
        "tests/layers/test_head.py",
    ),
    Mutation(
        "documents see each other",
        "stack/kernels/attention/mask.py",
        "allowed &= self.query_segments[:, :, None] == self.key_segments[:, None, :]",
        "pass",
        "tests/kernels",
    ),
    Mutation(
        "padding is seen",
        "stack/kernels/attention/mask.py",
        "allowed &= keys < self.lengths[:, None, None]",
        "pass",
        "tests/kernels",
    ),
    Mutation(
        "a window too wide by one",
        "stack/kernels/attention/mask.py",
        "abs(distance) < self.window",
        "abs(distance) <= self.window",
        "tests/kernels",
    ),
    Mutation(
        "every layer has the window",
        "stack/kernels/attention/mask.py",
        "near | ~self.local",
        "near",
        "tests/kernels",
    ),
    Mutation(
        "one rotation for all layers",
        "stack/layers/attention.py",
        "if config.local_rope_theta is None or mask.window is None:",
        "if True:",
        "tests/models/test_decoder.py",
    ),
    Mutation(
        "embedded words not scaled",
        "stack/models/decoder.py",
        "math.sqrt(config.embed_dim) if config.scale_embedding else None",
        "None",
        "tests/interop/test_hugging_face_numerics.py",
    ),
    Mutation(
        "all layers planned with the window",
        "stack/models/cost.py",
        "(config.num_layers - local, None)",
        "(config.num_layers - local, config.window)",
        "tests/models/test_cost.py",
    ),
    Mutation(
        "rotation the wrong way",
        "stack/layers/rotary.py",
        "second * cos + first * sin",
        "second * cos - first * sin",
        "tests/layers/test_rotary.py",
    ),
    Mutation(
        "norm_epsilon ignored",
        "stack/layers/norm.py",
        "keepdims=True) + epsilon)",
        "keepdims=True) + 1e-12)",
        "tests/layers/test_norm.py",
    ),
    Mutation(
        "dropout not rescaled",
        "stack/layers/dropout.py",
        "x / (1.0 - rate)",
        "x",
        "tests/layers/test_dropout.py",
    ),
    Mutation(
        "every layer drops the same",
        "stack/models/stack.py",
        "layer_keys(run.keys, index)",
        "layer_keys(run.keys, 0)",
        "tests/models/test_decoder.py",
    ),
    Mutation(
        "the word table's gradient in bfloat16",
        "stack/layers/embedding.py",
        "jax.ops.segment_sum(values.astype(jnp.float32), rows, number)",
        "jax.ops.segment_sum(values, rows, number).astype(jnp.float32)",
        "tests/layers/test_embedding.py",
    ),
    Mutation(
        "residual projections start too large",
        "stack/layers/mlp.py",
        "math.sqrt(2 * config.num_layers)",
        "math.sqrt(2)",
        "tests/models/test_decoder.py",
    ),
    Mutation(
        "temperature ignored",
        "stack/inference/sampling.py",
        "keepdims=True)) / temperature",
        "keepdims=True)) * 1.0",
        "tests/inference/test_sampling.py",
    ),
    Mutation(
        "keys cached in the first slot",
        "stack/layers/attention.py",
        "start_index=slot, axis=1",
        "start_index=0, axis=1",
        "tests/inference/test_generate.py",
    ),
    Mutation(
        "a step skipped on resuming",
        "stack/train/ledger.py",
        "self._without(record.position(step))",
        "self._without(record.position(step + 1))",
        "tests/train/test_trainer.py",
    ),
    Mutation(
        "a bad step that is applied",
        "stack/step/guard.py",
        "jax.lax.select_n(is_good, before, after)",
        "after",
        "tests/train/test_bad_steps.py",
    ),
    Mutation(
        "a file of a checkpoint that is not synced",
        "stack/storage/store.py",
        "            os.fsync(file.fileno())",
        "            pass",
        "tests/train/test_power.py",
    ),
    Mutation(
        "rows left out that are read",
        "stack/data/position.py",
        "np.where(rows >= start, rows + (stop - start), rows)",
        "np.where(rows >= stop, rows + (stop - start), rows)",
        "tests/train/test_bad_steps.py",
    ),
    Mutation(
        "a digest that is not compared",
        "stack/train/checkpoint/manifest.py",
        "    if got != want:",
        "    if len(got) != len(want):",
        "tests/train/checkpoint/test_damage.py",
    ),
    Mutation(
        "a manifest that is not the last file",
        "stack/train/checkpoint/manifest.py",
        "elif folder.isdecimal() and file == _OLD:",
        "elif folder.isdecimal() and not steps.add(int(folder)) and file == _OLD:",
        "tests/train/checkpoint/test_checkpoints.py",
    ),
    Mutation(
        "another dtype gone on with",
        "stack/train/record.py",
        '    "model.scan_unroll",\n',
        '    "model.scan_unroll",\n    "model.dtype",\n',
        "tests/train/test_record.py",
    ),
    Mutation(
        "a bad config started again for ever",
        "stack/launch/kubernetes.py",
        '"values": [1, 2]',
        '"values": [1]',
        "tests/launch/test_kubernetes.py",
    ),
    Mutation(
        "runs on a disk that goes with its pod",
        "stack/launch/kubernetes.py",
        "    check_shared(job.config, SHARED)\n",
        "",
        "tests/launch/test_kubernetes.py",
    ),
    Mutation(
        "a line that ends where a range begins is lost",
        "stack/data/records.py",
        "file.seek(max(0, start - 1))",
        "file.seek(start)",
        "tests/data/test_prepare.py",
    ),
    Mutation(
        "a tokenizer that was sent elsewhere finds special tokens in texts",
        "stack/data/tokenizer.py",
        "        self.__dict__.update(state)\n        _take_all_as_text(self.model)",
        "        self.__dict__.update(state)",
        "tests/data/test_prepare.py",
    ),
    Mutation(
        "weights go before their average",
        "stack/train/weights/saved.py",
        '_PARTS = ("params", "frozen", "ema")',
        '_PARTS = ("ema", "params", "frozen")',
        "tests/train/test_init_from.py",
    ),
    Mutation(
        "new words at the sum over all rows",
        "stack/train/weights/load.py",
        "(total / max(1, rows.sum()))",
        "(total / source.shapes[name][0])",
        "tests/train/test_init_from.py",
    ),
    Mutation(
        "later positions are zero",
        "stack/train/weights/load.py",
        "table = np.array(shards[box])",
        "table = np.zeros_like(shards[box])",
        "tests/train/test_init_from.py",
    ),
    Mutation(
        "init_from may change",
        "stack/train/record.py",
        '*("seed", "init_from", "model"',
        '*("seed", "model"',
        "tests/train/test_record.py",
    ),
    Mutation(
        "a parallel decoder takes the weights of a decoder",
        "stack/train/weights/match.py",
        '_FAMILY = ("kind", "position"',
        '_FAMILY = ("position"',
        "tests/train/test_init_from.py",
    ),
    Mutation(
        "a part of a tensor is read from its beginning",
        "stack/interop/hugging_face.py",
        "source[(slice(first, last),",
        "source[(slice(0, last - first),",
        "tests/interop/test_init_from_folder.py",
    ),
)

_NOTHING = 5  # The status of pytest where a tier of a file has no test.


def survives(mutation: Mutation, folder: Path) -> bool:
    """Whether the tests pass although the copy in a folder is broken."""
    file = folder / mutation.file
    whole = file.read_text("utf-8")
    file.write_text(whole.replace(mutation.old, mutation.new), "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutation.tests]
    tiers = [[*command, "-m", tier] for tier in ("not full", "full")]
    cache = str(ROOT / ".cache" / "jax")
    environment = os.environ | {"PYTHONPATH": str(folder), "JAX_COMPILATION_CACHE_DIR": cache}
    try:
        for command in tiers:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode == 1:
                return False
            if done.returncode not in (0, _NOTHING):
                sys.exit(f"{mutation.name}: no test ran:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    finally:
        file.write_text(whole, "utf-8")
    return True


def main() -> None:
    """Breaks what the arguments name, or everything, and tells what no test saw."""
    wanted = [one for one in MUTATIONS if not sys.argv[1:] or any(part in one.name for part in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as name:
        for item in COPIED:
            copy = shutil.copytree if (ROOT / item).is_dir() else shutil.copy
            copy(ROOT / item, Path(name) / item)
        unseen = []
        for mutation in wanted:
            passes = survives(mutation, Path(name))
            unseen += [mutation.name] * passes
            sys.stdout.write(f"{'NOT SEEN' if passes else 'seen':<9} {mutation.name}\n")
            sys.stdout.flush()
    sys.exit(f"{len(unseen)} of {len(wanted)} seen by no test" if unseen else None)


if __name__ == "__main__":
    main()
