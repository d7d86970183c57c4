"""How far the planner's memory formula is from steps compiled in 8 bits, beside the same in bfloat16.

    uv run python benchmarks/plan_memory_fp8.py [RECIPE ...]

Three recipes, of 4 layers in a loop, x zero 0 and 3 x remat none and full, without and with tensor
parallelism, x ways of scaling, compiled for H200 as `benchmarks/plan_memory.py` does. Needs the extra `plan`;
10 to 30 s of one core per cell. Each line is printed as it is known: bytes as compiled, by formula, and what
8 bits bring.
"""

import argparse
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

from plan_memory import Cell, compiled_bytes, config_of, workload_of

from stack.planner.formula.memory import memory

RECIPES = ("llama3_8b", "gpt2_1_5b", "gpt2_124m")
LAYERS = 4
WAYS = {
    "bfloat16": [],
    "tensor": ["kernels.matmul=fp8"],
    "channel": ["kernels.matmul=fp8", "kernels.fp8.blocks=channel"],
    "block": ["kernels.matmul=fp8", "kernels.fp8.blocks=block"],
}


def main() -> None:
    """Prints a line for each cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--tensor", nargs="+", type=int, default=[1, 2])
    options = parser.parse_args()
    print(f"{'recipe':<12} zero remat tensor {'scaled by':<9} compiled  formula  off")
    for recipe in options.recipes:
        for tensor in options.tensor:
            for zero in (0, 3):
                for remat in ("none", "full"):
                    whole = config_of(Cell(recipe, zero, remat, tensor, False))
                    few = [f"model.num_layers={LAYERS}", "model.scan_unroll=1"]
                    for way in options.ways:
                        config = whole.replace(*few, *WAYS[way])
                        compiled = compiled_bytes(config)
                        formula = memory(workload_of(config)).program
                        print(
                            f"{recipe:<12} {zero:>4} {remat:<5} {tensor:>6} {way:<9} {compiled / 2**30:8.3f}"
                            f" {formula / 2**30:8.3f} {formula / compiled - 1:+.1%}",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
