"""The server: ``app`` wires it, ``service`` answers, ``grpcio`` is the transport."""
