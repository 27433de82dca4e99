"""A damaged aggregate, made anew from the uploads and the weight rows that were used."""

import hashlib
import logging
from typing import Any

from fedmosaic.privacy.encryption.aggregator import Aggregator
from fedmosaic.privacy.encryption.records import RoundContext
from fedmosaic.protos.messages import AggregateSection
from fedmosaic.server.round.aggregates import LOST, Offer, stored_aggregate
from fedmosaic.server.round.close import DamagedUploadsError, upload_payloads
from fedmosaic.server.round.weights import section_label
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.blobs import Blobs
from fedmosaic.server.storage.store import Store, StoredAggregate

log = logging.getLogger(__name__)


def repair_aggregate(
    settings: ServerSettings,
    store: Store,
    blobs: Blobs,
    aggregator: Aggregator[Any],
    offer: Offer,
    recipient: str,
) -> StoredAggregate:
    """Make an aggregate of the open round anew, with the rows that it was made with, and store it.

    Where the uploads are damaged too, the recipient is refused it, and trains one round alone. `offer` is of
    the open round, and has an aggregate of the recipient.
    """
    stored = offer.stored[recipient]
    sections = [section for section, _ in offer.sections(settings, recipient)]
    closed, uploads = offer.round - 1, store.uploads(offer.round - 1)
    used = {name for section in sections if section.row for name in section.row.contributors}
    digest, sizes = hashlib.sha256(), []
    try:
        payloads = upload_payloads(blobs, {name: uploads[name] for name in used}, closed)
        for section in sections:
            if section.row is None:
                sizes.append(0)
                continue
            label = section_label(section.name, settings.family(recipient))
            size = settings.dimensions(recipient)[section.name]
            context = RoundContext(settings.federation, stored.key_epoch, closed, label, size)
            records = {client: payloads[client][section.name] for client in section.row.contributors}
            (payload,) = aggregator.aggregate(records, {recipient: section.row}, context)
            blobs.write("aggregates", offer.round, f"{recipient}.{section.name}", payload)
            # Of a sum of real numbers the last digits depend on how many rows were summed at once.
            digest.update(payload)
            sizes.append(len(payload))
    except (DamagedUploadsError, KeyError) as error:
        log.error("the aggregate of %s cannot be made anew: %s", recipient, error)
        sections = [AggregateSection(s.name, None, b"", s.refusal or LOST) for s in sections]
        sizes, digest = [0] * len(sections), hashlib.sha256()
    made = stored_aggregate(stored.key_epoch, sections, sizes, digest.digest())
    store.replace_aggregate(offer.round, recipient, made)
    return made
