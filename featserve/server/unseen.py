"""Calls that grpcio ends by itself, as more wait than it may let wait: no handler sees them, but its channelz does.

https://github.com/grpc/proposal/blob/master/A14-channelz.md
"""

from __future__ import annotations

from collections import deque
from typing import Any

from grpc_channelz.v1 import channelz_pb2 as pb
from grpc_channelz.v1.channelz import ChannelzServicer

SERVICER: Any = ChannelzServicer
"""What it answers calls with, which need no context where they succeed."""
LOOKS = 8
"""Of so many, while the server is idle, the least is right: what waited at one look was seen by the next."""


class Unseen:
    """The calls of one server that its handlers are not asked for. ``ended``: how many gRPC ended so far."""

    def __init__(self, most_waiting: int) -> None:
        """Of the server that was made last in this process, which lets at most so many calls wait."""
        servers = SERVICER.GetServers(pb.GetServersRequest(), None).server
        self._server = pb.GetServerRequest(server_id=max(server.ref.server_id for server in servers))
        self._most_waiting = most_waiting
        self._looks: deque[int] = deque(maxlen=LOOKS)
        self.ended = 0

    def look(self, seen: int, *, idle: bool) -> None:
        """Look how many calls there were, of which handlers have ``seen`` so many; in turns of the event loop.

        What waits is not seen either. In a server that is ``idle`` only what came this very moment does. While it is
        busy as many as it lets wait are left out, and come in later. Whose caller gave up before counts as ended, too.
        """
        unseen = int(SERVICER.GetServer(self._server, None).server.data.calls_started) - seen
        if idle:
            self._looks.append(unseen)
            if len(self._looks) == LOOKS:
                self.ended = max(self.ended, min(self._looks))
        else:
            self.ended = max(self.ended, unseen - self._most_waiting)
