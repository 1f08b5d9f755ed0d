"""A client whose training takes no time: it returns its vector; Flower's mod does the secure sum around it."""

from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import Code, Context, FitRes, Message, Status, ndarrays_to_parameters
from flwr.compat.common import recorddict_compat as compat

from securesum.protocol import WEIGHT, vector


def answer(message: Message, context: Context) -> Message:
    """The fit result: this node's vector, of the size that the instruction names."""
    instruction = compat.recorddict_to_fitins(message.content, keep_input=True)
    values = vector(int(context.node_config["partition-id"]), int(instruction.config["size"]))
    result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([values]), int(WEIGHT), {})
    return Message(compat.fitres_to_recorddict(result, keep_input=False), reply_to=message)


app = ClientApp(mods=[secaggplus_mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Flower calls this within the stage that collects the masked vectors."""
    return answer(message, context)
