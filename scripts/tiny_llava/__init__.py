"""The parts of `scripts/train_tiny_llava.py`: packed batches, training stages, evaluation."""
