"""Imported first of all: says which packages are missing, all at once, before the first of them is missed."""

import importlib.util
import sys

WANTED = (
    *("torch", "torchvision", "timm", "transformers", "datasets", "safetensors", "h5py", "pydantic", "jaxtyping"),
    *("filelock", "tensorboard", "rich"),
)

if missing := [name for name in WANTED if importlib.util.find_spec(name) is None]:
    sys.exit(f"Error: the suite cannot be run here: not installed: {', '.join(missing)}.")
