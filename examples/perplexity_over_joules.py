"""A plot of what learning costs: perplexity over joules, from the folders of runs over a network.

python -m launch.federated --network=umi_20 --out=runs/umi
python -m launch.federated --network=umi_20 --uplink=rounding:4 --out=runs/umi_4bit
python examples/perplexity_over_joules.py runs/umi runs/umi_4bit
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")  # a file only
import matplotlib.pyplot as plt


def history(folder: pathlib.Path) -> tuple[list[float], list[float]]:
    """(joules of all clients since the start, perplexity) of every evaluated round."""
    (path,) = sorted(folder.rglob("metrics.jsonl"))
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    evaluated = [record for record in records if "ppl" in record and "joules" in record]
    if not evaluated:
        raise SystemExit(f"{folder} holds no run over a network")
    return [record["joules"] for record in evaluated], [record["ppl"] for record in evaluated]


def main(folders: list[str], path: str = "perplexity_over_joules.png") -> None:
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for folder in folders:
        ax.plot(*history(pathlib.Path(folder)), marker=".", label=pathlib.Path(folder).name)
    ax.set(xlabel="energy of all clients, J", ylabel="perplexity")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(path, dpi=120)
    plt.close(fig)
    print(path)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(sys.argv[1:])
