"""GRPO written once, as pure tensor functions: tensors in, tensors out; no trainer, no I/O, imports only torch."""
