"""Golden runs: short real runs through the launch commands, recorded exactly and compared after a restructuring.

    .venv/bin/python tools/golden_runs.py record golden.json.gz          # all cases; writes the file
    .venv/bin/python tools/golden_runs.py check golden.json.gz         # runs them again, exit status 1 on a difference
    .venv/bin/python tools/golden_runs.py check golden.json.gz --only='^fed/krum|^dev/'
    .venv/bin/python tools/golden_runs.py record golden.json.gz --only=REGEX   # these cases anew, the others kept
    .venv/bin/python tools/golden_runs.py check golden.json.gz --core          # one of each kind: a fifth of the time
    .venv/bin/python tools/golden_runs.py list

Run it from the root of the worktree whose code is meant: the code that runs is that of the current folder.

After a fix that changes results on purpose: `check`, read that only the cases that should differ do, then
`record FILE --only=THOSE` (or `record FILE` for all), and say why in the commit or the notes.

What a case is: a command (launch.federated, launch.case_study, launch.cross_device, launch.plan_network), a list of
flags, a number of fake CPU devices, and perhaps a round before whose end the run is stopped and then continued. The
base model (random, 2 layers, written by this script in Hugging Face's format) and the texts are made here from seeds,
without the package. The flags are parsed by absl and the command's main() is called, in worker processes of one
command and one number of devices each (the commands define the same flags). What is read is the run's folder:
metrics.jsonl, row.json, table.json, timeline.json and plan.json without IGNORED keys, the exported parameters (tuned
ones, clients' own, whole models), and where nothing is exported the params of the last checkpoint. Floats are kept
exactly (JSON of repr), arrays as SHA-256, norm and values (of long ones every n-th), so that a difference has a size.

After renaming: RENAMED_KEYS, RENAMED_FILES and RENAMED_ARRAYS below map what the record has to what new code writes;
flags are renamed in the cases themselves, which are found by their names. Keys that only the new code writes are noted
and are no difference, lost ones are.

Bit for bit holds on one machine with one version of jax. XLA may round otherwise where the same mathematics is
compiled in another shape; `check --rtol=1e-5` then says what differs by more than that, beside integers and strings,
which must be equal.
"""

import argparse
import base64
import contextlib
import gzip
import hashlib
import importlib
import io
import json
import math
import os
import pathlib
import random
import re
import shutil
import struct
import subprocess
import sys
import time
import warnings
import zlib
from typing import NamedTuple

import numpy as np

# What the record has -> what new code writes. Keys of records and rows; None: gone on purpose.
RENAMED_KEYS: dict[str, str | None] = {"message_norm": "update_norm"}
# Patterns of paths below a run's folder -> replacement, as re.sub takes them, tried in turn.
RENAMED_FILES: dict[str, str] = {}
# Patterns of array names -> replacement.
RENAMED_ARRAYS: dict[str, str] = {}
# Times and memory of this machine, not results.
IGNORED = {
    "round_s",
    "tokens_per_s",
    "fine_tune_s_per_client_round",
    "latency_ms_per_token",
    "latency_repeats",
    "fine_tune_repeats",
    "peak_memory_bytes",
}
LONGEST = 4096  # of longer arrays every n-th value is kept


class Case(NamedTuple):
    """name: of the record. command: launch.NAME. stop_at: the run is stopped when it reports this round, and continued;
    `same_as` names the case that it must then equal."""

    name: str
    command: str
    flags: tuple[str, ...]
    devices: int = 1
    stop_at: int | None = None
    same_as: str | None = None


FED = (
    "--checkpoint={base} --tokenizer=bytes --train_text={text}/train.jsonl --eval_text={text}/eval.jsonl --seq_len=16 "
    "--num_clients=6 --cohort_size=4 --num_rounds=3 --local_steps=2 --batch_size=2 --max_eval_windows=8 "
    "--checkpoint_every=3 --partition=quantity --skew=0.7 --lora_rank=4 --lora_alpha=8 --lora_lr=2e-2 "
    "--adapter_lr=2e-2 --adapter_dim=4 --prompt_tokens=3 --group_size=32 --seed=3"
)
DEV = "--num_clients=30 --cohort_size=8 --num_rounds=3 --eval_every=1 --checkpoint_every=3 --seed=3 --client_lr=0.3"
TEXT_TASK = "--task=agnews --train_text={text}/train.tsv --test_text={text}/test.tsv --alpha=0.5"
IMAGES = "--task=images --num_clients=1000 --cohort_size=3 --batch_size=5 --client_lr=0.05"
ALL = "--cohort_size=6"
ATTACKED = f"{ALL} --attack_fraction=0.34"

FEDERATED = {
    # algorithms
    "fedavg": "",
    "fedavg_all_clients": ALL,
    "fedavg_sgd": "--client_optimizer=sgd --lora_lr=0.5",
    "fedavg_uniform_weights": "--weighting=uniform",
    "fedavg_side_by_side": "--clients_per_pass=4",
    "fedavg_two_per_pass": "--clients_per_pass=2 --cohort_size=5",
    "fedavg_remat": "--remat",
    "fedavg_eval_every": "--eval_every=2",
    "fedprox": "--algorithm=fedprox --proximal=0.3",
    "fedavgm": "--algorithm=fedavgm --server_momentum=0.5",
    "server_lr": "--server_lr=0.5",
    "fedadam": "--algorithm=fedadam",
    "fedyogi": "--algorithm=fedyogi",
    "fedadagrad": "--algorithm=fedadagrad",
    "server_adam": "--server_optimizer=adam",
    "server_yogi": "--server_optimizer=yogi",
    "server_adagrad": "--server_optimizer=adagrad",
    "scaffold": "--algorithm=scaffold --lora_lr=0.5",
    "scaffold_server_lr": "--algorithm=scaffold --lora_lr=0.5 --server_lr=0.5 --weights=awq",
    "fedbuff": "--algorithm=fedbuff --buffer_size=3 --num_rounds=5",
    "fedbuff_server_lr": "--algorithm=fedbuff --server_lr=0.5 --num_rounds=5",
    "fedit": "--algorithm=fedit",
    "fedit_bias": "--algorithm=fedit --aggregation_bias",
    "ffa_lora": "--algorithm=ffa_lora",
    "fedsa_lora": "--algorithm=fedsa_lora",
    "flora": "--algorithm=flora",
    "flora_ranks": "--algorithm=flora --lora_ranks=1,2,4",
    "flexlora": "--algorithm=flexlora",
    "flexlora_ranks_awq": "--algorithm=flexlora --lora_ranks=1,2,4 --weights=awq",
    "hetlora": "--algorithm=hetlora",
    "hetlora_ranks": "--algorithm=hetlora --lora_ranks=1,2,4",
    # ways of tuning, weights, data
    "adapter": "--peft=adapter",
    "prompt": "--peft=prompt",
    "prefix": "--peft=prefix",
    "full": "--peft=full --full_lr=1e-2",
    "lora_dropout": "--lora_dropout=0.3",
    "lora_targets": "--lora_targets=q_proj,o_proj,down_proj",
    "rtn": "--weights=rtn",
    "awq_adapter": "--weights=awq --peft=adapter",
    "bfloat16": "--dtype=bfloat16",
    "partition_random": "--partition=random",
    "partition_dirichlet": "--partition=dirichlet --alpha=0.3",
    "partition_document": "--partition=document",
    # personalization, with the clients' own evaluation
    "ditto": "--personalization=ditto:0.5",
    "ditto_fedprox": "--personalization=ditto:0.5 --algorithm=fedprox --proximal=0.3",
    "apfl": "--personalization=apfl:0.3",
    "apfl_learned": "--personalization=apfl:learned",
    "fedper": "--personalization=fedper:1",
    "fedrep": "--personalization=fedrep:1",
    "private_lora": "--personalization=private_lora:2",
    "private_lora_fedit_awq": "--personalization=private_lora:1 --algorithm=fedit --weights=awq",
    "ditto_ffa_lora": "--personalization=ditto:0.5 --algorithm=ffa_lora",
    "ditto_adapter_topk": "--personalization=ditto:0.5 --peft=adapter --uplink=topk:0.3",
    "ditto_fedadam": "--personalization=ditto:0.5 --algorithm=fedadam",
    # aggregators, under attack or not
    "median": f"{ALL} --aggregator=median",
    "trimmed_mean": f"{ALL} --aggregator=trimmed_mean:0.2",
    "krum": f"{ALL} --aggregator=krum:0.2",
    "multi_krum": f"{ALL} --aggregator=multi_krum:0.2",
    "geometric_median": f"{ALL} --aggregator=geometric_median",
    "norm_bound": f"{ALL} --aggregator=norm_bound:0.05",
    "fltrust": f"{ALL} --aggregator=fltrust",
    "median_network": "--aggregator=median --network=chen --cohort_size=6",
    "krum_ditto": f"{ALL} --aggregator=krum:0.2 --personalization=ditto:0.5",
    # attacks
    "sign_flip": f"{ATTACKED} --attack=sign_flip:4",
    "scale_norm_bound": f"{ATTACKED} --attack=scale:20 --aggregator=norm_bound:0.1",
    "alie": f"{ATTACKED} --attack=alie:1.5 --aggregator=multi_krum:0.3",
    "alie_own_z": f"{ATTACKED} --attack=alie",
    "ipm": f"{ATTACKED} --attack=ipm:5 --aggregator=fltrust",
    "noise": f"{ATTACKED} --attack=noise:0.1 --aggregator=geometric_median",
    "label_flip": f"{ATTACKED} --attack=label_flip --aggregator=trimmed_mean:0.3",
    "sign_flip_scaffold": f"{ATTACKED} --attack=sign_flip --algorithm=scaffold --lora_lr=0.5",
    "noise_fedbuff": "--attack=noise:0.1 --attack_fraction=0.34 --algorithm=fedbuff",
    "label_flip_flora": f"{ATTACKED} --attack=label_flip --algorithm=flora",
    # privacy
    "dp_noise": "--privacy=dp --dp_noise=0.5 --dp_clip=0.1",
    "dp_epsilon": "--privacy=dp --dp_epsilon=8 --dp_clip=0.1",
    "dp_adaptive": "--privacy=dp --dp_noise=0.5 --dp_clip=0.1 --dp_quantile=0.5",
    "dp_cap": "--privacy=dp --dp_noise=0.5 --dp_clip=0.1 --dp_cap=20",
    "dp_fedadam": "--privacy=dp --dp_noise=0.5 --dp_clip=0.1 --algorithm=fedadam",
    "dp_ditto": "--privacy=dp --dp_noise=0.5 --dp_clip=0.1 --personalization=ditto:0.5",
    "dp_sgd": "--privacy=dp_sgd --dp_noise=0.6 --dp_clip=0.5",
    "dp_sgd_epsilon": "--privacy=dp_sgd --dp_epsilon=20 --dp_clip=0.5",
    "dp_sgd_label_flip": f"{ATTACKED} --privacy=dp_sgd --dp_noise=0.6 --dp_clip=0.5 --attack=label_flip",
    "secure": "--privacy=secure",
    "secure_8bit": "--privacy=secure --secure_bits=8 --secure_clip=0.1",
    "secure_dp": "--privacy=dp,secure --dp_noise=0.5 --dp_clip=0.1",
    "secure_dp_sgd": "--privacy=dp_sgd,secure --dp_noise=0.6 --dp_clip=0.5",
    "secure_network": "--privacy=secure --network=chen --cohort_size=6",
    "secure_scaffold": "--privacy=secure --algorithm=scaffold --lora_lr=0.5",
    "secure_ditto": "--privacy=secure --personalization=ditto:0.5",
    # the uplink
    "qsgd": "--uplink=qsgd:4",
    "rounding": "--uplink=rounding:4",
    "topk": "--uplink=topk:0.2",
    "lowrank": "--uplink=lowrank:1",
    "topk_scaffold": "--uplink=topk:0.2 --algorithm=scaffold --lora_lr=0.5",
    "rounding_fedbuff": "--uplink=rounding:4 --algorithm=fedbuff",
    "qsgd_median": "--uplink=qsgd:4 --aggregator=median --cohort_size=6",
    "topk_fedsa_lora": "--uplink=topk:0.2 --algorithm=fedsa_lora",
    "topk_network": "--uplink=topk:0.2 --network=chen --cohort_size=6",
    "rounding_dp": "--uplink=rounding:4 --privacy=dp --dp_noise=0.5 --dp_clip=0.1",
    # who takes part
    "poisson": "--selection=poisson",
    "oort": "--selection=oort --num_rounds=5",
    "oort_network": "--selection=oort --network=umi_20 --num_rounds=4",
    "deadline": "--selection=deadline --network=umi_20 --deadline_s=0.3",
    # networks and what is done about losses
    "net_umi_20": "--network=umi_20 --device=phone,vehicle",
    "net_chen": f"--network=chen {ALL}",
    "net_yang": "--network=yang",
    "net_fedcs": "--network=fedcs --peft=full --full_lr=1e-2",
    "net_tran": "--network=tran --device=edge_box",
    "net_facts_20": "--network=facts_20",
    "net_umi_20_tight": f"--network=umi_20 --deadline_s=0.05 {ALL}",
    "net_unbiased": f"--network=chen --aggregation=unbiased {ALL}",
    "net_unbiased_fedprox": f"--network=chen --aggregation=unbiased {ALL} --algorithm=fedprox --proximal=0.3",
    "net_last_delta": f"--network=chen --aggregation=last_delta {ALL} --num_rounds=4",
    "net_last_delta_topk": f"--network=chen --aggregation=last_delta {ALL} --num_rounds=4 --uplink=topk:0.2",
    "net_over_the_air": f"--network=chen --aggregation=over_the_air {ALL}",
    "net_over_the_air_truncated": f"--network=umi_20 --aggregation=over_the_air_truncated {ALL}",
    "net_over_the_air_ditto": f"--network=umi_20 --aggregation=over_the_air {ALL} --personalization=ditto:0.5",
    "net_over_the_air_dp_sgd": f"--network=umi_20 --aggregation=over_the_air {ALL} --privacy=dp_sgd --dp_noise=0.6",
    "net_scaffold": f"--network=chen {ALL} --algorithm=scaffold --lora_lr=0.5",
    "net_hetlora_ranks": f"--network=chen {ALL} --algorithm=hetlora --lora_ranks=1,2,4",
    "net_flora_ranks": f"--network=umi_20 {ALL} --algorithm=flora --lora_ranks=1,2,4",
    "net_fedbuff": "--network=umi_20 --device=phone,vehicle --algorithm=fedbuff --buffer_size=2 --num_rounds=5",
    "net_ditto": f"--network=chen {ALL} --personalization=ditto:0.5",
    "net_dp": "--network=chen --privacy=dp --dp_noise=0.5 --dp_clip=0.1",
    "net_sign_flip_last_delta": f"--network=chen --aggregation=last_delta {ATTACKED} --attack=sign_flip:4",
}
RESUMED = (  # stopped in round 3 after the checkpoint of round 2
    "fedavg",
    "fedadam",
    "scaffold",
    "fedbuff",
    "hetlora_ranks",
    "flora",
    "ditto",
    "apfl_learned",
    "private_lora",
    "topk",
    "dp_adaptive",
    "secure",
    "oort",
    "net_last_delta",
    "net_umi_20",
    "net_fedbuff",
    "net_over_the_air",
)
ON_THREE_DEVICES = (
    "fedavg",
    "fedavg_two_per_pass",
    "scaffold",
    "fedbuff",
    "flora_ranks",
    "hetlora_ranks",
    "ditto",
    "topk",
    "qsgd",
    "krum",
    "fltrust",
    "sign_flip",
    "alie",
    "dp_noise",
    "secure",
    "dp_sgd",
    "net_chen",
    "net_last_delta",
    "net_over_the_air",
)
CROSS_DEVICE = {
    "linear": "",
    "linear_vmap": "--execution=vmap",
    "linear_scan": "--execution=scan",
    "linear_steps": "--execution=steps",
    "linear_epochs": "--local_epochs=2 --batch_size=7",
    "linear_uniform_weights": "--weighting=uniform",
    "linear_sparse_looks": "--eval_every=2 --num_rounds=5 --checkpoint_every=3",
    "linear_centralized": "--centralized_epochs=2 --centralized_lr=0.1",
    "fedprox": "--algorithm=fedprox --proximal=0.3",
    "fedprox_steps": "--algorithm=fedprox --proximal=0.3 --execution=steps",
    "fedprox_vmap": "--algorithm=fedprox --proximal=0.3 --execution=vmap",
    "fedavgm": "--algorithm=fedavgm",
    "fedadam": "--algorithm=fedadam",
    "fedyogi": "--algorithm=fedyogi",
    "fedadagrad": "--algorithm=fedadagrad",
    "server_adam": "--server_optimizer=adam --server_lr=0.02",
    "scaffold": "--algorithm=scaffold",
    "scaffold_vmap": "--algorithm=scaffold --execution=vmap",
    "poisson": "--selection=poisson",
    "dp": "--privacy=dp --dp_epsilon=8 --dp_clip=0.5",
    "dp_adaptive": "--privacy=dp --dp_noise=0.5 --dp_clip=0.5 --dp_quantile=0.5",
    "dp_cap": "--privacy=dp --dp_noise=0.5 --dp_clip=0.5 --dp_cap=40 --execution=vmap",
    "median": "--aggregator=median",
    "trimmed_mean": "--aggregator=trimmed_mean:0.2 --execution=steps",
    "krum": "--aggregator=krum:0.2",
    "multi_krum": "--aggregator=multi_krum:0.2",
    "geometric_median": "--aggregator=geometric_median",
    "norm_bound": "--aggregator=norm_bound:0.5",
    "sign_flip": "--attack=sign_flip:4 --attack_fraction=0.34",
    "scale": "--attack=scale:20 --attack_fraction=0.34 --execution=steps",
    "alie": "--attack=alie:1.5 --attack_fraction=0.34",
    "ipm": "--attack=ipm:5 --attack_fraction=0.34",
    "noise": "--attack=noise:0.1 --attack_fraction=0.34",
    "label_flip": "--attack=label_flip --attack_fraction=0.34",
    "qsgd": "--uplink=qsgd:4",
    "rounding": "--uplink=rounding:4",
    "topk": "--uplink=topk:0.2",
    "topk_steps": "--uplink=topk:0.2 --execution=steps",
    "topk_scaffold": "--uplink=topk:0.2 --algorithm=scaffold",
    "lowrank": "--uplink=lowrank:2",
    "images": IMAGES,
    "images_scan": f"{IMAGES} --execution=scan",
    "images_scaffold": f"{IMAGES} --algorithm=scaffold",
    "text": TEXT_TASK,
    "text_fedadam_centralized": f"{TEXT_TASK} --algorithm=fedadam --centralized_epochs=1",
    "text_label_flip_median": f"{TEXT_TASK} --attack=label_flip --attack_fraction=0.34 --aggregator=median",
}
DEV_RESUMED = ("linear", "fedadam", "scaffold", "topk", "dp_adaptive", "linear_steps")
DEV_ON_THREE_DEVICES = ("linear", "linear_steps", "scaffold", "dp", "krum", "topk", "fedadam")
CASE_STUDY = {
    "all": "--peft=lora,adapter,prompt,prefix --weights=fp,awq --num_rounds=2",
    "full": "--peft=full,lora --weights=fp --num_rounds=2 --full_lr=1e-2",
    "rtn_3bit": "--peft=lora --weights=rtn --bits=3 --num_rounds=2",
    "network": "--peft=lora,adapter --weights=fp,rtn --num_rounds=2 --network=umi_20",
}
CORE = (  # --core: one of each kind
    r"^fed/(fedavg|fedprox|fedadam|scaffold|fedbuff|fedit_bias|fedsa_lora|flora_ranks|hetlora_ranks|full|ditto|"
    r"apfl_learned|fedper|private_lora|trimmed_mean|krum|fltrust|alie|label_flip|dp_adaptive|dp_sgd|secure|qsgd|topk|"
    r"oort|net_umi_20|net_unbiased|net_last_delta|net_over_the_air)$|^fed_(4|2\+2)/(scaffold|topk|ditto)$|"
    r"^fed_3dev/(fedbuff|net_chen)$|^dev/(linear|linear_steps|scaffold|dp_adaptive|topk|label_flip|images|text)$|"
    r"^dev_(4|2\+2)/scaffold$|^study/network$|^plan/tiny_topk$"
)
PLAN = {
    "7b": "--model=7b --peft=lora,full --weights=fp16,int4 --network=umi_20 --device=phone,vehicle --rounds=2",
    "tiny_topk": "--model=tiny --peft=lora --weights=fp32 --network=yang --device=phone --uplink=topk:0.1 --rounds=2",
}


def cases() -> dict[str, Case]:
    """All cases by name."""
    found = [Case(f"fed/{name}", "federated", tuple(f"{FED} {own}".split())) for name, own in FEDERATED.items()]
    for name in RESUMED:
        rounds = "" if "--num_rounds" in FEDERATED[name] else "--num_rounds=4"
        flags = tuple(f"{FED} {FEDERATED[name]} {rounds} --checkpoint_every=2".split())
        found.append(Case(f"fed_4/{name}", "federated", flags))
        found.append(Case(f"fed_2+2/{name}", "federated", flags, stop_at=3, same_as=f"fed_4/{name}"))
    found += [
        Case(f"fed_3dev/{name}", "federated", tuple(f"{FED} {FEDERATED[name]}".split()), devices=3)
        for name in ON_THREE_DEVICES
    ]
    found += [Case(f"dev/{name}", "cross_device", tuple(f"{DEV} {own}".split())) for name, own in CROSS_DEVICE.items()]
    for name in DEV_RESUMED:
        flags = tuple(f"{DEV} {CROSS_DEVICE[name]} --num_rounds=4 --checkpoint_every=2".split())
        found.append(Case(f"dev_4/{name}", "cross_device", flags))
        found.append(Case(f"dev_2+2/{name}", "cross_device", flags, stop_at=3, same_as=f"dev_4/{name}"))
    found += [
        Case(f"dev_3dev/{name}", "cross_device", tuple(f"{DEV} {CROSS_DEVICE[name]}".split()), devices=3)
        for name in DEV_ON_THREE_DEVICES
    ]
    found += [Case(f"study/{name}", "case_study", tuple(f"{FED} {own}".split())) for name, own in CASE_STUDY.items()]
    small = [
        flag for flag in FED.split() if not flag.startswith(("--checkpoint=", "--tokenizer=", "--train", "--eval_t"))
    ]
    pretrained = (*small, "--model=tiny", "--pretrain_steps=3", "--pretrain_batch_size=6", "--num_rounds=2")
    found.append(Case("study/pretrained", "case_study", (*pretrained, "--peft=lora", "--weights=fp,awq")))
    found.append(Case("fed/pretrained", "federated", pretrained))
    found.append(Case("fed_3dev/pretrained", "federated", pretrained, devices=3))
    found += [Case(f"plan/{name}", "plan_network", tuple(own.split())) for name, own in PLAN.items()]
    return {case.name: case for case in found}


# Inputs, made without the package.


def write_inputs(folder: pathlib.Path) -> None:
    """folder/base, a random LLaMA of 2 layers in Hugging Face's format; folder/text, texts with and without labels."""
    base, text = folder / "base", folder / "text"
    for path in (base, text):
        path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 272,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (base / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (272, 32), "model.norm.weight": (32,), "lm_head.weight": (272, 32)}
    for i in range(2):
        block = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32)}
        block |= {"self_attn.o_proj": (32, 32), "mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32)}
        block |= {"mlp.down_proj": (32, 64), "input_layernorm": (32,), "post_attention_layernorm": (32,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    rng, header, blobs, start = random.Random(7), {}, [], 0
    for name, shape in shapes.items():
        draw = (lambda: 1.0 + rng.gauss(0, 0.1)) if len(shape) == 1 else (lambda: rng.gauss(0, 0.2))
        blob = struct.pack(f"<{math.prod(shape)}f", *(draw() for _ in range(math.prod(shape))))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + len(blob)]}
        start += len(blob)
        blobs.append(blob)
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)
    (base / "model.safetensors").write_bytes(struct.pack("<Q", len(packed)) + packed + b"".join(blobs))
    words = ["".join(rng.choice("aeioubcdfghlmnprst") for _ in range(rng.randint(2, 8))) for _ in range(150)]

    def document(topic: int, length: int) -> str:
        own = words[30 * topic : 30 * topic + 60]
        return " ".join(rng.choice(own) for _ in range(length)).capitalize() + "."

    for name, count in (("train", 40), ("eval", 6)):
        lines = [json.dumps({"text": document(i % 4, rng.randint(15, 45))}) + "\n" for i in range(count)]
        (text / f"{name}.jsonl").write_text("".join(lines))
    labels = ("World", "Sports", "Business", "Sci/Tech")
    for name, count in (("train", 600), ("test", 120)):
        topics = [rng.randrange(4) for _ in range(count)]
        lines = [f"{document(topic, rng.randint(4, 12))}\t{labels[topic]}\n" for topic in topics]
        (text / f"{name}.tsv").write_text("".join(lines))


# One run.


class Stopped(Exception):
    """Raised in a command's report of a round, to stop it there."""


def run_case(case: Case, module, work: pathlib.Path) -> dict:
    """The record of a case: {"files": {path: content}, "arrays": {name: figures}}, or {"error": text}."""
    from absl import flags

    out = work / "runs" / f"{os.getpid()}"
    shutil.rmtree(out, ignore_errors=True)
    given = [flag.format(base=work / "base", text=work / "text") for flag in case.flags] + [f"--out={out}"]
    say, log = module.app.say, io.StringIO()

    def stopping(text: str) -> None:
        if f"round {case.stop_at}:" in text:
            raise Stopped(text)
        say(text)

    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            if case.stop_at is not None:
                module.app.say = stopping
                flags.FLAGS([case.command, *given])
                try:
                    module.main()
                    return {"error": f"did not report round {case.stop_at}"}
                except Stopped:
                    pass
                finally:
                    module.app.say = say
                    flags.FLAGS.unparse_flags()
            flags.FLAGS([case.command, *given])
            module.main()
        return read_run(out)
    except Exception as e:  # a case that fails is reported, the others go on
        import traceback

        (work / "logs").mkdir(exist_ok=True)
        path = work / "logs" / (case.name.replace("/", "-") + ".log")
        path.write_text(log.getvalue() + traceback.format_exc())
        return {"error": f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"}
    finally:
        flags.FLAGS.unparse_flags()
        shutil.rmtree(out, ignore_errors=True)


def read_run(out: pathlib.Path) -> dict:
    """What a run left in its folder."""
    files, arrays = {}, {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        copied = name.startswith("setups/") and (out / path.name).exists()  # the command's report has it too
        if path.name == "metrics.jsonl" and not copied:
            files[name] = [without_ignored(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name in ("row.json", "timeline.json", "table.json", "plan.json") and not copied:
            if path.name != "row.json" or not name.startswith("setups/"):
                files[name] = without_ignored(json.loads(path.read_text()))
        elif path.suffix == ".safetensors" and not name.startswith("base/"):
            arrays |= {f"{name}:{key}": figures(x) for key, x in read_safetensors(path).items()}
    if not arrays:
        for folder in sorted(out.rglob("checkpoints")):
            steps = sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
            name = folder.relative_to(out).as_posix()
            arrays |= {f"{name}:{key}": figures(x) for key, x in checkpoint_params(steps[-1]).items()}
    return {"files": files, "arrays": arrays}


def checkpoint_params(step: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays below a node "params" of an orbax checkpoint."""
    import jax
    import orbax.checkpoint as ocp

    place = step / "default" if (step / "default").exists() else step
    with warnings.catch_warnings(action="ignore"), ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(place.absolute())  # warns that shardings come from the file
    found = {}
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        if "params" in keys:
            found["/".join(keys[keys.index("params") :])] = np.asarray(x)
    return found


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file; bfloat16 as its bits."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    dtypes = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I64": "<i8", "U8": "u1", "F64": "<f8"}
    found = {}
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            data = raw[8 + length + start : 8 + length + end]
            found[name] = np.frombuffer(data, dtypes[entry["dtype"]]).reshape(entry["shape"])
    return found


def without_ignored(value):
    """JSON without the keys of IGNORED."""
    if isinstance(value, dict):
        return {k: without_ignored(v) for k, v in value.items() if k not in IGNORED}
    return [without_ignored(v) for v in value] if isinstance(value, list) else value


def figures(x: np.ndarray) -> dict:
    """What is kept of an array."""
    x = np.ascontiguousarray(x)
    flat = x.reshape(-1)
    kept = flat[:: -(-max(x.size, 1) // LONGEST)]
    return {
        "dtype": str(x.dtype),
        "shape": list(x.shape),
        "sha256": hashlib.sha256(x.tobytes()).hexdigest(),
        "norm": float(np.sqrt(np.sum(np.square(flat.astype(np.float64))))),
        "values": base64.b64encode(zlib.compress(kept.tobytes(), 9)).decode(),
    }


def values_of(kept: dict) -> np.ndarray:
    """The values that `figures` kept, float64."""
    return np.frombuffer(zlib.decompress(base64.b64decode(kept["values"])), kept["dtype"]).astype(np.float64)


# Comparing.


def differences(old: dict, new: dict, rtol: float) -> tuple[list[str], list[str]]:
    """(differences, notes) of two records of a case."""
    if "error" in old or "error" in new:
        return [f"failed: recorded {old.get('error', 'fine')}, now {new.get('error', 'fine')}"], []
    wrong, notes = [], []
    old_files = {renamed(name, RENAMED_FILES): content for name, content in old["files"].items()}
    old_arrays = {renamed(renamed(name, RENAMED_FILES), RENAMED_ARRAYS): x for name, x in old["arrays"].items()}
    for kind, before, now in (("file", old_files, new["files"]), ("array", old_arrays, new["arrays"])):
        wrong += [f"{kind} {name} is gone" for name in before if name not in now]
        notes += [f"{kind} {name} is new" for name in now if name not in before]
    for name in sorted(old_files.keys() & new["files"].keys()):
        compare_json(old_files[name], new["files"][name], name, rtol, wrong, notes)
    for name in sorted(old_arrays.keys() & new["arrays"].keys()):
        a, b = old_arrays[name], new["arrays"][name]
        if (a["dtype"], a["shape"]) != (b["dtype"], b["shape"]):
            wrong.append(f"{name}: {a['dtype']}{a['shape']} is now {b['dtype']}{b['shape']}")
        elif a["sha256"] != b["sha256"]:
            x, y = values_of(a), values_of(b)
            off = float(np.max(np.abs(x - y), initial=0.0) / (np.max(np.abs(x), initial=0.0) or 1.0))
            if not off <= rtol or rtol == 0:
                wrong.append(f"{name}: off by {off:.2e} of its largest value (norm {a['norm']!r} -> {b['norm']!r})")
    return wrong, notes


def compare_json(old, new, place: str, rtol: float, wrong: list, notes: list) -> None:
    """Appends what differs, with its place."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = {key: RENAMED_KEYS.get(key, key) for key in old}
        for key, name in names.items():
            if name is None or name in IGNORED:
                continue
            if name not in new:
                wrong.append(f"{place}.{key} is gone")
            else:
                compare_json(old[key], new[name], f"{place}.{key}", rtol, wrong, notes)
        notes += [f"{place}.{key} is new" for key in new if key not in names.values()]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new)):
            compare_json(a, b, f"{place}[{i}]", rtol, wrong, notes)
    elif isinstance(old, float) and isinstance(new, float | int):
        same = old == new or (math.isnan(old) and math.isnan(new))
        if not same and not (rtol and math.isclose(old, new, rel_tol=rtol, abs_tol=rtol * 1e-3)):
            wrong.append(f"{place}: {old!r} -> {new!r} (off by {abs(new - old) / (abs(old) or 1.0):.2e})")
    elif old != new:
        wrong.append(f"{place}: {str(old)[:80]} -> {str(new)[:80]}")


def renamed(name: str, table: dict[str, str]) -> str:
    """The name after the substitutions of a table."""
    for pattern, replacement in table.items():
        name = re.sub(pattern, replacement, name)
    return name


# Workers and commands.


def work_of(args) -> dict[str, dict]:
    """Runs the asked-for cases in worker processes of one command and one number of devices; {name: record}."""
    chosen = [case for case in cases().values() if re.search(args.only, case.name)]
    if args.core:
        chosen = [case for case in chosen if re.search(CORE, case.name)]
    if not chosen:
        sys.exit(f"--only={args.only} fits no case")
    if args.shuffle is not None:
        random.Random(args.shuffle).shuffle(chosen)
    groups: dict[tuple[str, int], list[str]] = {}
    for case in chosen:
        groups.setdefault((case.command, case.devices), []).append(case.name)
    batches = [(key, names[i : i + 30]) for key, names in groups.items() for i in range(0, len(names), 30)]
    batches.sort(key=lambda batch: -len(batch[1]))
    write_inputs(args.work)
    waiting, running, records = list(enumerate(batches)), [], {}
    while waiting or running:
        if waiting and len(running) < args.jobs:
            number, ((command, devices), names) = waiting.pop(0)
            result = args.work / f"result-{os.getpid()}-{number}.json"
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
                + " --xla_backend_optimization_level=0",  # a third less to compile
                "JAX_COMPILATION_CACHE_DIR": str(args.work / "jax_cache"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                "PYTHONHASHSEED": "0",
                "MPLBACKEND": "Agg",
            }
            line = [sys.executable, __file__, "worker", str(result), "--work", str(args.work), "--command", command]
            running.append((subprocess.Popen([*line, "--cases", *names], env=environment), result, names))
            continue
        time.sleep(0.1)
        for entry in [entry for entry in running if entry[0].poll() is not None]:
            running.remove(entry)
            process, result, names = entry
            found = json.loads(result.read_text()) if result.exists() else {}
            result.unlink(missing_ok=True)
            dead = {"error": f"the worker ended with status {process.returncode}"}
            records |= {name: found.get(name, dead) for name in names}
    return records


def worker(args) -> None:
    """Runs cases of one command in this process and writes their records."""
    sys.path.insert(0, os.getcwd())
    import matplotlib.figure

    matplotlib.figure.Figure.savefig = lambda *_, **__: None  # plots are no part of a record, and slow
    module, records, known = importlib.import_module(f"launch.{args.command}"), {}, cases()
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    for name in args.cases:
        begin, used = time.perf_counter(), time.process_time()
        records[name] = run_case(known[name], module, args.work)
        ended = records[name].get("error", "")
        begin, used = time.perf_counter() - begin, time.process_time() - used
        print(f"{name:45s} {begin:6.1f} s, of the CPU {used:5.1f} s  {ended}", flush=True)
        args.file.write_text(json.dumps(records))


def unequal_twins(records: dict[str, dict]) -> list[str]:
    """Runs that were stopped and continued and do not equal their whole twin."""
    found = []
    for case in cases().values():
        if case.same_as in records and case.name in records:
            wrong, _ = differences(records[case.same_as], records[case.name], 0.0)
            found += [f"{case.name} is not {case.same_as}: {line}" for line in wrong[:3]]
    return found


def load(path: pathlib.Path) -> dict:
    raw = path.read_bytes()
    return json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)


def save(path: pathlib.Path, content: dict) -> None:
    raw = json.dumps(content, indent=1, sort_keys=True).encode()
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)


def record(args) -> int:
    """Writes the file; exit status 1 where a case failed or a continued run is not its whole twin."""
    whole = load(args.file) if args.file.exists() and (args.only or args.core) else {"cases": {}}
    found = work_of(args)
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()
    import jax

    whole |= {"commit": git("rev-parse", "--short", "HEAD"), "jax": jax.__version__}
    whole["cases"] |= found
    save(args.file, whole)
    failed = [f"{name}: {r['error']}" for name, r in found.items() if "error" in r]
    twins = unequal_twins(found)
    print("\n".join([*failed, *twins]))
    print(f"{len(found)} cases recorded in {args.file}, {len(failed)} failed, {len(twins)} differ after a stop")
    return 1 if failed or twins else 0


def check(args) -> int:
    """Compares; exit status 1 on a difference."""
    whole = load(args.file)
    found, bad, noted = work_of(args), [], {}
    for name, now in found.items():
        if name not in whole["cases"]:
            print(f"NEW   {name}: not in {args.file}")
            continue
        wrong, notes = differences(whole["cases"][name], now, args.rtol)
        for note in notes:
            short = re.sub(r"\[\d+\]", "[]", note)
            noted[short] = noted.get(short, 0) + 1
        if wrong:
            bad.append(name)
            print(f"DIFF  {name}: {len(wrong)} differences")
            print("\n".join(f"        {line}" for line in wrong[: args.lines]))
    lost = [name for name in whole["cases"] if name not in cases()]
    twins = unequal_twins(found)
    print("\n".join([f"note  {note} ({count} times)" for note, count in noted.items()] + twins))
    print("\n".join(f"LOST  {name} is in {args.file} and no longer a case" for name in lost))
    print(f"{len(found)} cases, {len(bad)} differ from {args.file} (commit {whole['commit']}): {' '.join(bad)}")
    return 1 if bad or lost or twins else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "check", "list", "worker"])
    parser.add_argument("file", nargs="?", type=pathlib.Path)
    parser.add_argument("--only", default="", help="regular expression over the cases' names")
    parser.add_argument("--core", action="store_true", help="one case of each kind, for the inner loop")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes at a time")
    parser.add_argument("--rtol", type=float, default=0.0, help="check: floats may be off by so much")
    parser.add_argument("--lines", type=int, default=4, help="check: differences shown per case")
    parser.add_argument("--shuffle", type=int, help="seed of another order of the cases")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/tmp/golden_runs"), help="scratch folder")
    parser.add_argument("--command", help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.action == "list":
        print("\n".join(cases()))
        return 0
    if args.file is None:
        parser.error("which FILE?")
    args.work = args.work.absolute()
    if args.action == "worker":
        worker(args)
        return 0
    begin, status = time.perf_counter(), {"record": record, "check": check}[args.action](args)
    print(f"{time.perf_counter() - begin:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
