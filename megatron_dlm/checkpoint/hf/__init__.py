"""HuggingFace checkpoints: import into any layout, export, comparison. One small table per model family."""
