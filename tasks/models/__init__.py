"""Base models: a hub name, a folder, a GGUF file or the bundled default, made ready for MLX."""
