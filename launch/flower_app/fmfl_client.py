"""The ClientApp: passes every message on to the node of this machine (launch/flower_node.py), which stays alive."""

from flwr.app import Context, Message  # pyright: ignore[reportMissingImports]
from flwr.clientapp import ClientApp  # pyright: ignore[reportMissingImports]

from fmfl_jax.deploy import channel
from fmfl_jax.deploy.envelope import Envelope
from fmfl_jax.deploy.flower import from_records, to_records

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    path = str(context.node_config["channel"])
    try:
        answer = channel.request(path, from_records(message.content))
    except (OSError, EOFError, ValueError) as error:
        answer = Envelope({"error": f"launch.flower_node does not answer at {path}: {error}"})
    return Message(to_records(answer), reply_to=message)
