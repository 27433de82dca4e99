"""The ClientApp: hands the server's turn to the client on this machine, and its turn back. It holds no key.

The node's configuration names the client's Unix socket, `socket="/run/fedmosaic/ada.sock"`; where it does
not, as in a simulation, the run's configuration names a folder in which the sockets are numbered.
"""

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedmosaic.integrations.flower.pipe import RECORD, ask


def carry(message: Message, context: Context) -> Message:
    """Answer one message of the ServerApp."""
    node, record = context.node_config, message.content.config_records[RECORD]
    path = node.get("socket") or f"{context.run_config['sockets']}/{node['partition-id']}.sock"
    turn = ask(str(path), bytes(record["turn"]), idle=bool(record["idle"]))
    return Message(RecordDict({RECORD: ConfigRecord({"turn": turn})}), reply_to=message)


app = ClientApp()
app.query()(carry)
