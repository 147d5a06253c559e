"""What the server that forks ranks has imported; it runs nothing."""

import importlib
import importlib.util
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import accelerate  # noqa: E402, F401
import datasets  # noqa: E402, F401
import datasets.packaged_modules.json.json  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401

import accel_distill.generate  # noqa: E402, F401

for name in (
    "deepspeed",
    "tokenizers.trainers",
    "transformers.integrations.deepspeed",
    "transformers.tokenization_utils_tokenizers",
):
    if importlib.util.find_spec(name.split(".")[0]):
        importlib.import_module(name)
