"""Messages between a rank and its workers arrive whole and in order, however the stream cuts them."""

from __future__ import annotations

import socket

import pytest

from dpgen.workers.messages import MessageInbox, encode_message, read_message


def test_messages_arrive_whole_however_the_stream_cuts_them() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        inbox = MessageInbox(ours)
        assert list(inbox.take()) == []
        values = [1, "a" * 100, {"b": None}]
        arrived = []
        for byte in b"".join(map(encode_message, values)):
            theirs.sendall(bytes([byte]))
            arrived += list(inbox.take())
        assert arrived == values


def test_what_came_before_the_end_of_a_stream_is_taken_first() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            theirs.sendall(encode_message("last") + encode_message("torn")[:-1])
        inbox = MessageInbox(ours)
        assert list(inbox.take()) == ["last"]
        with pytest.raises(EOFError):
            list(inbox.take())


def test_a_worker_reads_several_messages_sent_at_once() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs.makefile("rb") as stream:
        ours.sendall(encode_message([1, 2]) + encode_message("b" * 50_000))
        assert [read_message(stream), read_message(stream)] == [[1, 2], "b" * 50_000]
        ours.close()
        theirs.close()
        with pytest.raises(EOFError):
            read_message(stream)
