"""What a name, a host, a port and an address are, once for every file and option that holds one.

RFC 1123 for names, RFC 5280 (§4.2.1.6) for what a certificate names, RFC 3986 for brackets around IPv6. Each
type gives the canonical form back, so that what is signed, dialled and compared is the same text.
"""

import ipaddress
import re
from typing import Annotated, Final

from pydantic import AfterValidator, Field, StringConstraints

_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_LONGEST_HOST: Final = 253
_HIGHEST_PORT: Final = 65535
_IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def member_id(text: str) -> str:
    """The name of a federation or a member, as `bounds.Identifier` has it; ValueError otherwise."""
    if not _NAME.fullmatch(text):
        raise ValueError("write 1 to 63 of a-z, 0-9 and '-', not starting with '-'")
    return text


def host(text: str) -> str:
    """A name or address that clients can reach, in its canonical form.

    ValueError says what would be right.
    """
    found = _ip_address(text)
    if found is None:
        return _dns_name(text)
    if found.is_unspecified or found.is_multicast:
        raise ValueError(f"{found} is not an address that clients can reach; name the server's own")
    return str(found)


def address(text: str) -> str:
    """Host and port of a server, such as fl.example.org:7443 or [2001:db8::1]:7443."""
    name, port = _split(text)
    if port == 0:
        raise ValueError("port 0 is no port to connect to; give the one that the server listens on")
    return _joined(host(name), port)


def listen_address(text: str) -> str:
    """Where a server listens: an `address`, 0.0.0.0 or [::] for all of the machine; port 0 for a free one."""
    name, port = _split(text)
    found = _ip_address(name)
    return _joined(host(name) if found is None or not found.is_unspecified else str(found), port)


MemberId = Annotated[str, AfterValidator(member_id)]
"""Name of a federation or of a member."""
Family = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9][A-Za-z0-9._:/-]{0,127})?$")]
"""As `fedmosaic.protos.bounds.Family` has it."""
Host = Annotated[str, AfterValidator(host)]
"""A name or address that a certificate carries and clients reach."""
Port = Annotated[int, Field(ge=1, le=_HIGHEST_PORT)]
Address = Annotated[str, AfterValidator(address)]
"""Host and port to connect to."""
ListenAddress = Annotated[str, AfterValidator(listen_address)]
"""Host and port to listen on."""


def is_local(server: str) -> bool:
    """Whether an `address` is of this machine or of a private network, where no proxy leads.

    A name is local when it has no dot, or ends in .local, .internal, .localhost or .home.arpa.
    """
    name, _ = _split(server)
    found = _ip_address(name)
    if found is not None:
        return found.is_loopback or found.is_private or found.is_link_local
    return "." not in name or name.endswith((".local", ".internal", ".localhost", ".home.arpa"))


def _split(text: str) -> tuple[str, int]:
    if "://" in text:
        raise ValueError("this is a URL; write host:port, such as fl.example.org:7443")
    name, colon, port = text.rpartition(":")
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
        if not isinstance(_ip_address(name), ipaddress.IPv6Address):
            raise ValueError("only an IPv6 address stands in brackets, such as [2001:db8::1]:7443")
    elif ":" in name or text.endswith("]"):
        raise ValueError("write an IPv6 address in brackets and with its port, such as [2001:db8::1]:7443")
    if not colon:
        raise ValueError("there is no port; write host:port, such as fl.example.org:7443")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= _HIGHEST_PORT):
        raise ValueError(f"the port is {port[:20]!r}; write a number of at most {_HIGHEST_PORT}")
    return name, int(port)


def _joined(name: str, port: int) -> str:
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def _ip_address(text: str) -> _IpAddress | None:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address) and found.scope_id is not None:
        raise ValueError("an address with a zone (%) is another one on every machine; leave the zone out")
    return found


def _dns_name(text: str) -> str:
    if "://" in text or "/" in text:
        raise ValueError("this is a URL; write the host alone, such as fl.example.org")
    if text.startswith("["):
        raise ValueError("write an IPv6 address without brackets here, such as 2001:db8::1")
    if ":" in text:
        raise ValueError("write the host without a port; the port has a key of its own")
    if not text.isascii():
        raise ValueError(f"write the name as the DNS has it{_ascii_form(text)}")
    name = text.lower().removesuffix(".")
    labels = name.split(".")
    if len(name) > _LONGEST_HOST or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(
            f"this is no host name: at most {_LONGEST_HOST} characters, between dots at most 63 of letters, "
            "digits and '-', such as fl.example.org"
        )
    if labels[-1].isdigit() or re.fullmatch(r"0x[0-9a-f]*", labels[-1]):
        raise ValueError("this is neither a name nor a complete address, such as 192.0.2.1")
    return name


def _ascii_form(text: str) -> str:
    try:
        return f": {text.encode('idna').decode('ascii')}"
    except UnicodeError:
        return ", in ASCII"
