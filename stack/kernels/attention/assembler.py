"""What the CUDA that is installed here does wrong to kernels of Mosaic."""


def wrong_masks() -> str | None:
    """Why masks are assembled wrongly here, if they are; the reason that JAX's own attention gives."""
    version = _cuda_version()
    if not 12_080 <= version < 12_091:
        return None
    return f"CUDA {version // 1000}.{version % 1000 // 10} assembles masks wrongly, mended in 12.9.1"


def _cuda_version() -> int:
    """Of the CUDA that is installed here, e.g. 12080 for 12.8; 0: there is none."""
    from jax._src.lib import cuda_versions

    if cuda_versions is None:
        return 0
    try:
        return cuda_versions.cuda_runtime_get_version()
    except RuntimeError:
        return 0
