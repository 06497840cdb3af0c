"""Makes lora_cat.npz: what Hugging Face PEFT's add_weighted_adapter(combination_type="cat") makes of three adapters.

torch 2.13.0, peft 0.21.2, transformers 5.24.0, Python 3.11:  cd tests/golden && /tmp/golden/bin/python make_lora_cat.py

Adapters of ranks 2, 3 and 4 on a Linear of 7 inputs and 5 outputs, alpha = 2 rank (so alpha / rank is 2 for all),
weights .5, .3 and .2. Arrays in this project's layout: a0 [7, 2], b0 [2, 5] and so on; weights [3]; delta [7, 5], the
merged adapter's whole change of the weight, PEFT's scaling included.
"""

import pathlib

import numpy as np
import peft
import torch

RANKS, WEIGHTS = (2, 3, 4), (0.5, 0.3, 0.2)


def main() -> None:
    rng = np.random.default_rng(0)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(7, 5, bias=False)), _config(RANKS[0]), "client0")
    for i, rank in enumerate(RANKS[1:], start=1):
        model.add_adapter(f"client{i}", _config(rank))
    layer, found = model.base_model.model[0], {}
    for i, rank in enumerate(RANKS):
        found[f"a{i}"] = rng.normal(size=(7, rank)).astype(np.float32)
        found[f"b{i}"] = rng.normal(size=(rank, 5)).astype(np.float32)
        with torch.no_grad():
            layer.lora_A[f"client{i}"].weight.copy_(torch.from_numpy(found[f"a{i}"].T))
            layer.lora_B[f"client{i}"].weight.copy_(torch.from_numpy(found[f"b{i}"].T))
    model.add_weighted_adapter([f"client{i}" for i in range(3)], list(WEIGHTS), "all", combination_type="cat")
    found["weights"] = np.asarray(WEIGHTS, np.float32)
    found["delta"] = layer.get_delta_weight("all").detach().numpy().T
    np.savez_compressed(pathlib.Path(__file__).parent / "lora_cat.npz", **found)


def _config(rank: int) -> peft.LoraConfig:
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"])


if __name__ == "__main__":
    main()
