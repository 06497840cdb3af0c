"""Keys for a federation on real machines: TLS for the server, an identity for every node and every client.

  python -m launch.flower_keys --host=fl.example.org --num_nodes=2 --num_clients=20 --keys=keys

Copy keys/server to the server and keys/nodeI to node I, and nothing else anywhere: keys/ca.key signs further
certificates, so keep it off line. Client c belongs to node c modulo --num_nodes.
"""

import pathlib

from absl import flags

from fmfl_jax.deploy.keys import make_keys
from launch import app

_HOST = flags.DEFINE_list("host", ["localhost", "127.0.0.1"], "Names and addresses that nodes reach the server by.")
_NUM_NODES = flags.DEFINE_integer("num_nodes", 2, "Machines with clients.", lower_bound=1)
_NUM_CLIENTS = flags.DEFINE_integer("num_clients", 2, "Clients, dealt to the nodes in turn.", lower_bound=1)
_DAYS = flags.DEFINE_integer("days", 365, "How long the certificates hold.", lower_bound=1)
_KEYS = flags.DEFINE_string("keys", "keys", "Folder to make; it must not exist.")


def main():
    folder = pathlib.Path(_KEYS.value)
    numbers = {"num_nodes": _NUM_NODES.value, "num_clients": _NUM_CLIENTS.value, "days": _DAYS.value}
    make_keys(folder, _HOST.value, **numbers)
    app.say(f"{folder}/server is for the server, {folder}/node0 to {folder}/node{_NUM_NODES.value - 1} for the nodes")
    app.say(f"keep {folder}/ca.key off line")


if __name__ == "__main__":
    app.run(main)
