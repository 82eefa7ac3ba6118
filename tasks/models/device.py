"""Where MLX computes: CPU, Metal or CUDA."""

from __future__ import annotations


def on_gpu() -> bool:
    """Whether MLX's default device is a GPU."""
    import mlx.core as mx

    return bool(mx.default_device() == mx.gpu)


def own_memory_bytes() -> int:
    """Memory of a GPU that does not share the machine's; 0 on Metal and on a CPU."""
    import mlx.core as mx

    if not on_gpu() or mx.metal.is_available():
        return 0
    return int(mx.device_info().get("total_memory", 0))


def device_name() -> str:
    """MLX's default device in words: "CPU", "Metal: Apple M3 Max", "CUDA: NVIDIA H200"."""
    import mlx.core as mx

    if not on_gpu():
        return "CPU"
    backend = "Metal" if mx.metal.is_available() else "CUDA"
    return f"{backend}: {mx.device_info()['device_name']}"
