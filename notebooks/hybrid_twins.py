"""What is attention still for? Small twins of the hybrid, trained alike on one retrieval and one arithmetic task.

    python notebooks/hybrid_twins.py --seeds 3 --out assets/hybrid_twins.json

The twins are stacks of seven layers and a quarter of a million parameters. They differ in one thing, the mixer of four
of the layers:

    hybrid                  M-M*-M-     three Mamba-2 layers and one attention layer
    Mamba only              M-MM-M-     the attention layer replaced
    attention only          *-**-*-     the Mamba layers replaced; no positions, as in the hybrid
    attention + positions   *-**-*-     the same with learned positions added to the embedding, as in a GPT

The last one is a control. Attention without positions is no model that anybody would train; with positions it is.

All see the same rows in the same order (the data depend on the task and the seed alone), with the same number of steps,
learning rate and initialisation rule. Scored are held-out questions: a response counts when every token of trace and
answer is the model's first choice. Greedy generation writes such a response exactly when each next token is the first
choice after the right ones before it, so one forward pass tells what free generation would give; notebook 02_the_hybrid
holds this against `evaluate.accuracy`, which does generate.

The function that trains one twin is `train_twin`; the notebook calls it, too.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn as nn

import tasks
import train
from data import Blend, pack_shard
from model import ModelConfig, build
from tokenizer import SPECIALS, TURN, train_bpe  # noqa: F401
