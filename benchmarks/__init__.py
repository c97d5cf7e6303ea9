"""Benchmarks of ssmtune: run from a checkout as `python -m benchmarks.<name>`; they are not part of the wheel."""

import os

os.environ.setdefault("SSMTUNE_LAZY", "1")  # the operators alone: a scan needs neither peft nor transformers
os.environ.setdefault("HF_HUB_OFFLINE", "1")
