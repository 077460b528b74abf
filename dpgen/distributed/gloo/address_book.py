"""Hand out gloo's addresses: each rank needs those of all others, so rank 0 packs them into one value of the store."""

from __future__ import annotations

import json
import socket
import struct
import zlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]


class AddressBook(Store):
    """Let gloo's ranks find each other's addresses in one value, which rank 0 packs once all ranks have set theirs.

    With plain gets each rank asks for N keys and receives N addresses of about 150 bytes: 250 MB through the store of
    1,000 ranks. The packed addresses take about 10 bytes each. All else goes to the store underneath.

    Args:
        store: all ranks' store, under a prefix of this world.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        super().__init__()
        self._store, self._rank, self._size = store, rank, size
        self._prefix: str | None = None  # of the keys of addresses, which end with the rank
        self._addresses: dict[str, bytes] = {}

    def set(self, key: str, value: bytes | str) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        prefix, _, last = key.rpartition("/")
        if self._prefix is None and last == str(self._rank):
            self._prefix, data = prefix, _clear_padding(data)
        self._store.set(key, data)

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        if self._prefix is not None and not self._addresses:
            self._addresses = self._exchange(self._prefix)
        if all(key in self._addresses for key in keys):
            return [self._addresses[key] for key in keys]
        return [bytes(value) for value in self._store.multi_get(list(keys))]

    def _exchange(self, prefix: str) -> dict[str, bytes]:
        """Return all ranks' addresses by key, once all of them are there."""
        keys = [f"{prefix}/{rank}" for rank in range(self._size)]
        if self._rank == 0:
            values = [bytes(value) for value in self._store.multi_get(keys)]
            packed = zlib.compress(json.dumps([value.hex() for value in values]).encode(), 9)
            self._store.set(f"{prefix}/all", packed)
        else:
            packed = self._store.get(f"{prefix}/all")
            values = [bytes.fromhex(value) for value in json.loads(zlib.decompress(packed))]
        return dict(zip(keys, values, strict=True))

    def add(self, key: str, amount: int) -> int:
        return int(self._store.add(key, amount))

    def append(self, key: str, value: bytes) -> None:
        self._store.append(key, value)

    def check(self, keys: list[str]) -> bool:
        return bool(self._store.check(keys))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        return bytes(self._store.compare_set(key, expected, desired))

    def delete_key(self, key: str) -> bool:
        return bool(self._store.delete_key(key))

    def has_extended_api(self) -> bool:
        return True

    def multi_set(self, keys: list[str], values: list[bytes]) -> None:
        self._store.multi_set(keys, values)

    def num_keys(self) -> int:
        return int(self._store.num_keys())

    def wait(self, keys: list[str], *timeout: timedelta) -> None:
        self._store.wait(keys, *timeout)

    def set_timeout(self, timeout: timedelta) -> None:
        self._store.set_timeout(timeout)

    @property
    def timeout(self) -> timedelta:
        limit: timedelta = self._store.timeout
        return limit


def _clear_padding(address: bytes) -> bytes:
    """Return an address of gloo with zeros where it holds whatever was in memory; any other value as it is.

    An address is a host name, and a `sockaddr_storage` of 128 bytes with a number (gloo/transport/tcp/address.h, torch
    2.13), both after their lengths. IPv4 uses 16 bytes of the 128, IPv6 uses 28.
    """
    try:
        (name_bytes,) = struct.unpack_from("<Q", address)
        num_bytes, family = struct.unpack_from("<QH", address, start := 8 + name_bytes)
    except (struct.error, OverflowError):
        return address
    start += 8
    used = {socket.AF_INET: 16, socket.AF_INET6: 28}.get(family)
    if used is None or num_bytes != 136 or len(address) != start + num_bytes:
        return address
    return address[: start + used] + bytes(128 - used) + address[start + 128 :]
