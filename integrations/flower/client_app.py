"""The ClientApp: hands the server's records to the client on this machine, and its records back.

It holds no key and understands nothing of what it carries. The node's configuration names the client's Unix
socket, `socket="/run/fedmosaic/ada.sock"`; where it does not, as in a simulation, the run's configuration
names a folder in which the sockets are numbered.
"""

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedmosaic.integrations.flower.secured import RECORD, ask


def carry(message: Message, context: Context) -> Message:
    """Answer one message of the ServerApp."""
    node = context.node_config
    path = node.get("socket") or f"{context.run_config['sockets']}/{node['partition-id']}.sock"
    said = ask(str(path), bytes(message.content.config_records[RECORD][RECORD]))
    return Message(RecordDict({RECORD: ConfigRecord({RECORD: said})}), reply_to=message)


app = ClientApp()
app.query()(carry)
