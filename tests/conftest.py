"""Shared by all tests: shape annotations are checked at run time, threads are kept few."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# ranks are forked gloo processes; a GPU, where there is one, is not for them
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
