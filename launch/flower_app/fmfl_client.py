"""The ClientApp: passes every message on to the node of this machine (launch/flower_node.py), which stays alive."""

from flwr.app import Context, Message  # pyright: ignore[reportMissingImports]
from flwr.clientapp import ClientApp  # pyright: ignore[reportMissingImports]

from fmfl_jax.deploy import channel, secagg_plus_client
from fmfl_jax.deploy.envelope import Envelope
from fmfl_jax.deploy.flower import from_records, to_records

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    path = str(context.node_config["channel"])

    def ask_node(request: Envelope) -> Envelope:
        try:
            return channel.request(path, request)
        except (OSError, EOFError, ValueError) as error:
            return Envelope({"error": f"launch.flower_node does not answer at {path}: {error}"})

    if secagg_plus_client.is_secagg_plus(message):
        return secagg_plus_client.answer(message, context, ask_node)
    request = from_records(message.content)
    if request.head.get("kind") == "mean":
        answer = Envelope({"error": "the mean of this node's clients is sent masked, by SecAgg+, or not at all"})
    else:
        answer = ask_node(request)
    return Message(to_records(answer), reply_to=message)
