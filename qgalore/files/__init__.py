"""Reading and writing: safetensors, checkpoints and exports, each whole or not at all."""
