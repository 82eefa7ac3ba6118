"""Where MLX computes: CPU, Metal or CUDA."""

from __future__ import annotations


def on_gpu() -> bool:
    """Whether MLX's default device is a GPU."""
    import mlx.core as mx

    return bool(mx.default_device() == mx.gpu)


def device_name() -> str:
    """MLX's default device in words: "CPU", "Metal: Apple M3 Max", "CUDA: NVIDIA H200"."""
    import mlx.core as mx

    if not on_gpu():
        return "CPU"
    backend = "Metal" if mx.metal.is_available() else "CUDA"
    return f"{backend}: {mx.device_info()['device_name']}"
