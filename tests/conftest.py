"""Environment of the suite: no network, no compiler, few threads; set before torch is imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))

from posttrain import environment

environment.prepare()
