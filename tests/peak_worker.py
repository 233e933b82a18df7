"""Runs a command and prints the largest sum of bytes of tensors alive, by class."""

import json
import os
import sys

import torch

from prefuse.trainer.cli import main
from prefuse.trainer.plan.live import LiveBytes

with LiveBytes(resizing="RANK" in os.environ) as live:
    main(sys.argv[1:])
assert torch.get_num_threads() == 1
print("PEAK " + json.dumps(live.peak))
