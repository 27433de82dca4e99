"""Take in what the consortium has signed for a party, if it is about this party's own keys.

The answer to a request is public: certificate, roster, and what they are verified with. Everything in it may
have been chosen by somebody else, so nothing of the kit changes before all of it has been checked.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedmosaic.privacy.federation import identity, kits
from fedmosaic.privacy.federation.kits import Kit
from fedmosaic.privacy.federation.requests import KeyRequest, fingerprint, read_bounded, read_request
from fedmosaic.privacy.federation.roster import RosterMark
from fedmosaic.privacy.files import write_atomically
from fedmosaic.protos.errors import ConfigurationError, IdentityError

_LARGEST: Final = {
    kits.CONSORTIUM_KEY: 1 << 10,
    kits.AUTHORITY_CERTIFICATE: 1 << 16,
    kits.SERVER_SETTINGS: 1 << 16,
    kits.BASIS: 1 << 31,
    kits.TLS_CERTIFICATE: 1 << 16,
    kits.ROSTER: 1 << 23,
}
"""Bytes of each file of an answer. They are written in this order, the roster after what it names."""
_MAY_LACK: Final = (kits.TLS_CERTIFICATE, kits.BASIS, kits.SERVER_SETTINGS)


def consortium_fingerprint(answer: Path) -> str:
    """Fingerprint of the keys that vouch for certificates and rosters; IdentityError if unreadable."""
    return fingerprint("consortium", *_vouching(answer))


def _vouching(place: Path) -> tuple[str, str]:
    """The key that signs rosters, and the SHA-256 of the one that signs certificates."""
    path = place / kits.CONSORTIUM_KEY
    key = identity.public_from_hex(path.read_text(encoding="utf-8", errors="replace"), str(path))
    certificate = identity.read_certificate(place / kits.AUTHORITY_CERTIFICATE)
    return identity.public_hex(key), identity.public_key_sha256(certificate)


def install(answer: Path, kit: Path, confirm: Callable[[str], None] | None) -> Kit:
    """Check an answer of the consortium against this party's own keys, and take it in, all of it or nothing.

    Stopped in the middle, it can be done again. A server or client that runs takes up what has changed.
    `confirm` is told the consortium's fingerprint at the first installation, and raises if it is not right;
    None where consortium and kit were made together, and are flushed to the disk together.
    """
    with tempfile.TemporaryDirectory(prefix="fedmosaic-install-") as scratch:
        # Checked and installed is this copy, whatever happens to the folder meanwhile.
        copy = Path(scratch)
        for name, limit in _LARGEST.items():
            if name not in _MAY_LACK or (answer / name).exists():
                (copy / name).write_bytes(read_bounded(answer / name, limit, f"the {name} of an answer"))
        if not (copy / kits.TLS_CERTIFICATE).exists():  # it brings a new roster alone
            here = kit / kits.TLS_CERTIFICATE
            if not here.exists():
                raise ConfigurationError(f"the answer has no {here.name}, nor has {kit}; ask for all of it")
            shutil.copyfile(here, copy / here.name)
        found = kits.open_kit(copy)
        _check_consortium(found, kit, confirm)
        if (kit / kits.ROSTER).exists():
            RosterMark.of(kits.open_kit(kit).roster).check(found.roster)
        for name, source in _own_keys(found, kit).items():
            source.replace(kit / name)
        for name in _LARGEST:
            if (copy / name).exists() and (name != kits.SERVER_SETTINGS or not (kit / name).exists()):
                content = (copy / name).read_bytes()
                write_atomically(kit / name, content, durable=confirm is not None)
    pending = kit / kits.PENDING
    if pending.exists() and not (pending / kits.TLS_KEY).exists():
        if (pending / kits.REQUEST).exists():
            (pending / kits.REQUEST).replace(kit / kits.REQUEST)
        shutil.rmtree(pending)
    return kits.open_kit(kit)


def _check_consortium(found: Kit, kit: Path, confirm: Callable[[str], None] | None) -> None:
    if not (kit / kits.CONSORTIUM_KEY).exists():
        if confirm is not None:
            confirm(consortium_fingerprint(found.directory))
    elif _vouching(kit) != _vouching(found.directory):
        raise IdentityError(
            f"the answer is of another consortium than the one that {kit} trusts: fingerprint "
            f"{consortium_fingerprint(found.directory)}, not {consortium_fingerprint(kit)}. Nothing was "
            "installed; call the consortium"
        )


def _own_keys(found: Kit, kit: Path) -> dict[str, Path]:
    """Where the private keys lie that an answer is about, by their name in the kit; else IdentityError."""
    certificate = identity.check_certificate(found.tls_certificate, found.authority)
    pinned = identity.public_key_sha256(certificate)
    keys = {kits.TLS_KEY: _holder(kit, kits.TLS_KEY, pinned, "certificate")}
    asked = _request_for(keys[kits.TLS_KEY], kit)
    if not identity.certificate_uris(found.tls_certificate):
        names = set(identity.certificate_names(certificate))
        if asked is not None and (asked.id or names != set(asked.hosts)):
            raise _other_party(asked, f"a server {', '.join(sorted(names))}")
        return keys
    member = found.roster.party(found.member_id())
    given = found.roster.federation, member.id, member.family
    if asked is not None and (asked.federation, asked.id, asked.family) != given:
        raise _other_party(asked, "member {1!r} of {0!r}, family {2!r}".format(*given))
    if member.tls_key_sha256 != pinned:
        raise _exchanged("TLS key on the roster", member.tls_key_sha256, [pinned])
    what = "identity key on the roster"
    keys[kits.IDENTITY_KEY] = _holder(kit, kits.IDENTITY_KEY, member.identity_key, what)
    from fedmosaic.privacy.mechanism.projection import check_basis  # reads tensors, which a server never does

    check_basis(found.roster.terms.profile, found.basis if found.basis.exists() else None)
    return keys


def _holder(kit: Path, name: str, public: str, what: str) -> Path:
    """The private key, in use or pending, that belongs to a public one."""
    here = {_public(place): place for place in (kit / kits.PENDING / name, kit / name) if place.exists()}
    if not here:
        raise IdentityError(f"{kit} has no {name}: make keys with `fedmosaic keys request` first")
    if public not in here:
        raise _exchanged(what, public, list(here))
    return here[public]


def _public(path: Path) -> str:
    """A private key's public one as the roster pins it: Ed25519 itself, of others the SHA-256."""
    key = identity.read_private_key(path).public_key()
    return identity.public_hex(key) if isinstance(key, Ed25519PublicKey) else identity.spki_sha256(key)


def _exchanged(what: str, public: str, here: list[str]) -> IdentityError:
    return IdentityError(
        f"the {what} is not one that was made here: it is {public[:16]}…, here is "
        f"{', '.join(f'{key[:16]}…' for key in here)}. Somebody has exchanged it, on the way or at the "
        "consortium, and could pose as you. Nothing was installed; call the consortium"
    )


def _request_for(tls_key: Path, kit: Path) -> KeyRequest | None:
    """The request that a key was made for; a kit from before requests has none."""
    path = tls_key.parent / kits.REQUEST
    if not path.exists():
        path = kit / kits.PENDING / kits.REQUEST  # after an installation that was stopped in the middle
    return read_request(path) if path.exists() else None


def _other_party(asked: KeyRequest, given: str) -> IdentityError:
    details = f"family {asked.family!r}" if asked.id else ", ".join(asked.hosts)
    return IdentityError(
        f"the answer is for {given}; the request was for {asked.who} of {asked.federation!r}, {details}. "
        "Nothing was installed; call the consortium"
    )
