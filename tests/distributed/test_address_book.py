"""Exchanging gloo's addresses: rank 0 packs them, so that each rank asks for one value instead of N."""

from __future__ import annotations

import socket
import struct

import pytest
from torch.distributed import HashStore

from dpgen.distributed.gloo.address_book import AddressBook


def make_address(rank: int, family: int = socket.AF_INET, host: bytes = b"vm") -> bytes:
    """Return an address as gloo of torch 2.13 writes it, with garbage where an IPv4 address has no meaning."""
    ip = bytes([10, 0, rank // 256, rank % 256])
    garbage = bytes((7 * rank + place) % 256 for place in range(112))
    used = struct.pack("<H", family) + struct.pack(">H4s8x", 20_000 + rank, ip)
    return struct.pack("<Q", len(host)) + host + struct.pack("<Q", 136) + used + garbage + struct.pack("<Q", rank)


class CountingStore(HashStore):
    """Count the bytes that a rank other than 0 sends and receives."""

    num_bytes = 0

    def set(self, key: str, value: bytes | str) -> None:
        self.num_bytes += len(key) + len(value)
        super().set(key, value)

    def get(self, key: str) -> bytes:
        value = super().get(key)
        self.num_bytes += len(key) + len(value)
        return value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        values = super().multi_get(keys)
        self.num_bytes += sum(map(len, [*keys, *values]))
        return values


def exchange(num_ranks: int, addresses: list[bytes]) -> tuple[list[list[bytes]], int]:
    """Return what each rank receives, as gloo asks for it, and the bytes between the last rank and the store."""
    store = CountingStore()
    books = [AddressBook(store, rank, num_ranks) for rank in range(num_ranks)]
    for rank, book in enumerate(books):
        store.num_bytes = 0
        book.set(f"0//cpu//0/{rank}", addresses[rank])
    num_sent = store.num_bytes
    received = []
    for book in books:
        store.num_bytes = 0
        keys = [f"0//cpu//0/{peer}" for peer in range(num_ranks)]
        received.append([*book.multi_get(keys[:2]), *(book.get(key) for key in keys[2:])])
    return received, num_sent + store.num_bytes


def test_a_rank_of_a_thousand_exchanges_a_few_kilobytes() -> None:
    addresses = [make_address(rank) for rank in range(1000)]
    received, num_bytes = exchange(1000, addresses)
    assert num_bytes < 20_000, "so less than 20 MB for all ranks, where plain gets would take 250 MB"
    for rank, address in enumerate(received[-1]):
        assert (address[:34], address[-8:]) == (addresses[rank][:34], addresses[rank][-8:])
        assert len(address) == len(addresses[rank])


@pytest.mark.parametrize(
    "value",
    [b"", b"short", make_address(3, family=99), make_address(3)[:-1], b"\xff" * 154, make_address(3) + b"more"],
    ids=["empty", "short", "other family", "cut", "no length", "longer"],
)
def test_a_value_that_is_no_known_address_arrives_unchanged(value: bytes) -> None:
    received, _ = exchange(2, [make_address(0), value])
    assert received[0][1] == received[1][1] == value


def test_other_keys_go_to_the_store_itself() -> None:
    store = HashStore()
    book = AddressBook(store, 1, 2)
    assert book.add("count", 3) == 3
    book.set("barrier", "here")
    assert (book.get("barrier"), store.get("barrier"), book.check(["barrier"])) == (b"here", b"here", True)
    assert book.multi_get(["barrier", "count"]) == [b"here", b"3"]
